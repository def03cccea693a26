"""From a score per weight to the weights that stay."""

import torch
from torch import Tensor

from compress.task import LayerPlan


def keep_largest(score: Tensor, plan: LayerPlan) -> Tensor:
    """Keep the highest scores of each output row, or of each group of m inputs for an n:m pattern.

    `score`: [out, in] float. Returns bool [out, in], True where the weight stays. Exact counts: each row loses
    int(in * sparsity) weights, each group of m keeps n (n is the number kept, as NVIDIA and PyTorch count). Of equal
    scores the earlier column goes first.
    """
    if plan.pattern:
        n, m = plan.pattern
        return _drop_smallest(score.unflatten(1, (-1, m)), m - n).flatten(1)
    return _drop_smallest(score, int(score.shape[1] * plan.sparsity))


def _drop_smallest(score: Tensor, count: int) -> Tensor:
    """False at the `count` smallest of the last dimension; a stable sort breaks ties by position."""
    smallest = score.argsort(dim=-1, stable=True)[..., :count]
    return torch.ones_like(score, dtype=torch.bool).scatter(-1, smallest, False)
