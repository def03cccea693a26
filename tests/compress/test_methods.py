"""What every method has to keep to, whoever wrote it: the folders are read, so a new file is tested by being there."""

import re
from dataclasses import replace

import pytest
import torch
from tasks import error, random_task

from compress.calib.stats import LayerStats
from compress.errors import InputError
from compress.kernels.weights import IntWeight
from compress.steps import STAGES, methods, verb_of
from compress.task import LayerPlan

PRUNERS = {name: m for name, m in methods("prune").items() if hasattr(m, "prune_layer")}
REFINERS, QUANTIZERS = methods("refine"), methods("quantize")
PLANS = [
    LayerPlan(sparsity=0.5),
    LayerPlan(sparsity=0.7),
    LayerPlan(sparsity=0.5, pattern=(2, 4)),
    LayerPlan(sparsity=0.5, pattern=(4, 8)),
    LayerPlan(sparsity=0.75, pattern=(1, 4)),
    LayerPlan(sparsity=1 - 5 / 16, pattern=(5, 16)),
    LayerPlan(sparsity=0.7, compare="layer"),
    LayerPlan(sparsity=0.5, block=(4, 8)),
    LayerPlan(sparsity=0.75, block=(16, 1)),
]
OF_THE_LOSS = {"grad_sq", "grad_abs"}  # who reads them need not keep a layer's output close
GRIDS = [LayerPlan(wbits=b, group_size=g, symmetric=s) for b in (2, 3, 4, 8) for g in (32, -1) for s in (True, False)]


def apply(stage, module, task, **options):
    return getattr(module, verb_of(stage, module))(task, module.Options(**options))


def keeps_zeros(quantizer):
    """Whether a quantizer takes pruned weights; one that does not says so when the run is planned."""
    module = QUANTIZERS[quantizer]
    try:
        if hasattr(module, "planned"):
            module.planned((48, 64), LayerPlan(sparsity=0.5, wbits=4), module.Options())
    except InputError:
        return False
    return True


def only_needed(task, module):
    """The task with nothing but the statistics the method says it needs."""
    given = {name: getattr(task.stats, name) for name in module.NEEDS}
    return replace(task, stats=LayerStats(task.stats.n_tokens, **given))


@pytest.mark.parametrize("stage", STAGES)
def test_every_method_says_what_it_is_where_it_is_from_and_what_can_be_set(stage):
    assert methods(stage)
    for name, module in methods(stage).items():
        assert re.match(r"\w[^:]*: .+[.:]$", module.__doc__.splitlines()[0]), f"{name} needs one plain first sentence"
        if stage != "allocate":
            assert re.search(r"arXiv:\d{4}\.\d{5}", module.__doc__), f"{name} names no paper"
        for key, field in module.Options.model_fields.items():
            assert field.description, f"{name}.{key} has no description"
            assert not field.is_required(), f"{name}.{key} has no default"
        with pytest.raises(ValueError, match="frozen"):
            module.Options().__setattr__("anything", 1)


def check_counts(task):
    """What the plan asks for is pruned; methods may differ in how they round unstructured sparsity."""
    plan, gone = task.plan, ~task.keep
    if plan.pattern:
        n, m = plan.pattern
        assert (gone.unflatten(1, (-1, m)).sum(-1) == m - n).all()
    elif plan.block:
        rows, columns = plan.block
        blocks = gone.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
        assert torch.equal(blocks.all(-1), blocks.any(-1)), "a block is torn"
        assert blocks.all(-1).sum() == int(blocks.shape[:2].numel() * plan.sparsity)
    elif plan.compare == "layer":
        assert gone.sum() == int(gone.numel() * plan.sparsity)
    else:
        assert gone.float().mean().item() == pytest.approx(plan.sparsity, abs=1 / 64)


def plan_id(plan):
    kind = plan.pattern or plan.block or plan.compare
    return f"{plan.sparsity:g}-{kind}"


@pytest.mark.parametrize("plan", PLANS, ids=plan_id)
@pytest.mark.parametrize("name", PRUNERS)
def test_pruners(name, plan):
    module = PRUNERS[name]
    task = random_task(plan)
    before = task.weight.clone()
    done = apply("prune", module, only_needed(task, module))
    assert torch.equal(task.weight, before), "the input was changed"
    assert done.weight.shape == before.shape and done.weight.dtype == torch.float32
    assert torch.isfinite(done.weight).all()
    assert (done.weight[~done.keep] == 0).all()
    check_counts(done)
    again = apply("prune", module, only_needed(task, module))
    assert torch.equal(again.weight, done.weight)
    if not module.NEEDS & OF_THE_LOSS:
        assert error(replace(done, stats=task.stats)) <= error(apply("prune", PRUNERS["magnitude"], task)) + 1e-9


@pytest.mark.parametrize("name", PRUNERS)
def test_equal_weights_and_weights_that_were_zero_do_not_move_the_count(name):
    for plan in PLANS:
        task = random_task(plan)
        for weight in (torch.ones(48, 64), task.weight.masked_fill(task.weight > 0, 0.0)):
            check_counts(apply("prune", PRUNERS[name], replace(task, weight=weight, original=weight)))


