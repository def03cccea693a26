"""Several checkpoints beside the first of them: what `compress eval` measured, a row for each measure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compress.eval.means import mean_over_windows
from compress.report import percent, size, table, with_error


@dataclass(frozen=True)
class Line:
    """One measure of one checkpoint.

    `sums` and `counts`: what the mean is taken over, window by window or document by document, where it is known. Those
    of a perplexity are nats and tokens.
    """

    kind: str  # perplexity, kl, top1, task or bytes
    value: float
    se: float | None = None
    sums: Sequence[float] = ()
    counts: Sequence[int] = ()


@dataclass(frozen=True)
class Cell:
    """A measure as the table has it; `change` from the first checkpoint is a ratio for perplexities and bytes."""

    value: float
    se: float | None
    change: float | None = None
    change_se: float | None = None


def compare(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measures of all checkpoints, of which `measured` has what `compress eval` says of each.

    Returns rows {"measure", "kind", "cells": [{"value", "se", "change", "change_se"} for each]}. The error of a change is
    that of pairs, over the same windows or documents: far smaller than the errors of both. Perplexities and bytes are
    compared as a ratio, tasks as a difference; divergence and agreement are differences already.
    """
    first, *_ = every = [_lines(data) for data in measured]
    return [
        {"measure": name, "kind": line.kind, "cells": [asdict(_cell(line, lines[name])) for lines in every]}
        for name, line in first.items()
    ]


def comparison_table(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> Any:
    """The same for people: a column for each checkpoint."""
    cells = [[row["measure"], *(_text(row["kind"], Cell(**cell)) for cell in row["cells"])] for row in rows]
    return table("", ["", *names], cells)


def _lines(data: dict[str, Any]) -> dict[str, Line]:
    """Every measure by its name, as gates name them."""
    lines: dict[str, Line] = {}
    for row in data.get("measured", ()):
        where = f"{row['text']}, {row['protocol']}"
        pieces = row["window_nll"], row["window_tokens"]
        lines[f"perplexity, {where}"] = Line("perplexity", row["perplexity"], row["perplexity_se"], *pieces)
        if "word_perplexity" in row:
            lines[f"word perplexity, {where}"] = Line("perplexity", row["word_perplexity"])
        if "kl" in row:
            lines[f"KL in nats, {where}"] = Line("kl", row["kl"], row["kl_se"])
            lines[f"same top token, {where}"] = Line("top1", row["top1"], row["top1_se"])
    for task, found in data.get("tasks", {}).items():
        for metric, one in found["metrics"].items():
            each = one["each"] or ()
            lines[f"{task}, {metric}"] = Line("task", one["value"], one["se"], each, [1] * len(each))
    return lines | {"size of the weights": Line("bytes", data["bytes"])}


def _cell(first: Line, line: Line) -> Cell:
    if line is first or line.kind in ("kl", "top1"):
        return Cell(line.value, line.se)
    se = None
    if line.sums and line.counts == first.counts:
        pairs = [a - b for a, b in zip(line.sums, first.sums, strict=True)]
        se = mean_over_windows(pairs, line.counts).se
    if line.kind == "task":
        return Cell(line.value, line.se, line.value - first.value, se)
    ratio = line.value / first.value
    return Cell(line.value, line.se, ratio, None if se is None else ratio * se)


def _text(kind: str, cell: Cell) -> str:
    """A value with its error, or where it is compared its change with that of pairs, in brackets."""
    if cell.change is not None:
        sign = ("+" if cell.change >= 0 else "") if kind == "task" else "× "
        return f"{_value(kind, cell.value, None)} ({sign}{with_error(cell.change, cell.change_se, 3)})"
    return _value(kind, cell.value, cell.se)


def _value(kind: str, value: float, se: float | None) -> str:
    if kind == "bytes":
        return size(value)
    if kind == "top1":
        return percent(value, se)
    return with_error(value, se, {"perplexity": 2, "kl": 4, "task": 3}[kind])
