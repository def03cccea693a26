"""Signed bytes give back the checkpoint's tensors, and their products are those of integer_linear."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_weights import int_weight

from compress.kernels.inputs import InputQuantizer
from compress.kernels.w8a8.layout import Int8Weight
from compress.kernels.w8a8.ops import offset_of
from compress.kernels.w8a8.reference import integer_linear


@given(
    bits=st.integers(2, 8),
    out_features=st.integers(1, 9),
    in_features=st.integers(1, 300),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_there_and_back(bits, out_features, in_features, symmetric, seed):
    weight = int_weight((out_features, in_features), bits, in_features, symmetric, seed=seed)
    found = Int8Weight.from_int(weight).to_int()
    assert found.description() == weight.description()
    tensors = weight.tensors()
    assert found.tensors().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.tensors().items())


@given(static=st.booleans(), symmetric=st.booleans(), has_bias=st.booleans(), seed=st.integers(0, 99))
def test_signed_codes_and_the_offset_are_the_whole_product(static, symmetric, has_bias, seed):
    weight, x = int_weight((7, 40), 8, 40, symmetric, seed=seed), torch.randn(5, 40) * 30
    inputs = InputQuantizer(8, static, torch.randn(40) * 9 if static else None)
    bias = torch.randn(7) if has_bias else None
    signed, offset, token_scale = Int8Weight.from_int(weight), offset_of(weight, inputs, bias), inputs.token_scale(x)
    zero_point = 0 if signed.zero_point is None else signed.zero_point.long().unsqueeze(1)
    sums = inputs.codes(x).long() @ (signed.codes.long() - zero_point).T
    found = sums.double() * signed.scale.double()
    found = found if token_scale is None else found * token_scale.double()
    found = found if offset is None else found + offset.double()
    torch.testing.assert_close(found, integer_linear(x, inputs, weight, bias), rtol=1e-6, atol=1e-4)
