from dataclasses import replace

import pytest
import torch
from tasks import error, random_task

from compress.calib.stats import LayerStats
from compress.kernels.weights import Grid
from compress.quantize import rtn
from compress.quantize.gptq import Options, quantize_layer
from compress.task import LayerPlan

PLAIN = Options(act_order=False, shrink_steps=0)


def one_column_at_a_time(task, damping=0.01):
    """GPTQ as its paper states it, in float64 with the inverse Hessian downdated after each column (eq. 2 and 3)."""
    plan, h = task.plan, task.stats.hessian.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse, weight = torch.linalg.inv(h), task.weight.double().clone()
    grid = Grid.fit(task.weight.unflatten(1, (-1, plan.group_size)), plan.wbits, plan.symmetric, task.dtype)
    codes = torch.empty_like(weight)
    for i in range(len(h)):
        group = i // plan.group_size
        scale, zero = grid.scale[:, group].double(), grid.zero_point[:, group].double()
        codes[:, i] = (weight[:, i] / scale + zero).round().clamp(0, 2**plan.wbits - 1)
        miss = (weight[:, i] - (codes[:, i] - zero) * scale) / inverse[i, i]
        weight -= torch.outer(miss, inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [8, 24, 128])
def test_blocked_updates_give_the_papers_codes(block_size, symmetric):
    task = random_task(LayerPlan(wbits=4, group_size=32, symmetric=symmetric))
    codes = quantize_layer(task, PLAIN.model_copy(update={"block_size": block_size})).packed.codes()
    assert (codes != one_column_at_a_time(task)).float().mean() < 0.01  # a tie here and there falls the other way


def test_uncorrelated_inputs_make_it_round_to_nearest():
    task = random_task(LayerPlan(wbits=3, group_size=32))
    task = replace(task, stats=LayerStats(9, hessian=torch.eye(64)))
    assert torch.equal(quantize_layer(task, PLAIN).packed.packed, rtn.quantize_layer(task, rtn.Options()).packed.packed)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_part_pays(bits):
    task = random_task(LayerPlan(wbits=bits, group_size=32))
    nearest = error(rtn.quantize_layer(task, rtn.Options()))
    plain = error(quantize_layer(task, PLAIN))
    assert plain < 0.8 * nearest
    assert error(quantize_layer(task, Options(act_order=True, shrink_steps=0))) < plain
    assert error(quantize_layer(task, Options())) < plain


def test_errors_flow_around_pruned_weights():
    task = random_task(LayerPlan(sparsity=0.5, wbits=3, group_size=32))
    keep = torch.rand(task.weight.shape, generator=torch.Generator().manual_seed(2)) > 0.5
    pruned = replace(task.pruned(task.weight, keep), original=task.pruned(task.weight, keep).weight)
    assert error(quantize_layer(pruned, Options())) < 0.9 * error(rtn.quantize_layer(pruned, rtn.Options()))


def test_groups_stay_where_they_are_under_activation_order():
    """Static groups: a checkpoint needs no permutation, since column i always has the scale of group i // group_size."""
    task = random_task(LayerPlan(wbits=4, group_size=32))
    ordered, plain = (quantize_layer(task, Options(act_order=on, shrink_steps=0)).packed for on in (True, False))
    assert torch.equal(ordered.scale, plain.scale)
    assert not torch.equal(ordered.packed, plain.packed)
