import itertools
from dataclasses import replace

import pytest
import torch
from students import inputs_of, random_layer, student_of, train
from tasks import random_task
from torch import nn

from compress.errors import InputError, RunError
from compress.kernels.correction import Correction
from compress.kernels.linear import PackedLinear
from compress.quantize import rtn
from compress.recover.adapters import MergedAdapter, attach
from compress.recover.beginnings import leading_directions, leading_inputs, support
from compress.recover.variants import STORED, VARIANTS, AdapterOptions
from compress.task import LayerPlan

PACKED, SPARSE_PACKED = (
    LayerPlan(wbits=2, group_size=16),
    LayerPlan(wbits=4, group_size=32, sparsity=0.5, pattern=(2, 4)),
)
PLAIN, PRUNED = LayerPlan(), LayerPlan(sparsity=0.6)
ADDS = [name for name, variant in VARIANTS.items() if variant.factors]


def quantized(task):
    return rtn.quantize_layer(task, rtn.Options()) if task.plan.wbits < 16 else task


def student_with(*plans, dtype=torch.float32, bias=True):
    """Layers side by side, and inputs of unit size for all of them."""
    tasks = [random_layer(plan, quantized, f"up_proj{i}", seed=i) for i, plan in enumerate(plans)]
    x = inputs_of(tasks[0])
    return student_of(*tasks, dtype=dtype, bias=bias), (x / x.std()).to(dtype)


def corrected(student, correction):
    """The student as it is after an earlier method."""
    student.layers = {name: replace(layer, correction=correction) for name, layer in student.layers.items()}
    return student


def outputs(student, x):
    return torch.stack([student.lm[name](x) for name in student.layers])


def learn(student, x, options, steps=3):
    """Towards other weights. Returns the learner and the losses."""
    learner = attach(student, options)
    move = 0.05 * torch.randn(64, 48, generator=torch.Generator().manual_seed(5))
    wanted = outputs(student, x).detach() + x @ move.to(x.dtype)
    return learner, train(learner, lambda: (outputs(student, x) - wanted).float().square().mean(), steps, 1e-3)


def ended(student, learner, x):
    """Outputs of what results() says the layers have become."""
    found = []
    for name, result in learner.results().items():
        assert result.packed is None, "codes stay"
        weight = student.layers[name].packed.dequantize() if result.weight is None else result.weight
        delta = 0.0 if result.correction is None else result.correction.delta()
        found.append(x.float() @ (weight + delta).T + student.layers[name].module.bias.float())
    return torch.stack(found)


def sparse(out=48, inputs=64, rank=3):
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(rank, inputs, generator=generator) / 8, torch.randn(out, rank, generator=generator) / 8
    return Correction(a, b, torch.tensor([1, 70, 3000], dtype=torch.int32), torch.tensor([0.5, -1.0, 2.0]))


@pytest.mark.parametrize("plan", [PACKED, SPARSE_PACKED, PLAIN, PRUNED])
@pytest.mark.parametrize("variant", STORED)
def test_an_adapter_that_has_not_learned_changes_no_bit(variant, plan):
    for dtype in (torch.float32, torch.bfloat16):
        student, x = student_with(
            plan, dtype=dtype, bias=plan is not PRUNED
        )  # whose bias is not added within the product
        before = outputs(student, x)
        attach(student, AdapterOptions(variant=variant, rank=4))
        assert torch.equal(outputs(student, x), before)


