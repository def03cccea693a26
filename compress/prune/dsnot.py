"""DSnoT: swap pruned weights for kept ones until each output's expected value is back where it was.

Zhang et al., Dynamic Sparse No Training, arXiv:2310.08915, section 3. Refines the mask of any pruner. A row's expected
error is what its output lost on average, e = Σ (W₀ - W) E[x], with W₀ the original weights and W those the pruner left.
Each swap restores the pruned weight with the most W₀ E[x] / Var[x] of e's sign to its original value, and removes the
kept weight with the smallest |W| ‖x‖ among those whose W E[x] has the opposite sign: both bring e nearer to zero. In
an n:m pattern the swap stays within the group of m. Kept weights keep the pruner's values, each row its count, and no
weight is moved twice. A row stops after `max_cycles` swaps, when |e| is small, or when a swap would take e past zero.

A smaller expected error can be a larger output error: e is only the mean of it. `guard`, which is ours, passes over
swaps that would raise the row's squared output error Δ H Δᵀ, Δ = W - W₀, and tries the next. It needs the Hessian and
one product with it; without it DSnoT needs sums only, and a row stops at the first swap it refuses, as in the paper.

The authors' code differs: its threshold is absolute and grows with the sequence length (here: a share of the row's
output, so scaling weights or inputs changes nothing); its variance leaves out differences between sequences; it
refines attention layers only; its unstructured swaps may take e past zero; its n:m swaps ignore the sign of the weight
they remove; it divides by zero for a constant input channel, and fails on rows with fewer weights than cycles.
Here the variance is at least a millionth of the layer's mean variance: a constant channel is a certain gain, and tried
first. Costs two partial sorts, and with the guard as much as measuring the output error.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from compress.options import MethodOptions
from compress.task import LayerTask

NEEDS = frozenset({"x_sum", "x_sq", "hessian"})


class Options(MethodOptions):
    """How far rows are taken."""

    max_cycles: int = Field(50, ge=1, description="swaps tried in each row")
    threshold: float = Field(0.01, ge=0, description="expected error left alone, as a share of the row's output")
    guard: bool = Field(True, description="make only swaps that lower the squared output error too")


def needs(options: Options) -> frozenset[str]:
    """The statistics that these options read."""
    return NEEDS if options.guard else NEEDS - {"hessian"}


def refine_layer(task: LayerTask, options: Options) -> LayerTask:
    """Swap pruned weights for kept ones, within rows and within groups of an n:m pattern."""
    stats, keep = task.stats, task.keep
    assert keep is not None and stats.x_sum is not None and stats.x_sq is not None  # a pruner ran; NEEDS asks
    n_tokens = max(stats.n_tokens, 1)
    mean, mean_sq = stats.x_sum / n_tokens, stats.x_sq / n_tokens
    error = (task.original - task.weight) @ mean  # [out], the paper's expected error
    tolerance = options.threshold * (task.original.square() @ mean_sq).sqrt()
    swaps = _find_swaps(task, error.sign(), mean, mean_sq, options.max_cycles)
    made = _choose(task, swaps, error.abs(), tolerance, options.guard)
    rows = made.nonzero()[:, 0]
    refined = keep.clone()
    refined[rows, swaps.grown[made]] = True
    refined[rows, swaps.pruned[made]] = False
    return task.pruned(torch.where(refined & ~keep, task.original, task.weight), refined)


@dataclass(frozen=True)
class _Swaps:
    """Pairs of weights of each row in the order in which they are tried, every field [out, k]."""

    grown: Tensor  # int64, columns to restore
    pruned: Tensor  # int64, columns to remove
    restored: Tensor  # float32, the original weights at `grown`
    removed: Tensor  # float32, the weights at `pruned`
    nearer: Tensor  # float32, how much nearer to zero the expected error comes; infinite where a row has no more pairs


def _find_swaps(task: LayerTask, sign: Tensor, mean: Tensor, mean_sq: Tensor, count: int) -> _Swaps:
    """Pair the best weight to grow with the best to prune, the second best with the second best, and so on.

    `sign`: [out], of the expected error. `mean`, `mean_sq`: [in], of x and of x². At most `count` pairs of each row.
    """
    keep, weight = task.keep, task.weight
    assert keep is not None
    variance = (mean_sq - mean.square()).clamp(min=0)
    variance = variance.clamp(min=max(1e-6 * variance.mean().item(), torch.finfo(variance.dtype).tiny))
    helps = sign.unsqueeze(1) * mean  # what a unit of weight takes off the error when it is added
    gain = (task.original * helps / variance).masked_fill_(keep | (task.original * helps <= 0), -torch.inf)
    cost = (weight.abs() * mean_sq.sqrt()).masked_fill_(~keep | (weight * helps >= 0), torch.inf)

    in_features = weight.shape[1]
    m = in_features if task.plan.pattern is None else task.plan.pattern[1]
    start = torch.arange(0, in_features, m, device=weight.device).unsqueeze(1)
    gain, grown = gain.unflatten(1, (-1, m)).topk(min(count, m))
    cost, pruned = cost.unflatten(1, (-1, m)).topk(min(count, m), largest=False)
    gain = gain.masked_fill(cost.isinf(), -torch.inf).flatten(1)
    gain, order = gain.topk(min(count, gain.shape[1]))
    grown, pruned = ((columns + start).flatten(1).gather(1, order) for columns in (grown, pruned))
    restored, removed = task.original.gather(1, grown), weight.gather(1, pruned)
    nearer = restored * helps.gather(1, grown) - removed * helps.gather(1, pruned)
    return _Swaps(grown, pruned, restored, removed, nearer.masked_fill(gain == -torch.inf, torch.inf))


def _choose(task: LayerTask, swaps: _Swaps, error: Tensor, tolerance: Tensor, guard: bool) -> Tensor:
    """Which swaps are made, [out, k] bool, from each row's |expected error| and what of it is left alone, [out]."""
    made = torch.zeros_like(swaps.grown, dtype=torch.bool)
    rise = _output_error(task, swaps, made) if guard else None
    going = torch.ones_like(error, dtype=torch.bool)
    for i in range(made.shape[1]):
        wanted = going & (error > tolerance) & (swaps.nearer[:, i] <= error)
        if rise is None:
            going = wanted
        else:
            rows = wanted.nonzero()[:, 0]
            wanted[rows] = rise(i, rows) < 0
        made[:, i] = wanted
        error = error - swaps.nearer[:, i].where(wanted, 0.0)
    return made


