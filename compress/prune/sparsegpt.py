"""SparseGPT: prune a block of input columns at a time, and let the columns still to come absorb the error.

Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, arXiv:2301.00774,
algorithm 1. Needs the Hessian of each input; costs a Cholesky factorization per distinct input and a rank-one update
per column. A weight's score is its squared value over the squared pivot of its column; unstructured masks compare all
rows of a block of columns at once, n:m masks compare the m columns of a group with the weights as updated so far.
Masks that are compared otherwise (`compare`, and blocks of weights) are chosen before the first update. The paper's
joint sweep, which rounds the kept weights in the same pass, is `--pruner gptq`.
"""

import torch
from pydantic import Field
from torch import Tensor

from compress.calib.stats import inverse_factor
from compress.options import MethodOptions
from compress.settle import SweepMask, settle_columns
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
    columns = task.weight.T.clone(memory_format=torch.contiguous_format)  # [in, out]: one column's weights lie together
    mask = SweepMask(columns, factor, task.plan)

    def settle(i: int, column: Tensor) -> Tensor:
        return column * mask.reach(i)

    settle_columns(columns, factor, settle, options.block_size, mask.unit, mask.begin)
    return task.pruned(columns.T.contiguous(), mask.keep.T.contiguous())
