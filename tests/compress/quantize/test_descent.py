import pytest
import torch
from tasks import error, random_task

from compress.calib.stats import damped
from compress.kernels.weights import Grid
from compress.quantize.descent import Columns, descend
from compress.quantize.gptq import Options, quantize_layer
from compress.task import LayerPlan


def nearest(task, keep=None):
    """The task's weight rounded to nearest, as descent takes it."""
    plan = task.plan
    groups = task.weight.unflatten(1, (-1, plan.group_size))
    grid = Grid.fit(groups, plan.wbits, plan.symmetric, task.dtype)
    steps = (grid.encode_groups(groups) - grid.zero_point.unsqueeze(-1)).flatten(1).T.contiguous()
    if keep is not None:
        steps *= keep
    return Columns(steps, grid.scale.T.contiguous(), grid.zero_point.T.contiguous(), plan.wbits, keep)


def damped_hessian(stats, damping):
    with damped(stats, damping) as hessian:
        return hessian.clone()


def loss(columns, task, hessian):
    miss = (task.weight.T - columns.values()).double()
    return ((hessian.double() @ miss) * miss).sum(0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_no_pass_raises_the_error_of_any_row(group_size, symmetric):
    task = random_task(LayerPlan(wbits=3, group_size=group_size, symmetric=symmetric))
    hessian = damped_hessian(task.stats, 0.01)
    columns = nearest(task)
    before = loss(columns, task, hessian)
    first = before.sum()
    for _ in range(4):
        descend(columns, task.weight.T, task.weight.T, hessian, 1, task.dtype)
        after = loss(columns, task, hessian)
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    assert after.sum() < 0.5 * first


def test_it_ends_where_no_single_code_can_do_better():
    task = random_task(LayerPlan(wbits=3, group_size=32), out=6)
    hessian, columns = damped_hessian(task.stats, 0.01), nearest(task)
    descend(columns, task.weight.T, task.weight.T, hessian, 50, task.dtype)
    least = loss(columns, task, hessian)
    for i in range(len(columns.steps)):
        for move in (-1, 1):
            before = columns.steps[i].clone()
            lowest = -columns.zero_point[i // 32]
            columns.steps[i] = (before + move).clamp(lowest, lowest + 7)
            assert (loss(columns, task, hessian) >= least * (1 - 1e-5)).all()
            columns.steps[i] = before


def test_scales_stay_what_a_checkpoint_stores_and_positive():
    task = random_task(LayerPlan(wbits=2, group_size=16, symmetric=False))
    columns = nearest(task)
    columns.steps[:16] = 0  # a group without a weight has no best scale
    descend(columns, task.weight.T, task.weight.T, damped_hessian(task.stats, 0.01), 3, torch.bfloat16)
    assert torch.equal(columns.scale.bfloat16().float(), columns.scale)
    assert (columns.scale > 0).all()
    codes = columns.steps.unflatten(0, (-1, 16)) + columns.zero_point.unsqueeze(1)
    assert codes.min() >= 0 and codes.max() <= 3


def test_pruned_weights_stay_zero():
    task = random_task(LayerPlan(wbits=3, group_size=32))
    keep = torch.rand(64, 48, generator=torch.Generator().manual_seed(0)) > 0.5
    columns = nearest(task, keep)
    descend(columns, task.weight.T, task.weight.T, damped_hessian(task.stats, 0.01), 3, task.dtype)
    assert not columns.values()[~keep].any()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_revising_a_sweep_pays(bits):
    task = random_task(LayerPlan(wbits=bits, group_size=32, symmetric=False))
    sweep, revised = (error(quantize_layer(task, Options(passes=passes))) for passes in (0, 4))
    assert revised < 0.95 * sweep


def test_outputs_that_a_sweep_made_worse_than_rounding_begin_there():
    task = random_task(LayerPlan(wbits=3, group_size=32))
    hessian, columns, plain = damped_hessian(task.stats, 0.01), nearest(task), nearest(task)
    columns.steps[:, 5] = 0
    assert descend(columns, task.weight.T, task.weight.T, hessian, 0, task.dtype) == 1
    assert torch.equal(columns.steps, plain.steps)
