"""The loop over transformer blocks: observe, apply every step to every layer, save, move on."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.calib.gradients import FIELDS
from compress.calib.hidden import HiddenStates
from compress.calib.layers import Layer
from compress.calib.model import Block, Model
from compress.calib.observe import observe, shared_inputs, stages
from compress.calib.stats import LayerStats
from compress.checkpoint.native import Contents, decode, encode
from compress.checkpoint.stored import StoredLayer
from compress.clock import Clock
from compress.errors import RunError
from compress.gradients import Gradients
from compress.kernels.weights import IntWeight
from compress.plan import PlannedLayer
from compress.progress import Reporter
from compress.run_dir import RunDir
from compress.steps import Step
from compress.task import LayerTask


@dataclass(frozen=True)
class Work:
    """What the loop needs to know."""

    model: Model
    steps: list[Step]
    plans: dict[str, PlannedLayer]
    run: RunDir
    sequential: bool
    refresh_gradients: int = 0  # blocks after which gradients are taken anew; 0: never

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that the steps read."""
        return frozenset[str]().union(*(step.needs for step in self.steps))

    @property
    def gradients(self) -> Gradients:
        """Those of the needs that are not statistics of an input."""
        return Gradients(self.model, self.run, self.needs & FIELDS, self.refresh_gradients)


@dataclass(frozen=True)
class Finished:
    """What is kept of a layer until its block is saved; the task itself would keep its statistics in memory."""

    layer: Layer
    packed: IntWeight | None
    keep: Tensor | None  # [out, in] bool
    bits: float  # a weight, scales and zero points counted
    error: float  # relative, of the layer's output

    @property
    def n_weights(self) -> int:
        """How many weights the layer has."""
        return self.layer.shape[0] * self.layer.shape[1]

    @property
    def stored(self) -> StoredLayer | None:
        """The layer as the run folder keeps it; None if it is not quantized."""
        if self.packed is None:
            return None
        return StoredLayer(self.layer.name, self.layer.param, self.layer.index, self.layer.transposed, self.packed)


def block_key(index: int) -> str:
    """What the run folder calls a block."""
    return f"{index:04d}"


def compress_blocks(work: Work, tokens: Tensor | None, reporter: Reporter) -> None:
    """Take every block through the steps, or only replay it where an earlier sitting finished it.

    `tokens`: [nsamples, seqlen] int64, or None if no step needs calibration.
    """
    hidden = None
    if tokens is not None:  # gradients first, while there is one sequence's hidden states in memory at a time
        _take_gradients(work, 0, tokens, (work.model.embed(window) for window in tokens), reporter)
    clock = Clock()
    if tokens is not None:
        hidden = _embed(work, tokens)
    clock.lap("embed")
    with reporter.stage("block", work.model.n_blocks) as stage:
        for index in range(work.model.n_blocks):
            note = _advance(work, index, hidden, clock)
            work.run.journal.write(event="block", block=index, seconds=_rounded(clock.seconds))
            stage.step(note)
            if tokens is not None and hidden is not None:
                _take_gradients(work, index + 1, tokens, hidden, reporter)
            clock = Clock()
    if hidden is not None:
        hidden.close()


def _advance(work: Work, index: int, hidden: HiddenStates | None, clock: Clock) -> str:
    """Compress or replay one block and take the hidden states through it. Returns a line about it for the reader."""
    with work.model.loaded(index) as block:
        clock.lap("load")
        if work.run.has(block_key(index)):
            note = _replay(work, block)
            clock.lap("load")
        else:
            note = _compress_block(work, block, hidden, clock)
        if hidden is not None and index + 1 < work.model.n_blocks:
            for j in range(len(hidden)):
                hidden[j] = block(hidden[j])
        clock.lap("forward")
    return note


def _take_gradients(work: Work, index: int, tokens: Tensor, hidden: Iterable[Tensor], reporter: Reporter) -> None:
    """The gradients that belong before a block, if there are any and a block that they are for is not finished."""
    gradients = work.gradients
    if gradients.due(index) and not all(work.run.has(block_key(each)) for each in gradients.span(index)):
        gradients.take(index, tokens, hidden, reporter)


def _embed(work: Work, tokens: Tensor) -> HiddenStates:
    """The hidden states that enter the first block."""
    first = work.model.embed(tokens[0])
    hidden = HiddenStates(first, len(tokens), work.run.path)
    hidden[0] = first
    for index in range(1, len(tokens)):
        hidden[index] = work.model.embed(tokens[index])
    return hidden


