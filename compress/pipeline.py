"""A run from its recipe to its checkpoint."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.blocks import compress_blocks, finished_blocks
from compress.calib.allocator import map_large, return_freed
from compress.calib.data import calibration_windows
from compress.calib.model import Model
from compress.calib.ranks import ALONE, Ranks
from compress.calib.self_text import self_generated_windows
from compress.calib.weight_files import WeightFiles
from compress.checkpoint.formats import open_weights
from compress.checkpoint.native import Contents, decode
from compress.checkpoint.save import Saver, lacking
from compress.clock import peak_rss_bytes
from compress.costs import Costs
from compress.files import sha256, write_json
from compress.head import HEAD, compress_head
from compress.measure import DenseModel, measure, measure_whole, measures
from compress.plan import PlannedLayer, allocated, plan_format, plan_head, plan_layers, predicted_loss
from compress.progress import Reporter
from compress.recipe import Calibration, Recipe
from compress.run_dir import Finished, RunDir, Shared
from compress.sizes import dense_bytes, n_parameters
from compress.steps import find_drift, find_steps
from compress.whole_model import PRUNED, after_pruning, prepare, prune_whole_model, prunes_whole_model
from compress.whole_recovery import Recovery, prepare_recovery, recovered_key
from compress.work import Work

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def open_model(folder: Path, dtype: str = "auto", device: str = "cpu") -> Model:
    """A model with its embeddings and head loaded, from a folder in any format we read."""
    return Model(folder, open_weights(folder), DTYPES[dtype], device)


def compress(
    recipe: Recipe, folder: Path, out: Path, reporter: Reporter, ranks: Ranks = ALONE, shared: Shared | None = None
) -> dict[str, Any]:
    """Run a recipe on the model in `folder` and write its checkpoint to `out`; resume if `out` holds the same run.

    All of `ranks` call this. They share the loop over blocks; what is not in it the first does while the others wait.
    `shared`: where runs of the same model keep what they have in common (RunDir).

    Returns the figures of the run: checkpoint, format, dense_bytes, compressed_bytes, bits_per_weight, sparsity,
    seconds (finished blocks of earlier sittings included), peak_rss_bytes (of one rank); predicted_loss and
    measured_loss where the plan is made of trials; recovery where there is one, a line for each method that trains.
    Raises InputError for a request that cannot be met, RunError where a run cannot go on; what is finished stays.
    """
    map_large()
    started = time.monotonic()
    steps = find_steps(recipe)
    model = open_model(folder, recipe.dtype, ranks.device)
    if prunes_whole_model(recipe):
        prepare(recipe, model)
    prepare_recovery(recipe)
    layers, head = plan_layers(model, recipe), plan_head(model, recipe)
    dense = {"dense_bytes": dense_bytes(model), "parameters": n_parameters(model)}
    run = RunDir(out / "run", recipe, _fingerprint(model), shared, ranks)
    try:
        if (done := ranks.agree(lambda: _finished_before(run, out, folder, reporter))) is not None:
            return done
        _tell_unused(model, run, reporter)
        run.journal.write(event="opened", seconds=round(time.monotonic() - started, 3))
        run.borrow_blocks()
        pruned: dict[str, Any] = {}
        if prunes_whole_model(recipe):
            model, layers, pruned = _smaller(recipe, model, run, reporter)
        with ranks.first_goes_first():
            compress_head(model, head, run)
        layers, prediction = allocate(model, recipe, layers, run, reporter)
        format_name, reason = plan_format(model, recipe, layers)
        reporter.say(f"writing the {format_name} format: {reason}")
        _expect(Costs(model, recipe, layers), run)
        work = Work(
            model,
            steps,
            {layer.name: layer for layer in layers},
            run,
            recipe.sequential,
            recipe.calib.refresh_gradients,
            find_drift(recipe, steps),
            format_name,
            recipe.adapter_bits,
        )
        compress_blocks(work, _tokens(model, recipe, run, reporter) if work.needs else None, reporter)
        run.lend_blocks()
        so_far = {"checkpoint": str(out), "format": format_name, **dense, **pruned}
        so_far["peak_rss_bytes"] = max(ranks.gather(peak_rss_bytes()))
        recovery = Recovery(recipe, work, partial(open_model, folder, recipe.dtype, ranks.device), reporter)
        recovered = {"recovery": recovery.run(), **recovery.for_dense()} if recipe.recover else {}
        return ranks.agree(lambda: _conclude(out, recovery, prediction, so_far | recovered, started))
    finally:
        run.close()


def _expect(costs: Costs, run: RunDir) -> None:
    """Note in the journal what the run will take, when it begins: `compress inspect` has it beside what it took."""
    if run.ranks.first and not any(line["event"] == "expected" for line in run.journal.read()):
        seconds = {name: round(value, 2) for name, value in costs.seconds().items()}
        run.journal.write(event="expected", seconds=seconds, peak_rss_bytes=costs.peak_bytes())
        return_freed()


def _conclude(
    out: Path, recovery: Recovery, prediction: "Prediction | None", so_far: dict[str, Any], started: float
) -> dict[str, Any]:
    """From finished blocks to a checkpoint and its figures."""
    recipe, work, run = recovery.recipe, recovery.work, recovery.work.run
    result = {**_totals(work, recipe), **so_far}
    _write(out, work, recipe, result)
    if prediction is not None:
        result |= _losses(work, recipe, prediction, recovery.reporter)
    result["seconds"] = round(time.monotonic() - started + _earlier_seconds(run), 2)
    result["peak_rss_bytes"] = max(so_far["peak_rss_bytes"], peak_rss_bytes(), recovery.peak)
    run.journal.write(event="done", **result)
    Finished(run.path).update(result)
    run.drop_blocks()
    return result


def _write(out: Path, work: Work, recipe: Recipe, result: dict[str, Any]) -> None:
    """Make a checkpoint of what the run folder holds, and add its bytes to the figures."""
    started = time.monotonic()
    saver = Saver(out, work.format_name, work.model, recipe)
    for contents in _finished(work, recipe):
        saver.add(contents)
        return_freed()
    result["compressed_bytes"] = saver.finish_weights()
    result["bits_per_weight"] = result["compressed_bytes"] * 8 / result["parameters"]
    work.run.journal.write(event="checkpoint", seconds=round(time.monotonic() - started, 3))
    saver.finish(result)


def _finished_before(run: RunDir, out: Path, folder: Path, reporter: Reporter) -> dict[str, Any] | None:
    """The figures of a run that an earlier sitting finished, if its checkpoint is still whole."""
    if (done := Finished(run.path).read()) is None:
        return None
    if (lost := lacking(out, folder, done)) is None:
        run.drop_blocks()  # of a sitting that was killed before it did
        reporter.say(f"{out} is finished already: these are its figures")
        return done
    reporter.say(f"{out} was finished, but {lost} is missing or damaged: it is made again")
    return None


def _smaller(
    recipe: Recipe, model: Model, run: RunDir, reporter: Reporter
) -> tuple[Model, list[PlannedLayer], dict[str, Any]]:
    """What a method that prunes whole models leaves of one, the plan of its layers, and figures of the pruning."""
    figures = run.ranks.agree(lambda: prune_whole_model(recipe, model, run, reporter))
    model = open_model(run.path / PRUNED, recipe.dtype, model.device)
    return model, plan_layers(model, after_pruning(recipe)), figures


def _earlier_seconds(run: RunDir) -> float:
    """What earlier sittings spent on what this one did not do again."""
    lines, new = run.journal.read(), run.journal.this_sitting()
    measured = sum(line["seconds"] for line in lines[: len(lines) - len(new)] if line["event"] == "measured")
    return measured + sum(line["seconds"] for line in new if line["event"] == "replayed")


def _fingerprint(model: Model) -> dict[str, Any]:
    """What the run's results depend on beside the recipe."""
    packages = ("torch", "transformers", "compress-llm")
    return {
        "model": files_fingerprint(model.folder, model.files),
        "versions": {package: version(package) for package in packages},
        "threads": torch.get_num_threads(),
    }


