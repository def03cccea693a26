from dataclasses import replace

import pytest
import torch
from students import inputs_of, random_layer, student_of, train
from torch import nn

from compress.errors import InputError
from compress.kernels.correction import Correction
from compress.quantize import codebook, rtn
from compress.recover.grid import Options, recover_model
from compress.task import LayerPlan

KINDS = {
    "integers": LayerPlan(wbits=2, group_size=32, symmetric=False),
    "2:4": LayerPlan(wbits=4, group_size=32, sparsity=0.5, pattern=(2, 4)),
    "pruned": LayerPlan(wbits=3, group_size=32, sparsity=0.6),
    "codebooks": LayerPlan(wbits=2),
}


def packed_layer(kind, dtype=torch.float32):
    def quantize(task):
        task = replace(task, dtype=dtype)
        if kind == "codebooks":
            return codebook.quantize_layer(task, codebook.Options(code_bits=4, iterations=0))
        return rtn.quantize_layer(task, rtn.Options())

    return random_layer(KINDS[kind], quantize)


def disturb(learner):
    generator = torch.Generator().manual_seed(3)
    for tensor in learner.tensors().values():
        tensor.normal_(generator=generator).mul_(0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_before_training_it_is_the_packed_model_bit_for_bit(kind, dtype):
    task = packed_layer(kind, dtype)
    student = student_of(task, dtype=dtype, bias=True)
    learner = recover_model(student, Options())
    x = inputs_of(task, dtype=dtype)
    assert torch.equal(student.lm["layer"](x), student.layers["layer"].module(x))
    packed = learner.results()["layer"].packed
    assert type(packed) is type(task.packed)
    for name, tensor in task.packed.tensors().items():
        assert torch.equal(packed.tensors()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_is_what_was_trained_bit_for_bit_and_codes_stay(kind, dtype):
    task = packed_layer(kind, dtype)
    student = student_of(task, dtype=dtype, bias=True)
    learner = recover_model(student, Options())
    disturb(learner)
    layer, packed = student.lm["layer"], learner.results()["layer"].packed
    assert torch.equal(packed.dequantize(), layer.weight_of(*layer.learning().values()))
    x = inputs_of(task, dtype=dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, packed.dequantize().to(dtype)) + layer.bias)
    for name, tensor in task.packed.tensors().items():
        assert torch.equal(packed.tensors()[name], tensor) != tensor.is_floating_point(), name
        assert packed.tensors()[name].dtype == tensor.dtype
    if task.keep is not None:
        assert (packed.dequantize()[~task.keep] == 0).all()


def decode(task, tensors):
    """What a packed weight decodes to, in float64 and written out: a sum over codes, times a scale."""
    packed = task.packed
    if "codebooks" in tensors:
        vectors = [tensors["codebooks"][m][packed.codes()[..., m].long()] for m in range(packed.n_codebooks)]
        return sum(vectors).flatten(1) * tensors["scale"]
    whole = packed.to_int()
    zero_point = 2 ** (whole.bits - 1) if whole.zero_point is None else whole.zero_point.double().unsqueeze(-1)
    levels = whole.codes().double().unflatten(1, (-1, whole.group_size)) - zero_point
    return (levels * tensors["scale"].unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_exact(kind):
    task = packed_layer(kind)
    student = student_of(task)
    learner = recover_model(student, Options())
    disturb(learner)
    layer, packed = student.lm["layer"], learner.results()["layer"].packed
    x, into_y = inputs_of(task, 6), torch.randn(6, 48, generator=torch.Generator().manual_seed(2))
    layer(x).backward(into_y)
    floats = {name: t for name, t in packed.tensors().items() if t.is_floating_point()}
    leaves = {name: t.double().requires_grad_() for name, t in floats.items()}
    (x.double() @ decode(task, leaves).T).backward(into_y.double())
    for name, move in layer.learning().items():
        start = task.packed.tensors()[name].double()
        size = start.square().mean((1, 2), keepdim=True).sqrt() if name == "codebooks" else start
        expected = leaves[name].grad * size
        assert (move.grad - expected).norm() < 1e-5 * expected.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_error_at_one_rate_whatever_the_size_of_the_weights(kind):
    task = packed_layer(kind)
    gains = []
    for size in (1.0, 1 / 64):
        packed = replace(task.packed, scale=task.packed.scale * size)
        small = replace(task, original=task.original * size, weight=packed.dequantize(), packed=packed)
        student = student_of(small)
        learner = recover_model(student, Options())
        x = inputs_of(small, 512)
        wanted = x @ small.original.T

        def loss(x=x, wanted=wanted, lm=student.lm):
            return (lm["layer"](x) - wanted).square().sum() / wanted.square().sum()

        losses = train(learner, loss, steps=40, lr=5e-3)
        gains.append(losses[-1] / losses[0])
    assert gains[0] < 0.97
    assert gains[1] == pytest.approx(gains[0], abs=0.01)


def test_neither_weights_nor_their_gradients_are_kept_for_backward():
    task = packed_layer("integers")
    student = student_of(task)
    recover_model(student, Options())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        student.lm["layer"](inputs_of(task, 4).requires_grad_())
    assert saved and max(t.numel() for t in saved) < task.weight.numel() / 2


def test_what_learns_can_be_put_aside_and_back():
    student = student_of(packed_layer("codebooks"))
    learner = recover_model(student, Options())
    kept = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    assert set(kept) == {"layer.codebooks", "layer.scale"}
    before = learner.results()["layer"].packed.dequantize()
    disturb(learner)
    assert not torch.equal(learner.results()["layer"].packed.dequantize(), before)
    learner.load(kept)
    assert torch.equal(learner.results()["layer"].packed.dequantize(), before)


def test_a_correction_stays_beside_the_weight_that_learns():
    student = student_of(packed_layer("integers"))
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 64, generator=generator), torch.randn(48, 2, generator=generator)
    correction = Correction(*factors, torch.tensor([3], dtype=torch.int32), torch.tensor([0.5]))
    student.layers["layer"].correction = correction
    learner = recover_model(student, Options())
    disturb(learner)
    done, x = learner.results()["layer"], torch.randn(4, 64, generator=generator)
    assert done.correction is correction
    assert torch.equal(student.lm["layer"](x), x @ (done.packed.dequantize() + correction.delta()).T)


def test_layers_that_are_not_packed_stay_as_they_are():
    whole = random_layer(LayerPlan(sparsity=0.5), lambda task: task, name="whole")
    student = student_of(whole, packed_layer("integers"))
    before = student.lm["whole"]
    assert set(recover_model(student, Options()).results()) == {"layer"}
    assert student.lm["whole"] is before
    with pytest.raises(InputError, match="grid has no packed layer"):
        recover_model(student_of(whole), Options())
