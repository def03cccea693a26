import math
from dataclasses import replace

import pytest
import torch
from students import inputs_of, random_layer, student_of, train
from torch import Tensor, nn

from compress.errors import InputError
from compress.kernels.correction import Correction
from compress.kernels.linear import recomputed_linear
from compress.kernels.weights import storable
from compress.quantize import codebook, gptq, rtn
from compress.recover.l4q import Options, in_cells, nearest_levels, recover_model
from compress.task import LayerPlan

PLANS = [
    LayerPlan(wbits=bits, group_size=32, symmetric=symmetric, sparsity=sparsity, pattern=pattern)
    for bits, symmetric, sparsity, pattern in (
        (2, False, 0.0, None),
        (2, True, 0.6, None),
        (4, True, 0.5, (2, 4)),
        (3, False, 0.5, (2, 4)),
        (8, True, 0.0, None),
        (8, False, 0.0, None),
    )
]


def by_gptq(task):
    return gptq.quantize_layer(task, gptq.Options())


def learned(plan, dtype=torch.float32, quantize=by_gptq, **options):
    task = random_layer(replace(plan), lambda task: quantize(replace(task, dtype=dtype)))
    student = student_of(task, dtype=dtype, bias=True)
    learner = recover_model(student, Options(**options))
    return task, student, learner, student.lm["layer"]


def disturb(layer, size=0.02):
    """Anything that training could have done."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        layer.b.normal_(generator=generator).mul_(size)
        layer.step.normal_(generator=generator).mul_(0.1)


class Formulas:
    """W_q and the gradients, as METHODS.md's source writes them down; b is minus the zero point times s, and stays."""

    def __init__(self, w: Tensor, a: Tensor, b: Tensor, s: Tensor, ends: tuple[Tensor, Tensor], alpha: float):
        group = w.shape[1] // s.shape[1]
        self.a, self.b, self.alpha, self.group = a, b, alpha, group
        self.wide, low, high = (each.repeat_interleave(group, 1) for each in (s, *ends))
        self.ratio = (w + alpha * b @ a) / self.wide
        self.clamped = self.ratio.clamp(low, high)
        self.inside = (low <= self.ratio) & (self.ratio <= high)
        self.weight = self.clamped.round() * self.wide

    def gradients(self, x: Tensor, into_y: Tensor, mask: Tensor | float = 1.0) -> dict[str, Tensor]:
        into_w = into_y.flatten(0, -2).T @ x.flatten(0, -2) * mask
        inside = into_w * self.inside
        by_s = torch.where(self.inside, self.clamped.round() - self.ratio, self.clamped)
        return {
            "x": into_y @ (self.weight * mask),
            "a": self.alpha * self.b.T @ inside,
            "b": self.alpha * inside @ self.a.T,
            "s": (into_w * by_s).unflatten(1, (-1, self.group)).sum(-1),
        }


def test_gradients_are_those_of_the_paper():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w, a, b, s = normal(24, 32), normal(4, 32), normal(24, 4) / 4, 0.4 + normal(24, 4).abs() / 4
    x, into_y = normal(3, 5, 32), normal(3, 5, 24)  # the official code takes the first of a batch only
    zero_point = torch.randint(0, 8, (24, 4), generator=generator).double()
    ends, alpha = (-zero_point, 7 - zero_point), 1.5

    def make(a, b, s):
        merged = (w + alpha * b @ a).unflatten(1, (4, -1))
        return (nearest_levels(merged, s, *ends) * s.unsqueeze(-1)).flatten(1)

    leaves = [each.clone().requires_grad_() for each in (x, a, b, s)]
    y = recomputed_linear(leaves[0], make, *leaves[1:])
    y.backward(into_y)
    formulas = Formulas(w, a, b, s, ends, alpha)
    assert 0.05 < formulas.inside.double().mean() < 0.95
    torch.testing.assert_close(y, x @ formulas.weight.T, rtol=0, atol=1e-12)
    for (name, expected), leaf in zip(formulas.gradients(x, into_y).items(), leaves, strict=True):
        torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=1e-11, msg=name)