def files_fingerprint(folder: Path, files: WeightFiles) -> dict[str, Any]:
    """What tells a model's files from another's without reading them through."""
    sizes = {file.name: file.stat().st_size for file in {entry.file for entry in files.entries.values()}}
    return {
        "config_sha256": sha256(folder / "config.json"),
        "files": dict(sorted(sizes.items())),
        "tensors": len(files.entries),
    }


def _tell_unused(model: Model, run: RunDir, reporter: Reporter) -> None:
    """Say, and note in the journal, which of the files' tensors do not go into the checkpoint."""
    if model.unused and not run.journal.read():
        note = "left out: the model that config.json describes has no place for it"
        reporter.say(f"{len(model.unused)} tensors, such as {model.unused[0]}, are {note}")
        for name in model.unused:
            run.journal.write(event="note", layer=name, note=note)


@dataclass(frozen=True)
class Prediction:
    """What trials say of a plan that is made of them, and what it takes to say how it came out."""

    loss: float  # the sum over the plan's parts
    outputs: Tensor  # [samples, tokens, hidden_size], what leaves the dense model's last block


def allocate(
    model: Model, recipe: Recipe, layers: list[PlannedLayer], run: RunDir, reporter: Reporter
) -> tuple[list[PlannedLayer], Prediction | None]:
    """The layers with the plans that the recipe's rule gives them, from measurements while all blocks are dense.

    What was measured is kept in the run folder, and the plan made of it beside it, in plan.json.
    """
    if not measures(recipe):
        return layers, None

    tokens = _tokens(model, recipe, run, reporter)

    def measured() -> dict[str, Tensor]:
        reporter.say(f"measuring the dense model, for {recipe.target.allocate} to say what each layer becomes")
        started = time.monotonic()
        figures = measure(DenseModel(model, layers, run, reporter), recipe, tokens)
        own_lines = (line["seconds"] for line in run.journal.this_sitting() if line["event"] == "gradients")
        run.journal.write(event="measured", seconds=round(time.monotonic() - started - sum(own_lines), 3))
        return figures

    with run.ranks.first_goes_first():
        found = run.once("measured", measured)
    layers = allocated(model, recipe, layers, found["measured"])
    if run.ranks.first:
        write_json(run.path / "plan.json", {layer.name: asdict(layer.plan) for layer in layers})
    loss = predicted_loss(layers, recipe, found["measured"])
    return layers, None if loss is None else Prediction(loss, found["outputs"])


