"""Corrections of low rank: what they take out of a layer's output, and what they leave alone."""

from dataclasses import replace

import pytest
import torch
from tasks import error, random_task

from compress.calib.stats import LayerStats
from compress.errors import InputError
from compress.prune import wanda
from compress.quantize import gptq, rtn
from compress.recipe import read_recipe
from compress.recover.low_rank import Options, low_rank, recover_layer
from compress.steps import find_steps
from compress.task import LayerPlan

PLAN = LayerPlan(wbits=2, group_size=32, symmetric=False)
METHODS = {"gptq": gptq, "rtn": rtn}


def quantizer(name):
    return lambda task: METHODS[name].quantize_layer(task, METHODS[name].Options())


def quantized(name="gptq", out=48, sparsity=0.0, pattern=None, **changes):
    plan = replace(PLAN, sparsity=sparsity, pattern=pattern)
    task = random_task(plan, out=out, dtype=changes.pop("dtype", torch.float32), **changes)
    if sparsity:
        task = wanda.prune_layer(task, wanda.Options())
    return quantizer(name)(task)


def corrected(task, name="gptq", **options):
    return recover_layer(task, Options(**options), quantizer(name))


@pytest.mark.parametrize("out", [48, 96], ids=["wide", "tall"])
@pytest.mark.parametrize("name", METHODS)
def test_each_rank_takes_more_out_and_all_of_them_everything(name, out):
    task = quantized(name, out)
    errors = [error(task)] + [error(corrected(task, name, rank=rank)) for rank in (1, 2, 4, 8, 16, 32, 64)]
    assert errors == sorted(errors, reverse=True) and errors[1] < errors[0]
    assert error(corrected(task, name, rank=1000)) < 1e-9 * errors[0]


@pytest.mark.parametrize("out", [48, 96], ids=["wide", "tall"])
def test_it_is_the_truncated_svd_in_units_of_the_inputs(out):
    """QERA, theorem 1, with the symmetric root of the damped Hessian, in float64."""
    task = quantized(out=out)
    e, hessian = (task.original - task.weight).double(), task.stats.hessian.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    values, vectors = torch.linalg.eigh(hessian)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    u, s, v = torch.linalg.svd(e @ root, full_matrices=False)
    wanted = u[:, :5] @ torch.diag(s[:5]) @ v[:5] @ torch.linalg.inv(root)
    a, b = low_rank(e.float(), task.stats, 5, 0.01)
    torch.testing.assert_close((b @ a).double(), wanted, atol=1e-3 * wanted.abs().max().item(), rtol=0)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_inputs_of_equal_size_make_it_the_plain_svd():
    e = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    a, b = low_rank(e, LayerStats(10, hessian=7 * torch.eye(30)), 3, 0.01)
    u, s, v = torch.linalg.svd(e, full_matrices=False)
    torch.testing.assert_close(b @ a, u[:, :3] @ torch.diag(s[:3]) @ v[:3], atol=1e-4, rtol=1e-4)


def test_weighted_by_the_inputs_it_beats_the_unweighted():
    task = quantized()
    a, b = low_rank(task.original - task.weight, LayerStats(1, hessian=torch.eye(64)), 8, 0.01)
    assert error(corrected(task, rank=8)) < 0.9 * error(replace(task, weight=task.weight + b @ a))


def test_an_error_of_low_rank_goes_away():
    task = quantized()
    added = torch.outer(torch.randn(48), torch.randn(64)) + torch.outer(torch.randn(48), torch.randn(64))
    task = replace(task, original=task.weight + added)
    assert error(corrected(task, rank=2)) < 1e-8


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("residual", [0.0, 0.02])
def test_alternation_is_never_worse_than_its_first_round(name, residual):
    for sparsity in (0.0, 0.5):
        task = quantized(name, sparsity=sparsity)
        rounds = [error(corrected(task, name, rank=4, iterations=n, residual=residual)) for n in (0, 1, 2, 4)]
        assert rounds == sorted(rounds, reverse=True)
    assert rounds[-1] < 0.99 * rounds[0]


def test_alternation_ends_with_weights_that_its_correction_is_for():
    task = quantized()
    done = corrected(task, rank=4, iterations=3)
    assert not torch.equal(done.packed.packed, task.packed.packed)
    assert torch.equal(done.weight, done.packed.dequantize() + done.correction.delta())
    assert torch.equal(done.original, task.original)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("iterations", [0, 2])
