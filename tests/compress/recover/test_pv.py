import math

import pytest
import torch
from students import inputs_of, random_layer, student_of
from torch import nn

from compress.errors import InputError
from compress.kernels.correction import Correction
from compress.quantize import codebook, gptq, rtn
from compress.recover.pv import Options, recover_model
from compress.recovery import Student
from compress.task import LayerPlan

W2 = LayerPlan(wbits=2, group_size=16)
STRAIGHT_THROUGH = {"max_code_change": 1.0, "trust_ratio": 0.0, "order": "distance"}


def by_rtn(task):
    return rtn.quantize_layer(task, rtn.Options())


def by_gptq(task):
    return gptq.quantize_layer(task, gptq.Options())


def by_codebook(task):
    return codebook.quantize_layer(task, codebook.Options(code_bits=4, vector_size=4, iterations=0))


PACKED = {
    "grid": (W2, by_rtn),
    "masked": (LayerPlan(sparsity=0.6, wbits=3, group_size=16), by_rtn),
    "2:4": (LayerPlan(sparsity=0.5, pattern=(2, 4), wbits=4, group_size=16), by_rtn),
    "codebooks": (LayerPlan(wbits=2), by_codebook),
}


def tuning(task, steps, dtype=torch.float32, watch=lambda student, learner: None, **options):
    """Steps on the layer's own squared error, along a cosine. Returns the student, the learner and the losses."""
    student, options = student_of(task, dtype=dtype), Options(**options)
    learner, x = recover_model(student, options), inputs_of(task, dtype=dtype)
    wanted = nn.functional.linear(x.float(), task.original)
    adam = torch.optim.Adam(learner.groups()[0].parameters, lr=options.lr)
    losses = []
    for step in range(steps + 1):
        loss = (student.lm[task.name](x).float() - wanted).square().mean() / wanted.square().mean()
        losses.append(loss.item())
        loss.backward()
        lr = options.lr * (0.5 + 0.5 * math.cos(math.pi * step / max(steps, 1)))
        adam.param_groups[0]["lr"] = lr
        if step < steps:
            learner.complete_gradients()
            adam.step()
            learner.update(step / steps, lr)
            watch(student, learner)
        adam.zero_grad()
    return student, learner, losses


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_live_weight_is_at_every_step_what_is_packed(name, dtype):
    task, seen = random_layer(*PACKED[name]), []

    def watch(student, learner):
        (result,) = learner.results().values()
        live = student.lm["layer"].weight
        assert live.dtype == dtype and torch.equal(live, result.packed.dequantize().to(dtype))
        if task.keep is not None:
            assert (live[~task.keep] == 0).all()
        seen.append(live.detach().clone())

    _, learner, losses = tuning(task, 20, dtype, watch, lr=3e-3, code_lr=1e-1)
    assert min(losses) < losses[0]
    assert not torch.equal(seen[0], seen[-1])
    before, after = task.packed, learner.results()["layer"].packed
    assert type(after) is type(before) and after.description() == before.description()
    assert not torch.equal(after.packed, before.packed)


@pytest.mark.parametrize("name", ["grid", "codebooks"])
def test_parameters_have_the_gradient_of_all_micro_batches(name):
    task = random_layer(*PACKED[name])
    x, gradients = inputs_of(task), []
    for parts in (x.split(256), x.split(64)):
        student = student_of(task)
        learner = recover_model(student, Options())
        for part in parts:
            student.lm["layer"](part).square().sum().backward()
        learner.complete_gradients()
        gradients.append([p.grad for p in learner.groups()[0].parameters])
    for whole, in_parts in zip(*gradients, strict=True):
        torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_the_buffer_gathers_what_no_single_step_could_change():
    """One step at a time is too short for any code; the buffer's length grows with every step."""
    task, off = random_layer(W2, by_rtn), []

    def watch(student, learner):
        off.append(float((learner.tensors()["layer.buffer"] - task.packed.dequantize()).norm()))

    _, learner, _ = tuning(task, 60, watch=watch, lr=1e-8, code_lr=4e-2)
    size = float(task.weight.norm())
    assert off[0] == pytest.approx(4e-2 * float(task.packed.dequantize().norm()), rel=1e-3)
    assert off[0] < off[4] < off[9] and off[9] > 0.2 * size
    changed = learner.results()["layer"].packed.codes() != task.packed.codes()
    assert 0 < changed.float().mean() < 0.1


