from dataclasses import replace

import pytest
import torch
from tasks import random_task

from compress.calib.stats import LayerStats
from compress.prune import magnitude, sparsegpt, wanda
from compress.prune.dsnot import NEEDS, Options, needs, refine_layer
from compress.task import LayerPlan, LayerTask

PLANS = [
    LayerPlan(sparsity=0.5),
    LayerPlan(sparsity=0.7),
    LayerPlan(sparsity=0.5, compare="layer"),
    LayerPlan(sparsity=0.5, pattern=(2, 4)),
    LayerPlan(sparsity=0.5, pattern=(4, 8)),
    LayerPlan(sparsity=1 - 5 / 16, pattern=(5, 16)),
]
PRUNERS = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}
all_starts = pytest.mark.parametrize(
    ("pruner", "plan", "guard"),
    [(pruner, plan, guard) for pruner in PRUNERS for plan in PLANS for guard in (True, False)],
    ids=lambda value: f"{value.sparsity:g}-{value.pattern}-{value.compare}" if isinstance(value, LayerPlan) else None,
)


def pruned(pruner="wanda", plan=PLANS[0], **changes) -> LayerTask:
    """A pruned layer of which some weights were zero before."""
    task = random_task(plan, **changes)
    weight = task.weight.masked_fill(task.weight.abs() < 0.001, 0.0)
    task = replace(task, weight=weight, original=weight)
    return PRUNERS[pruner].prune_layer(task, PRUNERS[pruner].Options())


def expected_error(task):
    """What each output lost on average, [out] float64."""
    return (task.original - task.weight).double() @ task.stats.x_sum.double() / task.stats.n_tokens


def output_error(task):
    """Squared output error of each row, [out] float64."""
    change = (task.weight - task.original).double()
    return ((change @ task.stats.hessian.double()) * change).sum(1)


