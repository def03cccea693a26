"""What calibration saw of one layer's input."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from compress.errors import RunError

PANEL = 256  # columns of a Hessian that are multiplied together where half of it is enough
WEIGHTS_AT_ONCE = 2**22  # of a layer that makes up for drift


@dataclass(frozen=True)
class LayerStats:
    """Sums over all calibration tokens of one input, shared by every layer that reads it (q, k and v, say).

    Only what the recipe's methods need is filled in. Methods that are given an input no token ever reached (an expert
    the router never chose) see `n_tokens == 0` and the statistics of white noise: unit variance, no correlation.
    """

    n_tokens: int
    x_sum: Tensor | None = None  # [in]      float32, sum of each input channel
    x_sq: Tensor | None = None  # [in]      float32, sum of squares of each input channel
    x_min: Tensor | None = None  # [in]      float32, least value of each input channel
    x_max: Tensor | None = None  # [in]      float32, greatest value of each input channel
    hessian: Tensor | None = None  # [in, in] float32, sum of x xᵀ
    drift: Tensor | None = None  # [in, in] float32, sum of (y - x) xᵀ, where y is what x is in the dense model
    drift_sum: Tensor | None = None  # [in]  float32, sum of y - x
    sample: Tensor | None = None  # [k, in]  float32, a few inputs, to measure output errors with
    grad_sq: Tensor | None = None  # [out, in] float32, of the weight; calib/gradients.py says what mean it is
    grad_abs: Tensor | None = None  # [out, in] float32, likewise
    factors: dict[Any, Any] = field(default_factory=dict, compare=False)  # what was already made of `hessian`, by what

    @property
    def finite(self) -> bool:
        """Whether every input was a finite number; NaN and infinity reach the sums and the Hessian's diagonal."""
        sums = (self.x_sq, self.x_min, self.x_max, None if self.hessian is None else self.hessian.diagonal())
        return all(bool(torch.isfinite(each).all()) for each in sums if each is not None)

    def output_energy(self, weight: Tensor) -> float:
        """Sum of squared outputs of a layer with this `weight` [out, in] over what `measured_on` names.

        tr(W H Wᵀ) for a weight, tr(Δ H Δᵀ) for a change of one: their ratio is the relative output error.
        """
        if self.hessian is not None:
            return _energy(weight, self.hessian)
        outputs = weight if self.sample is None else weight @ self.sample.T
        return outputs.square().sum(dtype=torch.float64).item()

    def shifted(self, shift: Tensor) -> "LayerStats":
        """What calibration would have seen of x - shift; `shift`: float32 [in]. Gradients stay as they are.

        Squares can only be shifted where `x_sum` is known; of channels that vary little around a large mean they keep few
        digits.
        """
        n, total, x_sq, hessian = self.n_tokens, self.x_sum, self.x_sq, self.hessian
        if total is not None:
            half = total - shift * (n / 2)  # sum of (x - z)(x - z)ᵀ = sum of x xᵀ - z halfᵀ - half zᵀ
            cross = torch.outer(shift, half)
            x_sq = None if x_sq is None else (x_sq - 2 * cross.diagonal()).clamp(min=0)
            hessian = None if hessian is None else hessian - (cross + cross.T)
        assert total is not None or (x_sq is None and hessian is None)  # the NEEDS of who shifts ask for it
        return replace(
            self,
            x_sum=None if total is None else total - n * shift,
            x_sq=x_sq,
            x_min=None if self.x_min is None else self.x_min - shift,
            x_max=None if self.x_max is None else self.x_max - shift,
            hessian=hessian,
            drift=None
            if self.drift is None or self.drift_sum is None
            else self.drift - torch.outer(self.drift_sum, shift),
            sample=None if self.sample is None else self.sample - shift,
            factors={},
        )

    def divided(self, scale: Tensor) -> "LayerStats":
        """What calibration would have seen of x / scale; `scale`: float32 [in], positive.

        Gradients are those of a weight with its columns multiplied by `scale`, so that its outputs stay.
        """

        def by(tensor: Tensor | None, divisor: Tensor) -> Tensor | None:
            return None if tensor is None else tensor / divisor

        return replace(
            self,
            x_sum=by(self.x_sum, scale),
            x_sq=by(self.x_sq, scale.square()),
            x_min=by(self.x_min, scale),
            x_max=by(self.x_max, scale),
            hessian=by(self.hessian, torch.outer(scale, scale)),
            drift=by(self.drift, torch.outer(scale, scale)),
            drift_sum=by(self.drift_sum, scale),
            sample=by(self.sample, scale),
            grad_sq=by(self.grad_sq, scale.square()),
            grad_abs=by(self.grad_abs, scale),
            factors={},
        )

    @property
    def measured_on(self) -> str:
        """What stands for H: the Hessian, a sample of its tokens, or, without calibration, the weights alone."""
        return "hessian" if self.hessian is not None else "weights" if self.sample is None else "sample"


