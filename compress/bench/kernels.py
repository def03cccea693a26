"""`compress bench kernels`: every implementation that serves a layer here, first whether it is right, then how fast it is.

Weights are random codes of a layer's shape. Beside each stands the dense product in the same dtype (cuBLAS on an NVIDIA
GPU, oneDNN on a CPU) and, on a GPU, the time that its memory takes to deliver the packed weight: no kernel is faster.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.benchmark import Timer

from compress.errors import InputError
from compress.kernels.dispatch import implementations, refusals
from compress.kernels.gemm.reference import excess_error, linear64, linear_rounded
from compress.kernels.implementation import Case, Implementation
from compress.kernels.packing import pack
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.timings import with_best_tiles
from compress.kernels.weights import IntWeight, PackedWeight
from compress.progress import Reporter
from compress.report import Report, table

RIGHT = 1.25  # times the dtype's own error against float64
CHECKED = 16  # tokens
SECONDS = 0.2  # of timing a product


@dataclass(frozen=True)
class KernelBench:
    """What is timed."""

    shape: tuple[int, int] = (4096, 4096)  # out_features, in_features
    tokens: tuple[int, ...] = (1, 16, 256)
    dtype: torch.dtype = torch.bfloat16
    group_size: int = 128
    only: tuple[str, ...] = ()  # names of implementations; empty: all


@torch.no_grad()
def bench_kernels(asked: KernelBench, device: str) -> Report:
    """Check and time each implementation on `device`; one that is not right has its error in place of times.

    Raises InputError for a shape that groups do not divide, or names that there are not.
    """
    if asked.shape[1] % asked.group_size or asked.shape[1] % 4:
        raise InputError(f"{asked.shape[1]} inputs do not divide into groups of {asked.group_size}: choose others")
    if unknown := set(asked.only) - implementations().keys():
        raise InputError(f"there is no implementation {min(unknown)}: there are {', '.join(implementations())}")
    place, found = torch.device(device), []
    weights = {name: make(asked) for name, make in WEIGHTS.items()}
    with Reporter().stage("kernels", len(weights)) as stage:
        for name, weight in weights.items():
            found += [{"weight": name, **row} for row in _rows(Case(weight, place, asked.dtype), asked)]
            stage.step()
    columns = ["weight", "implementation", "error", *(f"{count} tokens, x dense" for count in asked.tokens)]
    lines = [
        [row["weight"], row["implementation"], f"{row['error']:.2f}", *_cells(row, len(asked.tokens))] for row in found
    ]
    closing = (
        f"error: times {asked.dtype}'s own against float64, at most {RIGHT}; x dense: times as fast as that product"
    )
    data = {"asked": asdict(asked) | {"dtype": str(asked.dtype)}, "device": _name(place), "kernels": found}
    return Report(data, [table(f"{asked.shape[0]} x {asked.shape[1]} on {_name(place)}", columns, lines), closing])


def _rows(case: Case, asked: KernelBench) -> Iterator[dict[str, Any]]:
    """A row for each implementation that serves `case`: its name, error, and times by number of tokens."""
    decoded = case.weight.dequantize()
    dense = decoded.to(case.device, case.dtype)
    inputs = {count: _inputs(count, case) for count in {CHECKED, *asked.tokens}}
    x = inputs[CHECKED]
    exact, rounded = linear64(x.cpu(), case.weight), linear_rounded(x.cpu(), case.weight)
    base = {count: _seconds(partial(linear, inputs[count], dense), case.device) for count in asked.tokens}
    for name, reason in refusals(case).items():
        kind = implementations()[name]
        if reason is not None or kind.CODES or (asked.only and name not in asked.only):
            continue
        made = kind(case).to(case.device)
        error = excess_error(made(x).cpu(), rounded, exact)
        times = [] if error > RIGHT else [_timed(made, inputs[count], base[count], case) for count in asked.tokens]
        yield {"implementation": name, "error": error, "times": times}


def _timed(made: Implementation, x: Tensor, dense: float, case: Case) -> dict[str, Any]:
    """{"tokens", "seconds", "speedup" over the dense product, "roofline": share of what memory allows, None where that is
    unknown, "tiling": the fastest}."""
    timing = with_best_tiles(made, (x,), lambda made, _: _seconds(partial(made, x), case.device))
    seconds = timing.seconds
    rate = _bytes_per_second(case.device)
    least = None if rate is None else case.weight.nbytes / rate
    share = None if least is None else least / seconds
    tiling = timing.tiling and asdict(timing.tiling)
    return {"tokens": len(x), "seconds": seconds, "speedup": dense / seconds, "roofline": share, "tiling": tiling}


def _cells(row: dict[str, Any], count: int) -> list[str]:
    """Times of one implementation for the table."""
    cells = []
    for timed in row["times"]:
        share = "" if timed["roofline"] is None else f" ({100 * timed['roofline']:.0f} % of memory)"
        cells.append(f"{timed['speedup']:.2f}{share}")
    return cells or ["wrong"] * count


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """The median of one call; on a GPU with its cache cleared before each."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, return_mode="median")) / 1e3
    return float(Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
                 .blocked_autorange(min_run_time=SECONDS).median)  # fmt: skip


def _bytes_per_second(device: torch.device) -> float | None:
    """What a GPU's memory delivers by its clock and width; None for a CPU, and where the driver does not say."""
    if device.type != "cuda":
        return None
    facts = torch.cuda.get_device_properties(device)
    clock, width = getattr(facts, "memory_clock_rate", 0), getattr(facts, "memory_bus_width", 0)
    return 2 * clock * 1e3 * width / 8 or None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _inputs(count: int, case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, case.weight.shape[1], generator=generator).to(case.dtype).to(case.device)


def _grid(bits: int, asked: KernelBench) -> IntWeight:
    """Random codes on a symmetric grid."""
    (rows, columns), random = asked.shape, torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, asked.shape, generator=random)
    scale = (torch.rand(rows, columns // asked.group_size, generator=random) * 0.1 + 0.01).to(asked.dtype)
    return IntWeight(pack(codes, bits), scale, None, bits, asked.group_size, columns)


def _sparse(bits: int, asked: KernelBench) -> Sparse24IntWeight:
    """The same with two of every four inputs zero."""
    dense, random = _grid(bits, asked), torch.Generator().manual_seed(0)
    places = torch.rand(asked.shape[0], asked.shape[1] // 4, 4, generator=random).argsort(-1)
    keep = (places < 2).flatten(1)
    packed = pack(torch.where(keep, dense.codes(), 2 ** (bits - 1)), bits)
    return Sparse24IntWeight.from_int(
        IntWeight(packed, dense.scale, None, bits, dense.group_size, asked.shape[1]), keep
    )


WEIGHTS: dict[str, Callable[[KernelBench], PackedWeight]] = {
    "W4": lambda asked: _grid(4, asked),
    "W8": lambda asked: _grid(8, asked),
    "W3": lambda asked: _grid(3, asked),
    "W2": lambda asked: _grid(2, asked),
    "2:4 W4": lambda asked: _sparse(4, asked),
}
