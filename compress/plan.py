"""What each layer is asked to become, checked before any work is done."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from compress.allocate.choices import Budget
from compress.allocate.spread import LayerSize, Priced, groups_of
from compress.calib.layers import Layer
from compress.calib.model import Model
from compress.checkpoint.formats import choose_format
from compress.checkpoint.stored import StoredLayer
from compress.errors import InputError
from compress.kernels.correction import Correction, planned_correction
from compress.kernels.inputs import InputQuantizer
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import IntWeight, PackedWeight
from compress.recipe import Recipe
from compress.report import size
from compress.sizes import Sizes
from compress.steps import find_method, find_options, find_trial_steps, verb_of, whole_model
from compress.task import LayerPlan

Layout = Callable[
    [tuple[int, int], LayerPlan], PackedWeight
]  # of a shape (out, in) and a plan: a weight without values


@dataclass(frozen=True)
class PlannedLayer(LayerSize):
    """One layer, its shape and its plan."""

    plan: LayerPlan
    place: Layer
    layout: Layout
    inputs: InputQuantizer | None  # how what enters it will be rounded at most
    correction: Correction | None = None  # what recovery adds at most if it is quantized, without values

    @property
    def stored(self) -> StoredLayer | None:
        """How it will lie in a checkpoint, without values; None if it is not quantized."""
        if self.plan.wbits == 16:
            return None
        place, packed = self.place, self.layout(self.shape, self.plan)
        where = (place.name, place.param, place.index, place.transposed)
        return StoredLayer(*where, packed, inputs=self.inputs, correction=self.correction)


def plan_layers(model: Model, recipe: Recipe) -> list[PlannedLayer]:
    """The plan of every layer in the blocks, before an allocation that measures moves it.

    Raises InputError where a group or a pattern does not divide a layer, for an allocation that there is not or that
    tries what there is not, for a format that cannot hold the layers, and for a budget that no choices come down to.
    """
    places = [(index, layer) for index in range(model.n_blocks) for layer in model.layers_of(index)]
    if not places:
        raise InputError(f"{model.config.model_type}: found no linear layers in its blocks")
    rule, options = find_rule(recipe)
    if hasattr(rule, "trials"):
        find_trial_steps(recipe, rule.stand_ins(options))
    _check_inputs(model, recipe, [layer for _, layer in places])
    plan, layout, inputs = recipe.target.layer_plan(), find_layout(recipe), planned_inputs(recipe)
    layers = []
    for index, place in places:
        for asked in recipe.plans:
            _check(place, asked, recipe)
        added = _added_at_most(place, recipe, model.dtype)
        layers.append(PlannedLayer(place.name, index, place.shape, plan, place, layout, inputs, added))
    # With a budget, each choice somewhere: what no format can hold together is refused before anything is measured.
    mixed = [replace(layer, plan=recipe.plans[i % len(recipe.plans)]) for i, layer in enumerate(layers)]
    choose_format(recipe.format, packed_layers(model, recipe, mixed))
    return layers if recipe.target.budget is None else _priced(model, recipe, layers)


def _added_at_most(place: Layer, recipe: Recipe, dtype: torch.dtype) -> Correction | None:
    """What the recipe's methods of recovery add to a layer at most, without values: their options say it in `adds`."""
    rank = single = 0
    learns = place.index is None and isinstance(place.owner, nn.Linear)
    for name in recipe.recover[:-1] if recipe.scatter else recipe.recover:
        options: Any = find_options("recover", name, recipe.options.get(name, {}))
        if hasattr(options, "adds") and (learns or not whole_model("recover", name)):
            rank, single = options.adds(place.name, place.shape, (rank, single))
    if not rank and not single:
        return None
    return planned_correction(place.shape, rank, single, recipe.adapter_bits, dtype)


def find_layout(recipe: Recipe) -> Layout:
    """The memory layout that the recipe's quantizer gives to a layer: its `planned`, or integers, 2:4 without the zeros."""
    for stage, name in recipe.steps:
        if stage == "quantize" and hasattr(method := find_method(stage, name), "planned"):
            options = find_options(stage, name, recipe.options.get(name, {}))
            return lambda shape, plan: method.planned(shape, plan, options)
    return integer_layout


