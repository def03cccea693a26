"""`compress sweep`: settings times targets, each run measured, as a table, CSV, JSON and a plot."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar
from urllib.parse import quote

from compress.commands import find_model, pick_device
from compress.errors import InputError
from compress.eval.speed import SpeedProtocol
from compress.files import write_json, write_text
from compress.progress import Reporter
from compress.recipe import Recipe, merged, read_recipe
from compress.report import Report, number, table
from compress.runs import Bench, Protocol, Run, run_all
from compress.settings import read_setting, split_settings, taken

COLUMNS = (
    "setting target pruner refine quantizer allocate sparsity pattern wbits budget perplexity ratio layer_sparsity "
    "layer_bits_per_weight compressed_bytes seconds peak_rss_bytes nsamples seqlen tokens prefill_tokens_per_second "
    "prefill_speedup decode_ms_per_token decode_speedup failed"
).split()
NO_PLOT = 'there will be no plot: it takes matplotlib, `pip install "compress-llm[plots]"`'


Value = TypeVar("Value", float, int, str)


@dataclass(frozen=True)
class Request:
    """What a sweep is asked to do, as its flags have it."""

    model: str
    settings: list[str]  # PRUNER[+REFINE][+QUANTIZER][@ALLOCATE][:KEY=VALUE,...], several separated by commas
    sparsities: list[str]  # the same for these three
    patterns: list[str]
    wbits: list[str]
    base: dict[str, Any]  # recipe values of all runs
    recipe: Path | None
    text: str  # perplexity is measured on
    windows: int
    out: Path
    keep: bool = False
    speed: bool = False
    budgets: tuple[str, ...] = ()  # columns beside those of the other three


@dataclass(frozen=True)
class Column:
    """One target of a sweep."""

    label: str
    values: dict[str, Any]  # of the recipe's target


def sweep(request: Request, device: str) -> Report:
    """Run every setting at every target and measure each; what an earlier sitting finished is not repeated.

    Returns {"model", "protocol", "dense", "runs"}, which OUT/sweep.json has as well; OUT/sweep.csv has the runs.
    Raises InputError, before anything runs, for a setting that cannot be meant.
    """
    reporter, device = Reporter(), pick_device(device)
    runs, seqlen = plan_runs(request)
    folder = find_model(request.model, runs[0].recipe.revision, reporter)
    drawing = find_spec("matplotlib") is not None
    if not drawing:
        reporter.say(NO_PLOT)
    speed = SpeedProtocol() if request.speed else None
    protocol = Protocol(request.text, request.windows, seqlen)
    bench = Bench(folder, request.out, protocol, reporter, device, request.keep, speed)
    measured = run_all(bench, runs)
    data: dict[str, Any] = {"model": request.model, "protocol": protocol.described(), "dense": next(measured)}
    data["runs"] = []
    for row in measured:
        data["runs"].append(row)
        _write(request.out, data)
    files = "sweep.csv and sweep.json"
    if drawing:
        from compress.plots import draw_sweep

        draw_sweep(data, [request.out / "sweep.svg", request.out / "sweep.png"])
        files = "sweep.csv, sweep.json, sweep.svg and sweep.png"
    return Report(data, [*_tables(data), f"\nIn {request.out}: {files}"])


def plan_runs(request: Request) -> tuple[list[Run], int]:
    """Every run of a sweep, and the tokens of a window of the text that perplexity is measured on.

    Raises InputError for a setting or a target that cannot be meant.
    """
    columns = _columns(request)
    base = {**request.base, "model": request.model}
    settings = [(text, read_setting(text)) for text in split_settings(request.settings)]
    out = request.out
    runs = [
        Run(text, column.label, _recipe(request, base, (text, values), column), out / folder_name(text, column.label))
        for text, values in settings
        for column in columns
    ]
    target = runs[0].recipe.target.model_dump(exclude_none=True)  # a recipe has to have one
    return runs, read_recipe(request.recipe, merged(base, {"target": target})).calib.seqlen


def _columns(request: Request) -> list[Column]:
    """What --sparsity, --pattern and --wbits come to together, and each --budget."""
    pruning = [Column(f"{100 * s:g}%", {"sparsity": s}) for s in _each(request.sparsities, float, "--sparsity", "0.5")]
    for pattern in _each(request.patterns, str, "--pattern", "2:4"):
        if ":" not in pattern:
            mend = f"write the setting as wanda:target.pattern={pattern} and give --sparsity"
            raise InputError(f"--pattern {pattern}: a sweep's patterns are n:m; {mend}")
        pruning.append(Column(pattern, {"pattern": pattern, "sparsity": 0.0}))
    bits = [Column(f"W{b}", {"wbits": b}) for b in _each(request.wbits, int, "--wbits", "4")]
    budgets = [Column(b, {"budget": b}) for b in _each(list(request.budgets), str, "--budget", "3bits")]
    if budgets and not pruning and not bits:
        return budgets
    pairs = product(pruning or [Column("", {})], bits or [Column("", {})])
    return [Column(f"{p.label} {b.label}".strip() or "recipe", p.values | b.values) for p, b in pairs] + budgets


def _each(texts: list[str], kind: Callable[[str], Value], flag: str, example: str) -> list[Value]:
    """The values of an option that may be repeated and hold several each, separated by commas; every value once."""
    try:
        return list(dict.fromkeys(kind(piece.strip()) for text in texts for piece in text.split(",")))
    except ValueError as error:
        raise InputError(f"{flag} {','.join(texts)}: write numbers such as {example}") from error


def _recipe(request: Request, base: dict[str, Any], setting: tuple[str, dict[str, Any]], column: Column) -> Recipe:
    """The recipe of one setting at one target."""
    text, values = setting
    where = f"setting {text} at {column.label}"
    if twice := [key for key in column.values if taken(values, ["target", key])]:
        raise InputError(f"{where}: target.{twice[0]} is what the columns of the sweep set: give it in one place")
    try:
        recipe = read_recipe(request.recipe, merged(merged(base, values), {"target": column.values}))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if recipe.prunes and recipe.pruner is None:
        raise InputError(f"{where}: it names no pruner to come to that with: write one, such as wanda+{text}")
    if recipe.quantizes and recipe.quantizer is None:
        names = text.partition(":")[0].partition("@")[0]
        raise InputError(f"{where}: it names no quantizer to come to that with: write one, such as {names}+gptq")
    return recipe


def folder_name(setting: str, target: str) -> str:
    """The folder of a run: different ones for different runs, and fit for any file system."""
    return quote(f"{setting.replace(':', ',', 1)}_{target.replace('%', '').replace(':', 'of')}", safe="+@=,")


def _write(out: Path, data: dict[str, Any]) -> None:
    """sweep.json and sweep.csv, as far as the sweep has come."""
    write_json(out / "sweep.json", data)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **row.get("speed", {})} for row in data["runs"])
    write_text(out / "sweep.csv", text.getvalue())


def _tables(data: dict[str, Any]) -> list[Any]:
    """Perplexity and the seconds; its ratio to the dense model's; speed if it was measured; what failed."""
    runs, dense = data["runs"], data["dense"]["perplexity"]
    tables = [
        f"perplexity; {dense:.2f} dense",
        table("", *_with_seconds(_grid(runs, lambda row: number(row["perplexity"])), runs)),
        "\nperplexity, x dense",
        table("", *_grid(runs, lambda row: number(row["ratio"]))),
    ]
    if any("speed" in row for row in runs):
        tables += ["\nspeed, x dense: of a prompt, of a token after it", table("", *_grid(runs, _speed_cell))]
    lines = [f"\n{row['setting']} at {row['target']} failed: {row['failed']}" for row in runs if "failed" in row]
    slow = [row for row in runs if "none" in row.get("speed", {})]
    lines += [f"\n{row['setting']} at {row['target']} has no speed: {row['speed']['none']}" for row in slow]
    return [*tables, *lines]


Grid = tuple[list[str], list[list[str]]]  # columns, rows


def _grid(runs: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> Grid:
    """A row for each setting, a column for each target."""
    targets = list(dict.fromkeys(row["target"] for row in runs))
    rows: dict[str, dict[str, str]] = {}
    for row in runs:
        rows.setdefault(row["setting"], {})[row["target"]] = "failed" if "failed" in row else cell(row)
    return ["setting", *targets], [[name, *(cells[t] for t in targets)] for name, cells in rows.items()]


def _with_seconds(grid: Grid, runs: list[dict[str, Any]]) -> Grid:
    """The mean seconds of a setting's runs as one more column."""
    columns, rows = grid
    seconds: dict[str, list[float]] = {}
    for row in runs:
        seconds.setdefault(row["setting"], []).extend([row["seconds"]] if "seconds" in row else [])
    means = [f"{mean(each):.0f}" if each else "" for each in seconds.values()]
    return [*columns, "mean seconds"], [[*row, value] for row, value in zip(rows, means, strict=True)]


def _speed_cell(row: dict[str, Any]) -> str:
    speed = row["speed"]
    return "none" if "none" in speed else f"{speed['prefill_speedup']:.2f} {speed['decode_speedup']:.2f}"