def unit_hessian(stats: LayerStats, damping: float) -> tuple[Tensor, Tensor]:
    """The damped Hessian with inputs measured in units of their norm: R⁻¹ H R⁻¹ [in, in] and the root R [in].

    `damping` is a share of the mean diagonal of H added to its diagonal; R is the square root of the damped diagonal, so
    that the result has a unit diagonal. Layers that share statistics share it.
    """
    assert stats.hessian is not None  # the method's NEEDS asks for it
    key = ("unit", damping)
    if key not in stats.factors:
        diagonal = stats.hessian.diagonal()
        root = (diagonal + damping * diagonal.mean()).clamp(min=torch.finfo(diagonal.dtype).tiny).sqrt()
        unit = stats.hessian / root / root.unsqueeze(1)
        unit.diagonal().fill_(1.0)
        stats.factors[key] = unit, root
    return stats.factors[key]


def make_up(stats: LayerStats, weight: Tensor, share: float, damping: float = 0.01) -> Tensor:
    """The weight to aim at, so that a layer makes up for a `share` of how far its inputs have moved; [out, in] float32.

    With y the inputs in the dense model and x those in the model as compressed so far, the weight that comes nearest to
    W y is W + W (sum of (y - x) xᵀ) H⁻¹ (GPTAQ, Li et al., arXiv:2504.02692, eq. 8). All of it overshoots: what later
    layers are to make up for is then partly made up for already. `damping` as for `inverse_factor`. A weight whose
    inputs have no `drift` stays as it is.
    """
    if not share or stats.drift is None:
        return weight
    order = falling(stats)  # as GPTQ takes it, so that one factor serves both
    factor, _ = inverse_factor(stats, damping, order)
    made_up = weight.clone()
    for rows in made_up.split(max(1, WEIGHTS_AT_ONCE // weight.shape[1])):
        product = (rows @ stats.drift)[:, order]
        rows.index_add_(1, order, (product @ factor.T) @ factor, alpha=share)
    return made_up


def falling(stats: LayerStats) -> Tensor:
    """The inputs by falling diagonal of the Hessian, [in] int64."""
    assert stats.hessian is not None  # the method's NEEDS asks for it
    return stats.hessian.diagonal().argsort(descending=True, stable=True)


def _energy(weight: Tensor, hessian: Tensor) -> float:
    """tr(W H Wᵀ) of a symmetric H, from its upper half."""
    total = 0.0
    for start in range(0, len(hessian), PANEL):
        own, panel = slice(start, start + PANEL), weight[:, start : start + PANEL]
        product = torch.addmm(weight[:, :start] @ hessian[:start, own], panel, hessian[own, own], beta=2)
        total += (product * panel).sum(dtype=torch.float64).item()
    return total


@contextlib.contextmanager
def damped(stats: LayerStats, damping: float) -> Iterator[Tensor]:
    """The Hessian, while open with `damping` times its mean diagonal added to its diagonal, and more for inputs always zero.

    [in, in], with a positive diagonal. It is not copied, as few things in memory are as large.
    """
    assert stats.hessian is not None  # the method's NEEDS asks for it
    diagonal = stats.hessian.diagonal()
    before = diagonal.clone()
    try:
        _damp(diagonal, before, damping)
        yield stats.hessian
    finally:
        diagonal.copy_(before)


def _damp(diagonal: Tensor, before: Tensor, damping: float) -> None:
    mean = before.mean().item()
    diagonal.add_(damping * mean).masked_fill_(before == 0, max(mean, 1e-30))


def inverse_factor(stats: LayerStats, damping: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """Upper Cholesky factor U of the inverse of the damped Hessian (H⁻¹ = Uᵀ U), and the damping it took.

    `damping` is a share of the mean diagonal of H added to its diagonal (GPTQ, arXiv:2210.17323, section 3.3; SparseGPT,
    arXiv:2301.00774). It is multiplied by ten until the factorization succeeds. Inputs that were always zero get a unit
    diagonal. `order` permutes the inputs first. Layers that share statistics share the factor.

    Raises RunError if even a damping of the mean diagonal itself does not make it positive definite.
    """
    assert stats.hessian is not None  # the method's NEEDS asks for it
    key = (damping, None if order is None else tuple(order.tolist()))
    if key not in stats.factors:
        stats.factors[key] = _factorize(stats.hessian, damping, order)
    return stats.factors[key]


def _factorize(hessian: Tensor, damping: float, order: Tensor | None) -> tuple[Tensor, float]:
    diagonal = hessian.diagonal()
    if not torch.isfinite(diagonal).all():
        raise RunError("the calibration inputs of a layer hold NaN or infinity: check the model's weights and the data")
    order = torch.arange(len(hessian), device=hessian.device) if order is None else order
    backwards = order.flip(0)
    while damping <= 1.0:
        # H = R Rᵀ with R upper comes from a Cholesky factor of H taken backwards; then H⁻¹ = R⁻ᵀ R⁻¹ and U = R⁻¹. Half
        # the work of inverting H and factorizing again, and nothing but H has to be positive definite.
        factor = torch.empty_like(hessian)
        for rows, which in zip(factor.split(PANEL), backwards.split(PANEL), strict=True):
            rows.copy_(hessian[which][:, backwards])
        _damp(factor.diagonal(), diagonal[backwards], damping)
        if _invert_cholesky(factor) and all(torch.isfinite(end) for end in factor.aminmax()):
            _reverse(factor)
            return factor, damping
        damping *= 10
    raise RunError("a layer's Hessian is not positive definite even with full damping: use more calibration samples")


def _invert_cholesky(matrix: Tensor) -> bool:
    """Put the inverse of its lower Cholesky factor in place of a symmetric `matrix`; False: not positive definite.

    Panel by panel, so that nearly all of it is matrix products: twice as fast on a CPU as LAPACK's two routines.
    """
    panels = [slice(start, min(start + PANEL, len(matrix))) for start in range(0, len(matrix), PANEL)]
    for own in panels:
        before, after = slice(0, own.start), slice(own.stop, None)
        matrix[own.start :, own].addmm_(matrix[own.start :, before], matrix[own, before].T, alpha=-1)
        lower, failed = torch.linalg.cholesky_ex(matrix[own, own])
        if failed:
            return False
        matrix[own, own] = lower
        matrix[after, own] = torch.linalg.solve_triangular(lower, matrix[after, own].T, upper=False).T
    matrix.tril_()
    for own in panels:
        before, unit = slice(0, own.start), torch.eye(own.stop - own.start, dtype=matrix.dtype, device=matrix.device)
        matrix[own, own] = torch.linalg.solve_triangular(matrix[own, own], unit, upper=False)
        matrix[own, before] = matrix[own, own] @ (matrix[own, before] @ matrix[before, before]).neg_()
    return True


def _reverse(matrix: Tensor) -> None:
    """Turn rows and columns of a contiguous square matrix around, in place."""
    flat, at_once = matrix.view(-1), PANEL * len(matrix)
    for start in range(0, len(flat) // 2, at_once):
        stop = min(start + at_once, len(flat) // 2)
        low, high = slice(start, stop), slice(len(flat) - stop, len(flat) - start)
        flat[low], flat[high] = flat[high].flip(0), flat[low].flip(0)