def _output_error(task: LayerTask, swaps: _Swaps, made: Tensor) -> Callable[[int, Tensor], Tensor]:
    """A function of i and rows: by how much swap i raises the rows' Δ H Δᵀ, [rows], after those `made` before it.

    Adding `a` at columns `c` raises it by 2 a (Δ H)_c + a H_cc aᵀ. Δ H is not kept up to date: what the few swaps before
    add to it is looked up in H.
    """
    hessian = task.stats.hessian
    assert hessian is not None
    columns = torch.stack([swaps.grown, swaps.pruned], dim=2)  # [out, k, 2]
    amounts = torch.stack([swaps.restored, -swaps.removed], dim=2)
    slopes = ((task.weight - task.original) @ hessian).gather(1, columns.flatten(1)).view_as(amounts)

    def rise(i: int, rows: Tensor) -> Tensor:
        here, add = columns[rows, i], amounts[rows, i]
        before = columns[rows, :i].flatten(1)
        added = (amounts[rows, :i] * made[rows, :i].unsqueeze(2)).flatten(1)
        coupled = (hessian[here.unsqueeze(2), before.unsqueeze(1)] * added.unsqueeze(1)).sum(2)
        own = (hessian[here.unsqueeze(2), here.unsqueeze(1)] * add.unsqueeze(1)).sum(2)
        return (add * (2 * (slopes[rows, i] + coupled) + own)).sum(1)

    return rise
