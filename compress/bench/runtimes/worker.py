"""A runtime in a process of its own, that waits between its turns."""

import contextlib
import json
import subprocess
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from compress.bench.llama import undisturbed
from compress.errors import RunError


class Timed(Protocol):
    """What has turns."""

    about: dict[str, Any]  # cached: keys and values of past tokens are kept; versions

    def turn(self) -> None:
        """Time a prompt and the tokens after it."""

    @property
    def seconds(self) -> tuple[float, float]:
        """What counts of its turns: seconds of a prompt, and of a token."""

    def close(self) -> None:
        """End it."""


class Worker:
    """A script of scripts/, as a process.

    Raises RunError, when its model is loaded and at any turn, with the script's own line where that fails.
    """

    def __init__(self, name: str, command: list[str], environ: dict[str, str], log: Path):
        """Start it, load its model and let it have a turn that does not count. `log`: what it prints."""
        self._name, self._log = name, log
        self._prefill: list[float] = []  # seconds of a prompt
        self._decode: list[float] = []  # of a token after it
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, env=environ, cwd=log.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        try:
            self.about = self._answer()
            self._ask()
        except BaseException:
            self.close()
            raise

    def turn(self) -> None:
        """Time a prompt and the tokens after it."""
        found = self._ask()
        self._prefill.append(found["prefill"])
        self._decode.append(median(found["decode"]))

    @property
    def seconds(self) -> tuple[float, float]:
        """What counts of its turns: seconds of a prompt, and of a token."""
        return undisturbed(self._prefill, self._decode)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it said last, if anything, says more
            self._process.stdin.write(b"turn\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"{self._name} ended with exit code {self._process.wait()} and no answer: see {self._log}")
        found: dict[str, Any] = json.loads(line)
        if "failed" in found:
            raise RunError(found["failed"])
        return found
