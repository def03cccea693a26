"""Plots of what was measured. They take matplotlib, which the extra `plots` brings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from operator import itemgetter
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
ROUNDS: tuple[dict[str, str], ...] = (  # each further round of the colours has other dashes and other fill
    {"linestyle": "-"},
    {"linestyle": "--", "markerfacecolor": "white"},
    {"linestyle": ":", "fillstyle": "bottom", "markerfacecoloralt": "white"},
)
SWEPT = {"layer_sparsity": "sparsity", "wbits": "wbits"}  # what was asked of each axis; ticks stand there
LINE = 0.045  # height of a label as a share of the axis
LONGEST = 48  # letters of a label
SPREAD = 0.76  # share of a pattern's width that its markers stand in
WORST = 1000  # times the dense model's perplexity: where the axis ends, since what is beyond is of no use


@dataclass(frozen=True)
class Series:
    """What is drawn in one colour: the points of its line, in order, and the perplexity at each n:m pattern."""

    name: str
    style: dict[str, Any]
    line: list[tuple[float, float]]
    patterns: dict[str, float]


def draw_sweep(data: dict[str, Any], files: Sequence[Path]) -> None:
    """The figure of a sweep as files; their endings say the formats. Names stand at the ends of the lines."""
    figure, series = sweep_figure(data)
    label_lines(figure.axes[-1], series)
    _save(figure, files)


def sweep_figure(data: dict[str, Any], width: float = 9.0) -> tuple[Figure, list[Series]]:
    """Perplexity on a log axis against sparsity, a line a setting; against bits where nothing was pruned.

    `data`: what `sweep` returns; `width` in inches. Patterns such as 2:4 have a narrower panel of their own left of the
    lines, where each setting keeps its place sideways. Lines that go beyond WORST leave the plot; a pattern beyond it
    has an arrow. The series are without names yet: `label_lines`, or a legend.
    """
    dense = data["dense"]["perplexity"]
    top = WORST * dense
    done = [row | {"shown": min(row["perplexity"], 2 * top)} for row in data["runs"] if "failed" not in row]
    axis = "layer_sparsity" if any(row["sparsity"] for row in done) else "wbits"
    series = _series(done, axis)
    patterns = list(dict.fromkeys(pattern for one in series for pattern in one.patterns))
    figure, panels = _panels(len(patterns), any(one.line for one in series), width)
    _dress(panels, data)
    if patterns:
        _draw_patterns(panels[0], [one for one in series if one.patterns], patterns, top)
    if len(panels) == 2 or not patterns:
        _draw_lines(panels[-1], series, axis)
        panels[-1].set_xticks(
            sorted({row[SWEPT[axis]] for row in done if ":" not in row["pattern"] and not row.get("budget")})
        )
    if any(row["shown"] > top for row in done):
        panels[0].set_ylim(top=top)
    return figure, series


def _series(rows: list[dict[str, Any]], axis: str) -> list[Series]:
    """The rows of each line and its patterns: those of a setting, and of its bits where both are swept."""
    both = len({row["wbits"] for row in rows}) > 1 and any(row["sparsity"] for row in rows)
    named: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = f"{row['setting']}, W{row['wbits']}" if both and row["wbits"] < 16 else row["setting"]
        named.setdefault(name, []).append(row)
    series = []
    for (name, own), style in zip(named.items(), styles(), strict=False):
        line = sorted(
            ((_place(row, axis), row["shown"]) for row in own if ":" not in row["pattern"]), reverse=axis == "wbits"
        )
        patterns = {row["pattern"]: row["shown"] for row in own if ":" in row["pattern"]}
        series.append(Series(name, style, line, patterns))
    return series


def _place(row: dict[str, Any], axis: str) -> float:
    """Where a row stands on the axis: at the bits it was asked for, or, with a budget, at those it came to."""
    return row["layer_bits_per_weight"] if axis == "wbits" and row.get("budget") else row[axis]


def styles() -> Iterator[dict[str, Any]]:
    """Colour, marker, dash and fill of each line: colours first, then the same colours drawn otherwise, without end."""
    pairs = list(zip(COLOURS, MARKERS, strict=True))
    return cycle([{"color": colour, "marker": marker, **more} for more in ROUNDS for colour, marker in pairs])


def _panels(patterns: int, lines: bool, width: float) -> tuple[Figure, list[Axes]]:
    """A panel for `patterns` patterns, if any, and one for lines, right of it and with the same height axis."""
    if not patterns or not lines:
        figure = Figure(figsize=(min(width, 5.5 if patterns else 8), 5), layout="constrained")
        return figure, [figure.add_subplot()]
    figure = Figure(figsize=(width, 5), layout="constrained")
    share = min(0.28 * patterns, 1.0)  # of the width of the lines' panel
    return figure, list(figure.subplots(1, 2, sharey=True, width_ratios=(share, 1)))


def _dress(panels: list[Axes], data: dict[str, Any]) -> None:
    """Title, height axis, grid and the line of the dense model."""
    dense = data["dense"]["perplexity"]
    first = panels[0]
    first.set_yscale("log")
    first.set_title(data["model"], loc="left", fontsize=10)
    first.set_ylabel(f"perplexity on {Path(data['protocol']['text']).name}")
    first.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    first.yaxis.set_minor_formatter(NullFormatter())
    for axes in panels:
        axes.axhline(dense, color="0.4", linewidth=1, linestyle=(0, (1, 2)))
        axes.grid(True, which="major", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    first.annotate(f"dense {dense:.2f}", (0, dense), (4, -3), xycoords=("axes fraction", "data"), va="top",
                   textcoords="offset points", fontsize=8, color="0.3",
                   bbox={"color": "white", "pad": 0.5})  # fmt: skip


def _draw_lines(axes: Axes, series: list[Series], axis: str) -> None:
    """A line each against sparsity or bits."""
    for one in series:
        axes.plot([x for x, _ in one.line], [y for _, y in one.line], linewidth=1.6, markersize=5, **one.style)
    if axis == "wbits":
        axes.set_xlabel("bits a weight")
        axes.invert_xaxis()  # what costs more quality is on the right, as with sparsity
    else:
        axes.set_xlabel("sparsity of the blocks' weights")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _draw_patterns(axes: Axes, series: list[Series], patterns: list[str], top: float) -> None:
    """Markers in a column each within each pattern, so that none hides another; an arrow where one is above `top`."""
    step = SPREAD / max(1, len(series) - 1)
    for place, one in enumerate(series):
        aside = (place - (len(series) - 1) / 2) * step
        style = one.style | {"linestyle": "none", "markersize": 5}
        for pattern, height in one.patterns.items():
            x = patterns.index(pattern) + aside
            if height <= top:
                axes.plot(x, height, **style)
                continue
            across = axes.get_xaxis_transform()
            axes.plot(x, 0.94, transform=across, **style)
            axes.annotate(
                "", (x, 1), (x, 0.94), across, across, arrowprops={"arrowstyle": "->", "color": one.style["color"]}
            )
    for edge in range(1, len(patterns)):
        axes.axvline(edge - 0.5, color="0.8", linewidth=0.6)
    axes.set_xlim(-0.5, len(patterns) - 0.5)
    axes.set_xticks(range(len(patterns)), patterns)
    axes.tick_params(axis="x", color="none")  # the names stay level with those of the other panel
    axes.grid(False, axis="x")
    axes.set_xlabel("n:m pattern")


def label_lines(axes: Axes, series: list[Series]) -> None:
    """Markers and names beside the ends of the lines, right of the plot and moved apart where they would overlap.

    A setting without a line stands at the height of its last pattern.
    """
    axes.autoscale_view()  # or the axes do not know their ends yet
    to_share = (axes.transData + axes.transAxes.inverted()).transform
    ends = [one.line[-1] if one.line else (0, list(one.patterns.values())[-1]) for one in series]
    places = sorted(
        ((float(to_share(end)[1]), end, one) for end, one in zip(ends, series, strict=True)), key=itemgetter(0)
    )
    heights = _apart([height for height, *_ in places], min(LINE, 1 / max(1, len(places) - 1)))
    for height, (_, (x, y), one) in zip(heights, places, strict=True):
        colour = one.style["color"]
        axes.plot(1.05, height, transform=axes.transAxes, clip_on=False, markersize=5, **one.style)
        axes.annotate(_short(one.name), (1.05, height), (7, 0), "axes fraction", "offset points", fontsize=8, color=colour,
                      va="center", annotation_clip=False)  # fmt: skip
        if one.line:
            leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.6, "shrinkB": 4}
            end = (x, min(y, axes.get_ylim()[1]))
            axes.annotate("", end, (1.05, height), textcoords="axes fraction", annotation_clip=False, arrowprops=leader)


def _short(name: str) -> str:
    """A name that leaves room for the plot; long settings mostly begin alike and differ at their end."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 3]} … {name[-LONGEST // 2 :]}"


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
