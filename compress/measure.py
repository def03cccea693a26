"""What a rule of allocation asks of the dense model, measured with one block in memory at a time.

A rule with `measure_block` gets the weights and input statistics of each block. A rule with `trials` gets the loss of
each trial: at its block a trial starts as the dense hidden states sent through the changed block, and from there on its
hidden states go through every dense block, beside those of the dense model itself. The loss of the finished model is
measured in the same way, on the same text.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.allocate.spread import Trial, TrialOptions
from compress.calib.gradients import FIELDS
from compress.calib.hidden import HiddenStates, Sequences
from compress.calib.layers import Layer
from compress.calib.model import Block, Model
from compress.calib.observe import observe, shared_inputs
from compress.calib.stats import LayerStats
from compress.errors import RunError
from compress.gradients import Gradients
from compress.losses import losses
from compress.plan import PlannedLayer, find_rule
from compress.progress import Reporter
from compress.recipe import Recipe
from compress.run_dir import RunDir
from compress.steps import Step, find_trial_steps
from compress.task import LayerPlan, LayerTask


@dataclass(frozen=True)
class DenseModel:
    """A model that nothing was done to yet, and what its layers are asked to become."""

    model: Model
    layers: list[PlannedLayer]
    run: RunDir  # for gradients, and hidden states that are too many for memory
    reporter: Reporter


def measures(recipe: Recipe) -> bool:
    """Whether the recipe's rule of allocation has anything measured."""
    rule, _ = find_rule(recipe)
    return hasattr(rule, "measure_block") or hasattr(rule, "trials")


def measure(dense: DenseModel, recipe: Recipe, tokens: Tensor) -> dict[str, Tensor]:
    """What the recipe's rule asks for: "measured", float64, [n_layers] of a `measure_block`, [n_trials] of `trials`.

    With trials also "outputs", [samples, tokens, hidden_size], what leaves the dense model's last block. `tokens`:
    [nsamples, seqlen] int64. The model's weights are as before in the end. Raises RunError if the model yields NaN or
    infinity.
    """
    rule, options = find_rule(recipe)
    if hasattr(rule, "trials"):
        planned = rule.trials(dense.layers, recipe.target.layer_plan(), options)
        return _tried(dense, tokens, find_trial_steps(recipe, rule.stand_ins(options)), planned, options)
    never_called = torch.zeros((), dtype=torch.float64)
    figures = {layer.name: never_called for layer in dense.layers}
    for _, layers, stats in _observed_blocks(dense, tokens, rule.NEEDS):
        found = rule.measure_block([(layer.weight, stats[layer.name]) for layer in layers], options)
        figures |= {layer.name: figure for layer, figure in zip(layers, found, strict=True)}
    return {"measured": torch.stack([figures[layer.name] for layer in dense.layers])}


def measure_whole(model: Model, blocks: Iterable[Block], recipe: Recipe, tokens: Tensor, outputs: Tensor) -> float:
    """The loss of a model with other `blocks`, measured as that of trials is.

    `blocks`: each in turn, loaded; `outputs`: the dense model's, as `measure` gave them.
    """
    _, options = find_rule(recipe)
    n = len(outputs)
    streams = HiddenStates(outputs[:1], 2 * n)
    for index, sequence in enumerate(_sample(tokens, options)):
        streams[index] = outputs[index : index + 1]
        streams[n + index] = model.embed(sequence)
    for block in blocks:
        for index in range(n, 2 * n):
            streams[index] = block(streams[index])
    return losses(options.loss, model, streams, n, options.positions).item()


def _sample(tokens: Tensor, options: TrialOptions) -> Tensor:
    return tokens[: options.samples, : options.tokens]


def _observed_blocks(
    dense: DenseModel, tokens: Tensor, needs: frozenset[str]
) -> Iterator[tuple[Block, list[Layer], dict[str, LayerStats]]]:
    """Each block, the layers its forward calls, and the statistics of their inputs over all `tokens`."""
    model = dense.model
    hidden = HiddenStates(model.embed(tokens[0]), len(tokens), dense.run.path)
    for index, sequence in enumerate(tokens):
        hidden[index] = model.embed(sequence)
    with dense.reporter.stage("measuring block", model.n_blocks) as stage:
        for block in model.blocks():
            shared = shared_inputs(block, hidden[0])
            layers = [layer for layer in block.layers if layer.name in shared]
            stats = observe(block, layers, Sequences(hidden), needs, shared)
            for layer in layers:
                _require_finite(layer, stats[layer.name], model.dtype)
            yield block, layers, stats
            if block.index + 1 < model.n_blocks:
                for index in range(len(hidden)):
                    hidden[index] = block(hidden[index])
            stage.step()
    hidden.close()


def _require_finite(layer: Layer, stats: LayerStats, dtype: torch.dtype) -> None:
    if not (stats.finite and bool(torch.isfinite(layer.weight).all())):
        name = str(dtype).removeprefix("torch.")
        raise RunError(
            f"{layer.name} or its inputs hold NaN or infinity: the model's files are damaged, or do not fit {name} "
            "(--dtype float32)"
        )


def _tried(
    dense: DenseModel, tokens: Tensor, steps: list[Step], trials: list[Trial], options: TrialOptions
) -> dict[str, Tensor]:
    """The loss of each trial, and what leaves the dense model's last block. Trials come in the order of their blocks."""
    model, sample = dense.model, _sample(tokens, options)
    n, needs = len(sample), frozenset[str]().union(*(step.needs for step in steps))
    of_inputs = needs - FIELDS
    gradients = Gradients(model, dense.run, needs & FIELDS, every=0)
    if gradients.due(0):
        gradients.take(0, tokens, (model.embed(sequence) for sequence in tokens), dense.reporter)
    # The dense model's hidden states, then those of each trial begun.
    streams = HiddenStates(model.embed(sample[0]), n * (1 + len(trials)), dense.run.path)
    for index, sequence in enumerate(sample):
        streams[index] = model.embed(sequence)
    begun = n
    for block, layers, stats in _observed_blocks(dense, tokens if of_inputs else tokens[:1], of_inputs):
        before = begun
        for trial in trials:
            if trial.block == block.index:
                changed = [layer for layer in layers if layer.name in trial.layers]
                seen = (replace(stats[layer.name], **gradients.of(block.index, layer.name)) for layer in changed)
                with tried(changed, seen, trial.plan, steps):
                    for index in range(n):
                        streams[begun + index] = block(streams[index])
                begun += n
        for index in range(before):
            streams[index] = block(streams[index])
    outputs = torch.cat([streams[index] for index in range(n)])
    with dense.reporter.stage("comparing trial", n * len(trials)) as stage:
        found = losses(options.loss, model, streams, n, options.positions, stage.step)
    streams.close()
    return {"measured": found, "outputs": outputs}


@contextlib.contextmanager
def tried(layers: list[Layer], stats: Iterable[LayerStats], plan: LayerPlan, steps: list[Step]) -> Iterator[None]:
    """Give layers, while the context lasts, the weights that the steps make of them; `stats`: of each layer's input."""
    before = [layer.weight.clone() for layer in layers]
    try:
        for layer, seen in zip(layers, stats, strict=True):
            weight = layer.weight.float().contiguous()
            task = LayerTask(layer.name, weight, weight, seen, plan, layer.weight.dtype)
            for step in steps:
                task = step.run(task) if step.applies(plan) else task
            layer.install(task.weight)
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.install(weight)
