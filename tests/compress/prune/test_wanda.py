import torch

from compress.calib.stats import LayerStats
from compress.prune.wanda import Options, prune_layer
from compress.task import LayerPlan, LayerTask


def test_the_papers_example():
    """Sun et al., figure 1: |W| ‖X‖ prunes what magnitude would keep."""
    weight = torch.tensor([[4.0, 0.0, 1.0, -1.0], [3.0, -2.0, -1.0, -3.0], [-3.0, 1.0, 0.0, 2.0]])
    norms = torch.tensor([1.0, 2.0, 8.0, 3.0])
    task = LayerTask("x", weight, weight, LayerStats(1, x_sq=norms.square()), LayerPlan(sparsity=0.5))
    pruned = prune_layer(task, Options()).weight
    assert pruned.tolist() == [[4.0, 0.0, 1.0, 0.0], [0.0, 0.0, -1.0, -3.0], [-3.0, 0.0, 0.0, 2.0]]


def test_equal_inputs_make_it_magnitude_by_row():
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    task = LayerTask("x", weight, weight, LayerStats(9, x_sq=torch.full((12,), 3.0)), LayerPlan(sparsity=0.5))
    keep = prune_layer(task, Options()).keep
    assert torch.equal(keep, weight.abs() >= weight.abs().sort(1).values[:, 6:7])
