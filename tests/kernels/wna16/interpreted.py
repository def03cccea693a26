"""Products with integer weights, interpreted; see tests/kernels/test_interpreter.py."""

import pytest
import torch
from packed_weights import int_weight
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.errors import InputError
from compress.kernels.gemm.launch import Epilogue, Launch
from compress.kernels.gemm.reference import excess_error, linear64, linear_rounded
from compress.kernels.packing import pack
from compress.kernels.weights import IntWeight
from compress.kernels.wna16 import ops
from compress.kernels.wna16.layout import SlicedWeight
from compress.kernels.wna16.triton import dequantize, matmul

HALF = torch.float16


def inputs(tokens, in_features, seed=0):
    return torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(seed)).to(HALF)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "in_features", "tokens", "splits", "deterministic"),
    [
        (4, 64, True, 320, 17, 2, True),  # half a block is missing at the end
        (4, 32, False, 96, 3, 1, True),
        (4, 200, False, 200, 1, 2, False),  # one group
        (2, 64, False, 128, 16, 1, True),
        (3, 128, True, 384, 3, 2, False),
        (3, 48, False, 48, 1, 1, True),
        (8, 128, False, 128, 3, 2, True),
        (8, 72, True, 72, 16, 1, True),
    ],
)
def test_numerics(bits, group_size, symmetric, in_features, tokens, splits, deterministic):
    out_features = 70 if bits == 4 else 40
    weight, x = int_weight((out_features, in_features), bits, group_size, symmetric), inputs(tokens, in_features)
    y = matmul(x, SlicedWeight.from_int(weight), launch=Launch(16, 64, splits=splits, deterministic=deterministic))
    assert y.dtype == HALF
    assert excess_error(y, linear_rounded(x, weight), linear64(x, weight)) <= 1.25


@pytest.mark.parametrize(("bits", "symmetric"), [(3, True), (4, False), (8, False)])
def test_identity_inputs_give_the_weight_itself(bits, symmetric):
    weight = int_weight((40, 64), bits, 32, symmetric)
    y = matmul(torch.eye(64, dtype=HALF), SlicedWeight.from_int(weight), launch=Launch(64, 64))
    assert torch.equal(y.T, weight.dequantize().to(HALF))


@pytest.mark.parametrize("splits", [1, 2])
def test_a_bias_and_a_correction_come_at_the_end(splits):
    weight, x = int_weight((40, 256), 4, 128, True), inputs(3, 256)
    random = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=random).to(HALF) for shape in ((21, 256), (40, 21)))
    epilogue = Epilogue(torch.randn(40, generator=random), a, b)
    y = matmul(x, SlicedWeight.from_int(weight), epilogue, launch=Launch(16, 64, splits=splits))
    assert excess_error(y, linear_rounded(x, weight, epilogue), linear64(x, weight, epilogue)) <= 1.25


def test_groups_of_zeros_give_zeros_and_a_huge_channel_spoils_no_other():
    weight, x = int_weight((40, 256), 4, 64, False), inputs(3, 256)
    zeros = weight.zero_point.repeat_interleave(64, dim=1)
    nothing = IntWeight(pack(zeros, 4), weight.scale, weight.zero_point, 4, 64, 256)
    assert matmul(x, SlicedWeight.from_int(nothing), launch=Launch(16, 64)).count_nonzero() == 0
    x[:, 100] = 3000
    scale = weight.scale.clone()
    scale[7] *= 100
    huge = IntWeight(weight.packed, scale, weight.zero_point, 4, 64, 256)
    y = matmul(x, SlicedWeight.from_int(huge), launch=Launch(16, 64)).float()
    exact, rounded = linear64(x, huge), linear_rounded(x, huge)
    for n in (0, 6, 8, 39):
        assert excess_error(y[:, n], rounded[:, n], exact[:, n]) <= 2  # three numbers: chance counts
    ordinary = torch.arange(40) != 7
    assert excess_error(y[:, ordinary], rounded[:, ordinary], exact[:, ordinary]) <= 1.25


