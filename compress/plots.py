"""Plots of what was measured. They take matplotlib, which the extra `plots` brings."""

from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from compress.files import replace_file

# Okabe and Ito's colours, which people with any kind of colour blindness tell apart; without yellow, too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":")  # a second round of the colours
SWEPT = {"layer_sparsity": "sparsity", "wbits": "wbits"}  # what was asked of each axis; ticks stand there
LINE = 0.045  # height of a label as a share of the axis
WORST = 1000  # times the dense model's perplexity: where the axis ends, since what is beyond is of no use


def draw_sweep(data: dict[str, Any], files: Sequence[Path]) -> None:
    """Perplexity on a log axis against sparsity, a line a setting; against bits where nothing was pruned.

    `data`: what `sweep` returns. Patterns such as 2:4 are hollow markers beside the lines. Each setting's name stands
    at the end of its line. Lines that go beyond WORST leave the plot. The endings of `files` say the formats.
    """
    dense = data["dense"]["perplexity"]
    top = WORST * dense
    done = [row | {"shown": min(row["perplexity"], 2 * top)} for row in data["runs"] if "failed" not in row]
    axis = "layer_sparsity" if any(row["sparsity"] for row in done) else "wbits"
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    labels = []
    for (name, rows), (colour, marker, dash) in zip(_series(done).items(), _styles(), strict=False):
        line = sorted(((row[axis], row["shown"]) for row in rows if ":" not in row["pattern"]), reverse=axis == "wbits")
        style = {"color": colour, "marker": marker}
        if line:
            axes.plot(*zip(*line, strict=True), linestyle=dash, linewidth=1.6, markersize=5, **style)
        fixed = [row for row in rows if ":" in row["pattern"]]
        for row in fixed:
            place = (row[axis], row["shown"])
            axes.plot(*place, linestyle="none", markersize=8, markerfacecolor="none", **style)
            axes.annotate(row["pattern"], place, (6, -3), textcoords="offset points", fontsize=7, color=colour)
        labels.append((*(line[-1] if line else (fixed[-1][axis], fixed[-1]["shown"])), name, colour))
    axes.axhline(dense, color="0.4", linewidth=1, linestyle=(0, (1, 2)))
    axes.annotate(f"dense {dense:.2f}", (0, dense), (4, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=8, color="0.3")  # fmt: skip
    if any(row["shown"] > top for row in done):
        axes.set_ylim(top=top)
    _dress(axes, axis, data)
    axes.set_xticks(sorted({row[SWEPT[axis]] for row in done}))
    _label(axes, labels)
    _save(figure, files)


def _series(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each line: those of a setting, and of its bits where both are swept."""
    both = len({row["wbits"] for row in rows}) > 1 and any(row["sparsity"] for row in rows)
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = f"{row['setting']}, W{row['wbits']}" if both and row["wbits"] < 16 else row["setting"]
        series.setdefault(name, []).append(row)
    return series


def _styles() -> Any:
    """Colour, marker and dash of each line: colours first, then the same colours dashed otherwise, without end."""
    return cycle([(*pair, dash) for dash in DASHES for pair in zip(COLOURS, MARKERS, strict=True)])


def _dress(axes: Axes, axis: str, data: dict[str, Any]) -> None:
    """Titles, ticks and grid."""
    axes.set_title(data["model"], loc="left", fontsize=10)
    axes.set_ylabel(f"perplexity on {Path(data['protocol']['text']).name}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if axis == "wbits":
        axes.set_xlabel("bits a weight")
        axes.invert_xaxis()  # what costs more quality is on the right, as with sparsity
    else:
        axes.set_xlabel("sparsity of the blocks' weights")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Names beside the ends of their lines, in a column right of the plot and moved apart where they would overlap."""
    axes.autoscale_view()  # or the axes do not know their ends yet
    to_share = (axes.transData + axes.transAxes.inverted()).transform
    places = sorted((float(to_share((x, y))[1]), x, y, name, colour) for x, y, name, colour in labels)
    heights = _apart([height for height, *_ in places], min(LINE, 1 / max(1, len(places) - 1)))
    for height, (_, x, y, name, colour) in zip(heights, places, strict=True):
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.6, "relpos": (0, 0.5)}
        end = (x, min(y, axes.get_ylim()[1]))
        axes.annotate(name, end, (1.03, height), textcoords="axes fraction", fontsize=8, color=colour, va="center",
                      annotation_clip=False, arrowprops=leader)  # fmt: skip


def _apart(heights: list[float], gap: float) -> list[float]:
    """Ascending heights moved up, and down again from 1, until neighbours are `gap` apart."""
    up: list[float] = []
    for height in heights:
        up.append(max(height, up[-1] + gap) if up else height)
    down: list[float] = []
    for height in reversed(up):
        down.append(min(height, down[-1] - gap) if down else min(height, 1.0))
    return down[::-1]


def _save(figure: Figure, files: Sequence[Path]) -> None:
    """The figure as files; the same figures give the same bytes."""
    for file in files:
        kind = file.suffix.removeprefix(".")
        about = {"Date": None} if kind == "svg" else None
        with matplotlib.rc_context({"svg.hashsalt": "compress", "svg.fonttype": "none"}):
            replace_file(file, partial(figure.savefig, format=kind, dpi=160, metadata=about))
