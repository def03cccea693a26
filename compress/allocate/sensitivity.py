"""Sensitivity: try sparsities on each part of the model, and choose those that together distort its output least.

Xu et al., Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks, arXiv:2308.10438. For
each group of layers and each candidate sparsity, that group alone is pruned by the recipe's own pruner and refiner (or
a quicker `pruner`), on statistics of the dense model, and the error of the last block's output on a few sequences is its
distortion: squared, relative to the output at each token, so that tokens with huge hidden states do not decide alone.
The distortion of a whole plan is taken to be the sum over groups, which the paper derives from a Taylor series. Dynamic
programming then finds the candidates of least sum that remove enough weights, counted in 1/20000 of all; what this grid
leaves is spread evenly, so that the total is exact. The paper's groups are single layers; a transformer has many, and
those of one attention or MLP depend on each other.

Costs, beside one pass of all calibration tokens: a solve of every layer for each candidate, and a forward of every trial
through the blocks from its own on, n_blocks² / 2 x groups a block x candidates block forwards of `samples` sequences.
With the defaults on 18 blocks that is 2268 x 4 sequences. Hidden states of all trials are kept at once.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from compress.allocate.spread import Floats, LayerSize, SpreadOptions, Trial, TrialOptions, groups_of, spread
from compress.task import LayerPlan

NEEDS: frozenset[str] = frozenset()  # beyond what the pruner reads
RESOLUTION = 20_000  # parts of all weights that dynamic programming counts in


class Options(TrialOptions, SpreadOptions):
    """What is tried, and on how much text."""

    group: Literal["module", "block"] = Field(
        "module", description="what has one sparsity: each module of a block (attention, mlp), or a block"
    )
    reach: float = Field(0.3, ge=0, lt=1, description="candidates go this far from the target")
    step: float = Field(0.1, ge=0.005, lt=1, description="distance between candidates")


def stand_ins(options: Options) -> dict[str, str | None]:
    """The stages of a trial, and what takes the place of the recipe's own method."""
    return {"prune": options.pruner}


def trials(layers: Sequence[LayerSize], target: LayerPlan, options: Options) -> list[Trial]:
    """What has to be measured: each group at each candidate but 0, by block, then group, then sparsity."""
    return [
        Trial(group[0].block, tuple(layer.name for layer in group), replace(target, sparsity=candidate))
        for group in groups_of(layers, options.group)
        for candidate in _candidates(target, options)
        if candidate > 0
    ]


def allocate_layers(
    layers: Sequence[LayerSize], measured: Tensor, target: LayerPlan, options: Options
) -> dict[str, LayerPlan]:
    """The plan of each layer, from the distortions [n_trials] of `trials`."""
    groups, candidates = groups_of(layers, options.group), np.array(_candidates(target, options))
    n_weights = np.array([sum(layer.n_weights for layer in group) for group in groups])
    distortion = np.zeros((len(groups), len(candidates)))
    distortion[:, candidates > 0] = measured.numpy().reshape(len(groups), -1)
    parts = RESOLUTION * n_weights / n_weights.sum()
    chosen = least_distortion(distortion, np.outer(parts, candidates).round().astype(int), _rounded(target, parts))
    wanted = {layer.name: candidates[choice] for group, choice in zip(groups, chosen, strict=True) for layer in group}
    return spread(layers, np.array([wanted[layer.name] for layer in layers]), target, options)


def _rounded(target: LayerPlan, parts: Floats) -> int:
    """The parts of all weights to remove, rounded as the groups' are, so that the uniform plan always counts as enough."""
    return int((parts * target.sparsity).round().sum())


def least_distortion(distortion: Floats, removed: NDArray[np.int_], least: int) -> NDArray[np.int_]:
    """The candidate of each group, [n_groups], of least total distortion among those that remove at least `least`.

    `distortion`, `removed`: [n_groups, n_candidates]; of each group at each candidate. Exact: with D(g, r) the least
    distortion of groups 0..g that removes r or more, D(g, r) = min over k of distortion[g, k] + D(g-1, r - removed[g, k]).
    Costs n_groups x n_candidates x least. Of equal candidates the first is taken.
    """
    wanted = np.arange(least + 1)
    best = np.where(wanted > 0, np.inf, 0.0)
    choices = np.empty((len(distortion), least + 1), np.int_)
    for group, (costs, parts) in enumerate(zip(distortion, removed, strict=True)):
        reached = np.stack([best[(wanted - p).clip(0)] + cost for cost, p in zip(costs, parts, strict=True)])
        choices[group], best = reached.argmin(0), reached.min(0)
    chosen = np.empty(len(distortion), np.int_)
    left = least
    for group in reversed(range(len(distortion))):
        chosen[group] = choices[group, left]
        left = max(left - removed[group, chosen[group]], 0)
    return chosen


def _candidates(target: LayerPlan, options: Options) -> list[float]:
    """The sparsities to try, ascending, the target among them."""
    steps = int(options.reach / options.step + 1e-9)
    tried = [target.sparsity + options.step * k for k in range(-steps, steps + 1)]
    return sorted({round(min(max(value, 0.0), options.highest(target)), 9) for value in tried})
