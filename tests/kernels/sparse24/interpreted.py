"""Products with 2:4 weights, interpreted; see tests/kernels/test_interpreter.py."""

import pytest
import torch
from packed_weights import sparse_weight
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.kernels.gemm.launch import Epilogue, Launch
from compress.kernels.gemm.reference import excess_error, linear64, linear_rounded
from compress.kernels.sparse24 import ops
from compress.kernels.sparse24.layout import SlicedSparse24Weight
from compress.kernels.sparse24.triton import dequantize, matmul

HALF = torch.float16


def inputs(tokens, in_features, seed=0):
    return torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(seed)).to(HALF)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "in_features", "tokens", "splits", "deterministic"),
    [
        (4, 128, True, 384, 17, 2, True),
        (4, 64, False, 64, 3, 1, True),
        (4, 100, False, 100, 1, 1, True),
        (2, 64, False, 128, 3, 1, True),
        (3, 128, True, 128, 1, 1, True),
        (8, 128, False, 256, 16, 2, False),
    ],
)
def test_numerics(bits, group_size, symmetric, in_features, tokens, splits, deterministic):
    weight, x = sparse_weight((40, in_features), bits, group_size, symmetric), inputs(tokens, in_features)
    launch = Launch(16, 64, splits=splits, deterministic=deterministic)
    y = matmul(x, SlicedSparse24Weight.from_sparse(weight), launch=launch)
    assert excess_error(y, linear_rounded(x, weight), linear64(x, weight)) <= 1.25


def test_identity_inputs_give_the_weight_itself():
    weight = sparse_weight((70, 128), 4, 64, False)
    y = matmul(torch.eye(128, dtype=HALF), SlicedSparse24Weight.from_sparse(weight), launch=Launch(128, 64))
    assert torch.equal(y.T, weight.dequantize().to(HALF))


def test_a_bias_and_a_correction_come_at_the_end():
    weight, x = sparse_weight((40, 128), 4, 128, True), inputs(3, 128)
    random = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=random).to(HALF) for shape in ((5, 128), (40, 5)))
    epilogue = Epilogue(torch.randn(40, generator=random), a, b)
    y = matmul(x, SlicedSparse24Weight.from_sparse(weight), epilogue)
    assert excess_error(y, linear_rounded(x, weight, epilogue), linear64(x, weight, epilogue)) <= 1.25


@pytest.mark.parametrize("tokens", [3, 20])
def test_all_tiles_that_are_timed_are_right(tokens):
    weight, x = sparse_weight((70, 2048), 4, 128, True), inputs(tokens, 2048)
    laid = SlicedSparse24Weight.from_sparse(weight)
    for tiling in ops.tilings(laid, tokens):
        y = ops.matmul(x, laid, tilings=[tiling])
        assert excess_error(y, linear_rounded(x, weight), linear64(x, weight)) <= 1.25


def test_deterministic_outputs_do_not_depend_on_the_batch():
    weight, x = SlicedSparse24Weight.from_sparse(sparse_weight((40, 256), 8, 64, True)), inputs(20, 256)
    together = matmul(x, weight, launch=Launch(32, 64, splits=2, deterministic=True))
    assert torch.equal(matmul(x[7:8], weight, launch=Launch(16, 64, splits=2, deterministic=True)), together[7:8])


@pytest.mark.parametrize(("bits", "symmetric", "in_features"), [(2, True, 64), (4, False, 320), (8, False, 128)])
def test_dequantized_is_the_decoded_weight(bits, symmetric, in_features):
    weight = sparse_weight((40, in_features), bits, 64, symmetric)
    sliced, expected = SlicedSparse24Weight.from_sparse(weight), weight.dequantize()
    assert torch.equal(dequantize(sliced, torch.float32), expected)
    assert torch.equal(dequantize(sliced, HALF, transposed=True), expected.to(HALF).T)


def test_operators_tell_compilers_what_they_return():
    weight, x = SlicedSparse24Weight.from_sparse(sparse_weight((24, 64), 4, 64, False)), inputs(2, 64)
    y, dense = ops.matmul(x, weight), ops.dequantize(weight, HALF)
    assert torch.equal(y, matmul(x, weight))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = ops.matmul(x, weight), ops.dequantize(weight, HALF)
    for fake, real in zip(fakes, (y, dense), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
