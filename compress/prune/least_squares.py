"""Least squares: with the mask as it is, give the kept weights the values that lose least of the layer's output.

The last step of ALPS (Meng et al., arXiv:2406.07831, section 3.3), for the mask of any pruner. Each row's kept weights
minimize (w - w₀) H (w - w₀)ᵀ, w₀ the original row: a linear system of its own for each row, since rows keep different
weights. Conjugate gradients solve all of them at once, each step one product of the weight with H. Needs the Hessian.
"""

import torch
from pydantic import Field
from torch import Tensor

from compress.calib.stats import unit_hessian
from compress.options import MethodOptions
from compress.task import LayerTask

NEEDS = frozenset({"hessian"})


class Options(MethodOptions):
    """How far the systems are solved."""

    damping: float = Field(0.01, gt=0, le=1, description="share of the Hessian's mean diagonal added to its diagonal")
    steps: int = Field(10, ge=1, description="steps of conjugate gradients")


def refine_layer(task: LayerTask, options: Options) -> LayerTask:
    """Solve for the kept weights; the mask stays."""
    assert task.keep is not None  # a pruner ran
    hessian, root = unit_hessian(task.stats, options.damping)
    solved = solve_kept(task.original * root, hessian, task.keep, task.weight * root, options.steps)
    return task.pruned(solved / root, task.keep)


def solve_kept(wanted: Tensor, hessian: Tensor, keep: Tensor, start: Tensor, steps: int) -> Tensor:
    """Weights [out, in], zero outside `keep`, that come close to least tr((wanted - w) H (wanted - w)ᵀ).

    `wanted`, `start`: [out, in] float32, `start` zero outside `keep`. `hessian`: [in, in] with a unit diagonal, which is
    all the preconditioning there is. A row's error never grows; a row that is solved exactly stays as it is.
    """
    weight = start
    residual = ((wanted - weight) @ hessian).mul_(keep)
    direction, size = residual, residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        curved = (direction @ hessian).mul_(keep)
        curvature = (direction * curved).sum(1, keepdim=True)
        length = torch.where(curvature > 0, size / curvature, 0.0)
        weight = torch.addcmul(weight, length, direction)
        residual = torch.addcmul(residual, length, curved, value=-1)
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = torch.addcmul(residual, torch.where(before > 0, size / before, 0.0), direction)
    return weight
