"""Codes of adapters: levels that are best for normal numbers, and matrices that come back as they were coded."""

import math

import pytest
import torch

from compress.kernels.adapter_codes import BITS, NormalCodes, normal_levels, rounded

LEAST = {1: 1 - 2 / math.pi, 2: 0.1175, 4: 0.009497}  # of N(0, 1); Max, 1960, table 1


@pytest.mark.parametrize("bits", BITS)
def test_each_level_is_the_mean_of_what_is_nearest_to_it(bits):
    levels = normal_levels(bits).double()
    assert len(levels) == 2**bits and (levels.diff() > 0).all()
    torch.testing.assert_close(levels, -levels.flip(0))
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2)
    cell = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
    means = torch.zeros_like(levels).index_add_(0, cell, density * x)
    means /= torch.zeros_like(levels).index_add_(0, cell, density)
    torch.testing.assert_close(levels, means, atol=1e-3 if bits < 8 else 0.05, rtol=0)
    error = ((x - levels[cell]) ** 2 * density).sum() / density.sum()
    assert error.item() == pytest.approx(LEAST.get(bits, error.item()), rel=1e-3)


def test_one_bit_is_the_mean_of_half_a_normal():
    assert normal_levels(1).tolist() == pytest.approx([-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(3, 40), (1, 7), (16, 64)])
def test_a_row_is_rounded_in_units_of_its_own(bits, shape):
    random = torch.Generator().manual_seed(bits)
    matrix = torch.randn(shape, generator=random) * torch.logspace(-4, 2, shape[0]).unsqueeze(1) + 0.01
    codes = NormalCodes.of(matrix, bits)
    assert codes.decode().shape == shape and torch.equal(codes.decode(), rounded(matrix, bits))
    share = (codes.decode() - matrix).square().sum(1) / matrix.var(1, correction=0) / shape[1]
    assert (share < {1: 0.7, 2: 0.3, 4: 0.05, 8: 2e-3}[bits]).all(), share
    assert {len(row.unique()) <= 2**bits for row in codes.decode()} == {True}
    for name, (size, dtype) in NormalCodes.expected(*shape, bits).items():
        assert getattr(codes, name).shape == size and getattr(codes, name).dtype == dtype


@pytest.mark.parametrize("bits", BITS)
def test_rows_that_do_not_vary_stay(bits):
    matrix = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]])
    assert torch.equal(rounded(matrix, bits), matrix)