def test_pruned_weights_stay_zero_in_packed_form_and_none_is_kept_singly(pattern, iterations):
    task = quantized(sparsity=0.5, pattern=pattern)
    done = corrected(task, rank=2, residual=0.1, iterations=iterations)
    assert (done.packed.dequantize()[~task.keep] == 0).all() and torch.equal(done.keep, task.keep)
    assert type(done.packed) is type(task.packed)
    assert task.keep.flatten()[done.correction.index.long()].all()


@pytest.mark.parametrize("name", METHODS)
def test_single_weights_are_the_largest_errors_and_take_some_out(name):
    task = quantized(name)
    done = corrected(task, name, rank=0, residual=0.02)
    index = done.correction.index
    assert index.dtype == torch.int32 and (index.diff() > 0).all() and len(index) == int(0.02 * 48 * 64)
    score = ((task.original - task.weight).square() * task.stats.hessian.diagonal()).flatten()
    assert score[index.long()].min() >= score.sort(descending=True).values[len(index) - 1]
    errors = [error(corrected(task, name, rank=0, residual=share)) for share in (0.01, 0.05, 0.2)]
    assert [error(task), *errors] == sorted([error(task), *errors], reverse=True)
    both = error(corrected(task, name, rank=4, residual=0.02))
    assert both < error(corrected(task, name, rank=4)) and both < error(done)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounded_as_the_checkpoint_keeps_it_it_never_makes_a_layer_worse(bits, dtype):
    task = quantized(dtype=dtype, adapter_bits=bits)
    done = corrected(task, rank=8)
    assert error(done) <= error(task)
    if done.correction is None:
        assert bits == 1 and done.notes == ("low-rank: left as it was, since a correction did not help",)
    else:
        assert done.correction.bits == bits
        assert torch.equal(done.weight, task.weight + done.correction.delta())


def test_the_input_is_not_changed():
    task = quantized(sparsity=0.5)
    before = [task.weight.clone(), task.original.clone(), task.stats.hessian.clone()]
    corrected(task, rank=4, iterations=1, residual=0.01)
    for tensor, kept in zip((task.weight, task.original, task.stats.hessian), before, strict=True):
        assert torch.equal(tensor, kept)


def test_inputs_that_were_always_zero_and_layers_without_error_break_nothing():
    task = quantized()
    alive = torch.ones(64).index_fill(0, torch.tensor([7]), 0.0)
    task = replace(task, stats=LayerStats(9, hessian=task.stats.hessian * alive * alive.unsqueeze(1)))
    done = corrected(task, rank=4, residual=0.01)
    assert torch.isfinite(done.weight).all() and error(done) < error(task)
    exact = replace(task, original=task.weight)
    assert corrected(exact, rank=4, residual=0.01).correction is None


def test_a_correction_of_nothing_is_refused():
    with pytest.raises(ValueError, match="there is nothing to add"):
        Options(rank=0)


def steps_of(**settings):
    return find_steps(read_recipe(None, {"model": "m", **settings}))


def test_the_step_quantizes_again_with_the_recipes_own_quantizer_and_options():
    options = {"rtn": {"shrink_steps": 7}, "low-rank": {"rank": 4, "iterations": 2}}
    target = {"wbits": 2, "group_size": 32, "symmetric": False}
    step = steps_of(target=target, quantizer="rtn", recover=["low-rank"], options=options)[-1]
    task = random_task(PLAN, dtype=torch.float32)
    done = rtn.quantize_layer(task, rtn.Options(shrink_steps=7))
    again = recover_layer(
        done, Options(**options["low-rank"]), lambda t: rtn.quantize_layer(t, rtn.Options(shrink_steps=7))
    )
    assert step.applies(PLAN) and not step.applies(LayerPlan(sparsity=0.5))
    assert step.needs == {"hessian"} and torch.equal(step.run(done).weight, again.weight)


def test_without_a_quantizer_there_is_nothing_to_correct():
    with pytest.raises(InputError, match="low-rank makes up for what quantization does to a layer: give --wbits"):
        steps_of(target={"sparsity": 0.5}, recover=["low-rank"])