def by_hand(task, options):
    """The mask as the docstring says it, one row and one swap at a time, in float64. Returns [out, in] bool."""
    stats, keep = task.stats, task.keep.clone()
    mean, mean_sq = (s.double() / stats.n_tokens for s in (stats.x_sum, stats.x_sq))
    variance = mean_sq - mean.square()
    hessian, m = stats.hessian.double(), task.plan.pattern[1] if task.plan.pattern else keep.shape[1]
    for row, (w0, w) in enumerate(zip(task.original.double(), task.weight.double(), strict=True)):
        change, e, moved = w - w0, (w0 - w) @ mean, set()
        least = options.threshold * (w0.square() @ mean_sq).sqrt()
        for _ in range(options.max_cycles):
            sign = e.sign()
            grow = [c for c in range(len(w)) if not task.keep[row, c] and sign * w0[c] * mean[c] > 0]
            grow.sort(key=lambda c: -(sign * w0[c] * mean[c] / variance[c]).item())
            drop = [c for c in range(len(w)) if task.keep[row, c] and sign * w[c] * mean[c] < 0]
            drop.sort(key=lambda c: (w[c].abs() * mean_sq[c].sqrt()).item())
            pairs = ((g, d) for g in grow for d in drop if g // m == d // m and not {g, d} & moved)
            g, d = next(pairs, (None, None))
            if g is None or e.abs() <= least:
                break
            moved |= {g, d}
            after = e - w0[g] * mean[g] + w[d] * mean[d]
            trial = change.clone()
            trial[g], trial[d] = 0.0, -w0[d]
            refused = after * sign < 0 or (options.guard and trial @ hessian @ trial >= change @ hessian @ change)
            if refused and not options.guard:
                break
            if not refused:
                e, change, keep[row, g], keep[row, d] = after, trial, True, False
    return keep


@all_starts
def test_it_is_the_rule_of_the_docstring(pruner, plan, guard):
    task, options = pruned(pruner, plan, out=12), Options(guard=guard, max_cycles=20)
    assert torch.equal(refine_layer(task, options).keep, by_hand(task, options))


@all_starts
def test_counts_and_kept_weights_stay_and_restored_weights_are_the_originals(pruner, plan, guard):
    task = pruned(pruner, plan)
    done = refine_layer(task, Options(guard=guard))
    assert not torch.equal(done.keep, task.keep)
    assert torch.equal(done.keep.sum(1), task.keep.sum(1))
    if plan.pattern:
        n, m = plan.pattern
        assert (done.keep.unflatten(1, (-1, m)).sum(-1) == n).all()
    assert torch.equal(done.weight[done.keep & task.keep], task.weight[done.keep & task.keep])
    assert torch.equal(done.weight[done.keep & ~task.keep], task.original[done.keep & ~task.keep])
    assert (done.weight[~done.keep] == 0).all()
    assert (task.original[done.keep & ~task.keep] != 0).all(), "a weight that was zero before brings nothing back"


@all_starts
def test_no_row_expects_a_larger_error_and_guarded_ones_have_none(pruner, plan, guard):
    task = pruned(pruner, plan)
    done = refine_layer(task, Options(guard=guard))
    before, after = expected_error(task), expected_error(done)
    assert (after.abs() <= before.abs() * (1 + 1e-5)).all()
    assert (after * before >= -1e-5 * before.square()).all(), "the error went past zero"
    moved = (done.keep != task.keep).any(1)
    assert (after.abs() < before.abs())[moved].all()
    if guard:
        assert (output_error(done) <= output_error(task) * (1 + 1e-5)).all()
        assert (output_error(done) < output_error(task))[moved].all()


def test_without_the_guard_some_rows_have_a_larger_output_error():
    task = pruned(plan=LayerPlan(sparsity=0.5, pattern=(2, 4)))
    assert (output_error(refine_layer(task, Options(guard=False))) > output_error(task)).any()


def test_rows_that_expect_little_error_are_left_alone():
    task = pruned()
    share = expected_error(task).abs() / (task.original.double().square() @ task.stats.x_sq.double() / 1024).sqrt()
    threshold = share.median().item()
    moved = (refine_layer(task, Options(threshold=threshold)).keep != task.keep).any(1)
    assert not moved[share <= threshold].any()
    assert moved[share > threshold].any()
    assert torch.equal(refine_layer(task, Options(threshold=1e6)).weight, task.weight)


def test_a_cycle_moves_one_pair_of_a_row_and_more_cycles_go_on_from_there():
    task = pruned("magnitude")
    moved = [(refine_layer(task, Options(max_cycles=n)).keep & ~task.keep) for n in (1, 3, 50)]
    assert moved[0].sum(1).max() == 1 and moved[1].sum(1).max() <= 3
    assert (moved[2] | ~moved[1]).all() and (moved[1] | ~moved[0]).all()
    assert moved[2].sum() > moved[1].sum() > moved[0].sum()


def test_the_size_of_weights_and_inputs_does_not_matter():
    task = pruned("sparsegpt")
    stats = task.stats
    larger = LayerStats(1024, x_sum=stats.x_sum * 4, x_sq=stats.x_sq * 16, hessian=stats.hessian * 16)
    scaled = replace(task, weight=task.weight / 8, original=task.original / 8, stats=larger)
    assert torch.equal(refine_layer(scaled, Options()).keep, refine_layer(task, Options()).keep)


def test_a_constant_input_is_a_certain_gain():
    """Column 0 never varies: its pruned weight comes back first, although it changes the mean less than column 1's."""
    x = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 2.0, 2.0, 2.0])
    x[:, 0] = 1.0
    weight = torch.tensor([[0.1, 0.2, 1.0, -0.01]])
    keep = torch.tensor([[False, False, True, True]])
    stats = LayerStats(len(x), x_sum=x.sum(0), x_sq=x.square().sum(0), hessian=x.T @ x)
    task = LayerTask("x", weight, weight, stats, LayerPlan(sparsity=0.5)).pruned(weight, keep)
    for guard in (True, False):
        done = refine_layer(task, Options(max_cycles=1, guard=guard))
        assert done.keep.tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("constant", [0.0, 1.0, -300.0])
def test_inputs_that_never_vary_break_nothing(guard, constant):
    task = pruned(out=8, inputs=16)
    x = torch.full((100, 16), constant)
    task = replace(task, stats=LayerStats(100, x_sum=x.sum(0), x_sq=x.square().sum(0), hessian=x.T @ x))
    done = refine_layer(task, Options(guard=guard))
    assert torch.isfinite(done.weight).all() and torch.equal(done.keep.sum(1), task.keep.sum(1))


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_rows_shorter_than_the_cycles_or_with_nothing_to_swap(guard, inputs):
    task = random_task(LayerPlan(sparsity=0.5), out=7, inputs=inputs)
    for keep in (torch.ones(7, inputs), torch.zeros(7, inputs), torch.eye(7)[:, :inputs]):
        start = task.pruned(task.weight, keep.bool())
        done = refine_layer(start, Options(guard=guard))
        assert torch.equal(done.keep.sum(1), start.keep.sum(1))
        if inputs == 1:
            assert torch.equal(done.keep, start.keep)


def test_inputs_that_no_token_reached_give_no_reason_to_swap():
    task = pruned()
    noise = LayerStats(0, x_sum=torch.zeros(64), x_sq=torch.ones(64), hessian=torch.eye(64))
    assert torch.equal(refine_layer(replace(task, stats=noise), Options()).keep, task.keep)


def test_only_the_guard_needs_the_hessian():
    assert needs(Options()) == NEEDS and needs(Options(guard=False)) == NEEDS - {"hessian"}
    task = pruned()
    bare = replace(task, stats=LayerStats(1024, x_sum=task.stats.x_sum, x_sq=task.stats.x_sq))
    options = Options(guard=False)
    assert torch.equal(refine_layer(bare, options).keep, refine_layer(task, options).keep)
