import torch

from compress.calib.stats import LayerStats
from compress.prune.magnitude import Options, prune_layer
from compress.task import LayerPlan, LayerTask


def test_the_smallest_of_each_row_go_and_the_rest_is_untouched():
    weight = torch.tensor([[0.1, -5.0, 2.0, -0.2], [9.0, 8.0, -7.0, 6.0]])
    task = LayerTask("x", weight, weight, LayerStats(0), LayerPlan(sparsity=0.5))
    assert prune_layer(task, Options()).weight.tolist() == [[0.0, -5.0, 2.0, 0.0], [9.0, 8.0, 0.0, 0.0]]
