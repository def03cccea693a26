"""Products with codebook vectors, interpreted; see tests/kernels/test_interpreter.py."""

import pytest
import torch
from packed_weights import codebook_weight
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.kernels.codebook import ops
from compress.kernels.codebook.layout import SlicedCodebookWeight
from compress.kernels.codebook.triton import dequantize, matmul
from compress.kernels.gemm.launch import Epilogue, Launch
from compress.kernels.gemm.reference import excess_error, linear64, linear_rounded

HALF = torch.float16


def inputs(tokens, in_features, seed=0):
    return torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(seed)).to(HALF)


@pytest.mark.parametrize(
    ("n_codebooks", "code_bits", "vector_size", "in_features", "tokens", "splits"),
    [(2, 8, 8, 200, 17, 2), (1, 16, 8, 64, 3, 1), (3, 5, 4, 60, 1, 1), (1, 12, 16, 128, 16, 1)],
)
def test_numerics(n_codebooks, code_bits, vector_size, in_features, tokens, splits):
    weight, x = codebook_weight((70, in_features), n_codebooks, code_bits, vector_size), inputs(tokens, in_features)
    launch = Launch(16, 64, splits=splits, deterministic=True)
    y = matmul(x, SlicedCodebookWeight.from_codebook(weight), launch=launch)
    assert excess_error(y, linear_rounded(x, weight), linear64(x, weight)) <= 1.25


def test_identity_inputs_give_the_weight_itself():
    weight = codebook_weight((40, 64), 1, 8, 8)
    y = matmul(torch.eye(64, dtype=HALF), SlicedCodebookWeight.from_codebook(weight))
    assert torch.equal(y.T, weight.dequantize().to(HALF))


def test_a_bias_and_a_correction_come_at_the_end():
    weight, x = codebook_weight((40, 64), 2, 8, 8), inputs(3, 64)
    random = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=random).to(HALF) for shape in ((5, 64), (40, 5)))
    epilogue = Epilogue(torch.randn(40, generator=random), a, b)
    y = matmul(x, SlicedCodebookWeight.from_codebook(weight), epilogue)
    assert excess_error(y, linear_rounded(x, weight, epilogue), linear64(x, weight, epilogue)) <= 1.25


@pytest.mark.parametrize("tokens", [3, 20])
def test_all_tiles_that_are_timed_are_right(tokens):
    weight, x = codebook_weight((70, 2048), 2, 8, 8), inputs(tokens, 2048)
    laid = SlicedCodebookWeight.from_codebook(weight)
    for tiling in ops.tilings(laid, tokens):
        y = ops.matmul(x, laid, tilings=[tiling])
        assert excess_error(y, linear_rounded(x, weight), linear64(x, weight)) <= 1.25


def test_deterministic_outputs_do_not_depend_on_the_batch():
    weight, x = SlicedCodebookWeight.from_codebook(codebook_weight((40, 256), 2, 8, 8)), inputs(20, 256)
    together = matmul(x, weight, launch=Launch(32, 64, splits=2, deterministic=True))
    assert torch.equal(matmul(x[7:8], weight, launch=Launch(16, 64, splits=2, deterministic=True)), together[7:8])


@pytest.mark.parametrize(
    ("n_codebooks", "code_bits", "vector_size", "in_features"), [(2, 8, 8, 200), (1, 16, 4, 64), (3, 5, 2, 66)]
)
def test_dequantized_is_the_decoded_weight(n_codebooks, code_bits, vector_size, in_features):
    weight = codebook_weight((70, in_features), n_codebooks, code_bits, vector_size)
    unpacked, expected = SlicedCodebookWeight.from_codebook(weight), weight.dequantize()
    assert torch.equal(dequantize(unpacked, torch.float32), expected)
    assert torch.equal(dequantize(unpacked, HALF, transposed=True), expected.to(HALF).T)


def test_operators_tell_compilers_what_they_return():
    weight, x = SlicedCodebookWeight.from_codebook(codebook_weight((24, 64), 1, 8, 8)), inputs(2, 64)
    y, dense = ops.matmul(x, weight), ops.dequantize(weight, HALF)
    assert torch.equal(y, matmul(x, weight))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = ops.matmul(x, weight), ops.dequantize(weight, HALF)
    for fake, real in zip(fakes, (y, dense), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
