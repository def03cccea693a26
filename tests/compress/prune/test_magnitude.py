import pytest
import torch

from compress.calib.stats import LayerStats
from compress.prune.magnitude import Options, prune_layer
from compress.task import LayerPlan, LayerTask


def pruned(weight, **plan):
    return prune_layer(LayerTask("x", weight, weight, LayerStats(0), LayerPlan(**plan)), Options())


def test_the_smallest_of_each_row_go_and_the_rest_is_untouched():
    weight = torch.tensor([[0.1, -5.0, 2.0, -0.2], [9.0, 8.0, -7.0, 6.0]])
    assert pruned(weight, sparsity=0.5).weight.tolist() == [[0.0, -5.0, 2.0, 0.0], [9.0, 8.0, 0.0, 0.0]]


def test_compared_over_the_layer_the_smallest_of_all_go():
    weight = torch.tensor([[0.1, -5.0, 2.0, -0.2], [9.0, 8.0, -7.0, 6.0]])
    assert pruned(weight, sparsity=0.5, compare="layer").weight.tolist() == [[0.0] * 4, [9.0, 8.0, -7.0, 6.0]]


def test_blocks_go_whole():
    weight = torch.tensor([[0.1, -0.2, 5.0, 0.0], [0.3, 0.1, 0.0, 0.0]])
    assert pruned(weight, sparsity=0.5, block=(2, 2)).weight.tolist() == [[0.0, 0.0, 5.0, 0.0], [0.0] * 4]


@pytest.mark.parametrize("compare", ["row", "layer"])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_equal_weights_and_weights_that_were_zero_do_not_move_the_count(pattern, compare):
    for weight in (torch.ones(6, 16), torch.eye(16)[:6]):
        keep = pruned(weight, sparsity=0.5, pattern=pattern, compare=compare).keep
        assert keep.sum() == 6 * 16 // 2
        assert keep[weight == weight.max()].sum() == (48 if weight.all() else 6)
