"""GPTQ: round one input column at a time, and let the columns still to come absorb its error; then revise it all.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv:2210.17323,
algorithm 1. Columns are taken by falling Hessian diagonal while groups stay where they are (static groups), so that no
checkpoint needs a permutation. Then `passes` of coordinate descent revise scales and codes (quantize/descent.py), which
the paper does not (QUANTIZATION.md has what it is worth). Needs the Hessian of each input; costs a Cholesky
factorization per distinct input, a rank-one update per column and pass, and a product of the weight with an [in, in]
matrix for each pass.

Pruned weights stay exactly zero and errors flow around them, so it runs after any pruner. As its own pruner
(`--pruner gptq`) it chooses the mask in the same sweep, as SparseGPT does (arXiv:2301.00774, section 3.5).
"""

import torch
from pydantic import Field
from torch import Tensor

from compress.calib.stats import damped, falling, inverse_factor
from compress.kernels.weights import Grid
from compress.options import MethodOptions
from compress.quantize.descent import Columns, descend
from compress.settle import SweepMask, settle_columns
from compress.task import LayerTask

NEEDS = frozenset({"hessian"})
ROWS_ALONE = True  # no row's codes depend on another's, so layers that read one input are solved as one
CHOOSES_MASKS = True  # if no pruner did


class Options(MethodOptions):
    """How the update is computed and each group's scale is chosen."""

    damping: float = Field(0.01, gt=0, le=1, description="share of the Hessian's mean diagonal added to its diagonal")
    block_size: int = Field(128, ge=8, description="columns updated together")
    act_order: bool = Field(True, description="take columns by falling Hessian diagonal")
    shrink_steps: int = Field(20, ge=0, le=200, description="ranges tried below min-max for each scale; 0: none")
    passes: int = Field(4, ge=0, description="of coordinate descent over scales and codes, after the sweep")


def flops(out_features: int, in_features: int, options: Options) -> float:
    """Operations that one layer takes, beyond a pass of SparseGPT; for estimates of time."""
    return 2 * out_features * in_features**2 * (1 + (options.passes + 1 if options.passes else 0))


def quantize_layer(task: LayerTask, options: Options) -> LayerTask:
    """Quantize one layer to its plan's bits and groups. Pruned weights stay exactly zero."""
    plan, hessian = task.plan, task.stats.hessian
    assert hessian is not None  # NEEDS asks for it
    groups = task.weight.unflatten(1, (-1, task.group_size))
    importance = hessian.diagonal().unflatten(0, (-1, task.group_size))
    grid = Grid.fit(groups, plan.wbits, plan.symmetric, task.dtype, importance, options.shrink_steps)

    joint = task.keep is None and plan.sparsity > 0
    in_order = not options.act_order or (joint and plan.pattern is not None)  # whose groups are neighbours
    order = None if in_order else falling(task.stats)
    factor, damping = inverse_factor(task.stats, options.damping, order)
    if damping != options.damping:
        task = task.noted(f"gptq: damping raised from {options.damping:g} to {damping:g} to factorize the Hessian")
    if order is None:
        order = torch.arange(len(hessian), device=hessian.device)
    columns = _sweep(task, grid, factor, order, options.block_size)
    weight, wanted = task.weight.T.contiguous(), task.original.T.contiguous()
    with damped(task.stats, damping) as hessian:
        worse = descend(columns, weight, wanted, hessian, options.passes, task.dtype)
    if worse:
        task = task.noted("gptq: outputs that were worse than rounded to nearest began so")
    if joint:
        assert columns.keep is not None  # chosen in the sweep
        task = task.pruned(task.weight, columns.keep.T.contiguous())
    return task.quantized(columns.packed(plan.symmetric, task.dtype))


def _sweep(task: LayerTask, grid: Grid, factor: Tensor, order: Tensor, block_size: int) -> Columns:
    """GPTQ's pass over the columns in `order` [in]; chooses the mask on its way if there is none and the plan wants one."""
    weight, plan, size = task.weight.T[order], task.plan, task.group_size  # [in, out]
    scale, zero_point = grid.scale.T.contiguous(), grid.zero_point.T.contiguous()
    lowest, highest = -zero_point, 2**plan.wbits - 1 - zero_point
    steps, at = torch.empty_like(weight), order.tolist()
    mask = SweepMask(weight, factor, plan) if task.keep is None and plan.sparsity else None
    keep = mask.keep if mask is not None else None if task.keep is None else task.keep.T[order]

    def settle(i: int, column: Tensor) -> Tensor:
        group = at[i] // size
        if mask is not None:
            mask.reach(i)
        wanted = column if keep is None else column * keep[i]
        step = torch.div(wanted, scale[group], out=steps[at[i]]).round_().clamp_(lowest[group], highest[group])
        return step * scale[group]

    settle_columns(weight, factor, settle, block_size, *(() if mask is None else (mask.unit, mask.begin)))
    if keep is not None:
        keep = torch.empty_like(keep).index_copy_(0, order, keep)
    return Columns(steps, scale, zero_point, plan.wbits, keep)
