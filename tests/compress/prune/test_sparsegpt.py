from dataclasses import replace

import pytest
import torch
from tasks import error, random_task

from compress.calib.stats import LayerStats
from compress.prune import sparsegpt, wanda
from compress.prune.sparsegpt import Options, prune_layer
from compress.task import LayerPlan


def test_uncorrelated_inputs_leave_nothing_to_update():
    """With a diagonal Hessian errors cannot be absorbed elsewhere: kept weights stay as they were."""
    task = random_task(LayerPlan(sparsity=0.5))
    stats = LayerStats(9, hessian=torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1))
    done = prune_layer(replace(task, stats=stats), Options())
    torch.testing.assert_close(done.weight[done.keep], task.weight[done.keep])


def test_the_last_column_update_is_the_least_squares_one():
    """Two columns, the first pruned: the second becomes w2 + w1 h12 / h22, the optimum of the damped problem."""
    hessian = torch.tensor([[1.0, 0.6], [0.6, 2.0]])
    weight = torch.tensor([[0.1, 3.0]])
    task = random_task(LayerPlan(sparsity=0.5), out=1, inputs=2)
    task = replace(task, weight=weight, original=weight, stats=LayerStats(9, hessian=hessian))
    done = prune_layer(task, Options(damping=1e-6))
    assert done.weight[0, 0] == 0
    assert done.weight[0, 1].item() == pytest.approx(3.0 + 0.1 * 0.6 / 2.0, rel=1e-4)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_the_update_pays(pattern):
    task = random_task(LayerPlan(sparsity=0.5, pattern=pattern))
    done = prune_layer(task, Options())
    only_mask = task.pruned(task.weight, done.keep)
    assert error(done) < 0.9 * error(only_mask)
    assert error(done) < 0.9 * error(wanda.prune_layer(task, wanda.Options()))


def test_blocks_share_sparsity_but_rows_need_not():
    task = random_task(LayerPlan(sparsity=0.5), inputs=64)
    gone = ~prune_layer(task, Options(block_size=16)).keep
    assert (gone.unflatten(1, (-1, 16)).sum((0, 2)) == 48 * 16 // 2).all()
    assert len(set(gone.sum(1).tolist())) > 1


def test_compared_over_the_layer_blocks_of_columns_share_no_sparsity():
    task = random_task(LayerPlan(sparsity=0.5, compare="layer"), inputs=64)
    done = prune_layer(task, Options(block_size=16))
    gone = ~done.keep
    assert gone.sum() == gone.numel() // 2
    assert len(set(gone.unflatten(1, (-1, 16)).sum((0, 2)).tolist())) > 1
    assert error(done) < 0.9 * error(task.pruned(task.weight, done.keep))


def test_with_uncorrelated_inputs_masks_over_the_layer_are_wandas():
    diagonal = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1
    stats = LayerStats(9, x_sq=diagonal, hessian=torch.diag(diagonal))
    for plan in (LayerPlan(sparsity=0.5, compare="layer"), LayerPlan(sparsity=0.5, block=(4, 8))):
        task = replace(random_task(plan), stats=stats)
        keep = prune_layer(task, Options(damping=1e-6)).keep
        assert torch.equal(keep, wanda.prune_layer(task, wanda.Options()).keep)


@pytest.mark.parametrize("block", [(1, 8), (8, 1), (16, 16)])
def test_the_update_pays_for_blocks_too(block):
    task = random_task(LayerPlan(sparsity=0.5, block=block))
    done = prune_layer(task, Options(block_size=16))
    assert error(done) < 0.9 * error(task.pruned(task.weight, done.keep))


def test_a_group_never_lies_across_two_blocks():
    task = random_task(LayerPlan(sparsity=0.5, pattern=(6, 12)), inputs=96)
    keep = prune_layer(task, Options(block_size=16)).keep
    assert (keep.unflatten(1, (-1, 12)).sum(-1) == 6).all()


def test_more_damping_is_noted():
    hessian = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.02]))
    task = random_task(LayerPlan(sparsity=0.5), inputs=4)
    done = sparsegpt.prune_layer(replace(task, stats=LayerStats(9, hessian=hessian)), Options())
    assert done.notes == ("sparsegpt: damping raised from 0.01 to 0.1 to factorize the Hessian",)