@pytest.mark.parametrize("plan", [PACKED, SPARSE_PACKED, PLAIN, PRUNED])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_and_its_result_gives_its_outputs_or_it_is_refused(variant, plan):
    student, x = student_with(plan, plan)
    options = AdapterOptions(variant=variant, rank=4)
    if (plan.wbits < 16 and variant not in STORED) or (plan is PRUNED and variant not in ADDS):
        with pytest.raises(InputError, match=r"up_proj0 is .* take one of lora"):
            attach(student, options)
        return
    learner, losses = learn(student, x, options)
    assert losses[-1] < losses[0]
    wanted = outputs(student, x)
    torch.testing.assert_close(ended(student, learner, x), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    for result in learner.results().values():
        assert result.packed is None and (result.correction is None) == (result.weight is not None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_folding_in_what_has_not_learned_gives_the_weight_itself(variant):
    student, _ = student_with(PLAIN, dtype=torch.bfloat16)
    (layer,) = student.layers.values()
    (result,) = attach(student, AdapterOptions(variant=variant, rank=4)).results().values()
    torch.testing.assert_close(result.weight, layer.module.weight.float(), rtol=1e-6, atol=0)
    assert layer.module.weight.dtype == torch.bfloat16 and layer.module.bias is not None


@pytest.mark.parametrize("variant", ADDS)
def test_pruned_weights_stay_zero_at_every_step(variant):
    student, x = student_with(PRUNED)
    (layer,) = student.layers.values()
    learner = attach(student, AdapterOptions(variant=variant, rank=4))
    module = student.lm[layer.name]
    assert isinstance(module, MergedAdapter)
    steps = iter(range(4))

    def loss():
        assert (module.weight()[~layer.keep] == 0).all() and next(steps) < 4
        return (module(x) - 1).square().mean()

    train(learner, loss, 3, 1e-2)
    weight = learner.results()[layer.name].weight
    assert (weight[~layer.keep] == 0).all() and not torch.equal(weight, layer.module.weight)


def test_gradients_of_a_masked_adapter_are_those_of_the_masked_weight():
    student, x = student_with(PRUNED)
    ((name, layer),) = student.layers.items()
    learner = attach(student, AdapterOptions(rank=4))
    adapter = student.lm[name].adapter
    a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    nn.init.normal_(b)
    weight = layer.module.weight + adapter.scaling["default"] * (b @ a) * layer.keep
    wanted = torch.autograd.grad(nn.functional.linear(x, weight, layer.module.bias).square().mean(), (a, b))
    found = torch.autograd.grad(student.lm[name](x).square().mean(), learner.groups()[0].parameters)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("variant", STORED)
def test_neither_a_dense_weight_nor_the_base_paths_input_is_kept_for_backward(variant):
    student, x = student_with(PACKED)
    ((name, layer),) = student.layers.items()
    attach(student, AdapterOptions(variant=variant, rank=4))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        student.lm[name](x.requires_grad_())
    assert not any(t.is_floating_point() and t.shape[-2:] == layer.packed.shape for t in kept)
    kept.clear()
    student.lm[name].enable_adapters(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        student.lm[name](x)
    assert not any(t.is_floating_point() for t in kept), "the base path keeps something beside its codes"


def test_a_lora_correction_is_peft_s_own_product():
    student, x = student_with(PACKED)
    learner, _ = learn(student, x, AdapterOptions(rank=4, alpha=12))
    (correction,) = (result.correction for result in learner.results().values())
    adapter = student.lm["up_proj0"]
    assert torch.equal(correction.a, adapter.lora_A["default"].weight)
    assert torch.equal(correction.b, 3 * adapter.lora_B["default"].weight)
    assert correction.a.shape == (4, 64) and correction.b.shape == (48, 4)
    torch.testing.assert_close(correction.delta(), adapter.get_delta_weight("default").detach())


@pytest.mark.parametrize("variant", STORED)
def test_merging_into_packed_codes_is_refused(variant):
    student, x = student_with(PACKED, PACKED)
    learner, _ = learn(student, x, AdapterOptions(variant=variant, rank=4))
    codes = [layer.module.weight.clone() for layer in student.layers.values()]
    for safe in (True, False):
        with pytest.raises(RunError, match="cannot be merged into packed codes"):
            learner.tuner.merge_and_unload(safe_merge=safe)
    assert all(torch.equal(c, layer.module.weight) for c, layer in zip(codes, student.layers.values(), strict=True))


@pytest.mark.parametrize("correction", [replace(sparse(), index=None, value=None), sparse(), sparse(rank=0)])
@pytest.mark.parametrize("variant", STORED)
def test_adapters_go_on_from_an_earlier_correction(variant, correction):
    student, x = student_with(PACKED)
    before = outputs(student, x) + x @ correction.delta().T
    learner = attach(corrected(student, correction), AdapterOptions(variant=variant, rank=5))
    torch.testing.assert_close(outputs(student, x), before)
    torch.testing.assert_close(ended(student, learner, x), before)
    train(learner, lambda: outputs(student, x).square().mean(), 3, 1e-2)
    (result,) = learner.results().values()
    torch.testing.assert_close(ended(student, learner, x), outputs(student, x), rtol=1e-5, atol=1e-4)
    for name in ("index", "value"):
        assert getattr(result.correction, name) is getattr(correction, name), "the sparse part is fixed"
    learned = {"lora": correction.rank or 5, "rslora": correction.rank or 5}
    assert result.correction.rank <= learned.get(variant, correction.rank + 8)
    assert not torch.equal(result.correction.delta(), correction.delta())


@pytest.mark.parametrize("plan", [PACKED, SPARSE_PACKED, PLAIN, PRUNED])
def test_single_weights_learn_beside_the_product(plan):
    student, x = student_with(plan, plan)
    before = outputs(student, x)
    options = AdapterOptions(rank=4, sparse=0.01)
    attach(student, options)
    assert torch.equal(outputs(student, x), before)
    student, x = student_with(plan, plan)
    learner, losses = learn(student, x, options)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(ended(student, learner, x), outputs(student, x), rtol=1e-5, atol=1e-4)
    for name, result in learner.results().items():
        layer, value = student.layers[name], student.lm[name].value
        assert value.numel() == round(0.01 * 48 * 64) and (value != 0).all()
        if plan.wbits < 16:
            assert result.correction.single == value.numel() and result.correction.rank == 4
            assert (result.correction.index.diff() > 0).all()
        else:
            assert plan is PLAIN or (result.weight[~layer.keep] == 0).all()
    with pytest.raises(InputError, match="to have single weights, which do not go with a dora"):
        attach(student_with(PLAIN)[0], AdapterOptions(variant="dora", sparse=0.01))


def test_single_weights_are_those_that_no_product_gives_back():
    student, _ = student_with(PACKED)
    (layer,) = student.layers.values()
    spoilt = layer.dense()
    spoilt.view(-1)[torch.tensor([7, 600, 2999])] += torch.tensor([9.0, -9.0, 9.0])
    spoilt += 50 * torch.outer(torch.arange(48.0), torch.arange(64.0)) / 64
    layer = replace(layer, dense=lambda: spoilt)
    found = support(layer, 3 / spoilt.numel(), 1)
    assert found.index.tolist() == [7, 600, 2999] and not found.value.any() and not found.rank


def test_no_pruned_weight_is_a_single_one():
    student, _ = student_with(SPARSE_PACKED)
    (layer,) = student.layers.values()
    layer = replace(layer, keep=None, dense=lambda: torch.ones(48, 64).masked_fill(layer.packed.keep(), 0.5))
    index = support(layer, 0.9, 1).index.long()
    assert len(index) == 48 * 32 and layer.packed.keep().flatten()[index].all()


def test_single_weights_go_on_from_earlier_ones():
    student, x = student_with(PACKED)
    correction = sparse()
    before = outputs(student, x) + x @ correction.delta().T
    learner = attach(corrected(student, correction), AdapterOptions(rank=5, sparse=0.01))
    torch.testing.assert_close(outputs(student, x), before)
    (result,) = learner.results().values()
    at = torch.isin(result.correction.index, correction.index)
    assert torch.equal(result.correction.value[at], correction.value) and not result.correction.value[~at].any()
    train(learner, lambda: outputs(student, x).square().mean(), 3, 1e-2)
    (result,) = learner.results().values()
    assert (result.correction.value[at] != correction.value).all()
    torch.testing.assert_close(ended(student, learner, x), outputs(student, x), rtol=1e-5, atol=1e-4)


def test_gradients_of_single_weights_are_those_of_the_weight():
    student, x = student_with(PACKED)
    ((name, layer),) = student.layers.items()
    value = attach(student, AdapterOptions(rank=4, sparse=0.01)).groups()[0].parameters[-1]
    weight = layer.packed.dequantize().requires_grad_()
    of_weight = torch.autograd.grad(nn.functional.linear(x, weight, layer.module.bias).square().mean(), weight)[0]
    found = torch.autograd.grad(student.lm[name](x).square().mean(), value)[0]
    torch.testing.assert_close(found, of_weight.flatten()[student.lm[name].index.long()])


@pytest.mark.parametrize("plan", [PACKED, PLAIN, PRUNED])
@pytest.mark.parametrize("variant", STORED)
def test_adapters_for_the_dense_model_leave_the_layer_as_it_is(variant, plan):
    student, x = student_with(plan)
    student.scatter = True
    if plan is PACKED:
        corrected(student, sparse())
    before = outputs(student, x)
    learner, losses = learn(student, x, AdapterOptions(variant=variant, rank=4))
    assert losses[-1] < losses[0]
    ((name, result),) = learner.results().items()
    layer = student.layers[name]
    if plan is PACKED:
        assert result.packed is None and result.correction is layer.correction and result.weight is None
        before = before + x @ layer.correction.delta().T
    else:
        assert torch.equal(result.weight, layer.module.weight.float()) and result.correction is None
    wanted = before + x @ result.for_dense.delta().T
    torch.testing.assert_close(outputs(student, x), wanted, rtol=1e-5, atol=1e-4)
    with pytest.raises(InputError, match="to be written for the dense model, and no file could hold a dora"):
        attach(student, AdapterOptions(variant="dora"))


def test_eva_starts_from_the_directions_with_most_of_the_inputs():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=random) * torch.logspace(0, -2, 64) @ torch.randn(64, 64, generator=random)
    layer = nn.Linear(64, 8)
    found = leading_directions({"one": layer}, lambda: [layer(part) for part in x.split(100)], 6)["one"]
    torch.testing.assert_close(found @ found.T, torch.eye(6), rtol=0, atol=1e-5)
    energies = torch.linalg.svdvals(x).square()
    assert (x @ found.T).square().sum() > 0.99 * energies[:6].sum() > 0.3 * energies.sum()
    student, _ = student_with(PACKED)
    wanted = leading_inputs(student, list(student.layers.values()), 4)["up_proj0"]
    (a, b) = attach(student, AdapterOptions(variant="eva", rank=4)).groups()[0].parameters
    assert torch.equal(a, wanted) and not b.any()
    with pytest.raises(InputError, match="eva adapters of rank 65: up_proj0 has fewer inputs"):
        attach(student_with(PACKED)[0], AdapterOptions(variant="eva", rank=65))


def test_targets_are_last_names():
    student, _ = student_with(PACKED, PACKED)
    student.layers = {
        f"blocks.0.{short}": layer for short, layer in zip(("q_proj", "v_proj"), student.layers.values(), strict=True)
    }
    assert len(attach(student, AdapterOptions(targets="v_proj")).results()) == 1
    with pytest.raises(InputError, match="no layer is called w_proj; there are: q_proj, v_proj"):
        attach(student, AdapterOptions(targets=["w_proj", "q_proj"]))


def test_many_layers_of_all_kinds_are_each_found_once():
    plans = list(itertools.islice(itertools.cycle([PACKED, PLAIN, PRUNED, SPARSE_PACKED]), 30))
    student, x = student_with(*plans)
    learner, losses = learn(student, x, AdapterOptions(rank=2), steps=2)
    assert list(learner.results()) == list(student.layers) and losses[-1] < losses[0]
    assert len(learner.groups()[0].parameters) == 60 and all(p.requires_grad for p in learner.groups()[0].parameters)
    assert sum(p.requires_grad for p in student.lm.parameters()) == 60


@pytest.mark.parametrize("variant", STORED)
def test_a_learner_goes_back_to_what_its_tensors_were(variant):
    student, x = student_with(PACKED, PACKED)
    options = AdapterOptions(variant=variant, rank=4)
    learner, _ = learn(student, x, options)
    saved = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    wanted = outputs(student, x)
    train(learner, lambda: outputs(student, x).square().mean(), 2, 1e-1)
    assert not torch.equal(outputs(student, x), wanted)
    learner.load(saved)
    assert torch.equal(outputs(student, x), wanted)
    other, _ = student_with(PACKED, PACKED)
    attach(other, options).load(saved)
    assert torch.equal(outputs(other, x), wanted), "a new learner is the same once loaded"


def test_beginnings_do_not_depend_on_the_random_state():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        student, _ = student_with(PACKED)
        found.append(attach(student, AdapterOptions(rank=4)).tensors())
        assert torch.initial_seed() == seed
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_are_float32_whatever_the_model_is(variant, dtype):
    student, x = student_with(PACKED if variant in STORED else PLAIN, dtype=dtype)
    learner, losses = learn(student, x, AdapterOptions(variant=variant, rank=4))
    assert {p.dtype for p in learner.groups()[0].parameters} == {torch.float32}
    assert outputs(student, x).dtype == dtype and losses[-1] < losses[0]


def adalora(plans=(PACKED, PACKED, PACKED), rank=4):
    student, x = student_with(*plans)
    return student, x, attach(student, AdapterOptions(variant="adalora", rank=rank))


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_adalora_ends_at_the_rank_it_was_given_on_average(steps):
    student, x, learner = adalora()
    optimizer = torch.optim.Adam(learner.groups()[0].parameters, 1e-2)
    ranks = []
    for step in range(steps):
        optimizer.zero_grad()
        (outputs(student, x)[0] - 1).square().mean().add(outputs(student, x)[1:].square().mean()).backward()
        optimizer.step()
        ranks.append(learner.update((step + 1) / steps, 1e-2)["rank"])
    assert ranks == sorted(ranks, reverse=True) and ranks[0] <= 6
    assert ranks[-1] == 4
    assert sum(result.correction.rank for result in learner.results().values()) == 12


def test_adalora_goes_on_from_its_tensors_as_if_it_had_not_stopped():
    def steps(learner, student, x, optimizer, which):
        for step in which:
            optimizer.zero_grad()
            (outputs(student, x) - 1).square().mean().backward()
            optimizer.step()
            learner.update((step + 1) / 20, 1e-2)

    student, x, learner = adalora()
    optimizer = torch.optim.SGD(learner.groups()[0].parameters, 1e-1)
    for stop in (5, 9, 15):
        again, _, other = adalora()
        steps(learner, student, x, optimizer, range(stop - 4, stop))
        other.load({name: tensor.clone() for name, tensor in learner.tensors().items()})
        steps(other, again, x, torch.optim.SGD(other.groups()[0].parameters, 1e-1), range(stop, 20))
        whole = {name: tensor.clone() for name, tensor in learner.tensors().items()}
        steps(learner, student, x, optimizer, range(stop, 20))
        for name, tensor in learner.tensors().items():
            assert torch.equal(tensor, other.tensors()[name]), name
        learner.load(whole)


def test_a_rank_that_a_layer_is_too_small_for_is_refused():
    student, _ = student_with(PACKED)
    with pytest.raises(InputError, match="miss adapters of rank 100"):
        attach(student, AdapterOptions(variant="miss", rank=100))


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="take one of lora, rslora"):
        AdapterOptions(variant="lorra")


def test_a_packed_layer_in_the_student_stays_what_it_was():
    task = quantized(random_task(PACKED))
    student = student_of(replace(task, name="layer"))
    attach(student, AdapterOptions())
    module = student.layers["layer"].module
    assert isinstance(module, PackedLinear) and torch.equal(module.packed.dequantize(), task.packed.dequantize())


@pytest.mark.parametrize("plan", [PACKED, PRUNED])
def test_gradients_under_autocast_are_nearly_those_without(plan):
    student, x = student_with(plan)
    (name,) = student.layers
    parameters = attach(student, AdapterOptions(rank=4)).groups()[0].parameters
    nn.init.normal_(parameters[1], std=0.01)
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = student.lm[name](x).float().square().mean()
        found.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)]))
    assert nn.functional.cosine_similarity(*found, 0) > 0.99