@pytest.mark.parametrize("plan", [LayerPlan(), LayerPlan(compare="layer"), LayerPlan(block=(4, 8))], ids=plan_id)
@pytest.mark.parametrize("name", PRUNERS)
def test_a_layer_that_is_asked_for_nothing_stays_as_it_is(name, plan):
    task = random_task(plan)
    done = apply("prune", PRUNERS[name], task)
    assert torch.equal(done.weight, task.weight) and done.keep.all()
    for refiner in REFINERS.values():
        torch.testing.assert_close(apply("refine", refiner, done).weight, task.weight)


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan.block is None], ids=plan_id)
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("name", REFINERS)
def test_refiners(name, pruner, plan):
    module = REFINERS[name]
    task = apply("prune", PRUNERS[pruner], random_task(plan))
    before, keep = task.weight.clone(), task.keep.clone()
    done = apply("refine", module, only_needed(task, module))
    assert torch.equal(task.weight, before) and torch.equal(task.keep, keep), "the input was changed"
    assert done.weight.shape == before.shape and done.weight.dtype == torch.float32
    assert torch.isfinite(done.weight).all()
    assert (done.weight[~done.keep] == 0).all()
    assert done.keep.sum() == keep.sum()
    check_counts(done)
    assert torch.equal(apply("refine", module, only_needed(task, module)).weight, done.weight)
    assert error(replace(done, stats=task.stats)) <= error(task) * (1 + 1e-4)  # damping moves the optimum a little


@pytest.mark.parametrize("plan", GRIDS, ids=lambda p: f"W{p.wbits}g{p.group_size}{'sym' if p.symmetric else 'asym'}")
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers(name, plan):
    module = QUANTIZERS[name]
    task = random_task(plan)
    before = task.weight.clone()
    done = apply("quantize", module, only_needed(task, module))
    assert torch.equal(task.weight, before), "the input was changed"
    assert torch.equal(done.weight, done.packed.dequantize())
    if isinstance(done.packed, IntWeight):
        assert done.packed.bits == plan.wbits and done.packed.symmetric == plan.symmetric
        assert done.packed.codes().int().max() < 2**plan.wbits
    assert torch.isfinite(done.weight).all()
    again = apply("quantize", module, only_needed(task, module))
    for part, tensor in done.packed.tensors().items():
        assert torch.equal(again.packed.tensors()[part], tensor)
    assert error(replace(done, stats=task.stats)) <= error(apply("quantize", QUANTIZERS["rtn"], task)) + 1e-9


@pytest.mark.parametrize(
    "plan", GRIDS[::3], ids=lambda p: f"W{p.wbits}g{p.group_size}{'sym' if p.symmetric else 'asym'}"
)
@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("quantizer", [name for name in QUANTIZERS if keeps_zeros(name)])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_pruned_weights_stay_exactly_zero_in_packed_form(pruner, quantizer, pattern, plan):
    task = random_task(replace(plan, sparsity=0.5, pattern=pattern))
    pruned = apply("prune", PRUNERS[pruner], task)
    done = apply("quantize", QUANTIZERS[quantizer], pruned)
    assert (done.packed.dequantize()[~pruned.keep] == 0).all()
    assert torch.equal(done.keep, pruned.keep)


@pytest.mark.parametrize(
    ("stage", "name"),
    [("prune", n) for n in PRUNERS] + [("refine", n) for n in REFINERS] + [("quantize", n) for n in QUANTIZERS],
)
def test_an_input_channel_that_is_always_zero_breaks_nothing(stage, name):
    sparsity = 0.5 if stage != "quantize" or keeps_zeros(name) else 0.0
    task = random_task(LayerPlan(sparsity=sparsity, wbits=4, group_size=32))
    alive = torch.ones(64).index_fill(0, torch.tensor([7]), 0.0)
    sums = {"x_sum": task.stats.x_sum * alive, "x_sq": task.stats.x_sq * alive}
    task = replace(task, stats=replace(task.stats, **sums, hessian=task.stats.hessian * alive * alive.unsqueeze(1)))
    if stage == "refine":
        task = apply("prune", PRUNERS["magnitude"], task)
    assert torch.isfinite(apply(stage, methods(stage)[name], task).weight).all()


@pytest.mark.parametrize("plan", PLANS, ids=plan_id)
@pytest.mark.parametrize("name", PRUNERS)
def test_inputs_that_are_all_zero_break_nothing(name, plan):
    task = random_task(plan)
    sums = {key: torch.zeros_like(getattr(task.stats, key)) for key in ("x_sum", "x_sq", "hessian", *OF_THE_LOSS)}
    done = apply("prune", PRUNERS[name], replace(task, stats=LayerStats(task.stats.n_tokens, **sums)))
    check_counts(done)
    for refiner in [] if plan.block else REFINERS.values():
        refined = apply("refine", refiner, done)
        assert torch.isfinite(refined.weight).all() and torch.equal(refined.keep.sum(1), done.keep.sum(1))
