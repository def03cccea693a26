"""The loop over transformer blocks: observe, apply every step to every layer, save, move on."""

import time
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor

from compress.activations import InputPreparer, Prepared
from compress.calib.gradients import FIELDS
from compress.calib.hidden import HiddenStates, Sequences
from compress.calib.layers import Layer
from compress.calib.model import Block
from compress.calib.norms import emitting_norms
from compress.calib.observe import observe, saturation, shared_inputs, stages
from compress.calib.stats import LayerStats
from compress.checkpoint.native import Contents, decode, encode
from compress.clock import Clock
from compress.progress import Reporter
from compress.sharing import share_finished, share_vectors
from compress.solve import Reader, compress_layers
from compress.work import Finished, Work


def block_key(index: int) -> str:
    """What the run folder calls a block."""
    return f"{index:04d}"


def compress_blocks(work: Work, tokens: Tensor | None, reporter: Reporter) -> None:
    """Take every block through the steps, or only replay it where an earlier sitting finished it.

    `tokens`: [nsamples, seqlen] int64, or None if no step needs calibration. Each rank sends its share of the sequences
    through every block; whoever owns an input sums its statistics and solves the layers that read it.
    """
    sequences = None
    n_blocks, ranks = work.model.n_blocks, work.ranks
    finished = set(ranks.agree(lambda: [index for index in range(n_blocks) if work.run.has(block_key(index))]))
    if len(finished) == n_blocks:
        tokens = None  # nothing is left to calibrate
    if tokens is not None:
        tokens = tokens[list(ranks.share(len(tokens)))]
        # gradients first, while there is one sequence's hidden states in memory at a time
        _take_gradients(work, 0, finished, tokens, (work.model.embed(window) for window in tokens), reporter)
    clock = Clock()
    if tokens is not None:
        sequences = Sequences(_embed(work, tokens), _embed(work, tokens) if work.drift else None)
    clock.lap("embed")
    with reporter.stage("block", n_blocks) as stage:
        for index in range(n_blocks):
            note = _advance(work, index, index in finished, sequences, clock)
            work.run.journal.write(event="block", block=index, seconds=_rounded(clock.seconds))
            stage.step(note)
            if tokens is not None and sequences is not None:
                _take_gradients(work, index + 1, finished, tokens, sequences.hidden, reporter)
            clock = Clock()
    if sequences is not None:
        sequences.close()


def _advance(work: Work, index: int, finished: bool, sequences: Sequences | None, clock: Clock) -> str:
    """Compress or replay one block and take the hidden states through it. Returns a line about it for the reader."""
    with work.model.loaded(index) as block:
        clock.lap("load")
        if finished:
            if sequences is not None and sequences.dense is not None:
                for j, hidden in enumerate(sequences.dense):
                    sequences.dense[j] = block(hidden)
                clock.lap("forward")
            note = _replay(work, block)
            clock.lap("load")
        else:
            note = _compress_block(work, block, sequences, clock)
        if sequences is not None:
            _forward(work, block, sequences.hidden)
        clock.lap("forward")
    return note


def _forward(work: Work, block: Block, hidden: HiddenStates | list[Tensor]) -> None:
    """Take the hidden states through a finished block, with a line in the journal for what its codes could not hold."""
    with saturation(block) as counts:
        if block.index + 1 < work.model.n_blocks or counts:
            for j in range(len(hidden)):
                hidden[j] = block(hidden[j])
    everyones = work.ranks.gather(counts)
    for name in counts:
        beyond, total = (sum(each) for each in zip(*(theirs[name] for theirs in everyones), strict=True))
        work.run.journal.write(event="saturation", layer=name, share=beyond / total)


def _take_gradients(
    work: Work, index: int, finished: set[int], tokens: Tensor, hidden: Iterable[Tensor], reporter: Reporter
) -> None:
    """The gradients that belong before a block, if there are any and a block that they are for was not finished."""
    gradients = work.gradients
    if gradients.due(index) and not finished.issuperset(gradients.span(index)):
        gradients.take(index, tokens, hidden, reporter)


def _embed(work: Work, tokens: Tensor) -> HiddenStates:
    """The hidden states that enter the first block."""
    first = work.model.embed(tokens[0])
    hidden = HiddenStates(first, len(tokens), work.ranks.own_folder(work.run.path))
    hidden[0] = first
    for index in range(1, len(tokens)):
        hidden[index] = work.model.embed(tokens[index])
    return hidden


def finished_blocks(work: Work) -> Iterator[Block]:
    """Each block in turn with the weights that it has ended with."""
    for block in work.model.blocks():
        _restore(work, block)
        yield block


