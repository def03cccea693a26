"""SparseGPT: prune a block of input columns at a time, and let the columns still to come absorb the error.

Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, arXiv:2301.00774,
algorithm 1. Needs the Hessian of each input; costs a Cholesky factorization per distinct input and a rank-one update
per column. A weight's score is its squared value over the squared pivot of its column; unstructured masks compare all
rows of a block of columns at once, n:m masks compare the m columns of a group with the weights as updated so far.
"""

import torch
from pydantic import Field
from torch import Tensor

from compress.calib.stats import inverse_factor
from compress.options import MethodOptions
from compress.task import LayerPlan, LayerTask

NEEDS = frozenset({"hessian"})


class Options(MethodOptions):
    """How the weight update is computed."""

    damping: float = Field(0.01, gt=0, le=1, description="share of the Hessian's mean diagonal added to its diagonal")
    block_size: int = Field(128, ge=8, description="input columns whose mask is chosen together")


def prune_layer(task: LayerTask, options: Options) -> LayerTask:
    """Prune one layer to its plan's sparsity or pattern, updating the weights that stay."""
    factor, damping = inverse_factor(task.stats, options.damping)
    if damping != options.damping:
        task = task.noted(f"sparsegpt: damping raised from {options.damping:g} to {damping:g} to factorize the Hessian")
    columns = task.weight.T.clone(memory_format=torch.contiguous_format)  # [in, out]: one column's weights lie together
    keep = torch.ones_like(columns, dtype=torch.bool)
    block_size = options.block_size
    if task.plan.pattern:
        m = task.plan.pattern[1]
        block_size = max(block_size // m, 1) * m  # no group of m lies across two blocks
    for start in range(0, len(columns), block_size):
        stop = min(start + block_size, len(columns))
        error = _prune_block(columns[start:stop], keep[start:stop], factor[start:stop, start:stop], task.plan)
        columns[stop:].addmm_(factor[start:stop, stop:].T, error, alpha=-1)
    return task.pruned(columns.T.contiguous(), keep.T.contiguous())


def _prune_block(columns: Tensor, keep: Tensor, factor: Tensor, plan: LayerPlan) -> Tensor:
    """Prune a block of columns [b, out] in place, filling `keep`; returns the scaled errors [b, out] it makes."""
    pivots = factor.diagonal()
    if plan.pattern is None:
        score = (columns / pivots.unsqueeze(1)).square_().flatten()
        gone = score.topk(int(score.numel() * plan.sparsity), largest=False, sorted=False).indices
        keep.view(-1)[gone] = False
    errors = torch.zeros_like(columns)
    for i in range(len(columns)):
        if plan.pattern is not None and i % plan.pattern[1] == 0:
            n, m = plan.pattern
            score = (columns[i : i + m] / pivots[i : i + m].unsqueeze(1)).square_()
            keep[i : i + m].scatter_(0, score.argsort(dim=0, stable=True)[: m - n], False)
        errors[i] = columns[i].masked_fill(keep[i], 0.0).div_(pivots[i])
        columns[i].masked_fill_(~keep[i], 0.0)
        columns[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return errors
