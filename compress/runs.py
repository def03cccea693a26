"""Compress one model in many ways and measure each: what `compress sweep` and `compress bench quality` share."""

import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.calib.ranks import Ranks
from compress.calib.texts import check_source
from compress.checkpoint.writer import remove_checkpoint
from compress.clock import forget_peak
from compress.commands import check_out
from compress.errors import InputError, failure
from compress.eval.speed import SpeedProtocol, measure_speed
from compress.evaluate import evaluate
from compress.files import write_json, write_text
from compress.pipeline import compress, files_fingerprint, open_model
from compress.plan import plan_layers
from compress.progress import Reporter
from compress.recipe import Recipe
from compress.run_dir import Finished, Shared, check_claim, digest, held, read_json
from compress.steps import find_steps
from compress.whole_model import drop_smaller, prepare, prunes_whole_model
from compress.whole_recovery import prepare_recovery, untrained


@dataclass(frozen=True)
class Protocol:
    """What perplexity is measured on."""

    text: str
    windows: int
    seqlen: int

    def described(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One setting at one target."""

    setting: str
    target: str  # as a column of a table says it: 50%, 2:4, W4; empty if the setting says it
    recipe: Recipe
    folder: Path

    @property
    def title(self) -> str:
        """The run for a reader."""
        return f"{self.setting} at {self.target}" if self.target else self.setting

    def description(self) -> dict[str, Any]:
        """What is asked, for a row of a table."""
        target, names = self.recipe.target, dict(self.recipe.steps)
        return {
            "setting": self.setting,
            "target": self.target,
            "pruner": names.get("prune"),
            "refine": names.get("refine"),
            "quantizer": names.get("quantize"),
            "allocate": target.allocate,
            "sparsity": target.density_gap,
            "pattern": target.pattern,
            "wbits": target.wbits,
            "budget": target.budget,
            "nsamples": self.recipe.calib.nsamples,
            "seqlen": self.recipe.calib.seqlen,
        }


@dataclass(frozen=True)
class Bench:
    """Where runs go and how they are measured."""

    model: Path
    out: Path
    protocol: Protocol
    reporter: Reporter
    device: str
    keep: bool = True  # the checkpoints of its own making, once they are measured
    speed: SpeedProtocol | None = None

    @property
    def shared(self) -> Path:
        """What the runs have in common."""
        return self.out / "shared"


class Measurements:
    """A file of measurements; each is found again by what it was asked for, and made once."""

    def __init__(self, file: Path):
        self.file = file

    def get(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """What was measured before, if it was asked for in just this way."""
        return next((each["found"] for each in self._all() if each["asked"] == asked), None)

    def once(self, asked: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` gives, from the file if it is there."""
        found = self.get(asked)
        if found is None:
            found = measure()
            write_json(self.file, {"measurements": [*self._all(), {"asked": asked, "found": found}]})
        return found

    def _all(self) -> list[dict[str, Any]]:
        return read_json(self.file)["measurements"] if self.file.exists() else []


def run_all(bench: Bench, runs: list[Run]) -> Iterator[dict[str, Any]]:
    """The dense model's figures, then a row for each run as it is done; what earlier sittings finished is not repeated.

    The first is {"perplexity", "tokens" (scored)}. A row has the run's description, perplexity, ratio (to the dense
    model's), tokens, dense_bytes, compressed_bytes, layer_bits_per_weight, layer_sparsity (reached), seconds (of the
    whole run; shared gradients count in each), peak_rss_bytes (of this run; None where the system cannot say) and, if
    asked for, speed. A run that cannot go on has its line in `failed` instead, and the others go on.
    Raises InputError, before anything runs, for a request that cannot be met, and RunError if `out` is in use.
    """
    with held(bench.out):
        fingerprint = _check(bench, runs)
        own_peaks, whole = forget_peak(), True
        common = _common_blocks(runs)
        bench.reporter.say("measuring the dense model")
        dense = _perplexity(bench, bench.model, Measurements(bench.out / "dense.json"), {"model": fingerprint})
        yield dense
        for number, run in enumerate(runs, 1):
            bench.reporter.say(f"run {number} of {len(runs)}: {run.title}")
            row, trace = run.description(), run.folder / "error.txt"
            trace.unlink(missing_ok=True)
            try:
                row |= _figures(bench, run, common.get(run.folder))
                row["ratio"] = row["perplexity"] / dense["perplexity"]
                if not own_peaks:
                    row["peak_rss_bytes"] = None
            except Exception as error:  # one run of a night's; the line and the traceback are kept
                run.folder.mkdir(exist_ok=True)
                write_text(trace, traceback.format_exc())
                row["failed"] = failure(error, f"{trace} shows where")[1]
                bench.reporter.say(f"failed: {row['failed']}")
                whole = False
            yield row
        if whole:
            for blocks in bench.shared.glob("*/blocks"):
                shutil.rmtree(blocks)
        if whole and not bench.keep:
            for gradients in bench.shared.glob("*/gradients"):  # as large as the model; the tokens stay
                shutil.rmtree(gradients)


def _check(bench: Bench, runs: list[Run]) -> dict[str, Any]:
    """The fingerprint of the model's files. Raises InputError for the first run that cannot be met."""
    check_source(bench.protocol.text, "evaluation")
    for source in {run.recipe.calib.source for run in runs} - {"self"}:
        check_source(source)
    model = open_model(bench.model)
    fingerprint = files_fingerprint(bench.model, model.files)
    for run in runs:
        try:
            find_steps(run.recipe)
            if prunes_whole_model(run.recipe):
                prepare(run.recipe, model)
            prepare_recovery(run.recipe)
            plan_layers(model, run.recipe)
        except InputError as error:
            raise InputError(f"{run.title}: {error}") from error
        check_out(run.folder, bench.model)
        check_claim(run.folder / "run", run.recipe, fingerprint)
    return fingerprint


def _common_blocks(runs: list[Run]) -> dict[Path, str]:
    """The folders of runs that differ from another only in what trains after the blocks; a name for what they share."""
    names = {run.folder: digest(untrained(run.recipe).model_dump()) for run in runs}
    times = Counter(names.values())
    return {folder: name for folder, name in names.items() if times[name] > 1}


def _figures(bench: Bench, run: Run, blocks: str | None) -> dict[str, Any]:
    """One run's figures, measured now or before. `blocks`: the name of those that it shares with other runs."""
    record = Measurements(run.folder / "run" / "measurements.json")
    result = Finished(run.folder / "run").read()
    disposable = run.folder / "run" / "disposable"  # only what a bench made to be measured is ever removed
    if bench.keep:
        disposable.unlink(missing_ok=True)
    elif result is None:
        disposable.parent.mkdir(parents=True, exist_ok=True)
        disposable.touch()
    asked = [{"perplexity": bench.protocol.described()}, *([{"speed": asdict(bench.speed)}] if bench.speed else [])]
    lost = bench.keep and not (run.folder / "config.json").exists()  # removed by a sitting that was to keep none
    if result is None or lost or any(record.get(each) is None for each in asked):
        forget_peak()
        own_model = prunes_whole_model(run.recipe)  # then its blocks are of another model
        shared = None if own_model else Shared(bench.shared, blocks)
        result = compress(run.recipe, bench.model, run.folder, bench.reporter, Ranks(device=bench.device), shared)
    found = _perplexity(bench, run.folder, record, {}) | _speed(bench, run.folder, record)
    if disposable.exists():
        remove_checkpoint(run.folder)
        drop_smaller(run.folder / "run")
    same = ("dense_bytes", "compressed_bytes", "layer_bits_per_weight", "seconds", "peak_rss_bytes")
    return found | {"layer_sparsity": result["sparsity"], **{key: result[key] for key in same}}


def _perplexity(bench: Bench, folder: Path, record: Measurements, more: dict[str, Any]) -> dict[str, Any]:
    """{"perplexity", "tokens"} of a checkpoint; `more` is what its record tells measurements apart by, beside the protocol."""
    protocol = bench.protocol

    def measure() -> dict[str, Any]:
        got = evaluate(folder, [protocol.text], protocol.seqlen, protocol.windows, bench.reporter, bench.device)
        return {"perplexity": next(iter(got["perplexity"].values())), "tokens": got["tokens"]}

    return record.once({"perplexity": protocol.described(), **more}, measure)


def _speed(bench: Bench, folder: Path, record: Measurements) -> dict[str, Any]:
    """{"speed": of the checkpoint beside the dense model's, or why there is none}; empty if it was not asked for."""
    protocol = bench.speed
    if protocol is None:
        return {}

    def measure() -> dict[str, Any]:
        bench.reporter.say("measuring speed")
        try:
            dense, own = measure_speed([bench.model, folder], protocol, bench.device)
        except InputError as error:  # transformers alone does not read every format
            return {"speed": {"none": str(error)}}
        return {"speed": own.beside(dense)}

    return record.once({"speed": asdict(protocol)}, measure)