def _replay(work: Work, block: Block) -> str:
    """Give a block the weights an earlier sitting made."""
    _restore(work, block)
    seconds = work.run.figures(block_key(block.index))["seconds"]
    work.run.journal.write(event="replayed", block=block.index, seconds=seconds)
    return "finished before"


def _restore(work: Work, block: Block) -> None:
    key = block_key(block.index)
    contents = decode(*work.run.restore(key), where=key)
    stored = {layer.name: layer for layer in contents.layers}
    state = block.state()
    for name, tensor in contents.dense.items():
        state[name].copy_(tensor)
    for layer in block.layers:
        if layer.name in stored:
            layer.install(stored[layer.name].dequantize())
            layer.quantize_inputs(stored[layer.name].inputs)


def _compress_block(work: Work, block: Block, sequences: Sequences | None, clock: Clock) -> str:
    """Observe, compress and save one block. Returns a line about it for the reader."""
    started = time.monotonic()
    example = None if sequences is None else sequences.hidden[0]
    if example is None:
        shared = {layer.name: layer.name for layer in block.layers}
    else:
        shared = shared_inputs(block, example)
    groups = stages(block, shared)
    if not work.sequential:
        groups = [[layer for group in groups for layer in group]]
    preparer, plans = _preparer(work, block, shared, example), {name: work.plans[name].plan for name in shared}
    finished: list[Finished] = []
    for group in groups:
        by_input = _by_input(group, shared)
        owners = work.ranks.owners({name: _cost(readers) for name, readers in by_input.items()})
        stats: dict[str, LayerStats] = {}
        if sequences is not None:
            stats = observe(block, group, sequences, work.needs - FIELDS, shared, owners)
        clock.lap("observe")
        inputs: dict[str, Prepared] = {}
        if preparer is not None:
            stats = share_vectors(work.ranks, stats, shared)
            inputs = preparer.prepare(group, plans, stats)
        own = [by_input[name] for name in by_input if owners.has(name)]
        solved = [compress_layers(work, (_reader(work, block, each, stats, inputs) for each in mine)) for mine in own]
        layers = list(chain.from_iterable(by_input.values()))
        finished += share_finished(work.ranks, layers, list(chain.from_iterable(solved)))
        clock.lap("solve")
    for line in chain.from_iterable(done.journal for done in finished):
        work.run.journal.write(**line)
    for layer in block.layers:
        if layer.name not in shared:
            work.run.journal.write(event="note", layer=layer.name, note="left dense: the forward never calls it")
        elif not work.plans[layer.name].plan.changes:
            work.run.journal.write(event="note", layer=layer.name, note="left dense: the plan asks nothing of it")
    _save(work, block, finished, time.monotonic() - started)
    clock.lap("save")
    worst = max(finished, key=lambda done: done.error)
    return f"error up to {worst.error:.3g} ({worst.layer.name.removeprefix(block.name + '.')})"


def _by_input(layers: list[Layer], shared: dict[str, str]) -> dict[str, list[Layer]]:
    """The layers that the forward calls, by the first that reads the same input."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.name in shared:
            found.setdefault(shared[layer.name], []).append(layer)
    return found


def _cost(readers: list[Layer]) -> float:
    """About what it costs to observe and solve the layers that read one input, in units of a product."""
    in_features = readers[0].shape[1]
    return in_features**2 * (in_features + sum(layer.shape[0] for layer in readers))


def _reader(
    work: Work, block: Block, layer: Layer, stats: dict[str, LayerStats], inputs: dict[str, Prepared]
) -> Reader:
    """A layer with what is known of its input, which is taken from `stats`: it is not to stay in memory."""
    prepared = inputs.get(layer.name)

    def gradients() -> dict[str, Any]:
        found = work.gradients.of(block.index, layer.name)
        return found if prepared is None else prepared.gradients(found)

    return Reader(layer, stats.pop(layer.name, LayerStats(0)), prepared, gradients)


def _preparer(work: Work, block: Block, shared: dict[str, str], example: Tensor | None) -> InputPreparer | None:
    """What takes the inputs through their step, if there is one; it looks for norms while nothing is rounded yet."""
    if work.of_inputs is None:
        return None
    norms = {} if example is None else emitting_norms(block, shared, example)
    return InputPreparer(work.of_inputs, norms, shared, work.run.journal)


def _save(work: Work, block: Block, finished: list[Finished], seconds: float) -> None:
    """Put the finished block in the run folder, if this rank is the one that writes."""
    if not work.ranks.first:
        return
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
