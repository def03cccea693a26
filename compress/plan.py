"""What each layer is asked to become, checked before any work is done."""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from torch import Tensor

from compress.allocate.spread import LayerSize
from compress.calib.layers import Layer
from compress.calib.model import Model
from compress.checkpoint.stored import StoredLayer
from compress.errors import InputError
from compress.kernels.weights import IntWeight
from compress.recipe import Recipe
from compress.steps import find_method, find_options, find_trial_steps
from compress.task import LayerPlan


@dataclass(frozen=True)
class PlannedLayer(LayerSize):
    """One layer, its shape and its plan."""

    plan: LayerPlan
    stored: StoredLayer | None  # how it will lie in a checkpoint, without values; None if it is not quantized


def plan_layers(model: Model, recipe: Recipe) -> list[PlannedLayer]:
    """The plan of every layer in the blocks, before an allocation that measures moves sparsity between them.

    Raises InputError where a group or a pattern does not divide a layer, and for an allocation that there is not or
    that tries what there is not.
    """
    layers = [(index, layer) for index in range(model.n_blocks) for layer in model.layers_of(index)]
    if not layers:
        raise InputError(f"{model.config.model_type}: found no linear layers in its blocks")
    rule, options = find_rule(recipe)
    if hasattr(rule, "trials"):
        find_trial_steps(recipe, options.pruner)
    plan = recipe.target.layer_plan()
    return [_planned(index, layer, plan) for index, layer in layers]


def find_rule(recipe: Recipe) -> tuple[ModuleType, Any]:
    """The recipe's rule of allocation with its options. Raises InputError for one that there is not."""
    name = recipe.target.allocate
    return find_method("allocate", name), find_options("allocate", name, recipe.options.get(name, {}))


def allocated(layers: list[PlannedLayer], recipe: Recipe, measured: Tensor) -> list[PlannedLayer]:
    """The layers with the sparsity where the recipe's rule puts it, from what `measure` found for it."""
    rule, options = find_rule(recipe)
    plans = rule.allocate_layers(layers, measured, recipe.target.layer_plan(), options)
    return [replace(layer, plan=plans[layer.name]) for layer in layers]


def _planned(index: int, layer: Layer, plan: LayerPlan) -> PlannedLayer:
    in_features = layer.shape[1]
    _check_pattern(layer, plan)
    stored = None
    if plan.wbits < 16:
        group_size = plan.group_of(in_features)
        _check_groups(layer.name, in_features, group_size)
        packed = IntWeight.planned(layer.shape, plan.wbits, group_size, plan.symmetric)
        stored = StoredLayer(layer.name, layer.param, layer.index, layer.transposed, packed)
    return PlannedLayer(layer.name, index, layer.shape, plan, stored)


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


def _check_groups(name: str, in_features: int, group_size: int) -> None:
    if in_features % group_size:
        fitting = [g for g in (256, 128, 64, 32, 16, 8) if in_features % g == 0]
        mend = f"--group-size {fitting[0]}, or -1 for one scale an output channel" if fitting else "--group-size -1"
        raise InputError(f"{name} has {in_features} inputs, which groups of {group_size} do not divide: use {mend}")


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


def dense_bytes(model: Model) -> int:
    """Bytes of the model's parameters as they came, tied ones once."""
    unique = {id(p): p.numel() * p.element_size() for p in model.lm.parameters()}
    return sum(unique.values())


def n_parameters(model: Model) -> int:
    """How many parameters the model has, tied ones once."""
    return sum(p.numel() for p in {id(p): p for p in model.lm.parameters()}.values())
