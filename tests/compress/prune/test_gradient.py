from dataclasses import replace

import pytest
import torch
from tasks import random_task

from compress.prune import gradient, magnitude, wanda
from compress.task import LayerPlan

PLANS = [LayerPlan(sparsity=0.5), LayerPlan(sparsity=0.5, pattern=(2, 4))]


def test_by_hand():
    weight = torch.tensor([[4.0, -1.0, 2.0, 0.5]])
    task = random_task(LayerPlan(sparsity=0.5), out=1, inputs=4)
    stats = replace(task.stats, grad_sq=torch.tensor([[1.0, 64.0, 1.0, 4.0]]))
    pruned = gradient.prune_layer(replace(task, weight=weight, stats=stats), gradient.Options())
    assert pruned.weight.tolist() == [[4.0, -1.0, 0.0, 0.0]]  # scores 4, 8, 2, 1


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: str(plan.pattern))
def test_gradients_of_one_outputs_rank_alike_as_its_inputs_make_it_wanda(plan):
    """Where every token's output gradient is as large, a weight's gradient is its input."""
    task = random_task(plan)
    rows = torch.linspace(1e-6, 1e-3, len(task.weight)).unsqueeze(1)
    task = replace(task, stats=replace(task.stats, grad_sq=rows * task.stats.x_sq))
    assert torch.equal(
        gradient.prune_layer(task, gradient.Options()).keep, wanda.prune_layer(task, wanda.Options()).keep
    )


def test_without_any_gradient_it_is_magnitude():
    task = random_task(LayerPlan(sparsity=0.5))
    task = replace(task, stats=replace(task.stats, grad_sq=torch.zeros_like(task.weight)))
    assert torch.equal(
        gradient.prune_layer(task, gradient.Options()).keep, magnitude.prune_layer(task, magnitude.Options()).keep
    )
