import pytest
import torch

from compress.calib.stats import LayerStats
from compress.prune import magnitude
from compress.prune.wanda import Options, prune_layer
from compress.task import LayerPlan, LayerTask

PLANS = [
    LayerPlan(sparsity=0.5),
    LayerPlan(sparsity=0.5, compare="layer"),
    LayerPlan(sparsity=0.5, pattern=(2, 4)),
    LayerPlan(sparsity=0.5, block=(2, 3)),
]


def test_the_papers_example():
    """Sun et al., figure 1: |W| ‖X‖ prunes what magnitude would keep."""
    weight = torch.tensor([[4.0, 0.0, 1.0, -1.0], [3.0, -2.0, -1.0, -3.0], [-3.0, 1.0, 0.0, 2.0]])
    norms = torch.tensor([1.0, 2.0, 8.0, 3.0])
    task = LayerTask("x", weight, weight, LayerStats(1, x_sq=norms.square()), LayerPlan(sparsity=0.5))
    pruned = prune_layer(task, Options()).weight
    assert pruned.tolist() == [[4.0, 0.0, 1.0, 0.0], [0.0, 0.0, -1.0, -3.0], [-3.0, 0.0, 0.0, 2.0]]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_equal_inputs_make_it_magnitude(plan):
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    task = LayerTask("x", weight, weight, LayerStats(9, x_sq=torch.full((12,), 4.0)), plan)
    expected = magnitude.prune_layer(task, magnitude.Options())
    assert torch.equal(prune_layer(task, Options()).keep, expected.keep)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_neither_the_size_of_all_inputs_nor_the_number_of_tokens_matters(plan):
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    x_sq = torch.rand(12, generator=torch.Generator().manual_seed(1)) + 0.1
    masks = [
        prune_layer(LayerTask("x", weight, weight, LayerStats(n, x_sq=x_sq * scale), plan), Options()).keep
        for n, scale in ((10, 1.0), (1000, 64.0))
    ]
    assert torch.equal(*masks)


def test_an_input_that_was_always_zero_loses_its_weights_first():
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    x_sq = torch.ones(12).index_fill(0, torch.tensor([3, 8]), 0.0)
    task = LayerTask("x", weight, weight, LayerStats(9, x_sq=x_sq), LayerPlan(sparsity=0.25))
    assert not prune_layer(task, Options()).keep[:, [3, 8]].any()
