"""Revise what a sweep rounded: the scale of a group, then each of its codes, to what is best while all else stays.

Cyclic coordinate descent on the layer's squared output error tr((W - Ŵ) H (W - Ŵ)ᵀ), over codes as in QuantEase
(Behdin et al., arXiv:2309.01885, lemma 1), and over scales in between. GPTQ decides about a column once, before it
knows how later columns will be rounded; here every code may be decided again. No step raises the error.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.kernels.weights import Grid, IntWeight, storable
from compress.settle import INNER


@dataclass(frozen=True)
class Columns:
    """A quantized weight with its inputs first, so that what one input meets lies together. Descent changes it in place."""

    steps: Tensor  # [in, out] float32, whole numbers: code - zero_point, 0 where pruned
    scale: Tensor  # [groups, out] float32, as a checkpoint stores it
    zero_point: Tensor  # [groups, out] float32
    bits: int
    keep: Tensor | None  # [in, out] bool, False where pruned

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return len(self.steps) // len(self.scale)

    def values(self) -> Tensor:
        """The weight, [in, out] float32."""
        return self.steps.unflatten(0, (-1, self.group_size)).mul(self.scale.unsqueeze(1)).flatten(0, 1)

    def packed(self, symmetric: bool, scale_dtype: torch.dtype) -> IntWeight:
        """The weight as a checkpoint holds it."""
        codes = self.steps.unflatten(0, (-1, self.group_size)).add(self.zero_point.unsqueeze(1)).flatten(0, 1)
        grid = Grid(self.scale.T, self.zero_point.T, self.bits)
        return IntWeight.from_codes(codes.T, grid, self.group_size, symmetric, scale_dtype)


def descend(
    columns: Columns, weight: Tensor, wanted: Tensor, hessian: Tensor, passes: int, scale_dtype: torch.dtype
) -> int:
    """Lower the error of `columns` against `wanted` [in, out] under `hessian` [in, in], which has a positive diagonal.

    Outputs that would be better off if `weight` [in, out] were rounded to nearest begin so. Then each pass visits every group in turn: first its
    scales, rounded to what `scale_dtype` stores, then its codes. Costs a product of `hessian` with the weight for each
    pass, one to begin them, and one to compare with rounding to nearest. Returns how many outputs began anew.
    """
    replaced = _begin(columns, weight, wanted, hessian)
    if not passes:
        return replaced
    gradient = hessian @ (wanted - columns.values())  # half the error's, downhill
    size = columns.group_size
    for _ in range(passes):
        for group in range(len(columns.scale)):
            rows = slice(group * size, (group + 1) * size)
            local = gradient[rows].clone()
            change = _fit_scale(columns, group, local, hessian[rows, rows], scale_dtype)
            _round_again(columns, group, local, hessian[rows, rows], change)
            gradient.addmm_(hessian[:, rows], change, alpha=-1)
    return replaced


def _begin(columns: Columns, weight: Tensor, wanted: Tensor, hessian: Tensor) -> int:
    """Round outputs to nearest where that is better, and say how many were."""
    groups = columns.scale.unsqueeze(1), columns.zero_point.unsqueeze(1)
    nearest = weight.unflatten(0, (-1, columns.group_size)) / groups[0]
    nearest = nearest.round_().clamp_(-groups[1], 2**columns.bits - 1 - groups[1]).flatten(0, 1)
    if columns.keep is not None:
        nearest *= columns.keep
    before, after = columns.values(), replace(columns, steps=nearest).values()
    product = hessian @ (2 * wanted - before - after)  # a H a - b H b = (a - b) H (a + b) for both errors a and b
    worse = ((after - before) * product).sum(0) > 0
    if replaced := int(worse.sum()):
        columns.steps[:, worse] = nearest[:, worse]
    return replaced


def _fit_scale(columns: Columns, group: int, local: Tensor, hessian: Tensor, dtype: torch.dtype) -> Tensor:
    """Give a group the scales of least error. Takes them into `local`; returns the change of its values, [size, out]."""
    steps, scale = columns.steps.unflatten(0, (-1, columns.group_size))[group], columns.scale[group]
    product = hessian @ steps
    curvature = (steps * product).sum(0)
    best = scale + (steps * local).sum(0) / curvature  # NaN or infinite where all steps are zero
    stored = storable(best.nan_to_num(nan=1.0).clamp(min=0), dtype)
    nearer = (stored - best).abs() < (scale - best).abs()  # the error is a parabola around `best`
    moved = torch.where(nearer, stored - scale, 0.0)
    scale += moved
    local.addcmul_(product, moved, value=-1)
    return steps * moved


def _round_again(columns: Columns, group: int, local: Tensor, hessian: Tensor, change: Tensor) -> None:
    """Give each code of a group its best value in turn. `change` [size, out] takes in how values move."""
    start = group * columns.group_size
    scale, lowest = columns.scale[group], -columns.zero_point[group]
    highest = 2**columns.bits - 1 + lowest
    curvatures = hessian.diagonal().tolist()
    moves = torch.empty(min(INNER, len(local)), local.shape[1], device=local.device)
    for low in range(0, len(local), INNER):
        high = min(low + INNER, len(local))
        for i in range(low, high):
            steps = columns.steps[start + i]
            best = torch.addcdiv(steps, local[i], scale, value=1 / curvatures[i]).round_().clamp_(lowest, highest)
            if columns.keep is not None:
                best.mul_(columns.keep[start + i])
            move = torch.sub(best, steps, out=moves[i - low]).mul_(scale)
            steps.copy_(best)
            local[i + 1 : high].addr_(hessian[i, i + 1 : high], move, alpha=-1)
        change[low:high] += moves[: high - low]
        local[high:].addmm_(hessian[high:, low:high], moves[: high - low], alpha=-1)