def integer_layout(shape: tuple[int, int], plan: LayerPlan) -> PackedWeight:
    """Integers of the plan's bits and groups, without the zeros of a 2:4 pattern; as `LayerTask.quantized` packs them."""
    layout = Sparse24IntWeight if plan.pattern == (2, 4) else IntWeight
    return layout.planned(shape, plan.wbits, plan.group_of(shape[1]), plan.symmetric)


def plan_format(model: Model, recipe: Recipe, layers: list[PlannedLayer]) -> tuple[str, str]:
    """The name of the format to write, and why that one; with a budget, one in which the layers keep to it.

    Raises InputError if there is none.
    """
    fits = None if recipe.target.budget is None else partial(_over_budget, model, recipe, layers)
    return choose_format(recipe.format, packed_layers(model, recipe, layers), fits)


def _over_budget(model: Model, recipe: Recipe, layers: list[PlannedLayer], format_name: str) -> str | None:
    """Why a format is too large for a budget's layers; None: it is not."""
    taken, room = _taken(sizes := _sizes(model, recipe, format_name), layers), _room(sizes, model, recipe, layers)
    return None if taken <= room else f"{format_name} would take {size(taken - room)} more than the budget"


def packed_layers(model: Model, recipe: Recipe, layers: list[PlannedLayer]) -> list[StoredLayer]:
    """What is packed, without values: embeddings and head if asked, and the layers that are quantized."""
    return [*plan_head(model, recipe), *(stored for layer in layers if (stored := layer.stored) is not None)]


def _sizes(model: Model, recipe: Recipe, format_name: str) -> Sizes:
    assert recipe.target.budget is not None
    return Sizes(model, Budget.read(recipe.target.budget), format_name)


def _taken(sizes: Sizes, layers: list[PlannedLayer]) -> int:
    """What layers take of a budget."""
    return sum(sizes.of(layer.place, layer.stored) for layer in layers)


def _room(sizes: Sizes, model: Model, recipe: Recipe, layers: list[PlannedLayer]) -> int:
    """What a budget leaves for layers."""
    return sizes.room([layer.place for layer in layers], plan_head(model, recipe))


def _priced(model: Model, recipe: Recipe, layers: list[PlannedLayer]) -> list[PlannedLayer]:
    """The layers with a budget's choices and what each takes. Raises InputError if even the smallest take too much."""
    sizes, (_, options) = _sizes(model, recipe, recipe.format), find_rule(recipe)
    priced = []
    for layer in layers:
        stored = [(plan, replace(layer, plan=plan).stored) for plan in recipe.plans]
        choices = tuple(Priced(plan, sizes.of(layer.place, each)) for plan, each in stored)
        priced.append(replace(layer, choices=choices))
    groups = groups_of(priced, options.group)
    each = [zip(*([choice.nbytes for choice in layer.choices] for layer in group), strict=True) for group in groups]
    smallest, room = sum(min(map(sum, sums)) for sums in each), _room(sizes, model, recipe, layers)
    if smallest > room:
        raise InputError(_too_small(recipe, sizes, priced, smallest, plan_head(model, recipe)))
    return priced


def _too_small(recipe: Recipe, sizes: Sizes, layers: list[PlannedLayer], smallest: int, head: list[StoredLayer]) -> str:
    """One line on a budget that cannot be met; `smallest`: bytes that the smallest choices take."""
    start, mend = f"budget {recipe.target.budget} cannot be met: the smallest choices come to", "smaller choices"
    mend = f"{mend} (--set budget.choices=...) or a larger --budget"
    if sizes.budget.unit == "bits":
        bits = 8 * smallest / sum(layer.n_weights for layer in layers)
        return f"{start} {math.ceil(bits * 1000) / 1000:g} bits a weight: use {mend}"
    outside = sizes.outside([layer.place for layer in layers], head)
    use = mend if recipe.target.head_bits == 4 else f"--head-bits 4, {mend}"
    return f"{start} {size(smallest + outside)}, {size(outside)} of it outside the blocks' layers: use {use}"


def planned_inputs(recipe: Recipe) -> InputQuantizer | None:
    """How what enters quantized layers will be rounded at most: static, if some inputs may become so."""
    for stage, name in recipe.steps:
        if stage == "activations":
            return InputQuantizer(recipe.target.abits, find_method(stage, name).STATIC)
    return None


