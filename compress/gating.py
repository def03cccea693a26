"""`compress gate`: make what is to be judged, measure it, and hold it against its baseline or record one."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from compress.calib.ranks import Ranks
from compress.commands import find_model, pick_device
from compress.errors import InputError
from compress.files import write_json
from compress.gate import hold, read_baseline, record
from compress.gate_measure import Asked, described, measure_figures, read_asked
from compress.gate_output import Gated, append_markdown, text_tables, write_junit
from compress.pipeline import compress
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.report import Report

RECIPE = "recipe.toml"  # of a checkpoint


@dataclass(frozen=True)
class Target:
    """A checkpoint, or a recipe whose checkpoint is made to be judged and is gone afterwards."""

    name: str
    baseline: Path

    @property
    def recipe(self) -> Path:
        """What it is made from."""
        return Path(self.name) if self.made else Path(self.name) / RECIPE

    @property
    def made(self) -> bool:
        """Whether it is a recipe."""
        return self.name.endswith(".toml")


def find_targets(names: list[str], baseline: Path | None) -> list[Target]:
    """Each target with its baseline: the one given, or the JSON file beside a recipe.

    Raises InputError where that does not say which.
    """
    if baseline is not None and len(names) > 1:
        raise InputError(f"--baseline {baseline} is of one target: leave it out where recipes have theirs beside them")
    targets = []
    for name in names:
        if baseline is None and not name.endswith(".toml"):
            raise InputError(f"{name} is held against which figures? Give --baseline FILE")
        targets.append(Target(name, baseline or Path(name).with_suffix(".json")))
        if name.endswith(".toml"):
            read_recipe(Path(name), {})
    return targets


def gate(targets: list[Target], outputs: tuple[Path | None, Path | None], device: str) -> Report:
    """Hold each target against its baseline; `outputs`: files for Markdown (added to) and JUnit's XML.

    Returns {"held", "gates": [{"target", "baseline", "held", "verdicts"}]}. Raises InputError before any work for a
    baseline that cannot be read or asks for what is not there.
    """
    device, reporter = pick_device(device), Reporter()
    baselines = [read_baseline(target.baseline) for target in targets]
    asked = [read_asked(baseline.asked, target.baseline) for baseline, target in zip(baselines, targets, strict=True)]
    for each in asked:
        each.check()
    gates = []
    for target, baseline, wanted in zip(targets, baselines, asked, strict=True):
        started = time.monotonic()
        with _checkpoint(target, 0, device, reporter) as folder:
            figures = measure_figures(folder, wanted, device, reporter)
        verdicts = hold(baseline, figures)
        gates.append(Gated(target.name, str(target.baseline), verdicts, time.monotonic() - started))
        reporter.say(gates[-1].line)
    markdown, junit = outputs
    if markdown is not None:
        append_markdown(markdown, gates)
    if junit is not None:
        write_junit(junit, gates)
    data = {"held": all(each.held for each in gates), "gates": [each.data() for each in gates]}
    return Report(data, text_tables(gates))


def record_baselines(targets: list[Target], asked: Asked, seeds: int, device: str) -> Report:
    """Measure each target, and `seeds` - 1 more runs of its recipe on other calibration samples; write its baseline.

    A baseline that is there keeps its tolerances.

    Returns {"recorded": [{"target", "baseline", "figures"}]}. Raises InputError for a checkpoint without the recipe that
    more runs take.
    """
    device, reporter = pick_device(device), Reporter()
    asked.check()
    for target in targets:
        if seeds > 1 and not target.recipe.is_file():
            raise InputError(f"{target.name} has no {RECIPE} to repeat with other --seeds: record it with one")
    recorded = []
    for target in targets:
        runs = []
        for seed in range(seeds):
            if seeds > 1:
                reporter.say(f"{target.name}: run {seed + 1} of {seeds}")
            with _checkpoint(target, seed, device, reporter) as folder:
                runs.append(measure_figures(folder, asked, device, reporter))
        baseline = record(described(asked), runs)
        if target.baseline.exists():  # how far off is allowed was written by hand
            before = read_baseline(target.baseline)
            kept = {"tolerance": before.tolerance, "confidence": before.confidence}
            baseline = baseline.model_copy(update=kept)
        values = {name: figure.values for name, figure in baseline.figures.items()}
        write_json(target.baseline, baseline.model_dump(mode="json", exclude_none=True))
        recorded.append({"target": target.name, "baseline": str(target.baseline), "figures": values})
    lines = [f"recorded {len(each['figures'])} figures of {each['target']} in {each['baseline']}" for each in recorded]
    return Report({"recorded": recorded}, lines)


@contextmanager
def _checkpoint(target: Target, more: int, device: str, reporter: Reporter) -> Iterator[Path]:
    """The folder of a target's checkpoint, or of one made by its recipe with `more` added to the calibration's seed."""
    if not target.made and not more:
        yield find_model(target.name, None, reporter)
        return
    recipe = read_recipe(target.recipe, {})
    if more:
        recipe = read_recipe(target.recipe, {"calib": {"seed": recipe.calib.seed + more}})
    with tempfile.TemporaryDirectory(prefix="compress-gate-") as folder:
        model = find_model(recipe.model, recipe.revision, reporter)
        compress(recipe, model, Path(folder) / "out", reporter, Ranks(device=device))
        yield Path(folder) / "out"
