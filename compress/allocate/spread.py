"""What the rules share: the size of a layer, what is tried on one, and sparsities whose total is exact."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from compress.options import MethodOptions
from compress.task import LayerPlan

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Priced:
    """A plan that a layer may get, and what the layer then takes of a budget."""

    plan: LayerPlan
    nbytes: int


@dataclass(frozen=True)
class LayerSize:
    """One linear layer, before it has values."""

    name: str
    block: int
    shape: tuple[int, int]  # (out, in)
    choices: tuple[Priced, ...] = field(default=(), kw_only=True)  # with a budget: what it may become

    @property
    def n_weights(self) -> int:
        """How many weights the layer has."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Trial:
    """Some layers of one block compressed by one plan, while everything else stays dense."""

    block: int
    layers: tuple[str, ...]
    plan: LayerPlan


class TrialOptions(MethodOptions):
    """What every rule that tries plans on parts of the model can be told."""

    pruner: str | None = Field(None, description="what prunes in the trials; none: the recipe's own pruner and refiner")
    samples: int = Field(4, ge=1, description="calibration sequences that distortion is measured on")
    tokens: int = Field(512, ge=8, description="tokens of each")
    loss: Literal["output", "logits"] = Field(
        "output",
        description="the relative squared error of the last block's output, or the KL divergence of the logits",
    )
    positions: int = Field(64, ge=1, description="tokens of each sequence whose logits are compared")


def groups_of(layers: Sequence[LayerSize], by: str) -> list[list[LayerSize]]:
    """The layers that a rule treats alike, in the order of the blocks.

    `by`: "layer" (all experts' slices of one parameter together), "module" of a block, or "block".
    """
    groups: dict[tuple[int, str], list[LayerSize]] = {}
    for layer in layers:
        within = layer.name.split(f".{layer.block}.", 1)[-1]
        module, dot, _ = within.partition(".")  # no dot: the block's own layer
        names = {"layer": re.sub(r"\.\d+$", "", within), "module": module if dot else "", "block": ""}
        groups.setdefault((layer.block, names[by]), []).append(layer)
    return list(groups.values())


class SpreadOptions(MethodOptions):
    """What every rule that is not uniform can be told."""

    max_sparsity: float = Field(0.95, gt=0, lt=1, description="no layer gives more, unless the target itself does")

    def highest(self, target: LayerPlan) -> float:
        """The largest sparsity of a layer: never below the target, or the total could not be met."""
        return max(self.max_sparsity, target.sparsity)


def spread(
    layers: Sequence[LayerSize], wanted: Floats, target: LayerPlan, options: SpreadOptions
) -> dict[str, LayerPlan]:
    """The plan of each layer, from the sparsity [n_layers] that a rule wants of it.

    All are moved by one common amount, within [0, highest], so that together they remove exactly the target's share of
    the weights. The amount is found by bisection.
    """
    n_weights = np.array([layer.n_weights for layer in layers], np.float64)
    highest = options.highest(target)
    total = target.sparsity * n_weights.sum()
    low, high = -wanted.max(), highest - wanted.min()  # all dense, all at the highest
    for _ in range(64):
        middle = (low + high) / 2
        short = n_weights @ (wanted + middle).clip(0, highest) < total
        low, high = (middle, high) if short else (low, middle)
    exact = (wanted + high).clip(0, highest).round(12)  # 0.5 is to be 0.5, whatever bisection leaves of it
    return {layer.name: replace(target, sparsity=share) for layer, share in zip(layers, exact.tolist(), strict=True)}
