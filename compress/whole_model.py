"""Methods that work on a whole model: they leave a smaller ordinary one in the run folder, which the loop then opens.

run/training_text.safetensors   the windows a method learns from
run/training.safetensors        what a killed training goes on from
run/kept.safetensors            which outputs and inputs of each layer stay, bool: NAME.rows and NAME.columns
run/pruned/                     the smaller model, an ordinary checkpoint; pruned.json, written before its config.json
"""

import math
import shutil
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.calib.data import training_windows
from compress.calib.model import Model
from compress.calib.texts import check_source
from compress.checkpoint.save import copy_along, plain_config
from compress.checkpoint.writer import ShardWriter, remove_checkpoint
from compress.errors import InputError
from compress.files import write_json, write_tensors
from compress.progress import Reporter, Stage
from compress.recipe import Recipe
from compress.report import Report, size, table
from compress.run_dir import Journal, RunDir, read_json
from compress.sizes import dense_bytes, n_parameters
from compress.steps import find_method, find_options, whole_model
from compress.structures import Masks, Structures, find_structures, with_sizes
from compress.tracker import tracked
from compress.training import Session, Trainee, require_peft

PRUNED = "pruned"  # folder of the smaller model, in a run's
KEPT = "kept.safetensors"
TRACKER = "tracker"  # folder of trackers that write files, in a run's
TOLD_EVERY = 10  # steps between lines of the journal


def prunes_whole_model(recipe: Recipe) -> bool:
    """Whether a recipe's pruner is one of these methods."""
    return any(stage == "prune" and whole_model(stage, name) for stage, name in recipe.steps)


def after_pruning(recipe: Recipe) -> Recipe:
    """What is left to do once the smaller model is there."""
    target = recipe.target.model_copy(update={"sparsity": 0.0})
    return recipe.model_copy(update={"target": target, "pruner": None})


def prepare(recipe: Recipe, model: Model) -> Structures:
    """What can be taken out of the model, and that the recipe can be followed; nothing long is done.

    Raises InputError for what cannot go with such a pruner, and for a sparsity that no widths come near.
    """
    name = _pruner(recipe)
    if recipe.train is None:
        raise InputError(f"{name} learns from text: give --train FILE, or {name}:train=FILE in a sweep")
    check_source(recipe.train)
    if recipe.target.pattern != "unstructured":
        raise InputError(f"{name} takes out whole channels and heads: leave out pattern {recipe.target.pattern}")
    if recipe.target.allocate != "uniform":
        raise InputError(f"{name} finds out itself what goes: leave out allocate {recipe.target.allocate}")
    if recipe.refine is not None:
        raise InputError(f"{name} leaves no mask to refine: leave out refine {recipe.refine}")
    options = _options(recipe)
    plan = recipe.target.layer_plan()
    group_size = plan.group_size if plan.wbits < 16 and plan.group_size > 0 else 1
    structures = find_structures(model, options.heads, options.multiple_of, group_size)
    structures.choices(recipe.target.density_gap)
    require_peft()
    return structures


def prune_whole_model(recipe: Recipe, model: Model, run: RunDir, reporter: Reporter) -> dict[str, Any]:
    """Put the smaller model in `run.path / "pruned"`, unless it is there, and return its figures.

    sparsity (share of the blocks' weights taken out), widths (what each block kept), sizes (of config.json), first_loss,
    last_loss (in nats, of training batches), removed_norm (largest LoRA norm of what was taken out, before it was),
    training_seconds (of all sittings, without what a kill lost).
    """
    folder, file = run.path / PRUNED, run.path / "training.safetensors"
    name, options = _pruner(recipe), _options(recipe)
    if (folder / "config.json").is_file():
        file.unlink(missing_ok=True)  # of a sitting that was killed in between
        figures = read_json(folder / "pruned.json")
        run.journal.write(event="replayed", method=name, seconds=figures["training_seconds"])
        return figures
    structures = prepare(recipe, model)
    windows = run.once("training_text", lambda: {"windows": _windows(recipe, model)})["windows"]
    trainee = Trainee(model, structures, options.lora_rank, recipe.calib.seed)
    with reporter.stage(f"{name}, step", options.steps) as stage:
        method = find_method("prune", name)
        with tracked(Teller(name, stage, run.journal), reporter.tracker, run.path / TRACKER, name) as tell:
            session = Session(file, tell)
            keep, figures = method.prune_model(trainee, windows, recipe.target.density_gap, options, session)
    if session.earlier:
        run.journal.write(event="replayed", method=name, seconds=session.earlier)
    figures["training_seconds"] = session.seconds
    trainee.merge()
    figures["sizes"] = structures.sizes(figures["widths"])
    _write(model, structures, keep, run, figures)
    file.unlink()
    kept = _widths_line(structures, figures["widths"])
    note = f"{name} kept {kept}: {figures['sparsity']:.1%} of the weights are gone"
    run.journal.write(event="note", layer="every block", note=note)
    return figures


