"""OWL: blocks give less the more of their weights stand out.

Yin et al., Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity,
arXiv:2310.05175, section 3. A weight's score is |W| ||X||, as for Wanda, on the dense model; the outlier ratio of a block
is the share of scores above `threshold` times their mean, over all its layers together. Ratios are mapped linearly on
[target - limit, target + limit], most outliers lowest, and then moved together until the total is exact: so, as in the
authors' code, the blocks span 2 `limit`, and a block that stands alone may be further than `limit` from the target.
Costs one pass over the dense model.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.allocate.spread import LayerSize, SpreadOptions, spread
from compress.calib.stats import LayerStats
from compress.task import LayerPlan

NEEDS = frozenset({"x_sq"})


class Options(SpreadOptions):
    """What an outlier is, and how much it moves."""

    threshold: float = Field(5.0, gt=1, description="an outlier's score is more than this times the mean (M)")
    limit: float = Field(0.08, ge=0, lt=0.5, description="how far sparsities go from the target, before the shift (λ)")
    granularity: Literal["block", "layer"] = Field("block", description="what has one sparsity: a block, or each layer")


def measure_block(layers: Sequence[tuple[Tensor, LayerStats]], options: Options) -> Tensor:
    """The outlier ratio, in [0, 1], for each layer of one block of the dense model.

    `layers`: (weight [out, in], statistics of its input). Returns [n_layers] float64; with one sparsity a block all are
    the block's.
    """
    if options.granularity == "block":
        return torch.full((len(layers),), _outlier_ratio(layers, options.threshold), dtype=torch.float64)
    return torch.tensor([_outlier_ratio([layer], options.threshold) for layer in layers], dtype=torch.float64)


def _outlier_ratio(layers: Sequence[tuple[Tensor, LayerStats]], threshold: float) -> float:
    count = sum(weight.numel() for weight, _ in layers)
    mean = sum(score.sum(dtype=torch.float64).item() for score in _scores(layers)) / count
    return sum(int((score > threshold * mean).sum()) for score in _scores(layers)) / count


def _scores(layers: Sequence[tuple[Tensor, LayerStats]]) -> Iterator[Tensor]:
    """|W| ||X|| [out, in] float32, a layer at a time."""
    for weight, stats in layers:
        assert stats.x_sq is not None  # NEEDS asks for it
        yield weight.float().abs() * stats.x_sq.sqrt()


def allocate_layers(
    layers: Sequence[LayerSize], measured: Tensor, target: LayerPlan, options: Options
) -> dict[str, LayerPlan]:
    """The plan of each layer, from outlier ratios [n_layers]."""
    ratio = measured.numpy()
    span = (ratio.max() - ratio.min()) or 1.0
    outlying = (ratio - ratio.min()) / span  # 0: fewest outliers, 1: most
    return spread(layers, target.sparsity + options.limit * (1 - 2 * outlying), target, options)