def test_outside_of_the_grid_the_gradient_of_the_step_is_the_true_one():
    """Inside it is not (METHODS.md Q2 b): the slope of the rounded forward is round(w / s) there."""
    w, s = torch.tensor([[[5.0, -7.0, 9.0]]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    ends = -2 * torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)

    def total(s):
        return (nearest_levels(w, s, *ends) * s.unsqueeze(-1) * torch.tensor([1.0, 2.0, 3.0])).sum()

    leaf = s.clone().requires_grad_()
    total(leaf).backward()
    torch.testing.assert_close(leaf.grad.item(), ((total(s + 1e-4) - total(s - 1e-4)) / 2e-4).item())


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"W{p.wbits}-{p.symmetric}-{p.sparsity}-{p.pattern}")
def test_a_layer_learns_by_these_gradients_with_its_mask_and_its_stored_step(plan):
    task, _, _, layer = learned(plan, rank=4, alpha=8.0)
    disturb(layer)
    packed = task.packed.to_int()
    s0 = packed.scale.float()
    s = storable(s0 + s0 * layer.step.detach(), packed.scale.dtype)
    zero_point = torch.full_like(s0, 2 ** (plan.wbits - 1)) if packed.symmetric else packed.zero_point.float()
    ends = -zero_point, 2**plan.wbits - 1 - zero_point
    base = (layer.base.double() / 2 ** (14 - plan.wbits) * s0.double().unsqueeze(-1)).flatten(1)
    formulas = Formulas(base, *(each.detach().double() for each in (layer.a, layer.b, s)), ends, 2.0)
    x = inputs_of(task, 6).view(2, 3, -1)
    into_y = torch.randn(2, 3, len(s), generator=torch.Generator().manual_seed(2))
    layer(x).backward(into_y)
    mask = 1.0 if task.keep is None else task.keep.double()
    expected = formulas.gradients(x.double(), into_y.double(), mask)
    high = 2 ** (plan.wbits - packed.symmetric) - 1
    expected["step"] = expected.pop("s") * s0 / math.sqrt(32 * high)
    torch.testing.assert_close(layer.weight_of(*layer.learning().values()).double(), formulas.weight * mask)
    for name, parameter in layer.learning().items():
        difference = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"W{p.wbits}-{p.symmetric}-{p.sparsity}-{p.pattern}")
def test_before_training_it_is_the_packed_model_bit_for_bit(plan, margin, dtype):
    task, student, learner, layer = learned(plan, dtype, margin=margin)
    packed = learner.results()["layer"].packed
    assert type(packed) is type(task.packed) and packed.description() == task.packed.description()
    for name, tensor in task.packed.tensors().items():
        assert torch.equal(packed.tensors()[name], tensor), name
    x = inputs_of(task, dtype=dtype)
    assert torch.equal(layer(x), student.layers["layer"].module(x))


def test_started_at_the_dense_weight_it_is_nearest_rounding_on_the_quantizers_grid():
    task, _, learner, _ = learned(PLANS[0], start="dense")
    done, packed = learner.results()["layer"].packed, task.packed
    groups = task.original.unflatten(1, (-1, 32)) / packed.scale.float().unsqueeze(-1)
    nearest = (groups + packed.zero_point.unsqueeze(-1)).round().clamp(0, 3).flatten(1)
    assert (done.codes() != nearest).float().mean() < 1e-3  # but for ties within 2**-13 of a step
    assert (done.codes() != packed.codes()).float().mean() > 0.05
    assert torch.equal(done.scale, packed.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"W{p.wbits}-{p.symmetric}-{p.sparsity}-{p.pattern}")
def test_what_is_packed_is_what_was_trained_bit_for_bit(plan, dtype):
    task, _, learner, layer = learned(plan, dtype)
    disturb(layer)
    packed = learner.results()["layer"].packed
    assert type(packed) is type(task.packed)
    assert torch.equal(packed.dequantize(), layer.weight_of(*layer.learning().values()))
    assert (packed.to_int().codes() != task.packed.to_int().codes()).any()
    if task.keep is not None:
        assert (packed.dequantize()[~task.keep] == 0).all()
    x = inputs_of(task, dtype=dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, packed.dequantize().to(dtype)) + layer.bias)