def test_without_a_buffer_only_forced_codes_move():
    task = random_layer(W2, by_rtn)
    _, learner, losses = tuning(task, 40, lr=1e-8, delta_decay=1.0, max_code_change=1e-3)
    changed = learner.results()["layer"].packed.codes() != task.packed.codes()
    assert "layer.buffer" not in learner.tensors()
    assert changed.any() and min(losses) < losses[0]


@pytest.mark.parametrize("seed", range(5))
def test_it_ends_no_worse_than_straight_through_estimation_at_equal_steps(seed):
    """The quadratic of one layer, 32 x 64, 2 bits in groups of 16, from where GPTQ left it; both with the same rates."""
    task, rates = random_layer(W2, by_gptq, out=32, seed=seed), {"lr": 1e-3, "code_lr": 3e-2}
    pv, straight_through = (tuning(task, 60, **rates, **options)[2] for options in ({}, STRAIGHT_THROUGH))
    assert pv[-1] <= straight_through[-1] and min(pv) <= min(straight_through)
    assert min(pv) < pv[0]


def test_straight_through_estimation_rounds_its_buffer_to_nearest():
    task = random_layer(W2, by_rtn)
    _, learner, _ = tuning(task, 10, lr=1e-8, code_lr=0.1, **STRAIGHT_THROUGH)
    buffer, scale = learner.tensors()["layer.buffer"], task.packed.scale.float().repeat_interleave(16, 1)
    nearest = (buffer / scale + 2).round().clamp(0, 3)
    assert torch.equal(learner.results()["layer"].packed.codes().float(), nearest)
    assert (nearest != task.packed.codes()).float().mean() > 0.05


def test_the_buffer_of_what_cannot_change_waits():
    task = random_layer(W2, by_rtn)
    _, learner, _ = tuning(task, 20, lr=1e-8, code_lr=0.1)
    packed = learner.results()["layer"].packed
    steps = (learner.tensors()["layer.buffer"] - packed.dequantize()) / packed.scale.float().repeat_interleave(16, 1)
    assert steps.abs().max() <= 0.5001
    assert (steps.abs() > 0.4999).float().mean() > 0.05  # held back


def test_a_state_is_gone_back_to():
    task, states = random_layer(*PACKED["codebooks"]), []

    def watch(student, learner):
        copied = {name: tensor.clone() for name, tensor in learner.tensors().items()}
        states.append((copied, student.lm["layer"].weight.detach().clone()))

    student, learner, _ = tuning(task, 8, watch=watch, code_lr=3e-2)
    state, weight = states[3]
    assert not torch.equal(student.lm["layer"].weight, weight)
    learner.load(state)
    assert torch.equal(student.lm["layer"].weight, weight)
    for name, tensor in learner.tensors().items():
        assert torch.equal(tensor, state[name])


def test_what_an_earlier_method_adds_stays():
    task = random_layer(W2, by_rtn)
    generator = torch.Generator().manual_seed(0)
    added = Correction(0.1 * torch.randn(2, 64, generator=generator), 0.1 * torch.randn(48, 2, generator=generator))
    student = student_of(task)
    student.layers["layer"].correction = added
    learner = recover_model(student, Options(lr=1e-2))
    student.lm["layer"](inputs_of(task)).square().mean().backward()
    learner.update(0.0, 1e-2)
    result = learner.results()["layer"]
    assert result.correction is added
    assert torch.equal(student.lm["layer"].weight, result.packed.dequantize() + added.delta())


def test_a_layer_that_was_not_used_stays():
    """As an expert that no token of a batch was sent to."""
    tasks = [random_layer(W2, by_rtn, name=name) for name in "ab"]
    student = student_of(*tasks, bias=True)
    learner = recover_model(student, Options(delta_decay=1.0))
    student.lm["a"](inputs_of(tasks[0])).square().mean().backward()
    assert learner.update(0.0, 3e-4)["changed"] > 0
    packed = {name: result.packed.packed for name, result in learner.results().items()}
    assert not torch.equal(packed["a"], tasks[0].packed.packed) and torch.equal(packed["b"], tasks[1].packed.packed)
    assert student.lm["a"].bias is not None


def test_a_model_without_codes_is_refused():
    with pytest.raises(InputError, match="no layer of this recipe is quantized: add --wbits"):
        recover_model(Student(nn.Module(), {}), Options())
