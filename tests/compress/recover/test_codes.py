import itertools
import math
from dataclasses import replace

import pytest
import torch
from students import random_layer

from compress.errors import InputError
from compress.kernels.codebook_weight import CodebookWeight, decode_vectors
from compress.kernels.weights import IntWeight
from compress.quantize import codebook, rtn
from compress.recover.codes import Limits, VectorCodes, exchanged, subspace, taken_apart, within
from compress.task import LayerPlan

PLANS = {
    "grid": LayerPlan(wbits=2, group_size=16),
    "asymmetric": LayerPlan(wbits=3, group_size=16, symmetric=False),
    "masked": LayerPlan(sparsity=0.6, wbits=4, group_size=32),
    "2:4": LayerPlan(sparsity=0.5, pattern=(2, 4), wbits=4, group_size=32, symmetric=False),
    "codebook": LayerPlan(wbits=1),
    "codebooks": LayerPlan(wbits=2),
}
GRIDS = list(PLANS)[:4]


def by_codebook(task):
    return codebook.quantize_layer(task, codebook.Options(code_bits=4, vector_size=4, iterations=0))


@pytest.fixture(scope="module", params=PLANS)
def task(request):
    quantize = by_codebook if request.param.startswith("codebook") else lambda t: rtn.quantize_layer(t, rtn.Options())
    return random_layer(PLANS[request.param], quantize)


def moved(task, dtype=torch.bfloat16, seed=0):
    """A layer's codes with parameters that have learned something, and a weight for codes to follow."""
    generator = torch.Generator().manual_seed(seed)
    packed = task.packed
    if isinstance(packed, IntWeight):
        packed = replace(packed, scale=packed.scale.to(dtype))
    codes = taken_apart(packed, task.keep)
    for parameter in codes.parameters.values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    values = codes.values().detach()
    noise = values.std() * torch.randn(values.shape, generator=generator)
    return codes, values + noise


def distance(codes, reference):
    return (codes.values() - reference).detach().square().sum()


def changed(codes, before):
    """bool: which places have other codes."""
    other = codes.codes != before
    return other.any(-1) if other.dim() == 3 else other


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_packed_decodes_to_the_values_bit_for_bit(task, dtype):
    codes, reference = moved(task, dtype)
    for _ in range(3):
        assert torch.equal(codes.packed().dequantize(), codes.values())
        codes.approach(reference, Limits(share=0.1))
    assert codes.packed().description() == task.packed.description()
    assert {n: t.dtype for n, t in codes.packed().tensors().items() if n != "scale"} == {
        n: t.dtype for n, t in task.packed.tensors().items() if n != "scale"
    }


def test_at_first_it_is_the_packed_weight(task):
    for name, tensor in taken_apart(task.packed, task.keep).packed().tensors().items():
        assert torch.equal(tensor, task.packed.tensors()[name])


def test_gradients_are_those_of_the_values_by_the_chain_rule(task):
    """Against sums over what shares a parameter, in float64."""
    codes, of_weight = moved(task)
    gradients = codes.gradients(of_weight)
    of_weight, scale = of_weight.double(), codes.scale().detach().double()
    steps = codes.values().detach().double().unflatten(1, (scale.shape[1], -1)) / scale.unsqueeze(-1)
    of_scale = (of_weight.unflatten(1, (scale.shape[1], -1)) * steps).sum(-1) * codes.start
    torch.testing.assert_close(gradients["scale"].double(), of_scale, rtol=1e-5, atol=1e-6 * of_scale.abs().max())
    if "codebooks" in gradients:
        rows = (of_weight * scale).reshape(-1, codes.unit)
        for m, found in enumerate(gradients["codebooks"]):
            sums = torch.zeros_like(found, dtype=torch.float64).index_add_(0, codes.codes[..., m].flatten().int(), rows)
            sums *= codes.size[m]
            torch.testing.assert_close(found.double(), sums, rtol=1e-5, atol=1e-6 * sums.abs().max())


