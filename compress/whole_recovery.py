"""Methods of recovery that train the whole compressed model: after the blocks, before the checkpoint.

run/recovery_text_512.safetensors       the windows that methods with such a seqlen learn from
run/teacher/, or that of a sweep        the dense model's last hidden states there (teacher.py)
run/recovery_1.safetensors              what a killed training goes on from
run/blocks/0007-1.safetensors           a block after the first of these methods
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from compress.blocks import block_key
from compress.calib.data import training_windows
from compress.calib.model import Model
from compress.calib.texts import check_source
from compress.checkpoint.formats import as_held
from compress.checkpoint.native import Contents, decode, encode
from compress.checkpoint.stored import StoredLayer
from compress.clock import forget_peak, peak_rss_bytes
from compress.errors import InputError
from compress.progress import Reporter
from compress.recipe import Recipe
from compress.recover.variants import AdapterOptions
from compress.recovery import Recovered, TrainOptions
from compress.steps import find_method, find_options, whole_model
from compress.student import student_of, with_results
from compress.teacher import last_hidden_states
from compress.trainer import Course, Training, held_out
from compress.training import Session, require_peft
from compress.training_budget import TrainingBudget
from compress.whole_model import Teller, prunes_whole_model
from compress.work import Work

FEWEST = 8  # windows to learn from, however short the time
RECOVERY = "recovery"  # in the figures of the first block: those of the method


def trained_methods(recipe: Recipe) -> list[str]:
    """The recipe's methods of recovery that train the whole model, in order."""
    return [name for name in recipe.recover if whole_model("recover", name)]


def trained_options(recipe: Recipe) -> list[tuple[str, Any]]:
    """Those methods with their options."""
    return [(name, find_options("recover", name, recipe.options.get(name, {}))) for name in trained_methods(recipe)]


def prepare_recovery(recipe: Recipe) -> None:
    """Raise InputError for methods of recovery that the recipe cannot be followed with; nothing is done."""
    trained = trained_methods(recipe)
    if not trained:
        return
    if late := [name for name in recipe.recover[recipe.recover.index(trained[0]) :] if name not in trained]:
        raise InputError(f"{late[0]} works on layers while they are compressed: name it before {trained[0]}")
    for name in trained:
        if not recipe.quantizes and getattr(find_method("recover", name), "PACKED_ONLY", False):
            raise InputError(f"{name} works on quantized layers: give --wbits, or take --recover lora")
    if any(isinstance(options, AdapterOptions) for _, options in trained_options(recipe)):
        require_peft()
    if recipe.train is None and recipe.calib.source == "self":
        raise InputError(f"{trained[0]} learns from text that somebody wrote: give --train TEXT")
    if recipe.train is not None:
        check_source(recipe.train)


def training_cost(recipe: Recipe, model: Model) -> tuple[int, float]:
    """About how many tokens all methods learn from together, and the seconds that it takes, the teacher's among them.

    For a budget in time the tokens are what this machine may come to.
    """
    budget, tokens, seconds = TrainingBudget.read(recipe.recover_for), 0, 0.0
    for _, options in trained_options(recipe):
        windows = _windows_of(recipe, model, options.seqlen)
        tokens += windows * options.seqlen
        a_window = _seconds(model, options.seqlen)
        seconds += (windows * a_window if budget.seconds is None else budget.seconds) + windows * a_window / 4
    return tokens, seconds


def recovered_key(recipe: Recipe, index: int) -> str:
    """What the run folder calls a block once all is done to it."""
    return _key(index, len(trained_methods(recipe)))