def _replay(work: Work, block: Block) -> str:
    """Give a block the weights an earlier sitting made."""
    key = block_key(block.index)
    contents = decode(*work.run.restore(key), where=key)
    packed = {layer.name: layer.packed for layer in contents.layers}
    state = block.state()
    for name, tensor in contents.dense.items():
        state[name].copy_(tensor)
    for layer in block.layers:
        if layer.name in packed:
            layer.install(packed[layer.name].dequantize())
    work.run.journal.write(event="replayed", block=block.index, seconds=work.run.figures(key)["seconds"])
    return "finished before"


def _compress_block(work: Work, block: Block, hidden: HiddenStates | None, clock: Clock) -> str:
    """Observe, compress and save one block. Returns a line about it for the reader."""
    started = time.monotonic()
    if hidden is None:
        shared = {layer.name: layer.name for layer in block.layers}
    else:
        shared = shared_inputs(block, hidden[0])
    groups = stages(block, shared)
    if not work.sequential:
        groups = [[layer for group in groups for layer in group]]
    finished: list[Finished] = []
    for group in groups:
        stats = observe(block, group, hidden, work.needs - FIELDS, shared) if hidden is not None else {}
        clock.lap("observe")
        for layer in group:
            seen = replace(stats.pop(layer.name, LayerStats(0)), **work.gradients.of(block.index, layer.name))
            finished.append(_compress_layer(work, layer, seen))
        clock.lap("solve")
    for layer in block.layers:
        if layer.name not in shared:
            work.run.journal.write(event="note", layer=layer.name, note="left dense: the forward never calls it")
    _save(work, block, finished, time.monotonic() - started)
    clock.lap("save")
    worst = max(finished, key=lambda done: done.error)
    return f"error up to {worst.error:.3g} ({worst.layer.name.removeprefix(block.name + '.')})"


def _compress_layer(work: Work, layer: Layer, stats: LayerStats) -> Finished:
    """Take one layer through every step, with a line in the journal for each, and install what comes out."""
    weight = layer.weight.float().contiguous()
    if not torch.isfinite(weight).all():
        range_ = ", or its weights do not fit float16: use --dtype bfloat16" * (work.model.dtype == torch.float16)
        raise RunError(f"{layer.name} holds NaN or infinity as it came: the model's files are damaged{range_}")
    if not stats.finite:
        raise RunError(
            f"the inputs of {layer.name} hold NaN or infinity: weights before it are damaged, or too large for "
            f"{str(work.model.dtype).removeprefix('torch.')} (--dtype float32)"
        )
    task = LayerTask(layer.name, weight, weight, stats, work.plans[layer.name].plan, work.model.dtype)
    if work.needs and not stats.n_tokens:
        task = task.noted(
            "no calibration token reached this layer, so its inputs count as white noise: use more samples"
        )
    energy = stats.output_energy(weight)
    error, noted = 0.0, 0
    for step in work.steps:
        started = time.monotonic()
        task = step.run(task)
        seconds = time.monotonic() - started
        error = stats.output_energy(task.weight - weight) / energy if energy else 0.0
        if not torch.isfinite(task.weight).all():
            raise RunError(f"{step.name} made NaN or infinity of {layer.name}: use more calibration samples or damping")
        work.run.journal.write(
            event="layer", layer=layer.name, step=step.stage, method=step.name, seconds=round(seconds, 4),
            error=error, error_on=stats.measured_on, density=_density(task), bits=_bits(task, layer),
            notes=task.notes[noted:],
        )  # fmt: skip
        noted = len(task.notes)
    layer.install(task.weight)
    return Finished(layer, task.packed, task.keep, _bits(task, layer), error)


def _density(task: LayerTask) -> float:
    return 1.0 if task.keep is None else task.keep.float().mean().item()


def _bits(task: LayerTask, layer: Layer) -> float:
    """Bits a weight takes, scales and zero points counted."""
    if task.packed is None:
        return layer.stored.element_size() * 8.0
    return task.packed.nbytes * 8 / task.weight.numel()


def _save(work: Work, block: Block, finished: list[Finished], seconds: float) -> None:
    """Put the finished block in the run folder."""
    stored = [done.stored for done in finished if done.stored is not None]
    replaced = {layer.param for layer in stored}
    dense = {name: tensor for name, tensor in block.state().items() if name not in replaced}
    masks = {done.layer.name: done.keep for done in finished if done.keep is not None}
    figures = {
        "weights": sum(done.n_weights for done in finished),
        "pruned": sum(int((~keep).sum()) for keep in masks.values()),
        "bits": sum(done.bits * done.n_weights for done in finished),
        "seconds": round(seconds, 3),
    }
    work.run.save(block_key(block.index), *encode(Contents(stored, dense, masks)), figures)


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}
