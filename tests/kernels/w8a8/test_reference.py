"""Integers inside and scales at the end give what decoded inputs times decoded weights give, to the last bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.kernels.inputs import InputQuantizer
from compress.kernels.packing import pack
from compress.kernels.w8a8.reference import fake_linear, integer_linear
from compress.kernels.weights import IntWeight


def random_weight(bits, groups, group_size, symmetric, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (13, groups * group_size), generator=random)
    scale = (torch.rand(13, groups, generator=random) * 0.1 + 2**-14).to(dtype)
    zero_point = torch.randint(0, 2**bits, (13, groups), generator=random).to(torch.uint8)
    return IntWeight(pack(codes, bits), scale, None if symmetric else zero_point, bits, group_size, groups * group_size)


@given(
    bits=st.sampled_from([2, 4, 6, 8]),
    abits=st.sampled_from([4, 6, 8]),
    static=st.booleans(),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([8, 32, 128]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_integer_path_is_the_fake_quantized_one(bits, abits, static, groups, group_size, symmetric, dtype, seed):
    weight = random_weight(bits, groups, group_size, symmetric, dtype, seed)
    x = torch.randn(9, groups * group_size, generator=torch.Generator().manual_seed(seed)) * 50
    inputs = InputQuantizer(abits, static)
    assert torch.equal(integer_linear(x, inputs, weight), fake_linear(x, inputs, weight))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_shift_and_a_bias_come_after_the_scales(symmetric):
    weight, x = random_weight(8, 1, 64, symmetric, torch.float16, 0), torch.randn(9, 64) * 50
    inputs, bias = InputQuantizer(8, True, torch.randn(64) * 20), torch.randn(13)
    found = integer_linear(x, inputs, weight, bias)
    assert torch.equal(found, fake_linear(x, inputs, weight, bias))
    expected = inputs.fake(x).double() @ weight.dequantize().double().T + bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-3)  # sums reach a thousand, in float32


def test_the_largest_products_stay_within_int32():
    inputs, weight = InputQuantizer(8, True), random_weight(8, 1, 16384, False, torch.float16, 0)
    extreme = IntWeight(
        pack(torch.full((1, 16384), 255), 8), torch.ones(1, 1).half(), torch.zeros(1, 1).byte(), 8, 16384, 16384
    )
    x = torch.full((1, 16384), -128.0)
    assert integer_linear(x, inputs, extreme).item() == -128 * 255 * 16384
    assert torch.equal(integer_linear(x, inputs, weight), fake_linear(x, inputs, weight))
