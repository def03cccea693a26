"""The figures of a page."""

import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from compress.html_report.svg import INK, LEVELS, PAPER, Plot, legend, plot
from compress.plots import Series, styles, sweep_figure

Panel = tuple[str, dict[str, list[tuple[float, float]]]]  # its title, and each line's points by its name


def error_plot(layers: list[dict[str, Any]]) -> Plot | None:
    """The output error of each kind of layer against its block, a panel a step; None where nothing was lost."""
    steps = list(dict.fromkeys((step["step"], step["method"]) for layer in layers for step in layer["steps"]))
    panels: list[Panel] = []
    for step, method in steps:
        lines = {
            kind: [(float(block), value) for block, value in by_block.items() if value > 0]
            for kind, by_block in _by_kind(layers, lambda each: each["error"], (step, method)).items()
        }
        panels.append((f"after {method} ({step})", {kind: line for kind, line in lines.items() if line}))
    panels = [(title, lines) for title, lines in panels if lines]
    if not panels:
        return None
    caption = "Error of each layer's output on the calibration text, as a share of its energy, by block"
    return plot("error", caption, lambda width: _draw_panels(panels, width, "error of the output", shares=True))


def spread_plot(layers: list[dict[str, Any]]) -> Plot | None:
    """Bits and sparsity of each kind of layer in each block, as heat maps; None where all layers have the same."""
    maps = []
    for title, value, unit in (
        ("bits a weight", lambda step: step["bits"], ""),
        ("sparsity", lambda step: 100 * (1 - step["density"]), " %"),
    ):
        cells = _by_kind(layers, value, None)
        values = [each for row in cells.values() for each in row.values()]
        if values and max(values) - min(values) > 0.01 * max(1.0, max(values)):
            maps.append((title, unit, cells))
    if not maps:
        return None
    caption = f"{' and '.join(title for title, *_ in maps).capitalize()} of each layer, by block; stronger is more"
    return plot("spread", caption, lambda width: _draw_maps(maps, width))


def training_plot(name: str, trainings: list[tuple[str, dict[str, Any]]]) -> Plot | None:
    """The loss of each training, under its title, against its steps: on held-out text if that was measured."""
    panels: list[Panel] = []
    for title, training in trainings:
        points = training["points"]
        lines = {"loss on what it learns from": [(each["step"], each["loss"]) for each in points]}
        held_out = [(each["step"], each["held_out"]) for each in points if "held_out" in each]
        if held_out:
            start = [(0, training["loss_before"])] if "loss_before" in training else []
            lines = {"loss on held-out text": start + held_out} | lines
        panels.append((title, lines))
    if not panels:
        return None
    return plot(
        name, "Loss against steps of training", lambda width: _draw_panels(panels, width, "loss, nats", shares=False)
    )


def held_out_plot(rows: list[dict[str, Any]]) -> Plot | None:
    """Of a sweep: the held-out loss of every run's last training against its steps, a line a run."""
    lines = {}
    for row in rows:
        for training in row["training"][-1:]:
            held_out = [(each["step"], each["held_out"]) for each in training["points"] if "held_out" in each]
            start = [(0, training["loss_before"])] if "loss_before" in training else []
            lines[f"{row['name']} {row['target']}"] = start + held_out
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return None
    caption = "Loss on held-out text against steps, of each run's last training; runs may have other losses"
    return plot(
        "held-out", caption, lambda width: _draw_panels([("", lines)], width, "held-out loss, nats", shares=False)
    )


def size_plot(data: dict[str, Any]) -> Plot | None:
    """Perplexity against the size of the checkpoint, a line a setting; None where all are of one size."""
    rows = [row for row in data["runs"] if "failed" not in row]
    sizes = [row["compressed_bytes"] for row in rows]
    if not sizes or max(sizes) - min(sizes) < 0.002 * rows[0]["dense_bytes"]:
        return None
    caption = "Perplexity against the size of the checkpoint; left and low is better, the band joins what nothing beats"
    return plot("size", caption, lambda width: _draw_sizes(data, rows, width))


def sweep_plot(data: dict[str, Any]) -> Plot | None:
    """Perplexity against what was asked; None where that is a single point for each setting."""
    rows = [row for row in data["runs"] if "failed" not in row]
    if len({row["target"] for row in rows}) < 2:
        return None
    named = data | {"runs": [row | {"setting": row["name"]} for row in data["runs"]]}

    def draw(width: float) -> Figure:
        figure, series = sweep_figure(named, width)
        figure.axes[0].set_title("", loc="left")
        legend(figure, series, width)
        return figure

    return plot("sweep", "Perplexity against what was asked of the model", draw)


def _by_kind(layers: list[dict[str, Any]], value: Any, at: tuple[str, str] | None) -> dict[str, dict[int, float]]:
    """The mean `value` of each kind of layer in each block, after the step `at`, or after the last."""
    found: dict[str, dict[int, list[float]]] = {}
    for layer in layers:
        steps = [step for step in layer["steps"] if at is None or (step["step"], step["method"]) == at]
        if steps and layer["block"] is not None:
            found.setdefault(layer["kind"], {}).setdefault(layer["block"], []).append(value(steps[-1]))
    return {
        kind: {block: mean(values) for block, values in by_block.items()}
        for kind, by_block in zip(short_kinds(found), found.values(), strict=True)
    }