def test_deterministic_outputs_do_not_depend_on_the_batch():
    weight, x = SlicedWeight.from_int(int_weight((40, 160), 4, 32, False)), inputs(33, 160)
    small, large = Launch(16, 64, splits=2, deterministic=True), Launch(32, 64, splits=2, deterministic=True)
    together = matmul(x, weight, launch=large)
    for first, last in ((0, 1), (20, 33)):
        assert torch.equal(matmul(x[first:last], weight, launch=small), together[first:last])


@pytest.mark.parametrize("tokens", [3, 70])
def test_all_tiles_that_are_timed_are_right(tokens):
    weight, x = int_weight((70, 2048), 4, 128, True), inputs(tokens, 2048)
    laid = SlicedWeight.from_int(weight)
    tilings = ops.tilings(laid, tokens)
    assert len({each.tile for each in tilings}) > 1
    for tiling in tilings:
        y = ops.matmul(x, laid, tilings=[tiling])
        assert excess_error(y, linear_rounded(x, weight), linear64(x, weight)) <= 1.25


def test_inputs_may_have_more_dimensions_strides_and_no_tokens():
    weight = SlicedWeight.from_int(int_weight((40, 64), 4, 64, True))
    x = inputs(6, 128)[:, :64]
    flat = matmul(x, weight)
    assert torch.equal(matmul(x.unflatten(0, (2, 3)), weight), flat.unflatten(0, (2, 3)))
    assert torch.equal(matmul(x.contiguous(), weight), flat)
    assert matmul(x[:0], weight).shape == (0, 40)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "in_features"),
    [(2, 64, False, 64), (3, 32, True, 32), (4, 200, False, 200), (8, 64, False, 128)],
)
def test_dequantized_is_the_decoded_weight(bits, group_size, symmetric, in_features):
    weight = int_weight((40, in_features), bits, group_size, symmetric)
    expected = weight.dequantize()
    sliced = SlicedWeight.from_int(weight)
    assert torch.equal(dequantize(sliced, torch.float32), expected)
    assert torch.equal(dequantize(sliced, HALF, transposed=True), expected.to(HALF).T)


def test_what_does_not_fit_is_refused():
    weight, x = SlicedWeight.from_int(int_weight((40, 64), 4, 64, True)), inputs(2, 64)
    factor = torch.zeros(2, 64, dtype=HALF)
    for wrong, epilogue, told in (
        (x[:, :32], Epilogue(), "32 features"),
        (x.float(), Epilogue(), "float32"),
        (x.bfloat16(), Epilogue(), "bfloat16"),
        (x, Epilogue(a=factor), "two factors"),
        (x, Epilogue(a=factor, b=torch.zeros(40, 3, dtype=HALF)), "b is"),
        (x, Epilogue(a=factor.float(), b=torch.zeros(40, 2, dtype=HALF)), "cast it"),
        (x, Epilogue(bias=torch.zeros(39)), "bias is"),
    ):
        with pytest.raises(InputError, match=told):
            matmul(wrong, weight, epilogue)


def test_operators_tell_compilers_what_they_return():
    weight, x = SlicedWeight.from_int(int_weight((24, 64), 3, 64, False)), inputs(2, 64)
    epilogue = Epilogue(torch.zeros(24))
    y, dense = ops.matmul(x, weight, epilogue), ops.dequantize(weight, HALF, transposed=True)
    assert torch.equal(y, matmul(x, weight, epilogue))
    assert torch.equal(dense, dequantize(weight, HALF, transposed=True))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = ops.matmul(x, weight, epilogue), ops.dequantize(weight, HALF, transposed=True)
    for fake, real in zip(fakes, (y, dense), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_a_compiler_takes_measured_tiles_as_part_of_one_graph():
    weight, x = SlicedWeight.from_int(int_weight((24, 256), 4, 64, False)), inputs(3, 256)
    tilings = ops.tilings(weight, 3)
    compiled = torch.compile(lambda x: ops.matmul(x, weight, tilings=tilings), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), ops.matmul(x, weight, tilings=tilings))