def _check_inputs(model: Model, recipe: Recipe, layers: list[Layer]) -> None:
    if model.input_quantizers:
        name = next(iter(model.input_quantizers)).removesuffix(".weight")
        raise InputError(f"what enters {name} is quantized already: compress the model that this one was made of")
    if recipe.target.abits < 16 and (slices := [layer.name for layer in layers if layer.index is not None]):
        raise InputError(f"{slices[0]} is one expert of many in a parameter, whose inputs stay: leave out --abits")


def find_rule(recipe: Recipe) -> tuple[ModuleType, Any]:
    """The recipe's rule of allocation with its options. Raises InputError for one that there is not."""
    name = recipe.target.allocate
    return find_method("allocate", name), find_options("allocate", name, recipe.options.get(name, {}))


def allocated(model: Model, recipe: Recipe, layers: list[PlannedLayer], measured: Tensor) -> list[PlannedLayer]:
    """The layers with the plans that the recipe's rule gives them, from what `measure` found for it."""
    rule, options = find_rule(recipe)
    if verb_of("allocate", rule) == "choose_plans":
        room = _room(_sizes(model, recipe, recipe.format), model, recipe, layers)
        plans = rule.choose_plans(layers, measured, room, options)
    else:
        plans = rule.allocate_layers(layers, measured, recipe.target.layer_plan(), options)
    return [replace(layer, plan=plans[layer.name]) for layer in layers]


def predicted_loss(layers: list[PlannedLayer], recipe: Recipe, measured: Tensor) -> float | None:
    """The sum of the losses of the trials that the layers' plans are made of; None where a plan was not tried."""
    rule, options = find_rule(recipe)
    if not hasattr(rule, "trials"):
        return None
    plans, total = {layer.name: layer.plan for layer in layers if layer.plan.changes}, 0.0
    for trial, loss in zip(rule.trials(layers, recipe.target.layer_plan(), options), measured.tolist(), strict=True):
        if all(plans.get(name) == trial.plan for name in trial.layers):
            total += loss
            plans = {name: plan for name, plan in plans.items() if name not in trial.layers}
    return None if plans else total


def _check(layer: Layer, plan: LayerPlan, recipe: Recipe) -> None:
    """Raise InputError where a plan's pattern or groups do not divide a layer."""
    _check_pattern(layer, plan)
    if plan.wbits < 16:
        mend = None if recipe.target.budget is None else "other choices (--set budget.choices=...)"
        _check_groups(layer.name, layer.shape[1], plan.group_of(layer.shape[1]), mend)


def _check_pattern(layer: Layer, plan: LayerPlan) -> None:
    out_features, in_features = layer.shape
    if plan.pattern and in_features % plan.pattern[1]:
        n, m = plan.pattern
        raise InputError(
            f"{layer.name} has {in_features} inputs, which {n}:{m} does not divide: choose another pattern"
        )
    if plan.block and (out_features % plan.block[0] or in_features % plan.block[1]):
        shape, blocks = f"{out_features} outputs and {in_features} inputs", "x".join(map(str, plan.block))
        raise InputError(f"{layer.name} has {shape}, which blocks of {blocks} do not divide: choose another pattern")


def _check_groups(name: str, in_features: int, group_size: int, mend: str | None = None) -> None:
    if in_features % group_size:
        fitting = [g for g in (256, 128, 64, 32, 16, 8) if in_features % g == 0]
        flag = f"--group-size {fitting[0]}, or -1 for one scale an output channel" if fitting else "--group-size -1"
        raise InputError(
            f"{name} has {in_features} inputs, which groups of {group_size} do not divide: use {mend or flag}"
        )


def plan_head(model: Model, recipe: Recipe) -> list[StoredLayer]:
    """How embeddings and head will lie in a checkpoint; empty if they stay dense. A tied pair is one layer."""
    bits = recipe.target.head_bits
    if bits == 16:
        return []
    planned = {}
    embeddings = model.lm.get_input_embeddings()
    for module in (embeddings, model.lm.get_output_embeddings()):
        name = next((n for n, m in model.lm.named_modules() if m is module), None)
        if name is None or id(module.weight) in planned:
            continue
        shape = tuple(module.weight.shape)
        group_size = recipe.target.layer_plan().group_of(shape[1])
        _check_groups(name, shape[1], group_size)
        packed = IntWeight.planned(shape, bits, group_size, symmetric=True)
        planned[id(module.weight)] = StoredLayer(name, f"{name}.weight", None, False, packed, module is embeddings)
    return list(planned.values())
