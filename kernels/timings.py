"""How long implementations take on this machine: measured once for each kind of layer, kept in a file."""

import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import platformdirs
import torch

from compress.kernels.implementation import Case, Implementation

TOKENS = (1, 4, 16, 64, 256)
HOPELESS = 5.0  # times as slow as the fastest: a kernel over packed weights only falls further behind with more tokens
LEAST, MOST, ENOUGH = 2, 15, 0.01  # repeats, and the seconds after which there need be no more

Times = dict[str, dict[int, float]]  # implementation -> tokens -> seconds of one call


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
        return None if found is None else {name: {int(m): t for m, t in each.items()} for name, each in found.items()}

    def add(self, case: Case, times: Mapping[str, Mapping[int, float]]) -> None:
        """Keep what was measured."""
        known = self._read()
        known.setdefault(machine(case.device), {})[case.key] = {name: dict(each) for name, each in times.items()}
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


@torch.no_grad()
def measure(case: Case, kinds: Sequence[type[Implementation]]) -> Times:
    """Seconds of one call of each kind, by tokens; the fastest of a few, since all that disturbs makes it slower.

    A kernel over packed weights that falls far behind is not asked for more tokens, and has no figure there.
    """
    times: Times = {kind.NAME: {} for kind in kinds}
    made = [kind(case).to(case.device) for kind in kinds]
    for tokens in TOKENS:
        x = torch.randn(tokens, case.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(case.device)
        scale = None if case.inputs is None or case.inputs.static else torch.ones(tokens, 1, device=case.device)
        inputs = {True: (x.mul(30).to(torch.int8), scale), False: (x.to(case.dtype),)}
        for implementation in made:
            times[implementation.NAME][tokens] = _fastest(implementation, inputs[implementation.CODES])
        best = min(times[implementation.NAME][tokens] for implementation in made)
        made = [each for each in made if each.ROLE != "packed" or times[each.NAME][tokens] <= HOPELESS * best]
    return times


def _fastest(implementation: Implementation, inputs: tuple[torch.Tensor | None, ...]) -> float:
    _call(implementation, inputs)
    taken: list[float] = []
    while len(taken) < LEAST or (len(taken) < MOST and sum(taken) < ENOUGH):
        started = time.perf_counter()
        _call(implementation, inputs)
        taken.append(time.perf_counter() - started)
    return min(taken)


def _call(implementation: Implementation, inputs: tuple[torch.Tensor | None, ...]) -> None:
    if implementation(*inputs).is_cuda:  # type: ignore[arg-type]  # the first is there
        torch.cuda.synchronize()
