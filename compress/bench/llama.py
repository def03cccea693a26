"""llama.cpp beside ours: its own llama-bench, in turns with the models that are timed here."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from compress.errors import InputError, RunError

NEW_TOKENS = 16  # of a turn


def undisturbed(prefill: Sequence[float], decode: Sequence[float]) -> tuple[float, float]:
    """Of prompts' seconds the fastest; of seconds of a token after one, by turn, the median of the faster half."""
    return min(prefill), median(sorted(decode)[: (len(decode) + 1) // 2])


@dataclass
class LlamaBench:
    """A GGUF file as llama-bench runs it, and the seconds of its turns."""

    program: Path
    gguf: Path
    threads: int
    new_tokens: int = NEW_TOKENS
    prefill: list[float] = field(default_factory=list)  # seconds of a prompt
    decode: list[float] = field(default_factory=list)  # seconds of a token after it
    nbytes: int = 0
    kernels: dict[str, Any] = field(default_factory=dict)

    def turn(self, seqlen: int) -> None:
        """Time a prompt, and tokens after one of that length. Raises InputError or RunError if llama-bench does not run."""
        (prompt,) = self._run("-p", str(seqlen), "-n", "0")
        (tokens,) = self._run("-p", "0", "-n", str(self.new_tokens), "-d", str(seqlen))
        self.prefill.append(seqlen / prompt["avg_ts"])
        self.decode.append(1 / tokens["avg_ts"])
        self.nbytes = prompt["model_size"]
        self.kernels = {f"llama.cpp {prompt['build_commit']}, {prompt['model_type']}": 1}

    @property
    def seconds(self) -> tuple[float, float]:
        """What counts of its turns."""
        return undisturbed(self.prefill, self.decode)

    def _run(self, *what: str) -> list[dict[str, Any]]:
        command = [str(self.program), "-m", str(self.gguf), "-t", str(self.threads), "-r", "1", "-o", "json", *what]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found: list[dict[str, Any]] = json.loads(done.stdout)
        except OSError as error:
            raise InputError(f"cannot run {self.program}: {error.strerror}; build llama.cpp's llama-bench") from error
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip() or "it says nothing").splitlines()[-1]
            raise RunError(f"llama-bench stopped at {self.gguf}: {last}") from error
        except ValueError as error:
            raise RunError(f"llama-bench of {self.program} prints no JSON: take a newer llama.cpp") from error
        return found
