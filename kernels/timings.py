"""How long implementations take on this machine, and which tiles: measured once for each kind of layer, kept in a file."""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch

from compress.kernels.gemm.launch import Tiling
from compress.kernels.implementation import Case, Implementation

TOKENS = (1, 4, 16, 64, 256)
HOPELESS = 5.0  # times as slow as the fastest: a kernel over packed weights only falls further behind with more tokens
TILE_WORTH = 1.03  # tiles other than the rule's own have to be faster by this factor
LEAST, MOST, ENOUGH = 2, 15, 0.01  # repeats, and the seconds after which there need be no more

Inputs = tuple[torch.Tensor | None, ...]
Clock = Callable[[Implementation, Inputs], float]  # seconds of one call


@dataclass(frozen=True)
class Timing:
    """Of one call."""

    seconds: float
    tiling: Tiling | None = None  # of those there are, the one that took so long; None: there are none

    def kept(self) -> float | list[float]:
        """As the file has it: seconds, and what follows the tokens in the tiling."""
        return self.seconds if self.tiling is None else [self.seconds, *self.tiling.numbers[1:]]

    @classmethod
    def read(cls, tokens: int, kept: float | list[Any]) -> "Timing":
        """The inverse of `kept`."""
        return cls(kept[0], Tiling(tokens, *kept[1:])) if isinstance(kept, list) else cls(kept)


Times = dict[str, dict[int, Timing]]  # implementation -> tokens


def machine(device: torch.device) -> str:
    """What timings are of: the GPU, or the processor and threads, and torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _processor() -> str:
    """Its name and a mark of what it can do: hypervisors give many kinds one name."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name") or platform.processor() or platform.machine()
    return f"{name} {hashlib.sha256(found.get('flags', '').encode()).hexdigest()[:8]}"


class Timings:
    """The file of timings. One that is damaged or cannot be written is as good as none: it is measured again."""

    def __init__(self, path: Path | None = None):
        self.path = path or platformdirs.user_cache_path("compress-llm") / "kernel-timings.json"

    def of(self, case: Case) -> Times | None:
        """What was measured for layers like `case` on this machine; None: nothing."""
        found = self._read().get(machine(case.device), {}).get(case.key)
        if found is None:
            return None
        return {name: {int(m): Timing.read(int(m), t) for m, t in each.items()} for name, each in found.items()}

    def add(self, case: Case, times: Mapping[str, Mapping[int, Timing]]) -> None:
        """Keep what was measured."""
        known = self._read()
        kept = {name: {tokens: timing.kept() for tokens, timing in each.items()} for name, each in times.items()}
        known.setdefault(machine(case.device), {})[case.key] = kept
        aside = self.path.with_name(f"{self.path.name}.{time.monotonic_ns()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(known, indent=1), encoding="utf-8")
            aside.replace(self.path)
        except OSError:  # a cache that cannot be written: the next process measures again
            return

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


def fastest(implementation: Implementation, inputs: Inputs) -> float:
    """Of a few calls, since all that disturbs makes one slower; the first does not count."""
    _call(implementation, inputs)
    taken: list[float] = []
    while len(taken) < LEAST or (len(taken) < MOST and sum(taken) < ENOUGH):
        started = time.perf_counter()
        _call(implementation, inputs)
        taken.append(time.perf_counter() - started)
    return min(taken)


@torch.no_grad()
def measure(case: Case, kinds: Sequence[type[Implementation]], clock: Clock = fastest) -> Times:
    """What one call of each kind takes, by tokens, with the best of its tiles.

    A kernel over packed weights that falls far behind is not asked for more tokens, and has no figure there.
    """
    times: Times = {kind.NAME: {} for kind in kinds}
    made = [kind(case).to(case.device) for kind in kinds]
    for tokens in TOKENS:
        x = torch.randn(tokens, case.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(case.device)
        scale = None if case.inputs is None or case.inputs.static else torch.ones(tokens, 1, device=case.device)
        inputs = {True: (x.mul(30).to(torch.int8), scale), False: (x.to(case.dtype),)}
        for implementation in made:
            times[implementation.NAME][tokens] = with_best_tiles(implementation, inputs[implementation.CODES], clock)
        best = min(times[implementation.NAME][tokens].seconds for implementation in made)
        made = [each for each in made if each.ROLE != "packed" or times[each.NAME][tokens].seconds <= HOPELESS * best]
    return times


def with_best_tiles(implementation: Implementation, inputs: Inputs, clock: Clock = fastest) -> Timing:
    """One call with the best tiles for so many tokens, which `implementation` then keeps."""
    x, *_ = inputs
    assert x is not None
    tilings: Sequence[Tiling | None] = implementation.candidates(len(x)) or (None,)
    best = _timed(implementation, tilings[0], inputs, clock)
    for tiling in tilings[1:]:
        found = _timed(implementation, tiling, inputs, clock)
        best = found if found.seconds * TILE_WORTH < best.seconds else best
    implementation.tilings = () if best.tiling is None else (best.tiling,)
    return best


def _timed(implementation: Implementation, tiling: Tiling | None, inputs: Inputs, clock: Clock) -> Timing:
    implementation.tilings = () if tiling is None else (tiling,)
    return Timing(clock(implementation, inputs), tiling)


def _call(implementation: Implementation, inputs: Inputs) -> None:
    if implementation(*inputs).is_cuda:  # type: ignore[arg-type]  # the first is there
        torch.cuda.synchronize()
