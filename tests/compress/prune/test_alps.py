from itertools import combinations

import pytest
import torch
from tasks import error, random_task

from compress.prune import alps, least_squares, sparsegpt
from compress.task import LayerPlan

PLANS = [LayerPlan(sparsity=0.5), LayerPlan(sparsity=0.7), LayerPlan(sparsity=0.5, pattern=(2, 4))]


def best_error(task):
    """The least error that any mask of a one-row task has, over all masks with as many zeros."""
    inputs = task.weight.shape[1]
    kept = inputs - int(inputs * task.plan.sparsity)
    errors = []
    for columns in combinations(range(inputs), kept):
        keep = torch.zeros(1, inputs, dtype=torch.bool)
        keep[0, list(columns)] = True
        errors.append(error(task.pruned(exact(task, keep), keep)))
    return min(errors), sorted(errors)


def exact(task, keep):
    """Least squares with a mask, row by row in float64."""
    hessian = task.stats.hessian.double()
    weight = torch.zeros_like(task.original, dtype=torch.float64)
    for row in range(len(weight)):
        columns = keep[row].nonzero()[:, 0]
        wanted = (hessian @ task.original[row].double())[columns]
        weight[row, columns] = torch.linalg.solve(hessian[columns][:, columns], wanted)
    return weight.float()


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_its_error_is_below_sparsegpts(plan):
    for seed in range(3):
        task = random_task(plan, seed=seed)
        ours = alps.prune_layer(task, alps.Options())
        theirs = sparsegpt.prune_layer(task, sparsegpt.Options())
        assert error(ours) < 0.95 * error(theirs)
        assert (~ours.keep).sum() == (~theirs.keep).sum()


def test_on_a_small_row_it_finds_one_of_the_best_masks():
    for seed in range(4):
        task = random_task(LayerPlan(sparsity=0.5), out=1, inputs=12, seed=seed)
        best, every = best_error(task)
        found = error(alps.prune_layer(task, alps.Options(iterations=300, damping=1e-4)))
        assert best <= found * (1 + 1e-4)
        assert found <= every[len(every) // 50], "not among the best fiftieth of all 924 masks"


def test_more_iterations_find_better_masks():
    task = random_task(LayerPlan(sparsity=0.7))
    few, many = (error(alps.prune_layer(task, alps.Options(iterations=n))) for n in (1, 60))
    assert many < few


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_least_squares_reaches_the_optimum_of_any_mask(plan):
    pruned = sparsegpt.prune_layer(random_task(plan), sparsegpt.Options())
    solved = least_squares.refine_layer(pruned, least_squares.Options(steps=200, damping=1e-6))
    optimum = error(pruned.pruned(exact(pruned, pruned.keep), pruned.keep))
    assert torch.equal(solved.keep, pruned.keep)
    assert optimum < error(pruned)
    assert error(solved) == pytest.approx(optimum, rel=0.01)


def test_each_step_of_least_squares_lowers_the_damped_error():
    pruned = sparsegpt.prune_layer(random_task(LayerPlan(sparsity=0.6)), sparsegpt.Options())
    errors = [error(pruned)]
    for steps in (1, 2, 4, 8):
        errors.append(error(least_squares.refine_layer(pruned, least_squares.Options(steps=steps, damping=1e-6))))
    assert errors == sorted(errors, reverse=True)


def test_layers_that_share_statistics_share_the_spectrum():
    task = random_task(LayerPlan(sparsity=0.5))
    alps.prune_layer(task, alps.Options())
    made = dict(task.stats.factors)
    alps.prune_layer(task, alps.Options())
    assert made and all(task.stats.factors[key] is each for key, each in made.items())


def test_what_it_says_of_its_cost_grows_with_the_work():
    def said(inputs, iterations):
        return alps.flops(48, inputs, alps.Options(iterations=iterations))

    assert 0 < said(64, 30) < said(64, 60) and said(128, 30) > 2 * said(64, 30)
