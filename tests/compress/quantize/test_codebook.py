from dataclasses import replace

import pytest
import torch
from tasks import error, random_task

from compress.calib.stats import LayerStats
from compress.errors import InputError
from compress.quantize import gptq
from compress.quantize.codebook import Options, planned, quantize_layer
from compress.task import LayerPlan

TWO_BITS = LayerPlan(wbits=2, group_size=32, symmetric=False)
SMALL = {"code_bits": 4, "vector_size": 4}  # codebooks that are small beside a small layer


@pytest.fixture(scope="module")
def layer():
    """Large enough for two codebooks of 16 vectors to be far fewer values than it has weights."""
    return random_task(TWO_BITS, out=96, inputs=64)


def test_weights_that_lie_on_a_codebook_are_found_again():
    generator = torch.Generator().manual_seed(0)
    codebook, scale = torch.randn(16, 4, generator=generator), 1 + torch.rand(96, 1, generator=generator)
    codes = torch.rand(96, 16, generator=generator).argsort(1)  # each row has every vector once, so all are as long
    weight = codebook[codes].flatten(1) * scale
    task = replace(random_task(LayerPlan(wbits=1), out=96), weight=weight, original=weight)
    assert error(quantize_layer(task, Options(**SMALL))) < 1e-5  # what rounding to float16 leaves


def test_it_loses_less_than_gptq_at_no_more_bits(layer):
    by_grid, by_codebook = gptq.quantize_layer(layer, gptq.Options()), quantize_layer(layer, Options(**SMALL))
    assert by_codebook.packed.nbytes <= by_grid.packed.nbytes
    assert error(by_codebook) < 0.9 * error(by_grid)


def test_it_never_ends_worse_than_it_was(layer):
    errors = [error(quantize_layer(layer, Options(**SMALL, iterations=n))) for n in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


def test_a_large_input_counts_for_more():
    """With one input far larger than the others its weights come out better."""
    task = random_task(TWO_BITS, out=96)
    hessian = torch.eye(64).index_put_((torch.tensor(5), torch.tensor(5)), torch.tensor(1e4))
    done = quantize_layer(replace(task, stats=LayerStats(9, hessian=hessian)), Options(**SMALL))
    miss = (done.weight - task.weight).square().mean(0)
    assert miss[5] < 0.1 * miss.median()


@pytest.mark.parametrize(
    ("options", "plan", "complaint"),
    [
        (
            {},
            LayerPlan(sparsity=0.5, wbits=2),
            "cannot keep pruned weights at zero: leave out --sparsity and --pattern",
        ),
        ({"n_codebooks": 3}, LayerPlan(wbits=2), "3 x 8 bits for 8 inputs are not --wbits 2"),
        ({"code_bits": 10}, LayerPlan(wbits=2), "1 x 10 bits for 8 inputs are not --wbits 2"),
        ({"vector_size": 24}, LayerPlan(wbits=2), "vectors of 24 do not divide 64 inputs"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(options, plan, complaint):
    with pytest.raises(InputError, match=complaint):
        planned((48, 64), plan, Options(**options))


def test_bits_come_from_the_plan_and_the_real_weight_has_the_planned_size(layer):
    for wbits in (1, 2, 3, 4):
        plan = replace(TWO_BITS, wbits=wbits)
        wanted = planned((96, 64), plan, Options(**SMALL))
        assert wanted.n_codebooks == wbits
        done = quantize_layer(replace(layer, plan=plan), Options(**SMALL, iterations=0))
        assert done.packed.description() == wanted.description() and done.packed.nbytes == wanted.nbytes
