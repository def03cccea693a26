"""Codes of whole bytes lie where layout.py says and give back the checkpoint's tensors, and looked-up products are those of decoded weights."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_weights import codebook_weight

from compress.kernels.codebook.layout import SlicedCodebookWeight, block_inputs, field_bits
from compress.kernels.codebook.reference import matmul
from compress.kernels.gemm.launch import Epilogue
from compress.kernels.gemm.reference import linear64

WEIGHTS = {
    "out_features": st.integers(1, 9),
    "groups": st.integers(1, 80),
    "n_codebooks": st.integers(1, 3),
    "code_bits": st.sampled_from([1, 5, 8, 12, 16]),
    "vector_size": st.sampled_from([2, 4, 8]),
    "seed": st.integers(0, 99),
}


@given(**WEIGHTS)
def test_there_and_back(out_features, groups, n_codebooks, code_bits, vector_size, seed):
    weight = codebook_weight((out_features, groups * vector_size), n_codebooks, code_bits, vector_size, seed=seed)
    unpacked = SlicedCodebookWeight.from_codebook(weight)
    found = unpacked.to_codebook()
    assert unpacked.shape == weight.shape
    assert found.description() == weight.description()
    tensors = weight.tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.tensors().items())


@given(**WEIGHTS)
def test_every_code_lies_where_the_page_says(out_features, groups, n_codebooks, code_bits, vector_size, seed):
    weight = codebook_weight((out_features, groups * vector_size), n_codebooks, code_bits, vector_size, seed=seed)
    unpacked, codes = SlicedCodebookWeight.from_codebook(weight), weight.codes()
    width, rows = field_bits(code_bits), 64 // vector_size
    planes = block_inputs(code_bits) // 64
    for v in range(groups):
        b, p, r = v // (rows * planes), v // rows % planes, v % rows
        found = (unpacked.codes[:, rows * b + r] >> (width * p)) & (2**width - 1)
        assert torch.equal(found, codes[:, v].T.int())


@given(**WEIGHTS)
def test_the_reference_is_the_product_with_the_decoded_weight(
    out_features, groups, n_codebooks, code_bits, vector_size, seed
):
    weight = codebook_weight((out_features, groups * vector_size), n_codebooks, code_bits, vector_size, seed=seed)
    x = torch.randn(2, 3, weight.in_features, dtype=torch.float64)
    epilogue = Epilogue(torch.randn(out_features), torch.randn(2, weight.in_features), torch.randn(out_features, 2))
    found, expected = matmul(x, weight, epilogue), linear64(x, weight, epilogue)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # decoded in float32
