"""Quantized inputs and their products, interpreted; see tests/kernels/test_interpreter.py."""

import pytest
import torch
from packed_weights import int_weight
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.errors import InputError
from compress.kernels.gemm.launch import Launch
from compress.kernels.gemm.reference import excess_error
from compress.kernels.inputs import InputQuantizer
from compress.kernels.w8a8 import ops
from compress.kernels.w8a8.layout import Int8Weight
from compress.kernels.w8a8.reference import integer_linear
from compress.kernels.w8a8.triton import matmul, quantize

HALF = torch.float16


def awkward(tokens, in_features):
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(0)) * 40
    x[0], x[-1, 5] = 0, 3000
    return x.to(HALF)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("static", [True, False])
def test_codes_are_those_of_the_quantizer(bits, static):
    x = torch.cat([awkward(9, 1030), torch.arange(-515, 515).unsqueeze(0).to(HALF) / 2])  # halves: ties
    for shift in (torch.randn(1030) * 20, None) if static else (None,):
        inputs = InputQuantizer(bits, static, shift)
        codes, scale = quantize(x, inputs)
        assert torch.equal(codes, inputs.codes(x))
        assert scale is None if static else torch.equal(scale, inputs.token_scale(x))


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(
    ("bits", "symmetric", "in_features", "tokens", "splits"),
    [(8, True, 320, 17, 1), (8, False, 320, 3, 3), (4, False, 72, 1, 1), (8, True, 256, 16, 2)],
)
def test_products_are_exact_but_for_the_last_rounding(bits, symmetric, in_features, tokens, splits, static):
    weight, x = int_weight((70, in_features), bits, in_features, symmetric), awkward(tokens, in_features) / 16
    inputs = InputQuantizer(8, static, torch.randn(in_features) if static else None)
    offset = ops.offset_of(weight, inputs, torch.randn(70))
    token_scale, launch = inputs.token_scale(x), Launch(16, 64, splits=splits)
    y = matmul(inputs.codes(x), token_scale, Int8Weight.from_int(weight), offset, HALF, launch)
    exact = integer_linear(x, inputs, weight)
    exact += (offset if inputs.shift is None else offset - weight.dequantize() @ inputs.shift).double()
    assert excess_error(y, exact.to(HALF), exact) <= 1.01


def test_outputs_do_not_depend_on_the_batch_or_the_splits():
    weight, x = Int8Weight.from_int(int_weight((40, 256), 8, 256, False)), awkward(17, 256) / 16
    codes, scale = quantize(x, InputQuantizer(8))
    together = matmul(codes, scale, weight, None, HALF, Launch(32, 64))
    assert torch.equal(matmul(codes[3:4], scale[3:4], weight, None, HALF, Launch(16, 64, splits=2)), together[3:4])


@pytest.mark.parametrize("tokens", [3, 70])
def test_all_tiles_that_are_timed_give_the_same(tokens):
    weight, x = Int8Weight.from_int(int_weight((70, 2048), 8, 2048, False)), awkward(tokens, 2048) / 16
    codes, scale = quantize(x, InputQuantizer(8))
    expected = matmul(codes, scale, weight, None, HALF)
    tilings = ops.tilings(weight, tokens)
    assert len(tilings) >= 3
    for tiling in tilings:
        assert torch.equal(ops.matmul(codes, scale, weight, None, HALF, [tiling]), expected)


def test_the_largest_sums_stay_within_int32():
    weight = Int8Weight(torch.full((1, 1024), 127, dtype=torch.int8), torch.ones(1).half(), None, 8)
    least = Int8Weight(weight.codes, weight.scale, torch.tensor([-128], dtype=torch.int8), 8)
    codes = torch.full((1, 1024), -128, dtype=torch.int8)
    scale = torch.full((1, 1), 2.0**-12)
    assert matmul(codes, scale, least, None, HALF).item() == -128 * 255 * 1024 / 2**12


def test_what_does_not_fit_is_refused():
    weight, codes = Int8Weight.from_int(int_weight((40, 64), 8, 64, True)), torch.zeros(2, 64, dtype=torch.int8)
    for wrong, dtype, told in (
        (codes.int(), HALF, "int32"),
        (codes[:, 1:], HALF, "63"),
        (codes, torch.float32, "float32"),
    ):
        with pytest.raises(InputError, match=told):
            matmul(wrong, None, weight, None, dtype)


@pytest.mark.parametrize("static", [True, False])
def test_operators_tell_compilers_what_they_return(static):
    weight, x = Int8Weight.from_int(int_weight((24, 64), 8, 64, False)), awkward(2, 64) / 16
    inputs = InputQuantizer(8, static)
    codes, scale = ops.quantize(x, inputs)
    y = ops.matmul(codes, scale, weight, None, HALF)
    assert torch.equal(y, matmul(codes, scale, weight, None, HALF))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = *ops.quantize(x, inputs), ops.matmul(codes, scale, weight, None, HALF)
    for fake, real in zip(fakes, (codes, scale, y), strict=True):
        assert (fake is None and real is None) or (fake.shape, fake.dtype) == (real.shape, real.dtype)