def drop_smaller(run: Path) -> None:
    """Remove the smaller model from a run's folder, if there is one; a kill meanwhile leaves nothing that looks whole."""
    if (folder := run / PRUNED).is_dir():
        remove_checkpoint(folder)
        shutil.rmtree(folder)


def _widths_line(structures: Structures, widths: dict[str, int]) -> str:
    return " and ".join(f"{widths[kind.name]} of {kind.size} {kind.name}" for kind in structures.kinds)


class Teller:
    """Moves the bar each step, and writes a line of the journal now and then."""

    def __init__(self, method: str, stage: Stage, journal: Journal):
        self.method, self.stage, self.journal, self.since = method, stage, journal, time.monotonic()

    def __call__(self, step: int, figures: dict[str, Any]) -> None:
        """A step is done; `figures` of it, its loss among them."""
        if self.stage.done < step - 1:  # a training that goes on
            self.stage.skip(step - 1 - self.stage.done)
        self.stage.step(f"loss {figures['loss']:.3f}")
        if step % TOLD_EVERY == 0 or step == self.stage.total or "held_out" in figures:
            now = time.monotonic()
            seconds, self.since = round(now - self.since, 3), now
            self.journal.write(event="train", method=self.method, step=step, seconds=seconds, **figures)


def _pruner(recipe: Recipe) -> str:
    return next(name for stage, name in recipe.steps if stage == "prune")


def _options(recipe: Recipe) -> Any:
    name = _pruner(recipe)
    return find_options("prune", name, recipe.options.get(name, {}))


def _windows(recipe: Recipe, model: Model) -> Tensor:
    """The text to learn from, and a tenth more to hold out: tokens [n, seqlen]."""
    options = _options(recipe)
    assert recipe.train is not None  # prepare
    at_most = options.batch_size + math.ceil(options.steps * options.batch_size / 0.9)
    return training_windows(recipe.train, model.tokenizer, at_most, options.seqlen, recipe.calib.seed)


def _write(model: Model, structures: Structures, keep: Masks, run: RunDir, figures: dict[str, Any]) -> None:
    """The smaller model as an ordinary checkpoint; config.json last."""
    folder = run.path / PRUNED
    write_tensors(run.path / KEPT, _kept(model, structures, keep))
    writer = ShardWriter(folder)
    for name, tensor in model.as_stored(model.outside()).items():
        writer.add(name, tensor)
    for index, block in enumerate(model.modules):
        chosen = {name: masks[index] for name, masks in keep.items()}
        left = {name: structures.removed(name, tensor, chosen) for name, tensor in block.state_dict().items()}
        stored = {f"{model.path}.{index}.{name}": tensor for name, tensor in left.items()}
        for name, tensor in model.as_stored(stored).items():
            writer.add(name, tensor)
    writer.finish()
    copy_along(model.folder, folder)
    write_json(folder / "pruned.json", figures)
    write_json(folder / "config.json", with_sizes(plain_config(model), figures["sizes"]))


def _kept(model: Model, structures: Structures, keep: Masks) -> dict[str, Tensor]:
    """What stays of each layer that has lost something."""
    found: dict[str, Tensor] = {}
    for index in range(model.n_blocks):
        chosen = {name: masks[index] for name, masks in keep.items()}
        for layer in {port.layer for kind in structures.kinds for port in (*kind.writers, kind.reader)}:
            stays = dict(zip(("rows", "columns"), structures.stays(layer, chosen), strict=True))
            name = f"{model.path}.{index}.{layer}"
            found |= {f"{name}.{what}": mask.cpu() for what, mask in stays.items() if mask is not None}
    return found


def estimate_whole_model(recipe: Recipe, model: Model) -> Report:
    """`--dry-run` of such a pruner: what it would do, and how large the model would be without heads and channels.

    Between numbers of heads and channels that come to the same sparsity, the training decides.
    """
    structures, options = prepare(recipe, model), _options(recipe)
    choices = structures.choices(recipe.target.density_gap)
    sparsity = structures.sparsity(choices[-1])
    gone = round(sparsity * structures.n_weights)
    dense, parameters = dense_bytes(model), n_parameters(model)
    data = {
        "steps": [name for _, name in recipe.steps],
        "sparsity": sparsity,
        "widths": choices,
        "parameters": parameters - gone,
        "dense_bytes": dense,
        "compressed_bytes": round(dense * (1 - gone / parameters)),
        "training_tokens": options.steps * options.batch_size * options.seqlen,
    }
    rows = [
        ["steps", " then ".join(data["steps"])],
        ["every block keeps", "\nor ".join(_widths_line(structures, widths) for widths in choices)],
        ["weights gone", f"{sparsity:.1%} of the blocks'"],
        ["size before quantization", f"{size(dense)} to {size(data['compressed_bytes'])}"],
        ["learns from", f"{data['training_tokens']} tokens of {recipe.train}"],
    ]
    return Report(data, [table("", ["", ""], rows)])
