"""What a command has to say: data for machines, tables for people."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from compress.errors import printable

_NUMERIC = {"", *"-.0123456789"}  # how a number's cell starts, or one left empty


@dataclass(frozen=True)
class Report:
    """`data` is JSON-able; `tables` say the same to a reader."""

    data: Any
    tables: Sequence[RenderableType]


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A plain table; columns of numbers are aligned right."""
    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numbers = all(row[index][:1] in _NUMERIC for row in rows)
        made.add_column(column, justify="right" if numbers and index else "left", no_wrap=index == 0)
    for row in rows:
        made.add_row(*map(printable, row))  # names in them may come from a file
    return made


def size(count: float) -> str:
    """Bytes for people: 511.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people: 48 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def number(value: float) -> str:
    """Two decimals, or the magnitude of what is beyond all use."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.0e}"


def with_error(value: float, se: float | None, digits: int) -> str:
    """A value with its standard error, if it has one."""
    return f"{value:.{digits}f}" + ("" if se is None else f" ± {se:.{digits}f}")


def percent(share: float, se: float | None) -> str:
    """The same for a share of 1."""
    return with_error(100 * share, None if se is None else 100 * se, 2) + " %"


def show(report: Report, as_json: bool) -> None:
    """Print a report on stdout: its data as JSON, or its tables."""
    if as_json:
        sys.stdout.write(json.dumps(report.data) + "\n")
    else:
        wide = None if sys.stdout.isatty() else 160  # a file or a pipe has no edge to wrap at
        Console(highlight=False, markup=False, emoji=False, width=wide).print(*report.tables, sep="\n")
