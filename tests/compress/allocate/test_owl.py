import pytest
import torch
from sizes import layer_sizes

from compress.allocate.owl import Options, allocate_layers, measure_block
from compress.calib.stats import LayerStats
from compress.task import LayerPlan


def layer(out, inputs, seed=0):
    """A weight and inputs without outliers: every score is between 1 and 2 times the input norm."""
    weight = 1 + torch.rand(out, inputs, generator=torch.Generator().manual_seed(seed))
    return weight, LayerStats(10, x_sq=torch.full((inputs,), 4.0))


def test_the_ratio_by_hand():
    weight = torch.full((4, 5), -1.0)
    weight[2, 3] = 100.0  # mean score (19 + 100) / 20 = 5.95; M = 5: above 29.75
    stats = LayerStats(10, x_sq=torch.ones(5))
    assert measure_block([(weight, stats)], Options()).tolist() == [1 / 20]
    assert measure_block([(weight, stats)], Options(threshold=17)).tolist() == [0]
    x_sq = torch.ones(5)
    x_sq[0] = 10_000.0  # four scores of 100 beside it: mean 5 x 100 + 15 over 20 = 25.75, and 128.75 is not reached
    assert measure_block([(weight, LayerStats(10, x_sq=x_sq))], Options()).tolist() == [0]
    assert measure_block([(weight, LayerStats(10, x_sq=x_sq))], Options(threshold=3)).tolist() == [5 / 20]


def test_a_block_is_one_distribution_of_scores():
    small, large = layer(8, 16), (layer(8, 16)[0] * 100, layer(8, 16)[1])
    together = measure_block([small, large], Options(threshold=1.5))
    assert together[0] == together[1] > 0.2
    apart = measure_block([small, large], Options(threshold=1.5, granularity="layer"))
    assert apart[0] == apart[1] < 0.2


def test_more_outliers_give_less_and_blocks_span_twice_the_limit():
    layers, target = layer_sizes(), LayerPlan(sparsity=0.6)
    ratio = torch.tensor([0.01, 0.01, 0.04, 0.04, 0.0, 0.0, 0.02, 0.02], dtype=torch.float64)
    plans = allocate_layers(layers, ratio, target, Options(limit=0.1))
    shares = [plans[x.name].sparsity for x in layers][::2]
    assert shares[1] < shares[3] < shares[0] < shares[2]
    assert shares[2] - shares[1] == pytest.approx(0.2)
    assert (shares[2] - shares[0]) / (shares[2] - shares[1]) == pytest.approx(0.25)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_without_a_limit_or_without_differences_it_is_uniform(sparsity):
    layers, target = layer_sizes(), LayerPlan(sparsity=sparsity)
    ratio = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert set(allocate_layers(layers, ratio, target, Options(limit=0)).values()) == {target}
    assert set(allocate_layers(layers, torch.full_like(ratio, 0.02), target, Options()).values()) == {target}