class Recovery:
    """What trains the blocks of a run that are finished.

    `dense`: opens the model as it came, to teach.
    """

    def __init__(self, recipe: Recipe, work: Work, dense: Callable[[], Model], reporter: Reporter):
        self.recipe, self.work, self.reporter = recipe, work, reporter
        self.peak = 0  # bytes held at most before the last training began
        own_head = recipe.target.head_bits < 16 or prunes_whole_model(recipe)
        self.teacher = dense() if own_head and trained_methods(recipe) else work.model

    def run(self) -> list[dict[str, Any]]:
        """Take the finished blocks through each method, unless an earlier sitting did, and return figures of each.

        method; those of `Training.run`; peak_rss_bytes, of the training alone (None where the system cannot say).
        Raises InputError for too little text, RunError where a training cannot go on.
        """
        figures = []
        for number, (name, options) in enumerate(trained_options(self.recipe), 1):
            run = self.work.run
            if all(run.has(_key(index, number)) for index in range(self.work.model.n_blocks)):
                done = run.figures(_key(0, number))[RECOVERY]
                run.journal.write(event="replayed", method=name, seconds=done["training_seconds"])
            else:
                done = self._recover(number, name, options)
            figures.append(done)
        return figures

    def _recover(self, number: int, name: str, options: TrainOptions) -> dict[str, Any]:
        run, model = self.work.run, self.work.model
        windows = self._windows(name, options.seqlen)
        started = time.monotonic()
        states = last_hidden_states(self.teacher, windows, run.folder_of("teacher") / "teacher", self.reporter)
        run.journal.write(event="teacher", tokens=windows.numel(), seconds=round(time.monotonic() - started, 3))
        course = Course(windows, states, self.teacher.lm, self.recipe.calib.seed)
        session = Session(run.path / f"recovery_{number}.safetensors", lambda *_: None)
        self.peak = max(self.peak, peak_rss_bytes())
        own_peak = forget_peak()
        with student_of(model, self._blocks(number - 1), run.journal) as student:
            learner = find_method("recover", name).recover_model(student, options)
            training = Training(student.lm, learner, course, options, name)
            training.begin(TrainingBudget.read(self.recipe.recover_for), session)
            with self.reporter.stage(f"{name}, step", training.steps) as stage:
                session.tell = Teller(name, stage, run.journal)
                figures = {"method": name, **training.run(session)}
            figures["peak_rss_bytes"] = peak_rss_bytes() if own_peak else None
            results = learner.results()
        states.close()
        if session.earlier:
            run.journal.write(event="replayed", method=name, seconds=session.earlier)
        self._save(number, results, figures)
        session.file.unlink()
        run.journal.write(event="recovered", **figures)
        return figures

    def _windows(self, name: str, seqlen: int) -> Tensor:
        """The text to learn from, and some more to hold out: tokens [n, seqlen]."""
        recipe, model, source = self.recipe, self.work.model, self.recipe.train or self.recipe.calib.source

        def cut() -> dict[str, Tensor]:
            wanted = _windows_of(recipe, model, seqlen)
            at_most = wanted + held_out(wanted + wanted // 9)
            return {"windows": training_windows(source, model.tokenizer, at_most, seqlen, recipe.calib.seed)}

        windows = self.work.run.once(f"recovery_text_{seqlen}", cut)["windows"]
        if len(windows) < 2:
            raise InputError(
                f"{source} gives {len(windows)} windows of {seqlen} tokens, and {name} takes two at least: use a longer "
                f"text, or lower --set {name}.seqlen"
            )
        return windows

    def _blocks(self, number: int) -> Iterator[Contents]:
        for index in range(self.work.model.n_blocks):
            yield decode(*self.work.run.restore(_key(index, number)), where=_key(index, number))

    def _save(self, number: int, results: dict[str, Recovered], figures: dict[str, Any]) -> None:
        """Put blocks with what became of their layers in the run folder."""
        work, model = self.work, self.work.model
        for index, before in enumerate(self._blocks(number - 1)):
            inside = {layer.name: results[layer.name] for layer in model.layers_of(index) if layer.name in results}
            after = with_results(before, inside, model.dtype, self.recipe.adapter_bits)
            own = work.run.figures(_key(index, number - 1)) | ({RECOVERY: figures} if not index else {})
            own["bits"] += sum(map(self._bits, after.layers)) - sum(map(self._bits, before.layers))
            work.run.save(_key(index, number), *encode(after), own)

    def _bits(self, layer: StoredLayer) -> int:
        """Bits of a layer in the checkpoint, its correction counted."""
        added = 0 if layer.correction is None else layer.correction.nbytes
        return 8 * (as_held(self.work.format_name, layer).packed.nbytes + added)


def _key(index: int, number: int) -> str:
    """What the run folder calls a block after so many methods."""
    return f"{block_key(index)}-{number}" if number else block_key(index)


def _windows_of(recipe: Recipe, model: Model, seqlen: int) -> int:
    """How many windows a method can go through once; for a budget in time a power of two, about what there is time for."""
    budget = TrainingBudget.read(recipe.recover_for)
    if budget.tokens is not None:
        return max(1, -(-budget.tokens // seqlen))
    assert budget.seconds is not None
    return max(FEWEST, 2 ** round(math.log2(max(1.0, budget.seconds / _seconds(model, seqlen)))))


def _seconds(model: Model, seqlen: int) -> float:
    """About what a window costs: the first block stands for all, which run forward twice and backward."""
    window = torch.zeros(seqlen, dtype=torch.int64)
    hidden = model.embed(window)
    with model.loaded(0) as block:
        block(hidden)
        started = time.monotonic()
        block(hidden)
        blocks = (time.monotonic() - started) * model.n_blocks
    some = min(seqlen, 64)
    started = time.monotonic()
    model.logits(hidden[:, :some])
    head = (time.monotonic() - started) * seqlen / some
    return 4 * blocks + 4 * head
