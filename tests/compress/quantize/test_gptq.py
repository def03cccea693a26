from dataclasses import replace

import pytest
import torch
from tasks import error, random_task

from compress.calib.stats import LayerStats
from compress.kernels.weights import Grid
from compress.prune import magnitude, sparsegpt
from compress.quantize import rtn
from compress.quantize.gptq import Options, quantize_layer
from compress.recipe import read_recipe
from compress.solve import run_step
from compress.steps import find_steps
from compress.task import LayerPlan

PLAIN = Options(act_order=False, shrink_steps=0, passes=0)  # the paper, nothing else


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
    ordered, plain = (
        quantize_layer(task, Options(act_order=on, shrink_steps=0, passes=0)).packed for on in (True, False)
    )
    assert torch.equal(ordered.scale, plain.scale)
    assert not torch.equal(ordered.packed, plain.packed)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_as_its_own_pruner_it_chooses_masks_in_the_sweep(pattern):
    """With so many bits that rounding hardly matters the mask is SparseGPT's; with few it is chosen after rounding errors."""
    fine, coarse = (random_task(LayerPlan(sparsity=0.5, pattern=pattern, wbits=bits, group_size=32)) for bits in (8, 2))
    keep = sparsegpt.prune_layer(fine, sparsegpt.Options(block_size=16)).keep
    options = Options(act_order=False, block_size=16)
    joint = quantize_layer(fine, options)
    assert (joint.keep == keep).float().mean() > 0.97
    assert joint.keep.float().mean() == 0.5
    assert not joint.weight[~joint.keep].any()
    assert (quantize_layer(coarse, options).keep != keep).float().mean() > 0.05


def test_one_sweep_for_both_costs_little():
    task = random_task(LayerPlan(sparsity=0.5, pattern=(2, 4), wbits=3, group_size=32))
    options = Options(act_order=False, passes=0)
    before = quantize_layer(sparsegpt.prune_layer(task, sparsegpt.Options()), options)
    assert error(quantize_layer(task, options)) < 1.1 * error(before)


def test_after_a_pruner_it_aims_at_the_weights_as_they_came():
    """Magnitude pruning leaves kept weights as they were; the descent makes up for those that went."""
    task = magnitude.prune_layer(random_task(LayerPlan(sparsity=0.5, wbits=4, group_size=32)), magnitude.Options())
    assert error(quantize_layer(task, Options(passes=8))) < 0.7 * error(task)


def test_layers_of_one_input_are_solved_as_one(monkeypatch):
    """Stacked, cut into chunks and taken apart again, layers get the codes they would have got alone."""
    monkeypatch.setattr("compress.solve.WEIGHTS_AT_ONCE", 64 * 20)
    step = find_steps(read_recipe(None, {"model": "m", "target": {"wbits": 4}}))[0]
    tasks = [random_task(LayerPlan(wbits=4, group_size=32), out=out, seed=0) for out in (48, 6, 31)]
    tasks = [replace(task, name=f"layer {len(task.weight)}", stats=tasks[0].stats) for task in tasks]
    tasks[1] = tasks[1].noted("of its own")
    for together, task in zip(run_step(step, tasks), tasks, strict=True):
        alone = step.run(task)
        assert together.notes[: len(task.notes)] == task.notes and ("of its own" in together.notes) == bool(task.notes)
        assert together.name == task.name and together.packed.shape == tuple(task.weight.shape)
        assert (together.packed.codes() == alone.packed.codes()).float().mean() > 0.99
        assert torch.equal(together.weight, together.packed.dequantize())
