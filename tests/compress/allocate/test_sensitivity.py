from itertools import product

import numpy as np
import pytest
import torch
from sizes import layer_sizes

from compress.allocate.sensitivity import Options, allocate_layers, least_distortion, trials
from compress.task import LayerPlan


@pytest.mark.parametrize("seed", range(20))
def test_dynamic_programming_equals_trying_everything(seed):
    random = np.random.default_rng(seed)
    distortion = random.random((5, 4))
    if seed % 2:
        distortion.sort(axis=1)  # more removed, more distortion; otherwise in any order
    removed = random.integers(0, 12, (5, 4))
    least = int(random.integers(0, removed.max(1).sum() + 1))
    chosen = least_distortion(distortion, removed, least)
    rows = np.arange(5)
    assert removed[rows, chosen].sum() >= least
    plans = [np.array(plan) for plan in product(range(4), repeat=5)]
    best = min(distortion[rows, plan].sum() for plan in plans if removed[rows, plan].sum() >= least)
    assert distortion[rows, chosen].sum() == pytest.approx(best)


def test_each_group_is_tried_at_each_candidate_around_the_target():
    asked = trials(layer_sizes(2), LayerPlan(sparsity=0.8), Options())
    assert [trial.plan.sparsity for trial in asked[:5]] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert asked[5].plan.sparsity == pytest.approx(0.95)  # 1.0 and 1.1 are out of bounds
    assert [trial.layers for trial in asked[::6]] == [(layer.name,) for layer in layer_sizes(2)]
    whole = trials(layer_sizes(2), LayerPlan(sparsity=0.8), Options(group="block", reach=0))
    assert [(t.block, len(t.layers), t.plan.sparsity) for t in whole] == [(0, 2, 0.8), (1, 2, 0.8)]
    assert all(t.plan.sparsity > 0 for t in trials(layer_sizes(2), LayerPlan(sparsity=0.1), Options()))


def costs(layers, target, options, weight_of):
    """Distortions that grow with the square of the sparsity, `weight_of` a trial's block times."""
    asked = trials(layers, target, options)
    return torch.tensor([weight_of(t) * t.plan.sparsity**2 for t in asked], dtype=torch.float64)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
def test_a_sensitive_block_gives_less_and_equal_ones_the_same(sparsity):
    layers, target = layer_sizes(), LayerPlan(sparsity=sparsity)
    measured = costs(layers, target, Options(), lambda t: 20.0 if t.block == 2 else 1.0)
    plans = allocate_layers(layers, measured, target, Options())
    shares = {layer.block: plans[layer.name].sparsity for layer in layers}
    assert shares[2] < sparsity - 0.05
    assert shares[2] < min(shares[block] for block in (0, 1, 3))
    # equal groups of equal size: convex costs want equal shares
    even = [layer for layer in layers if ".attn." in layer.name]
    plans = allocate_layers(even, costs(even, target, Options(), lambda t: 1.0), target, Options())
    assert {plan.sparsity for plan in plans.values()} == {sparsity}


def test_what_the_plan_costs_is_no_more_than_uniform_would():
    layers, target = layer_sizes(), LayerPlan(sparsity=0.5)
    for seed in range(10):
        options = Options(step=0.1)
        asked = trials(layers, target, options)
        random = np.random.default_rng(seed)
        measured = torch.tensor(random.random((8, 7))).cumsum(1).flatten()
        plans = allocate_layers(layers, measured, target, options)
        cost = {(t.layers[0], round(t.plan.sparsity, 6)): m for t, m in zip(asked, measured.tolist(), strict=True)}
        chosen = {n: min((s for m, s in cost if m == n), key=lambda s: abs(s - p.sparsity)) for n, p in plans.items()}
        assert sum(cost[item] for item in chosen.items()) <= sum(cost[n, 0.5] for n in plans) + 1e-9