def test_mixed_precision_rounds_neither_the_weight_nor_its_gradients():
    task, _, learner, layer = learned(PLANS[0])
    disturb(layer)
    x, into_y = inputs_of(task).bfloat16(), inputs_of(task)[:, :48].bfloat16()
    layer(x).backward(into_y)
    plain = {name: p.grad.clone() for name, p in layer.learning().items()}
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(into_y)
    weight = learner.results()["layer"].packed.dequantize().bfloat16()
    assert torch.equal(y, nn.functional.linear(x, weight) + layer.bias)
    for name, parameter in layer.learning().items():
        assert torch.equal(parameter.grad, plain[name]), name


def test_weights_lie_in_the_cells_of_their_codes_as_near_to_the_dense_ones_as_the_margin_lets_them():
    dense = torch.tensor([[[-9.0, 9.0, 1.4, 0.2, -0.3]]])
    levels = torch.tensor([[[-2.0, 1.0, 0.0, 0.0, 0.0]]])
    ends = torch.tensor([[-2.0]]), torch.tensor([[1.0]])
    for margin, expected in ((0.0, [-8.0, 8.0, 0.5, 0.2, -0.3]), (0.25, [-8.0, 8.0, 0.25, 0.2, -0.25])):
        held = in_cells(dense, levels, ends, margin, 4096)
        assert held.dtype == torch.int16
        torch.testing.assert_close(held[0, 0] / 4096, torch.tensor(expected), rtol=0, atol=1 / 2048)
        assert torch.equal((held / 4096).round().clamp(-2, 1), levels)


def test_nothing_of_the_size_of_the_weight_is_kept_for_backward():
    task, _, _, layer = learned(PLANS[1], rank=2)
    disturb(layer)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(inputs_of(task, 4).requires_grad_())
    assert saved and max(t.numel() for t in saved) < task.weight.numel() / 2
    y.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.learning().values())


def test_a_step_size_stays_positive_and_stored_whatever_happens_to_it():
    task, _, learner, layer = learned(PLANS[0])
    with torch.no_grad():
        layer.step.fill_(-3.0)
    packed = learner.results()["layer"].packed
    assert (packed.scale > 0).all()
    layer(inputs_of(task)).square().sum().backward()
    assert torch.isfinite(layer.step.grad).all()


@pytest.mark.parametrize("plan", [PLANS[0], PLANS[2]], ids=["W2", "2:4+W4"])
def test_training_lowers_the_error_of_nearest_rounding(plan):
    task, student, learner, layer = learned(
        plan, quantize=lambda task: rtn.quantize_layer(task, rtn.Options()), rank=16, freeze=0.2
    )
    x = inputs_of(task, 512)
    wanted = x @ task.original.T + layer.bias
    frozen = layer.base.clone()
    losses = train(learner, lambda: (student.lm["layer"](x) - wanted).square().mean(), steps=60, lr=1e-2)
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(layer.base, frozen)
    assert layer.step.abs().max() > 0
    begins = [group.begins for group in learner.groups() if layer.step in set(group.parameters)]
    assert begins == [0.2]


def test_what_learns_can_be_put_aside_and_back():
    _, _, learner, layer = learned(PLANS[0])
    kept = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    before = learner.results()["layer"].packed.dequantize()
    disturb(layer)
    assert not torch.equal(learner.results()["layer"].packed.dequantize(), before)
    learner.load(kept)
    assert torch.equal(learner.results()["layer"].packed.dequantize(), before)


def test_only_layers_of_integer_codes_learn():
    whole = random_layer(LayerPlan(), lambda task: task, name="whole")
    vectors = random_layer(
        LayerPlan(wbits=2), lambda task: codebook.quantize_layer(task, codebook.Options(code_bits=4)), name="vectors"
    )
    codes = random_layer(PLANS[0], by_gptq, name="codes")
    student = student_of(whole, vectors, codes)
    before = student.lm["whole"], student.lm["vectors"]
    assert set(recover_model(student, Options()).results()) == {"codes"}
    assert (student.lm["whole"], student.lm["vectors"]) == before
    with pytest.raises(InputError, match="l4q has no layer of integer codes"):
        recover_model(student_of(whole, vectors), Options())
    student = student_of(codes)
    student.layers["codes"].correction = Correction(torch.zeros(1, 64), torch.zeros(48, 1))
    with pytest.raises(InputError, match="codes has one: name l4q before"):
        recover_model(student, Options())
