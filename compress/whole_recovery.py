"""Methods of recovery that train the whole compressed model: after the blocks, before the checkpoint.

run/recovery_text_512.safetensors       the windows that methods with such a seqlen learn from
run/teacher/, or that of a sweep        the dense model's last hidden states there (teacher.py)
run/recovery_1.safetensors              what a killed training goes on from
run/blocks/0007-1.safetensors           a block after the first of these methods
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.blocks import block_key
from compress.calib.data import training_windows
from compress.calib.model import Model
from compress.calib.ranks import ALONE
from compress.calib.texts import check_source
from compress.calib.weight_files import read_all
from compress.checkpoint.adapter import FOR_DENSE, peft_bytes, write_peft
from compress.checkpoint.formats import as_held
from compress.checkpoint.native import Contents, decode, encode
from compress.checkpoint.stored import StoredLayer
from compress.clock import forget_peak, peak_rss_bytes
from compress.errors import InputError
from compress.progress import Reporter
from compress.recipe import Recipe
from compress.recover.variants import AdapterOptions
from compress.recovery import Recovered, TrainOptions
from compress.steps import find_method, find_options, methods, whole_model
from compress.student import student_of, with_results
from compress.teacher import LastHidden, last_hidden_states
from compress.tracker import tracked
from compress.trainer import Course, Training, held_out
from compress.training import Session, require_peft
from compress.training_budget import TrainingBudget
from compress.whole_model import KEPT, TRACKER, Teller, prunes_whole_model
from compress.work import Work

TRIES = 5  # of what a window costs
FEWEST = 8  # windows to learn from, however short the time
RECOVERY = "recovery"  # in the figures of the first block: those of the method


def trained_methods(recipe: Recipe) -> list[str]:
    """The recipe's methods of recovery that train the whole model, in order."""
    return [name for name in recipe.recover if whole_model("recover", name)]


def trained_options(recipe: Recipe) -> list[tuple[str, Any]]:
    """Those methods with their options."""
    return [(name, find_options("recover", name, recipe.options.get(name, {}))) for name in trained_methods(recipe)]


def untrained(recipe: Recipe) -> Recipe:
    """The same run without the methods that train the whole model: what its blocks are before them depends on."""
    trained = trained_methods(recipe)
    if not trained:
        return recipe
    recover = [name for name in recipe.recover if name not in trained]
    options = {name: values for name, values in recipe.options.items() if name not in trained}
    plain = {name: Recipe.model_fields[name].default for name in ("recover_for", "adapter_bits", "scatter", "train")}
    if recover:
        plain["adapter_bits"] = recipe.adapter_bits
    return recipe.model_copy(update={"recover": recover, "options": options, **plain})


def prepare_recovery(recipe: Recipe) -> None:
    """Raise InputError for methods of recovery that the recipe cannot be followed with; nothing is done."""
    trained = trained_methods(recipe)
    if recipe.scatter:
        _prepare_scatter(recipe)
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


def _prepare_scatter(recipe: Recipe) -> None:
    """Raise InputError where the last method of recovery has no adapters for the dense model."""
    scatters = [name for name, method in methods("recover").items() if getattr(method, "SCATTERS", False)]
    if (last := recipe.recover[-1]) not in scatters:
        raise InputError(f"{last} learns nothing for the dense model: leave out --scatter, or end with {scatters[0]}")
    if find_options("recover", last, recipe.options.get(last, {})).sparse:  # type: ignore[attr-defined]
        raise InputError(f"no adapter of PEFT holds single weights: leave out --scatter, or --set {last}.sparse")


def training_cost(recipe: Recipe, model: Model) -> tuple[int, float]:
    """About how many tokens all methods learn from together, and the seconds that it takes, the teacher's among them.

    For a budget in time the tokens are what this machine may come to.
    """
    budget, tokens, seconds = TrainingBudget.read(recipe.recover_for), 0, 0.0
    for _, options in trained_options(recipe):
        windows = _windows_of(recipe, model, options.seqlen)
        tokens += windows * options.seqlen
        a_window = _seconds(model, options.seqlen)
        teaching = windows * a_window / 4 if options.kl else 0.0
        seconds += (windows * a_window if budget.seconds is None else budget.seconds) + teaching
    return tokens, seconds


def recovered_key(recipe: Recipe, index: int) -> str:
    """What the run folder calls a block once all is done to it."""
    return _key(index, len(trained_methods(recipe)))


