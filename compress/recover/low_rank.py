"""Low-rank: add the product of low rank that takes most of the quantization error out of a layer's output.

QERA (Zhang et al., arXiv:2410.06040, theorem 1) on LQER's form (Zhang et al., arXiv:2402.02446): with E = W - Q and
H = S Sᵀ the sum of x xᵀ, B A S is the best approximation of rank r to E S, in closed form. S is a Cholesky factor here,
which gives the same B A as the paper's symmetric root. `iterations` goes on as LoftQ does (Li et al., arXiv:2310.08659,
algorithm 1): quantize W - B A, correct again, and keep the best. `residual` first takes single weights out, as SpQR
(Dettmers et al., arXiv:2306.03078) and DSEE (Chen et al., arXiv:2111.00160) do: those with the largest E_ij² H_jj, at the
values that are best together. Pruned weights of a layer stay zero in its packed form, and none is a single weight; the
product is dense. Needs the Hessian; costs the eigenvectors of a matrix of the layer's shorter side, and an iteration as
much as the quantizer again.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calib.stats import LayerStats, falling, inverse_factor, unit_hessian
from compress.kernels.correction import Correction
from compress.options import MethodOptions
from compress.prune.least_squares import solve_kept
from compress.task import LayerTask

NEEDS = frozenset({"hessian"})
STEPS = 10  # of conjugate gradients, for the values of single weights


class Options(MethodOptions):
    """How large the correction is, and how it is found."""

    rank: int = Field(32, ge=0, description="of the product that is added to each layer")
    iterations: int = Field(0, ge=0, description="times the rest is quantized again and corrected again")
    residual: float = Field(0.0, ge=0, lt=1, description="share of the weights that are kept singly, in 16 bits")
    damping: float = Field(0.01, gt=0, le=1, description="share of the Hessian's mean diagonal added to its diagonal")

    def adds(self, name: str, shape: tuple[int, int], before: tuple[int, int]) -> tuple[int, int]:
        """The rank and the number of single weights of a layer's correction at most, in place of those `before`."""
        return min(self.rank, *shape), int(shape[0] * shape[1] * self.residual)

    @model_validator(mode="after")
    def _something(self) -> "Options":
        if not self.rank and not self.residual:
            raise ValueError("neither a rank nor a residual: there is nothing to add")
        return self


def flops(out_features: int, in_features: int, options: Options) -> float:
    """Of the error in units of the inputs, its Gram matrix and the eigenvectors of that."""
    shorter = min(out_features, in_features)
    return (2 * out_features * in_features * (in_features + shorter) + 9 * shorter**3) * (1 + options.iterations)


def recover_layer(task: LayerTask, options: Options, quantize: Callable[[LayerTask], LayerTask]) -> LayerTask:
    """Correct one quantized layer, unless that would make its output no better. `quantize` is what made it."""
    best, least = task, _error(task)
    tried = task
    for iteration in range(options.iterations + 1):
        if iteration:
            tried = _without(task, tried, quantize)
        tried = tried.corrected(_correction(tried, options))
        if (error := _error(tried)) < least:
            best, least = tried, error
    return task.noted("low-rank: left as it was, since a correction did not help") if best is task else best


def _error(task: LayerTask) -> float:
    """Of the layer's output."""
    return task.stats.output_energy(task.original - task.weight)


def _without(task: LayerTask, corrected: LayerTask, quantize: Callable[[LayerTask], LayerTask]) -> LayerTask:
    """What the quantizer makes of a layer less its correction; the result is to do what `task` is to do."""
    assert corrected.correction is not None
    rest = task.original - corrected.correction.delta()
    weight = rest if task.keep is None else rest.masked_fill(~task.keep, 0.0)
    made = quantize(replace(task, weight=weight, original=rest, packed=None, correction=None))
    return replace(made, original=task.original)


def _correction(task: LayerTask, options: Options) -> Correction:
    """Of a packed task, before it is rounded."""
    assert task.packed is not None  # a quantizer ran
    error = task.original - task.packed.dequantize()
    single = _single(task, error, options)
    if single is not None:
        error = error - single
    a, b = low_rank(error, task.stats, options.rank, options.damping)
    if single is None:
        return Correction(a, b)
    index = single.flatten().nonzero().flatten()
    return Correction(a, b, index.int(), single.flatten()[index])


def _single(task: LayerTask, error: Tensor, options: Options) -> Tensor | None:
    """The single weights that are added, [out, in], zero elsewhere; None: there are none."""
    assert task.stats.hessian is not None  # NEEDS asks for it
    score = error.square() * task.stats.hessian.diagonal()
    if task.keep is not None:
        score.masked_fill_(~task.keep, 0.0)
    places = score.flatten().topk(int(error.numel() * options.residual), sorted=False).indices
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen.view(-1)[places] = True
    chosen &= score > 0
    if not chosen.any():
        return None
    unit, root = unit_hessian(task.stats, options.damping)
    return solve_kept(error * root, unit, chosen, torch.zeros_like(error), STEPS) / root


def low_rank(error: Tensor, stats: LayerStats, rank: int, damping: float) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank], float32, for which tr((E - B A) H (E - B A)ᵀ) is least.

    `error`: E, [out, in] float32. `damping`: as `inverse_factor` takes it. A's rows are as long as B's columns.
    """
    order = falling(stats)  # as GPTQ takes it, so that one factor serves both
    inverse, _ = inverse_factor(stats, damping, order)  # S⁻¹
    scaled = torch.linalg.solve_triangular(inverse, error[:, order], upper=True, left=False)  # E S
    rank = min(rank, *scaled.shape)
    if scaled.shape[0] <= scaled.shape[1]:
        b = _leading(scaled @ scaled.T, rank)
        a = b.T @ scaled
    else:
        a = _leading(scaled.T @ scaled, rank).T
        b = scaled @ a.T
    a = torch.empty_like(a).index_copy_(1, order, a @ inverse)
    lengths = a.norm(dim=1), b.norm(dim=0)
    ratio = torch.where(lengths[0] * lengths[1] > 0, lengths[1] / lengths[0], 1.0).sqrt()
    return a * ratio.unsqueeze(1), b / ratio


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, [n, rank]."""
    return torch.linalg.eigh(gram).eigenvectors[:, gram.shape[0] - rank :].flip(1)
