"""ALPS: let ADMM choose the mask and the weights together, then solve for the weights that stay.

Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models, arXiv:2406.07831,
algorithm 1 and section 3.3. Minimizes the layer's squared output error tr((W - Ŵ) H (W - Ŵ)ᵀ) over sparse W. ADMM splits
W into a dense copy, which solves a ridge regression, and a sparse one, which is the dense copy with its smallest weights
gone; the penalty ρ that pulls them together grows while the mask settles. Weights are measured in units of their
input's norm (H gets a unit diagonal), unstructured masks are compared over the layer. With the mask settled, conjugate
gradients take the kept weights close to their least-squares optimum, all rows at once.

SparseGPT decides about a column once, before it knows how later ones will be pruned; here every weight may come back.
Needs the Hessian of each input; costs an eigendecomposition per distinct input, and per iteration a product of the
weight with an [in, in] matrix and a partial sort.
"""

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from compress.calib.stats import LayerStats, unit_hessian
from compress.options import MethodOptions
from compress.prune.least_squares import solve_kept
from compress.prune.masks import keep_largest
from compress.task import LayerPlan, LayerTask

NEEDS = frozenset({"hessian"})
MATRICES = 4  # the unit Hessian, its eigenvectors, and LAPACK's room or an inverse on its way
EVERY = 3  # iterations between two looks at how much of the mask still moves
SELECTION = 5000  # what a weight's turn in a partial sort takes, in operations of a matrix product
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the kept weights that moved, factor of the penalty


class Options(MethodOptions):
    """How long the search goes on, and how the weights are solved for."""

    damping: float = Field(0.01, gt=0, le=1, description="share of the Hessian's mean diagonal added to its diagonal")
    iterations: int = Field(30, ge=1, description="of ADMM, at most: a mask that settles ends it")
    rho: float = Field(0.1, gt=0, description="penalty at the start")
    steps: int = Field(10, ge=0, description="steps of conjugate gradients once the mask is chosen")


def flops(out_features: int, in_features: int, options: Options) -> float:
    """Operations that one layer takes, beyond a pass of SparseGPT; for estimates of time."""
    products = 2 * out_features * in_features**2 * (options.iterations + options.steps + 2)
    spectra = in_features**3 * (9 + 2 * options.iterations / EVERY)
    return products + spectra + SELECTION * options.iterations * out_features * in_features


def prune_layer(task: LayerTask, options: Options) -> LayerTask:
    """Prune one layer to its plan's sparsity or pattern, and solve for the weights that stay."""
    hessian, root = unit_hessian(task.stats, options.damping)
    plan = task.plan if task.plan.compare else replace(task.plan, compare="layer")
    wanted = task.weight * root
    sparse, keep = _search(wanted, task.stats, plan, options)
    if keep.all():  # an allocation may ask nothing of a layer, and then it stays as it is to the last bit
        return task.pruned(task.weight, keep)
    return task.pruned(solve_kept(wanted, hessian, keep, sparse, options.steps) / root, keep)


def _search(wanted: Tensor, stats: LayerStats, plan: LayerPlan, options: Options) -> tuple[Tensor, Tensor]:
    """ADMM: the sparse copy of `wanted` [out, in] and its mask."""
    hessian, _ = unit_hessian(stats, options.damping)
    product = wanted @ hessian
    rho, sparse, dual = options.rho, wanted, torch.zeros_like(wanted)
    inverse = _ridge_inverse(stats, options.damping, rho)
    before: Tensor | None = None
    for i in range(1, options.iterations + 1):
        dense = torch.add(product, sparse, alpha=rho).sub_(dual) @ inverse
        wish = torch.add(dense, dual, alpha=1 / rho)
        keep = keep_largest(wish.abs(), plan)
        sparse = wish * keep
        dual.add_(dense.sub_(sparse), alpha=rho)
        if i % EVERY == 0:
            if before is not None:
                moved = (keep & ~before).sum().item() / max(keep.sum().item(), 1)
                if moved == 0:
                    break
                rho *= next(factor for share, factor in GROWTH if moved > share)
                inverse = _ridge_inverse(stats, options.damping, rho)
            before = keep
    return sparse, keep


def _ridge_inverse(stats: LayerStats, damping: float, rho: float) -> Tensor:
    """(H + ρ I)⁻¹ of the Hessian with a unit diagonal, [in, in]; layers that share statistics share the spectrum."""
    key = ("spectrum", damping)
    if key not in stats.factors:
        stats.factors[key] = torch.linalg.eigh(unit_hessian(stats, damping)[0])
    values, vectors = stats.factors[key]
    return (vectors / (values.clamp(min=0) + rho)) @ vectors.T
