import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.kernels.weights import SMALLEST_SCALE, WEIGHTS_AT_ONCE, Grid, IntWeight

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def random_groups(seed, spread=1.0):
    return torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(seed)) * spread


@given(st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_codes_survive_packing_and_zero_is_exact(bits, symmetric, dtype, seed):
    groups = random_groups(seed)
    groups[:, :, 3] = 0.0
    grid = Grid.fit(groups, bits, symmetric, dtype)
    codes = grid.encode_groups(groups)
    packed = IntWeight.from_codes(codes.flatten(1), grid, 16, symmetric, dtype)
    values = packed.dequantize().unflatten(1, (-1, 16))
    wanted = (codes - grid.zero_point.unsqueeze(-1)) * grid.scale.unsqueeze(-1)
    assert torch.equal(values, wanted)
    assert (values[:, :, 3] == 0).all()
    assert torch.equal(grid.encode_groups(values), codes), "a value on the grid must come back as itself"
    again = IntWeight.from_tensors(packed.tensors(), packed.description())
    assert torch.equal(again.dequantize(), packed.dequantize())


@given(st.sampled_from(DTYPES), st.floats(1e-8, 1e3), st.integers(0, 2**31))
def test_scales_are_exact_in_float16_and_in_the_models_dtype(dtype, spread, seed):
    scale = Grid.fit(random_groups(seed, spread), 4, True, dtype).scale
    assert torch.equal(scale.half().float(), scale)
    assert dtype == torch.float32 or torch.equal(scale.to(dtype).float(), scale)
    assert scale.min() >= SMALLEST_SCALE


def test_more_steps_and_importance_lower_the_weighted_error():
    groups = random_groups(0)
    groups[..., 0] *= 8  # an outlier a group
    importance = torch.ones(4, 16)
    importance[:, 0] = 1e-3

    def weighted(grid):
        values = (grid.encode_groups(groups) - grid.zero_point.unsqueeze(-1)) * grid.scale.unsqueeze(-1)
        return ((values - groups).square() * importance).sum().item()

    plain = weighted(Grid.fit(groups, 3))
    searched = weighted(Grid.fit(groups, 3, shrink_steps=20))
    assert weighted(Grid.fit(groups, 3, importance=importance, shrink_steps=20)) < searched < plain


def test_a_planned_weight_has_the_size_of_the_real_one():
    groups = random_groups(0)
    for symmetric in (True, False):
        grid = Grid.fit(groups, 3, symmetric)
        real = IntWeight.from_codes(grid.encode_groups(groups).flatten(1), grid, 16, symmetric, torch.float16)
        planned = IntWeight.planned((3, 64), 3, 16, symmetric)
        assert planned.nbytes == real.nbytes
        assert planned.description() == real.description()


def test_all_zero_groups_decode_to_zero():
    grid = Grid.fit(torch.zeros(2, 2, 16), 4, False)
    codes = grid.encode_groups(torch.zeros(2, 2, 16))
    packed = IntWeight.from_codes(codes.flatten(1), grid, 16, False, torch.float16)
    assert packed.dequantize().eq(0).all()
    assert packed.out_features == 2 and packed.nbytes == pytest.approx(2 * 4 * 4 + 2 * 2 * 2 + 2 * 2)


def test_ranges_are_searched_a_few_rows_at_a_time_with_the_same_result():
    groups = torch.randn(2 * WEIGHTS_AT_ONCE // 640 + 3, 5, 128)
    whole = Grid.fit(groups, 3, symmetric=False, shrink_steps=3)
    for rows in (slice(0, 2), slice(len(groups) - 2, None)):
        part = Grid.fit(groups[rows], 3, symmetric=False, shrink_steps=3)
        assert torch.equal(part.scale, whole.scale[rows]) and torch.equal(part.zero_point, whole.zero_point[rows])
