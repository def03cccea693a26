"""Planes hold every code where layout.py says, and give back the checkpoint's tensors to the last bit."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_weights import int_weight

from compress.kernels.gemm.launch import Epilogue
from compress.kernels.gemm.reference import linear64
from compress.kernels.wna16.layout import SlicedWeight, block_inputs, field_bits
from compress.kernels.wna16.reference import matmul

WEIGHTS = {
    "bits": st.sampled_from([2, 3, 4, 8]),
    "out_features": st.integers(1, 4),
    "groups": st.integers(1, 3),
    "group_size": st.sampled_from([8, 32, 128, 200]),
    "symmetric": st.booleans(),
    "dtype": st.sampled_from([torch.float16, torch.bfloat16]),
    "seed": st.integers(0, 99),
}


@settings(max_examples=25)
@given(**WEIGHTS)
def test_there_and_back(bits, out_features, groups, group_size, symmetric, dtype, seed):
    weight = int_weight((out_features, groups * group_size), bits, group_size, symmetric, dtype, seed)
    found = SlicedWeight.from_int(weight).to_int()
    assert found.description() == weight.description()
    tensors = weight.tensors()
    assert found.tensors().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.tensors().items())


@settings(max_examples=25)
@given(**WEIGHTS)
def test_every_code_lies_where_the_page_says(bits, out_features, groups, group_size, symmetric, dtype, seed):
    weight = int_weight((out_features, groups * group_size), bits, group_size, symmetric, dtype, seed)
    sliced, codes = SlicedWeight.from_int(weight), weight.codes()
    width, block = field_bits(bits), block_inputs(bits)
    for k in range(0, weight.in_features, 37):
        b, p, r = k // block, k % block // 16, k % 16
        found = (sliced.low[16 * b + r] >> (width * p)) & (2**width - 1)
        if sliced.high is not None:
            found = found | ((sliced.high[16 * b + r].int() >> p) & 1) << 2
        assert torch.equal(found, codes[:, k].int())


@settings(max_examples=25)
@given(**WEIGHTS)
def test_the_reference_is_the_product_with_the_decoded_weight(
    bits, out_features, groups, group_size, symmetric, dtype, seed
):
    weight = int_weight((out_features, groups * group_size), bits, group_size, symmetric, dtype, seed)
    x = torch.randn(2, 3, weight.in_features, dtype=torch.float64)
    epilogue = Epilogue(torch.randn(out_features), torch.randn(2, weight.in_features), torch.randn(out_features, 2))
    torch.testing.assert_close(matmul(x, weight, epilogue), linear64(x, weight, epilogue))
