from dataclasses import replace

import pytest
import torch
from tasks import random_task

from compress.prune import gradient, wanda
from compress.prune.gblm import NEEDS, Options, needs, prune_layer
from compress.task import LayerPlan

PLANS = [LayerPlan(sparsity=0.5), LayerPlan(sparsity=0.7), LayerPlan(sparsity=0.5, pattern=(2, 4))]


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.sparsity}-{plan.pattern}")
def test_without_the_gradient_it_is_wanda(plan, norm):
    task = random_task(plan)
    assert torch.equal(
        prune_layer(task, Options(alpha=0, norm=norm)).keep, wanda.prune_layer(task, wanda.Options()).keep
    )


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.sparsity}-{plan.pattern}")
def test_with_a_large_alpha_it_is_the_gradients_score(plan):
    task = random_task(plan)
    mask = prune_layer(task, Options(alpha=1e6)).keep
    assert torch.equal(mask, gradient.prune_layer(task, gradient.Options()).keep)
    assert not torch.equal(mask, prune_layer(task, Options(alpha=0)).keep)


def test_by_hand():
    """x_rms = 1 and 2; gradients 3 and 0: alpha decides which of two equal weights stays."""
    task = random_task(LayerPlan(sparsity=0.5), out=1, inputs=2)
    stats = replace(task.stats, n_tokens=4, x_sq=torch.tensor([4.0, 16.0]), grad_sq=torch.tensor([[9.0, 0.0]]))
    task = replace(task, weight=torch.ones(1, 2), stats=stats)
    assert prune_layer(task, Options(alpha=0.3)).keep.tolist() == [[False, True]]
    assert prune_layer(task, Options(alpha=0.4)).keep.tolist() == [[True, False]]


def test_the_norms_differ():
    task = random_task(LayerPlan(sparsity=0.5))
    one, two = (prune_layer(task, Options(alpha=1e6, norm=norm)).keep for norm in ("l1", "l2"))
    assert not torch.equal(one, two)


def test_as_many_samples_again_change_nothing():
    """The sums of a doubled calibration set are twice as large, the means of gradients are the same."""
    task = random_task(LayerPlan(sparsity=0.5))
    twice = replace(task.stats, n_tokens=2 * task.stats.n_tokens, x_sq=2 * task.stats.x_sq)
    assert torch.equal(prune_layer(task, Options()).keep, prune_layer(replace(task, stats=twice), Options()).keep)


def test_a_layer_no_token_reached_goes_by_magnitude():
    task = random_task(LayerPlan(sparsity=0.5))
    nothing = torch.zeros_like(task.weight)
    stats = replace(task.stats, n_tokens=0, x_sq=torch.ones(64), grad_sq=nothing)
    keep = prune_layer(replace(task, stats=stats), Options()).keep
    assert torch.equal(keep, task.weight.abs() >= task.weight.abs().sort(1).values[:, 32:33])


def test_only_one_kind_of_gradient_is_asked_for():
    assert needs(Options()) == {"x_sq", "grad_sq"}
    assert needs(Options(norm="l1")) == {"x_sq", "grad_abs"}
    assert NEEDS == needs(Options()) | needs(Options(norm="l1"))