@pytest.mark.parametrize(("share", "trust"), [(1.0, 0.0), (0.01, 0.0), (0.2, 0.05), (1.0, 0.02)])
def test_no_more_changes_than_the_limits_allow(task, share, trust):
    codes, reference = moved(task)
    before, values, near = codes.codes.clone(), codes.values().detach(), distance(codes, reference)
    told = codes.approach(reference, Limits(share, trust))
    other = changed(codes, before)
    places = other.numel() if codes.keep is None else int(codes.keep.sum())
    assert 0 < other.sum() <= share * places + 1
    assert told == pytest.approx(int(other.sum()) / places)
    assert distance(codes, reference) < near
    if trust:
        changes = (codes.values() - values).detach().view(-1, codes.unit).norm(dim=1)
        assert changes.square().sum().sqrt() <= trust * values.norm() + changes.max()


def test_given_a_gradient_the_change_that_promises_most_comes_first_and_none_that_harms(task):
    codes, reference = moved(task)
    gradient = torch.randn(reference.shape, generator=torch.Generator().manual_seed(5))
    gradient *= 1.0 if task.keep is None else task.keep
    before, values = codes.codes.clone(), codes.values().detach()
    promise = -(gradient * (reference - values)).view(-1, codes.unit).sum(1)
    codes.approach(reference, Limits(share=0.02), gradient)
    other = changed(codes, before).flatten()
    assert other.any() and (promise[other] > 0).all()
    if isinstance(codes, VectorCodes):
        assert promise[other].min() >= promise.sort(descending=True).values[math.ceil(0.02 * len(promise)) - 1]


def test_masked_weights_stay_zero_and_never_get_a_code(task):
    if task.keep is None:
        pytest.skip("nothing is pruned")
    for force in (False, True):
        codes, reference = moved(task)
        for _ in range(3):
            codes.approach(reference, Limits(share=0.5, trust=0.5, force=force))
            assert (codes.packed().dequantize()[~task.keep] == 0).all()
        assert type(codes.packed()) is type(task.packed)


@pytest.mark.parametrize("name", GRIDS)
def test_without_limits_a_grid_rounds_to_nearest(name):
    task = random_layer(PLANS[name], lambda t: rtn.quantize_layer(t, rtn.Options()))
    codes, reference = moved(task)
    codes.approach(reference, Limits())
    scale, zero_point = (
        each.detach().repeat_interleave(codes.group_size, 1) for each in (codes.scale(), codes.zero_point)
    )
    nearest = (reference / scale + zero_point).round().clamp(0, 2**codes.bits - 1)
    if codes.keep is not None:
        nearest = torch.where(codes.keep, nearest, zero_point)
    assert torch.equal(codes.codes.float(), nearest)


def test_without_limits_a_codebook_takes_the_nearest_vector():
    codes, reference = moved(random_layer(PLANS["codebook"], by_codebook))
    codes.approach(reference, Limits())
    vectors = (reference / codes.scale()).detach().view(-1, codes.unit)
    books = codes.codebooks().detach()
    nearest = (vectors.unsqueeze(1) - books).square().sum(-1).argmin(1)
    assert (codes.codes.flatten().int() == nearest).float().mean() > 0.999  # but for ties


@pytest.mark.parametrize("name", GRIDS)
def test_a_code_of_a_grid_moves_by_one_where_there_is_a_trust_ratio(name):
    task = random_layer(PLANS[name], lambda t: rtn.quantize_layer(t, rtn.Options()))
    codes, reference = moved(task)
    before = codes.codes.clone()
    codes.approach(reference + 5 * (reference - codes.values().detach()), Limits(trust=1e3))
    assert (codes.codes.int() - before.int()).abs().max() == 1


def test_forced_codes_change_though_none_is_nearer(task):
    codes, _ = moved(task)
    before, values = codes.codes.clone(), codes.values().detach()
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(3))
    assert codes.approach(values + 1e-4 * values.std() * noise, Limits(share=0.05)) == 0.0
    told = codes.approach(values + 1e-4 * values.std() * noise, Limits(share=0.05, force=True))
    assert told == pytest.approx(0.05, abs=0.01)
    assert changed(codes, before).sum() > 0


