"""Uniform: every layer gives the same share.

The setting of the methods' own papers, and the baseline of every other allocation.
"""

from collections.abc import Sequence

from compress.options import MethodOptions
from compress.task import LayerPlan

NEEDS: frozenset[str] = frozenset()


class Options(MethodOptions):
    """A uniform allocation has nothing to set."""


def allocate_layers(names: Sequence[str], target: LayerPlan, options: Options) -> dict[str, LayerPlan]:
    """The plan of each layer."""
    return dict.fromkeys(names, target)
