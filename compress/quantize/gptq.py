"""GPTQ: round one input column at a time, and let the columns still to come absorb its error.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv:2210.17323,
algorithm 1. Needs the Hessian of each input; costs a Cholesky factorization per distinct input and a rank-one update
per column. Pruned weights stay exactly zero and their columns' errors flow around them, so it also runs after any
pruner. With activation order, columns are taken by falling Hessian diagonal while groups stay where they are (static
groups), so that no checkpoint needs a permutation.
"""

import torch
from pydantic import Field
from torch import Tensor

from compress.calib.stats import inverse_factor
from compress.kernels.weights import Grid, IntWeight
from compress.options import MethodOptions
from compress.settle import settle_columns
from compress.task import LayerTask

NEEDS = frozenset({"hessian"})


class Options(MethodOptions):
    """How the update is computed and each group's scale is chosen."""

    damping: float = Field(0.01, gt=0, le=1, description="share of the Hessian's mean diagonal added to its diagonal")
    block_size: int = Field(128, ge=8, description="columns updated together")
    act_order: bool = Field(True, description="take columns by falling Hessian diagonal")
    shrink_steps: int = Field(20, ge=0, le=200, description="ranges tried below min-max for each scale; 0: none")


def quantize_layer(task: LayerTask, options: Options) -> LayerTask:
    """Quantize one layer to its plan's bits and groups. Pruned weights stay exactly zero."""
    plan, hessian = task.plan, task.stats.hessian
    assert hessian is not None  # NEEDS asks for it
    groups = task.weight.unflatten(1, (-1, task.group_size))
    importance = hessian.diagonal().unflatten(0, (-1, task.group_size))
    grid = Grid.fit(groups, plan.wbits, plan.symmetric, task.dtype, importance, options.shrink_steps)

    order = hessian.diagonal().argsort(descending=True, stable=True) if options.act_order else None
    factor, damping = inverse_factor(task.stats, options.damping, order)
    if damping != options.damping:
        task = task.noted(f"gptq: damping raised from {options.damping:g} to {damping:g} to factorize the Hessian")
    if order is None:
        order = torch.arange(len(hessian), device=hessian.device)
    columns = task.weight.T[order]  # [in, out]: one column's weights lie together
    codes = torch.empty_like(columns, dtype=torch.uint8)
    scales, zero_points = grid.scale.T.contiguous(), grid.zero_point.T.contiguous()
    keep = None if task.keep is None else task.keep.T
    at, highest = order.tolist(), 2**plan.wbits - 1

    def settle(i: int, column: Tensor) -> Tensor:
        group = at[i] // task.group_size
        wanted = column if keep is None else column * keep[at[i]]
        code = torch.addcdiv(zero_points[group], wanted, scales[group]).round_().clamp_(0, highest)
        codes[at[i]] = code
        return code.sub_(zero_points[group]).mul_(scales[group])

    settle_columns(columns, factor, settle, options.block_size)
    return task.quantized(IntWeight.from_codes(codes.T, grid, task.group_size, plan.symmetric, task.dtype))
