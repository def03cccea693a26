"""Figures of matplotlib as SVG inside a page: its fonts and colours, twice, for a wide window and for a phone."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from itertools import chain
from textwrap import fill
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from compress.plots import COLOURS, Series

WIDE, NARROW = 10.0, 3.9  # inches; a page shows an inch as about 90 pixels
LEVELS = tuple(f"#a0b0c{level}" for level in range(1, 10))  # shades of a heat map: only names, the page says which
INK, MUTED, GRID, PAPER = "#000000", "#666666", "#e6e6e6", "#ffffff"
# What the page calls each colour that a figure may have, so that it can be light or dark.
VARIABLES = {
    **{colour.lower(): f"--c{index}" for index, colour in enumerate(COLOURS, 1)},
    **{colour: f"--level{index}" for index, colour in enumerate(LEVELS, 1)},
    **dict.fromkeys((INK, "#4d4d4d"), "--ink"),
    MUTED: "--muted",
    **dict.fromkeys((GRID, "#cccccc"), "--line"),
    PAPER: "--paper",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may hold dollar signs
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
LETTER = 0.075  # inches, about


@dataclass(frozen=True)
class Plot:
    """A figure in both widths, and what it shows in words, for those who cannot see it."""

    wide: Markup
    narrow: Markup
    caption: str


def plot(name: str, caption: str, draw: Callable[[float], Figure]) -> Plot:
    """Draw a figure at both widths; `draw` gets the width in inches. `name` tells its parts from other figures'."""
    with matplotlib.rc_context(STYLE):
        wide, narrow = (_inline(f"{name}-{kind}", draw(width)) for kind, width in (("wide", WIDE), ("narrow", NARROW)))
    return Plot(wide, narrow, caption)


def legend(figure: Figure, series: list[Series], width: float) -> None:
    """Markers and names below a figure, in as many columns as there is room for; names too long for it are wrapped."""
    room = int(width / LETTER) - 8
    names = [fill(one.name, room, break_long_words=True) for one in series]
    longest = max((len(line) for line in chain.from_iterable(name.splitlines() for name in names)), default=1)
    handles = [Line2D([], [], markersize=5, linewidth=1.6, **one.style) for one in series]
    columns = max(1, min(len(series), int(width / (longest * LETTER + 0.6))))
    rows = -(-sum(len(name.splitlines()) for name in names) // columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * rows)
    figure.legend(handles, names, loc="outside lower center", ncols=columns, labelcolor=INK, handlelength=2.2)


def _inline(name: str, figure: Figure) -> Markup:
    """The figure as an `<svg>` element that takes colours, font and width from the page."""
    file = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # ids of its parts differ from those of other figures
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)  # a style is the page's
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # figure_1, axes_1: the same in every figure
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda found: _variable(found[0]), text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    text = re.sub(r"\n\s*", " ", text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None  # matplotlib writes one
    return Markup(re.sub(r"<svg[^>]*>", f'<svg {view[0]} aria-hidden="true" focusable="false">', text, count=1))


def _variable(colour: str) -> str:
    return f"var({VARIABLES[colour]})" if colour in VARIABLES else colour
