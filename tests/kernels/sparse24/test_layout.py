"""Slots hold every kept code and its place where layout.py says, and give back the checkpoint's tensors."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_weights import sparse_weight

from compress.kernels.gemm.launch import Epilogue
from compress.kernels.gemm.reference import linear64
from compress.kernels.sparse24.layout import SlicedSparse24Weight, block_inputs, field_bits
from compress.kernels.sparse24.reference import matmul

WEIGHTS = {
    "bits": st.sampled_from([2, 3, 4, 8]),
    "out_features": st.integers(1, 4),
    "groups": st.integers(1, 3),
    "group_size": st.sampled_from([8, 64, 128, 200]),
    "symmetric": st.booleans(),
    "seed": st.integers(0, 99),
}


@settings(max_examples=25)
@given(**WEIGHTS)
def test_there_and_back(bits, out_features, groups, group_size, symmetric, seed):
    weight = sparse_weight((out_features, groups * group_size), bits, group_size, symmetric, seed=seed)
    found = SlicedSparse24Weight.from_sparse(weight).to_sparse()
    assert found.description() == weight.description()
    tensors = weight.tensors()
    assert found.tensors().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.tensors().items())


@settings(max_examples=25)
@given(**WEIGHTS)
def test_every_code_lies_where_the_page_says(bits, out_features, groups, group_size, symmetric, seed):
    weight = sparse_weight((out_features, groups * group_size), bits, group_size, symmetric, seed=seed)
    sliced, codes, keep = SlicedSparse24Weight.from_sparse(weight), weight.to_int().codes(), weight.keep()
    width, slots = field_bits(bits), block_inputs(bits) // 64
    for four in range(0, weight.in_features // 4, 11):
        b, s, r = four // (16 * slots), four // 16 % slots, four % 16
        for which in (0, 1):
            value = (sliced.values[16 * b + r] >> (width * (2 * s + which))) & (2**width - 1)
            place = (sliced.places[16 * b + r].int() >> (4 * s + 2 * which)) & 3
            k = 4 * four + place.long().unsqueeze(1)
            assert keep.gather(1, k).all()
            assert torch.equal(value, codes.gather(1, k).flatten().int())


@settings(max_examples=25)
@given(**WEIGHTS)
def test_the_reference_is_the_product_with_the_decoded_weight(bits, out_features, groups, group_size, symmetric, seed):
    weight = sparse_weight((out_features, groups * group_size), bits, group_size, symmetric, seed=seed)
    x = torch.randn(2, 3, weight.in_features, dtype=torch.float64)
    epilogue = Epilogue(torch.randn(out_features), torch.randn(2, weight.in_features), torch.randn(out_features, 2))
    torch.testing.assert_close(matmul(x, weight, epilogue), linear64(x, weight, epilogue))