class Recovery:
    """What trains the blocks of a run that are finished: all ranks together.

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
            done = self.work.ranks.agree(partial(self._finished_before, number, name))
            figures.append(self._recover(number, name, options) if done is None else done)
        return figures

    def _finished_before(self, number: int, name: str) -> dict[str, Any] | None:
        """The figures of a method that an earlier sitting finished."""
        run = self.work.run
        lost = self._scatters(number) and not peft_bytes(self._for_dense)
        if lost or not all(run.has(_key(index, number)) for index in range(self.work.model.n_blocks)):
            return None
        self._state(number).unlink(missing_ok=True)  # of a sitting that was killed in between
        done: dict[str, Any] = run.figures(_key(0, number))[RECOVERY]
        run.journal.write(event="replayed", method=name, seconds=done["training_seconds"])
        return done

    def for_dense(self) -> dict[str, int]:
        """After `run`: adapter_for_dense_bytes, of the adapter for the dense model, which is not part of the checkpoint."""
        return {"adapter_for_dense_bytes": peft_bytes(self._for_dense)} if self.recipe.scatter else {}

    @property
    def _for_dense(self) -> Path:
        return self.work.run.path.parent / FOR_DENSE

    def _scatters(self, number: int) -> bool:
        """Whether a method's adapters are for the dense model as well: the last one's, if that is asked."""
        return self.recipe.scatter and number == len(trained_methods(self.recipe))

    def _state(self, number: int) -> Path:
        """What a killed training goes on from."""
        return self.work.run.path / f"recovery_{number}.safetensors"

    def _recover(self, number: int, name: str, options: TrainOptions) -> dict[str, Any]:
        run, model = self.work.run, self.work.model
        windows = self._windows(name, options.seqlen)
        states = self._taught(windows) if options.kl else None
        course = Course(windows, states, self.teacher.lm, self.recipe.calib.seed)
        session = Session(self._state(number), lambda *_: None, writes=self.work.ranks.first)
        self.peak = max(self.peak, peak_rss_bytes())
        own_peak = forget_peak()
        method = find_method("recover", name)
        sharing = self.work.ranks if getattr(method, "KEEPS_CODES", False) else ALONE
        with student_of(model, self._blocks(number - 1), run.journal, sharing) as student:
            student.windows = windows[: len(windows) - course.n_held_out]
            student.scatter = self._scatters(number)
            learner = method.recover_model(student, options)
            training = Training(student.lm, learner, course, options, name, self.work.ranks)
            training.begin(TrainingBudget.read(self.recipe.recover_for), session)
            with (
                self.reporter.stage(f"{name}, step", training.steps) as stage,
                tracked(Teller(name, stage, run.journal), self.reporter.tracker, run.path / TRACKER, name) as tell,
            ):
                session.tell = tell
                figures = {"method": name, **training.run(session)}
            figures["peak_rss_bytes"] = peak_rss_bytes() if own_peak else None
            results = learner.results()
        if states is not None:
            states.close()
        if session.earlier:
            run.journal.write(event="replayed", method=name, seconds=session.earlier)
        with self.work.ranks.first_goes_first():
            if self.work.ranks.first:
                self._write_for_dense(results)
                self._save(number, results, figures)
                session.file.unlink()
        run.journal.write(event="recovered", **figures)
        return figures

    def _taught(self, windows: Tensor) -> LastHidden:
        """What the dense model's last hidden states are there."""
        run, started = self.work.run, time.monotonic()
        with run.ranks.first_goes_first():
            states = last_hidden_states(self.teacher, windows, run.folder_of("teacher") / "teacher", self.reporter)
        run.journal.write(event="teacher", tokens=windows.numel(), seconds=round(time.monotonic() - started, 3))
        return states

    def _windows(self, name: str, seqlen: int) -> Tensor:
        """The text to learn from, and some more to hold out: tokens [n, seqlen]."""
        recipe, model, source = self.recipe, self.work.model, self.recipe.train or self.recipe.calib.source

        def cut() -> dict[str, Tensor]:
            wanted = _windows_of(recipe, model, seqlen)
            at_most = wanted + held_out(wanted + wanted // 9)
            return {"windows": training_windows(source, model.tokenizer, at_most, seqlen, recipe.calib.seed)}

        with self.work.ranks.first_goes_first():
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

    def _write_for_dense(self, results: dict[str, Recovered]) -> None:
        """Put what was learned for the dense model beside the checkpoint, with zeros where the model was made smaller."""
        learned = {name: each.for_dense for name, each in results.items() if each.for_dense is not None}
        if not learned:
            return
        run, dtype = self.work.run, self.work.model.dtype
        kept = read_all(run.path / KEPT)[0] if prunes_whole_model(self.recipe) else {}
        scattered = {
            name: each.scattered(kept.get(f"{name}.rows"), kept.get(f"{name}.columns")).to(dtype)
            for name, each in learned.items()
        }
        write_peft(self._for_dense, scattered, base_model=self.recipe.model)
        note = f"the adapter for the dense model is in {self._for_dense}"
        run.journal.write(event="note", layer="every layer", note=note)

    def _bits(self, layer: StoredLayer) -> int:
        """Bits of a layer in the checkpoint, its correction counted."""
        added = 0 if layer.correction is None else layer.correction.nbytes
        return 8 * (as_held(self.work.format_name, layer).packed.nbytes + added)


def _key(index: int, number: int) -> str:
    """What the run folder calls a block after so many methods."""
    return f"{block_key(index)}-{number}" if number else block_key(index)


def _windows_of(recipe: Recipe, model: Model, seqlen: int) -> int:
    """How many windows a method can go through once; for a budget in time a power of two, and no fewer than there is time for.

    What a step takes is measured later, with the model in memory; too few windows would then be learned from twice.
    """
    budget = TrainingBudget.read(recipe.recover_for)
    if budget.tokens is not None:
        return max(1, -(-budget.tokens // seqlen))
    assert budget.seconds is not None
    return max(FEWEST, 2 ** math.ceil(math.log2(max(1.0, budget.seconds / _seconds(model, seqlen)))))


def _seconds(model: Model, seqlen: int) -> float:
    """About what a window costs: the first block stands for all, which run forward twice and backward.

    The least of some tries counts, as other work on the machine only makes one longer.
    """
    window = torch.zeros(seqlen, dtype=torch.int64)
    hidden = model.embed(window)
    with model.loaded(0) as block:
        blocks = _least_seconds(partial(block, hidden)) * model.n_blocks
    some = min(seqlen, 64)
    head = _least_seconds(partial(model.logits, hidden[:, :some])) * seqlen / some
    return 4 * blocks + 4 * head


def _least_seconds(work: Callable[[], Any]) -> float:
    found = []
    for _ in range(TRIES):
        started = time.monotonic()
        work()
        found.append(time.monotonic() - started)
    return min(found)