def short_kinds(kinds: Iterable[str]) -> list[str]:
    """Kinds of layers by their last word, where that says which: q_proj for self_attn.q_proj."""
    full = list(kinds)
    last = [kind.rpartition(".")[2] for kind in full]
    return [short if last.count(short) == 1 else kind for short, kind in zip(last, full, strict=True)]


def _draw_panels(panels: list[Panel], width: float, label: str, shares: bool) -> Figure:
    """Lines in panels, beside each other if there is room: shares by block, on common axes, or losses by step."""
    names = list(dict.fromkeys(name for _, lines in panels for name in lines))
    series = [Series(name, style, [], {}) for name, style in zip(names, styles(), strict=False)]
    columns = max(1, min(len(panels), int(width / 3.0)))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(width, 2.6 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=shares, sharey=shares, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    everything = [y for _, lines in panels for line in lines.values() for _, y in line]
    for axes, (title, lines) in zip(grid.flat, panels, strict=False):
        own = everything if shares else [y for line in lines.values() for _, y in line]
        _scale(axes, own, shares)
        for one in series:
            line = lines.get(one.name, [])
            axes.plot([x for x, _ in line], [y for _, y in line], linewidth=1.6, markersize=4, **one.style)
        axes.set_title(title, loc="left", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(min(8, max(1, int(width / columns / 0.45))), integer=True))
        axes.grid(True, which="major", linewidth=0.6)
    for axes in grid[:, 0]:
        axes.set_ylabel(label)
    for axes in figure.axes[-columns:]:
        axes.set_xlabel("block" if shares else "step")
    legend(figure, series, width)
    return figure


def _scale(axes: Axes, values: list[float], shares: bool) -> None:
    """A height axis for positive values: a log scale where they are far apart, few ticks, and no zeros to count."""
    low, high = min(values), max(values)
    text, unit = ("{:g} %", 100) if shares else ("{:g}", 1)
    if low > 0 and high / low > 8:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 2000 else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text.format(round(unit * value, 6))))


def _draw_maps(maps: list[tuple[str, str, dict[str, dict[int, float]]]], width: float) -> Figure:
    """A heat map each below the other: kinds of layers against blocks."""
    heights = [len(cells) for *_, cells in maps]
    figure = Figure(figsize=(width, sum(0.24 * height + 0.95 for height in heights)), layout="constrained")
    grid = figure.subplots(len(maps), 1, squeeze=False, sharex=True, height_ratios=[height + 2 for height in heights])
    for axes, (title, unit, cells) in zip(grid.flat, maps, strict=True):
        blocks = sorted({block for row in cells.values() for block in row})
        values = np.array([[row.get(block, math.nan) for block in blocks] for row in cells.values()])
        edges = np.linspace(np.nanmin(values), np.nanmax(values), len(LEVELS) + 1)
        drawn = axes.pcolormesh(
            np.arange(len(blocks) + 1) - 0.5 + blocks[0],
            np.arange(len(cells) + 1),
            np.ma.masked_invalid(values),
            cmap=ListedColormap(LEVELS),
            norm=BoundaryNorm(edges, len(LEVELS)),
            edgecolors=PAPER,
            linewidth=min(1.0, 3 * width / len(blocks)),
        )
        axes.set_yticks(np.arange(len(cells)) + 0.5, list(cells))
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.set_title(title, loc="left", color=INK)
        bar = figure.colorbar(drawn, ax=axes, ticks=edges[[0, 3, 6, 9]], aspect=12, pad=0.02)
        bar.ax.set_yticklabels([f"{edge:.3g}{unit}" for edge in edges[[0, 3, 6, 9]]])
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
    grid[-1, 0].set_xlabel("block")
    return figure


def _draw_sizes(data: dict[str, Any], rows: list[dict[str, Any]], width: float) -> Figure:
    """Perplexity against MiB; rows whose perplexity is beyond all use leave at the top."""
    dense, top = data["dense"]["perplexity"], 100 * data["dense"]["perplexity"]
    figure = Figure(figsize=(width, 4.4 if width > 5 else 3.8), layout="constrained")
    axes = figure.add_subplot()
    named: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        named.setdefault(row["name"], []).append((row["compressed_bytes"] / 2**20, row["perplexity"]))
    series = [Series(name, style, sorted(named[name]), {}) for name, style in zip(named, styles(), strict=False)]
    best = sorted((row["compressed_bytes"] / 2**20, row["perplexity"]) for row in rows if row["best"])
    axes.plot(*zip(*_stairs(best), strict=True), color=LEVELS[2], linewidth=7, solid_capstyle="round")
    for one in series:
        axes.plot(*zip(*one.line, strict=True), linewidth=1.2, markersize=6, **one.style)
    mib = rows[0]["dense_bytes"] / 2**20
    axes.plot([mib], [dense], marker="*", markersize=11, color=INK, linestyle="none")
    axes.annotate("dense", (mib, dense), (-8, -3), textcoords="offset points", ha="right", color=INK)
    shown = [y for _, y in [*((0, row["perplexity"]) for row in rows), (0, dense)] if y <= top]
    _scale(axes, shown, shares=False)
    if len(shown) <= len(rows):
        axes.set_ylim(top=top)
    axes.set_xlabel("size of the weights, MiB")
    axes.set_ylabel(f"perplexity on {Path(data['protocol']['text']).name}")
    axes.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    legend(figure, series, width)
    return figure


def _stairs(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points of a frontier, and the corners between them: so good at that size, until a larger one is better."""
    corners = [(right[0], left[1]) for left, right in pairwise(points)]
    return sorted([*points, *corners], key=lambda point: (point[0], -point[1]))
