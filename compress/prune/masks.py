"""From a score per weight to the weights that stay."""

import torch
from torch import Tensor

from compress.task import LayerPlan

SCORES_AT_ONCE = 2**22  # of rows that compete within themselves: a partial sort takes three times their memory


def keep_largest(score: Tensor, plan: LayerPlan) -> Tensor:
    """Keep the highest scores of whatever the plan compares.

    `score`: [out, in] float, not negative, without NaN: what the output changes by if the weight goes. Returns bool
    [out, in], True where the weight stays. Counts are exact: each row loses int(in * sparsity) weights, with
    `compare` "layer" the layer loses int(out * in * sparsity), each group of m inputs keeps n (n is the number kept, as
    NVIDIA and PyTorch count), and of blocks, compared over the layer, int(blocks * sparsity) go whole. A block scores
    the sum of its squared scores: what the squared output changes by, were the inputs uncorrelated. Of equal scores
    the earlier one of the row, layer or group goes first.
    """
    if plan.block is not None:
        rows, columns = plan.block
        energy = score.square().unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).sum((1, 3))
        keep = _keep_share(energy.flatten(), plan.sparsity).view_as(energy)
        return keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    if plan.compare == "layer" and plan.pattern is None:
        return _keep_share(score.flatten(), plan.sparsity).view_as(score)
    some = score.split(max(1, SCORES_AT_ONCE // score.shape[1]))
    if plan.pattern is not None:
        n, m = plan.pattern
        return torch.cat([_drop_smallest(rows.unflatten(1, (-1, m)), m - n).flatten(1) for rows in some])
    return torch.cat([_keep_share(rows, plan.sparsity) for rows in some])


def _keep_share(score: Tensor, sparsity: float) -> Tensor:
    return _drop_smallest(score, int(score.shape[-1] * sparsity))


def _drop_smallest(score: Tensor, count: int) -> Tensor:
    """False at the `count` smallest of the last dimension, the earlier of equals first."""
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    cut = score.kthvalue(count, dim=-1, keepdim=True).values  # a fraction of a sort's time
    tied = score == cut
    tied_gone = count - (score < cut).sum(-1, keepdim=True)
    return (score > cut) | (tied & (tied.cumsum(-1, dtype=torch.int32) > tied_gone))
