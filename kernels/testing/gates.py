"""The gates that compiled kernels pass without a GPU, a row for each kernel and architecture.

spills, registers, shared, loads (128 bits), matrix, issue, conversions: read off machine code (sass.py). fetch (no byte
of a weight twice), banks, numerics: of a run in the emulator (ptx.py). ratchet: no figure may get worse by more than 3 %.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from compress.kernels.gemm.reference import excess_error
from compress.kernels.testing.aot import Compiled, amd_resources, build_folder, compile_kernel
from compress.kernels.testing.configs import Subject, subjects
from compress.kernels.testing.emulate import Launched, emulated
from compress.kernels.testing.ptx_program import Trap, UnsupportedPtx
from compress.kernels.testing.sass import GPUS, Code, read_code

NVIDIA = (80, 86, 89, 90, 100, 120)
AMD = ("gfx942", "gfx950", "gfx1100")
EMULATED = (80, 90)  # the others differ in machine code, hardly in PTX
LARGE_TILES = {90: ("HGMMA", "IGMMA"), 100: ("UTC",)}  # instructions of their own, for 64 rows and more
MOST_REGISTERS = 255
MOST_REGISTERS_DECODING = 168  # so that three CTAs of four warps fit
REFETCHED = 1.02
MOST_ERROR = 1.25  # times that of the dtype
TOLERANCE = 1.03
OUTRUN = {100: 2.2}  # memory brings so many times A100's weights for each instruction: shares are of A100's budget
FIGURES = ("registers", "spills", "shared", "per_weight", "fetched_bits", "conflicts", "error")  # less is better

Work = tuple[int, int | str, Path, bool]  # number of a kernel, architecture, folder of compiled ones, whether it is run


@dataclass
class Row:
    """What was found of a kernel on one architecture. None: not measured there."""

    kernel: str
    arch: str
    bits: float | None = None  # of a weight as it is stored, scales and zero points included
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None  # bytes of a CTA
    matrix: str = ""  # matrix instructions of the main loop
    per_weight: float | None = None  # instructions of a thread
    budget: float | None = None  # how many there may be before memory waits for them
    ceiling: float | None = None  # times as fast as float16 weights from memory can be
    fetched_bits: float | None = None  # of each weight
    stored_bits: float | None = None
    efficiency: float | None = None  # of the sectors fetched of the weight
    conflicts: float | None = None  # rounds of shared memory over those needed
    error: float | None = None  # over that of the dtype
    note: str = ""  # why something was not measured
    failed: list[str] = field(default_factory=list)  # gates, with figures
    waived: list[str] = field(default_factory=list)  # as the kernel's line in configs.py has them

    @property
    def key(self) -> str:
        """Its name in the file of metrics."""
        return f"{self.kernel} {self.arch}"

    def figures(self) -> dict[str, float]:
        """What the ratchet keeps."""
        values: dict[str, Any] = asdict(self)
        return {name: round(values[name], 3) for name in FIGURES if values[name] is not None}

    def kept(self) -> dict[str, Any]:
        """What metrics.json has of it: the figures, and what a page says beside them."""
        facts = {"bits": self.bits, "matrix": self.matrix or None, "waived": self.waived or None}
        return self.figures() | {name: fact for name, fact in facts.items() if fact is not None}


def check_one(work: Work) -> Row:
    """Check one kernel on one architecture; for a pool of processes, to which kernels themselves cannot be sent."""
    number, arch, build, emulate = work
    with build_folder(build):
        subject = known_subjects()[number]
        return check(subject, arch, emulate)


def concerned(subject: Subject, arch: int | str) -> bool:
    """Whether a kernel is launched on this architecture at all."""
    return isinstance(arch, int) or not (subject.config.nvidia_only or subject.config.function.is_gluon())


@cache
def known_subjects() -> tuple[Subject, ...]:
    """All kernels that are checked, in the order of their numbers."""
    return subjects()


def check(subject: Subject, arch: int | str, emulate: bool = True) -> Row:
    """Compile a kernel, read its code and, on some architectures, run it."""
    row = Row(subject.config.name, f"sm_{arch}" if isinstance(arch, int) else arch, subject.bits)
    try:
        compiled = compile_kernel(subject.config, arch)
    except Exception as error:  # Triton raises whatever its passes do
        row.failed.append(f"compile: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
        return row
    if isinstance(arch, str):
        resources = amd_resources(compiled)
        row.registers, row.spills, row.shared = resources["registers"], resources["spills"], compiled.shared_bytes
        _judge(row, subject, {"spills": row.spills == 0})
        return row
    _read(row, subject, compiled, arch)
    if emulate and arch in EMULATED:
        _run(row, subject, arch)
    return row


def _read(row: Row, subject: Subject, compiled: Compiled, arch: int) -> None:
    code, gpu, config = read_code(compiled), GPUS[arch], subject.config
    row.registers, row.spills, row.shared, row.matrix = code.registers, code.spills, code.shared_bytes, code.matrix
    row.budget = gpu.budget(subject.bits)
    if config.weights_per_loop:
        row.per_weight = code.per_weight(config.weights_per_loop)
        row.ceiling = 16 / subject.bits * min(1, row.budget / row.per_weight)
    decoding = subject.share is not None
    gates = {
        "spills": code.spills == 0,
        "registers": code.registers <= (MOST_REGISTERS_DECODING if decoding else MOST_REGISTERS),
        "shared": code.shared_bytes <= gpu.shared_bytes,
        "loads": code.wide_loads(),
        "matrix": _right_matrix(code, config.mma, arch),
        "issue": subject.share is None or _within(subject.share * OUTRUN.get(arch, 1), row),
        "conversions": not decoding or code.conversions == 0,
    }
    _judge(row, subject, gates)


def _within(share: float, row: Row) -> bool:
    """Whether instructions take no more than this share of the budget."""
    return row.per_weight is None or row.budget is None or row.per_weight <= share * row.budget


def _right_matrix(code: Code, wanted: str | None, arch: int) -> bool:
    if wanted is None or wanted in code.matrix:
        return True
    return any(name.startswith(LARGE_TILES.get(arch, ())) for name in code.loop)


def _run(row: Row, subject: Subject, arch: int) -> None:
    with emulated(arch) as launches:
        try:
            outcome = subject.example()
        except UnsupportedPtx as error:
            row.note = str(error).splitlines()[-1].strip()
            return
        except Trap as error:
            row.failed.append(f"run: {error}")
            return
    row.error = excess_error(outcome.result, outcome.reference, outcome.exact)
    own = [launched for launched in launches if launched.kernel == subject.config.function.__name__]
    _measure(row, subject, own, outcome.weights)
    gates = {
        "fetch": row.fetched_bits is None or row.fetched_bits <= REFETCHED * (row.stored_bits or math.inf),
        "banks": row.conflicts is None or row.conflicts <= 1.0,
        "numerics": row.error <= MOST_ERROR,
    }
    _judge(row, subject, gates)


def _measure(row: Row, subject: Subject, launches: list[Launched], weights: int) -> None:
    reports = [launched.report for launched in launches]
    fetched = sum(report.fetched_bits(name) for report in reports for name in subject.tensors)
    sizes = (report.stored_bytes[name] for report in reports[:1] for name in subject.tensors)
    row.fetched_bits, row.stored_bits = fetched / weights, 8 * sum(sizes) / weights
    row.efficiency = min(report.efficiency(name) for report in reports for name in subject.tensors)
    row.conflicts = max(report.bank_conflicts() for report in reports)


def _judge(row: Row, subject: Subject, gates: Mapping[str, bool]) -> None:
    for gate, passed in gates.items():
        if not passed:
            waiver = next((name for name in (gate, f"{gate} {row.arch}") if name in subject.waived), None)
            (row.failed if waiver is None else row.waived).append(waiver or gate)


def ratchet(rows: list[Row], kept: Mapping[str, Mapping[str, Any]]) -> None:
    """Mark as failed each figure that is more than 3 % worse than the one kept; new figures pass."""
    for row in rows:
        before = kept.get(row.key, {})
        for name, value in row.figures().items():
            if name in before and value > before[name] * TOLERANCE + 1e-9:
                row.failed.append(f"ratchet: {name} {before[name]:g} -> {value:g}")


COLUMNS: Mapping[str, Callable[[Row], Any]] = {
    "kernel": lambda r: r.kernel,
    "arch": lambda r: r.arch,
    "reg": lambda r: r.registers,
    "spill": lambda r: r.spills,
    "shared": lambda r: r.shared,
    "matrix": lambda r: r.matrix,
    "instr/w": lambda r: r.per_weight,
    "% budget": lambda r: round(100 * r.per_weight / r.budget) if r.per_weight and r.budget else None,
    "x fp16": lambda r: r.ceiling,
    "bits/w": lambda r: r.fetched_bits,
    "sectors": lambda r: r.efficiency,
    "banks": lambda r: r.conflicts,
    "error": lambda r: r.error,
    "gates": lambda r: "; ".join([*(f"FAIL {f}" for f in r.failed)] or ["ok"]) + _waived(r),
}


def _waived(row: Row) -> str:
    return f" (waived: {', '.join(row.waived)})" if row.waived else ""


def table(rows: list[Row]) -> Iterator[str]:
    """The lines of a table, for a terminal and for Markdown."""
    cells = [[_cell(show(row)) for show in COLUMNS.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    for line in [list(COLUMNS), ["-" * width for width in widths], *cells]:
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
