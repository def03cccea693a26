"""Uniform: every layer gives the same share.

The setting of the methods' own papers, and the baseline of every other allocation.
"""

from collections.abc import Sequence

from torch import Tensor

from compress.allocate.spread import LayerSize
from compress.options import MethodOptions
from compress.task import LayerPlan

NEEDS: frozenset[str] = frozenset()


class Options(MethodOptions):
    """A uniform allocation has nothing to set."""


def allocate_layers(
    layers: Sequence[LayerSize], measured: Tensor, target: LayerPlan, options: Options
) -> dict[str, LayerPlan]:
    """The plan of each layer. Nothing is measured for it."""
    return {layer.name: target for layer in layers}