def _losses(work: Work, recipe: Recipe, prediction: Prediction, reporter: Reporter) -> dict[str, float]:
    """The loss that the plan was said to come to, and that of what it became, with a line in the journal."""
    started, tokens = time.monotonic(), work.run.once("tokens", dict)["tokens"]  # which the prediction is made of
    measured = measure_whole(work.model, finished_blocks(work), recipe, tokens, prediction.outputs)
    found = {"predicted_loss": prediction.loss, "measured_loss": measured}
    work.run.journal.write(event="loss", seconds=round(time.monotonic() - started, 3), **found)
    return found


def rehearse_allocation(
    model: Model, recipe: Recipe, layers: list[PlannedLayer], reporter: Reporter
) -> tuple[list[PlannedLayer], Prediction | None]:
    """What `allocate` will give a run of this recipe, measured in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder), recipe, _fingerprint(model))
        try:
            compress_head(model, plan_head(model, recipe), run)
            return allocate(model, recipe, layers, run, reporter)
        finally:
            run.close()


def _tokens(model: Model, recipe: Recipe, run: RunDir, reporter: Reporter) -> Tensor:
    """The calibration tokens, [nsamples, seqlen]; an earlier sitting's if there was one."""
    calib = recipe.calib

    def sample() -> dict[str, Tensor]:
        reporter.say(f"calibrating on {calib.nsamples} x {calib.seqlen} tokens of {calib.source}")
        if calib.source == "self":
            windows = _own_text(model, calib, reporter)
        else:
            windows = calibration_windows(calib.source, model.tokenizer, calib.nsamples, calib.seqlen, calib.seed)
        return_freed()  # tokenizers make much of a text
        return {"tokens": windows}

    with run.ranks.first_goes_first():
        return run.once("tokens", sample)["tokens"]


def _own_text(model: Model, calib: Calibration, reporter: Reporter) -> Tensor:
    """Calibration tokens that the model itself writes, [nsamples, seqlen]."""
    with reporter.stage("writing calibration text, hundredth", 100) as stage:

        def report(done: int, total: int) -> None:
            while stage.done * total < done * 100:
                stage.step()

        return self_generated_windows(model.folder, model.tokenizer, calib.nsamples, calib.seqlen, calib.seed, report)


def _finished(work: Work, recipe: Recipe) -> Iterator[Contents]:
    """What lies outside the blocks, then every block, as the run folder has them."""
    outside = work.model.outside()
    if plan_head(work.model, recipe):
        packed = decode(*work.run.restore(HEAD), where=HEAD).layers
        replaced = {layer.param for layer in packed}
        yield Contents(packed, {name: tensor for name, tensor in outside.items() if name not in replaced})
    else:
        yield Contents([], outside)
    for index in range(work.model.n_blocks):
        key = recovered_key(recipe, index)
        yield decode(*work.run.restore(key), where=key)


def _totals(work: Work, recipe: Recipe) -> dict[str, float]:
    """Sparsity and bits over all weights of the blocks' layers."""
    figures = [work.run.figures(recovered_key(recipe, index)) for index in range(work.model.n_blocks)]
    weights = sum(f["weights"] for f in figures)
    return {
        "sparsity": sum(f["pruned"] for f in figures) / weights,
        "layer_bits_per_weight": sum(f["bits"] for f in figures) / weights,
    }