def test_an_exchange_is_the_best_of_all_exchanges():
    generator = torch.Generator().manual_seed(0)
    books, targets = torch.randn(2, 8, 4, generator=generator), torch.randn(6, 4, generator=generator)
    codes = torch.randint(0, 8, (6, 2), generator=generator)
    for target, old, new in zip(targets, codes, exchanged(targets, codes, books), strict=True):
        pairs = [torch.tensor(pair) for pair in itertools.product(range(8), repeat=2)]
        one_other = [pair for pair in pairs if (pair != old).sum() == 1]
        distances = [(decode_vectors(p.view(1, 1, 2), books)[0] - target).norm() for p in one_other]
        assert torch.equal(new, one_other[int(torch.stack(distances).argmin())])


def test_the_subspace_is_of_the_largest_scores():
    scores = torch.tensor([0.0, 3.0, 1.0, 0.0, 2.0, 5.0])
    assert subspace(scores, 0.3, 6).tolist() == [5, 1]
    assert subspace(scores, 1.0, 6).tolist() == [5, 1, 4, 2]
    assert subspace(torch.zeros(6), 1.0, 6).tolist() == []


def test_the_trust_ratio_allows_one_change_beyond():
    squares = torch.tensor([4.0, 1.0, 1.0, 9.0])
    assert within(squares, 0.0).tolist() == [True, False, False, False]
    assert within(squares, 2.3).tolist() == [True, True, True, False]
    assert within(squares, 10.0).all()


@pytest.mark.parametrize("seed", range(3))
def test_exact_p_and_restricted_v_steps_never_raise_a_quadratic(seed):
    """arXiv:2405.14852, theorem 3.2: a step no longer than one over the smoothness within the subspace."""
    task = random_layer(
        LayerPlan(wbits=2, group_size=16), lambda t: rtn.quantize_layer(t, rtn.Options()), out=32, seed=seed
    )
    hessian = task.stats.hessian.double() / task.stats.hessian.trace()
    codes = taken_apart(task.packed, None)

    def loss(values):
        miss = values.detach().double() - task.original
        return float(((miss @ hessian) * miss).sum() / 2)

    losses, moves = [loss(codes.values())], 0.0
    for step in range(60):
        fit_scales(codes, task.original, hessian, group=step % codes.start.shape[1])
        losses.append(loss(codes.values()))
        values = codes.values().detach()
        gradient = ((values - task.original).double() @ hessian).float()
        chosen = subspace(gradient.abs().flatten(), 0.002, gradient.numel())
        rows, columns = chosen // 64, chosen % 64
        smoothness = max(
            float(torch.linalg.eigvalsh(hessian[columns[rows == row]][:, columns[rows == row]])[-1])
            for row in rows.unique()
        )
        reference = values.clone()
        reference[rows, columns] -= gradient[rows, columns] / smoothness
        moves += codes.approach(reference, Limits(trust=1.0))
        losses.append(loss(codes.values()))
    assert moves > 0
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]


@torch.no_grad()
def fit_scales(codes, weight, hessian, group):
    """The best scale of a group for the codes there are, where its rounding leaves it better than the one there is."""
    here = slice(group * codes.group_size, (group + 1) * codes.group_size)
    scale, values = codes.scale(), codes.values()
    steps = (values[:, here] / scale[:, group : group + 1]).double()
    pull = ((weight - values).double() @ hessian)[:, here]
    curvature = ((steps @ hessian[here, here]) * steps).sum(1)
    best = scale[:, group] + (steps * pull).sum(1) / curvature
    old = codes.parameters["scale"][:, group].clone()
    codes.parameters["scale"][:, group] = (best / codes.start[:, group]).nan_to_num(1.0)
    worse = (codes.scale()[:, group] - best).abs() >= (scale[:, group] - best).abs()
    codes.parameters["scale"][worse, group] = old[worse]


def test_a_layout_without_codes_is_refused():
    class Other(CodebookWeight.__base__):  # a layout that nobody has taken apart
        __abstractmethods__ = frozenset()

    Other.__abstractmethods__ = frozenset()
    with pytest.raises(InputError, match=r"cannot change the codes of a Other: quantize with gptq or codebook"):
        taken_apart(object.__new__(Other), None)
