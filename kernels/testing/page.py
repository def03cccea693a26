"""The tables of KERNELS.md, from metrics.json alone: nothing is compiled, Triton is not needed."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from compress.kernels.testing.sass import GPUS

BEGIN, END = "<!-- figures: written by `python -m compress.kernels.testing --page` -->", "<!-- end of figures -->"
ARCHITECTURES = (*(f"sm_{arch}" for arch in GPUS), "gfx942", "gfx950", "gfx1100")
FEW = 32  # tokens
PAIR = ("sm_80", "sm_90")  # A100 and H100

Kept = Mapping[str, Any]  # of a kernel and an architecture: `Row.kept`
Kernel = Mapping[str, Kept]  # by architecture


def page(text: str, metrics: Mapping[str, Any]) -> str:
    """KERNELS.md with the tables of these metrics between its two marks."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return "\n".join([f"{head}{BEGIN}", "", *tables(metrics), "", f"{END}{tail}"])


def tables(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What each group of kernels comes to, what they take on each architecture, and what they need not pass."""
    kernels: dict[str, dict[str, Kept]] = {}
    for key, kept in metrics["figures"].items():
        name, _, arch = key.rpartition(" ")
        kernels.setdefault(name, {})[arch] = kept
    for group in dict.fromkeys(map(_group, kernels)):
        yield from [f"### {group}", ""]
        yield from _table(SPEED, {name: kernel for name, kernel in kernels.items() if _group(name) == group})
        yield ""
    yield from ["### Registers a thread, and shared memory of sm_80", ""]
    yield from _table(RESOURCES, kernels)
    yield from ["", "### Waived", "", "| gate | of | why |", "|---|---|---|"]
    yield from _waivers(metrics["waivers"])


def _group(name: str) -> str:
    if name.startswith("fragments"):
        return f"Up to {FEW} tokens on NVIDIA GPUs: {'2:4 weights' if '2:4' in name else 'dense weights'} in fragments"
    tokens = re.search(r"(\d+)x\d+$", name)
    if tokens and int(tokens[1]) > FEW:
        return f"More than {FEW} tokens"
    return f"Up to {FEW} tokens in plain Triton, on any GPU"


def _table(columns: Mapping[str, Callable[[Kernel], str]], kernels: Mapping[str, Kernel]) -> Iterator[str]:
    yield "| " + " | ".join(["kernel", *columns]) + " |"
    yield "|---" * (1 + len(columns)) + "|"
    for name, kernel in kernels.items():
        yield "| " + " | ".join([name, *(show(kernel) for show in columns.values())]) + " |"


def _waivers(waivers: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """A line for each gate and reason."""
    lines: dict[tuple[str, str], list[str]] = {}
    for kernel, reasons in waivers.items():
        for gate, why in reasons.items():
            lines.setdefault((gate, why), []).append(kernel)
    for (gate, why), names in sorted(lines.items()):
        yield f"| {gate} | {', '.join(names)} | {why} |"


def _figure(arch: str, name: str, form: str) -> Callable[[Kernel], str]:
    def show(kernel: Kernel) -> str:
        value = kernel.get(arch, {}).get(name)
        return "" if value is None else format(value, form)

    return show


def _pair(show: Callable[[str], Callable[[Kernel], str]]) -> Callable[[Kernel], str]:
    return lambda kernel: " / ".join(show(arch)(kernel) for arch in PAIR)


def _of_budget(arch: str) -> Callable[[Kernel], str]:
    def show(kernel: Kernel) -> str:
        kept = kernel.get(arch, {})
        budget = GPUS[int(arch.removeprefix("sm_"))].budget(kept.get("bits", 0))
        return f"{100 * kept['per_weight'] / budget:.0f} %" if "per_weight" in kept else ""

    return show


def _over_float16(arch: str) -> Callable[[Kernel], str]:
    def show(kernel: Kernel) -> str:
        kept = kernel.get(arch, {})
        if "per_weight" not in kept:
            return ""
        budget = GPUS[int(arch.removeprefix("sm_"))].budget(kept["bits"])
        return f"{16 / kept['bits'] * min(1, budget / kept['per_weight']):.1f}"

    return show


def _registers(arch: str) -> Callable[[Kernel], str]:
    def show(kernel: Kernel) -> str:
        kept = kernel.get(arch, {})
        spilt = f", {kept['spills']} spilt" if kept.get("spills") else ""
        return f"{kept['registers']}{spilt}" if "registers" in kept else ""

    return show


def _shared(kernel: Kernel) -> str:
    return f"{kernel.get(PAIR[0], {}).get('shared', 0) / 1024:.0f} KiB"


SPEED: Mapping[str, Callable[[Kernel], str]] = {
    "instructions a weight, sm_80 / 90": _pair(lambda arch: _figure(arch, "per_weight", ".2f")),
    **{f"budget {arch}": _of_budget(arch) for arch in ARCHITECTURES if arch.startswith("sm_")},
    "× float16, sm_80 / 90": _pair(_over_float16),
    "bits fetched": _figure("sm_80", "fetched_bits", ".2f"),
    "error": _figure("sm_80", "error", ".2f"),
    "matrix instruction": _figure("sm_80", "matrix", ""),
}
RESOURCES: Mapping[str, Callable[[Kernel], str]] = {
    **{arch: _registers(arch) for arch in ARCHITECTURES},
    "shared": _shared,
}
