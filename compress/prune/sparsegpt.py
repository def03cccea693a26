"""SparseGPT: prune a block of input columns at a time, and let the columns still to come absorb the error.

Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, arXiv:2301.00774,
algorithm 1. Needs the Hessian of each input; costs a Cholesky factorization per distinct input and a rank-one update
per column. A weight's score is its squared value over the squared pivot of its column; unstructured masks compare all
rows of a block of columns at once, n:m masks compare the m columns of a group with the weights as updated so far.
Masks that are compared otherwise (`compare`, and blocks of weights) are chosen before the first update.
"""

import torch
from pydantic import Field
from torch import Tensor

from compress.calib.stats import inverse_factor
from compress.options import MethodOptions
from compress.prune.masks import keep_largest
from compress.settle import settle_columns
from compress.task import LayerTask

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
    plan = task.plan
    columns = task.weight.T.clone(memory_format=torch.contiguous_format)  # [in, out]: one column's weights lie together
    pivots = factor.diagonal().unsqueeze(1)
    at_once = plan.block is not None or plan.compare is not None
    if at_once:
        keep = keep_largest((columns / pivots).abs_().T, plan).T.contiguous()
    else:
        keep = torch.ones_like(columns, dtype=torch.bool)

    def choose_in_block(start: int, stop: int) -> None:
        score = (columns[start:stop] / pivots[start:stop]).square_().flatten()
        gone = score.topk(int(score.numel() * plan.sparsity), largest=False, sorted=False).indices
        keep[start:stop].view(-1)[gone] = False

    def choose_n_of_m(start: int, n: int, m: int) -> None:
        score = (columns[start : start + m] / pivots[start : start + m]).square_()
        keep[start : start + m].scatter_(0, score.argsort(dim=0, stable=True)[: m - n], False)

    def settle(i: int, column: Tensor) -> Tensor:
        if plan.pattern is not None and i % plan.pattern[1] == 0:
            choose_n_of_m(i, *plan.pattern)
        return column * keep[i]

    if plan.pattern is None:
        begin = None if at_once else choose_in_block
        settle_columns(columns, factor, settle, options.block_size, begin=begin)
    else:
        settle_columns(columns, factor, settle, options.block_size, unit=plan.pattern[1])
    return task.pruned(columns.T.contiguous(), keep.T.contiguous())
