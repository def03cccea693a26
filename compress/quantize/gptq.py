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
    group_of = order // task.group_size
    scales, zero_points = grid.scale.T[group_of], grid.zero_point.T[group_of]
    keep = None if task.keep is None else task.keep.T[order]
    codes = torch.empty_like(columns)
    for start in range(0, len(columns), options.block_size):
        rows = slice(start, min(start + options.block_size, len(columns)))
        on_grid = (scales[rows], zero_points[rows], 2**plan.wbits - 1)
        kept = None if keep is None else keep[rows]
        error = _round_block(columns[rows], codes[rows], kept, factor[rows, rows], on_grid)
        columns[rows.stop :].addmm_(factor[rows, rows.stop :].T, error, alpha=-1)
    in_place = torch.empty_like(codes)
    in_place[order] = codes
    return task.quantized(IntWeight.from_codes(in_place.T, grid, task.group_size, plan.symmetric, task.dtype))


def _round_block(
    columns: Tensor, codes: Tensor, keep: Tensor | None, factor: Tensor, on_grid: tuple[Tensor, Tensor, int]
) -> Tensor:
    """Round a block of columns [b, out] one by one, filling `codes`; returns the scaled errors [b, out] it makes."""
    scales, zero_points, highest = on_grid
    errors = torch.empty_like(columns)
    pivots = factor.diagonal().tolist()
    for i in range(len(columns)):
        wanted = columns[i] if keep is None else columns[i].masked_fill(~keep[i], 0.0)
        code = torch.addcdiv(zero_points[i], wanted, scales[i], out=codes[i]).round_().clamp_(0, highest)
        errors[i] = (columns[i] - (code - zero_points[i]).mul_(scales[i])).div_(pivots[i])
        columns[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return errors
