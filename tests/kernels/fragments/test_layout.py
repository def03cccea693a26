"""Fragments hold every code where layout.py says, and give back the checkpoint's tensors to the last bit."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_weights import int_weight, sparse_weight

from compress.kernels.fragments.layout import SPARSE_BITS, FragmentWeight, block_inputs, field_bits

WEIGHTS = {
    "bits": st.sampled_from([2, 3, 4, 8]),
    "out_features": st.integers(1, 70),
    "groups": st.sampled_from([(32, 8), (64, 4), (128, 1), (128, 3), (640, 1)]),
    "symmetric": st.booleans(),
    "dtype": st.sampled_from([torch.float16, torch.bfloat16]),
    "seed": st.integers(0, 99),
}


def word(plane, block, lane, number):
    return plane[:, block, number // 4, lane, number % 4]


@settings(max_examples=15, deadline=None)
@given(**WEIGHTS)
def test_there_and_back(bits, out_features, groups, symmetric, dtype, seed):
    size, n = groups
    for make, there, back in (
        (int_weight, FragmentWeight.from_int, FragmentWeight.to_int),
        (sparse_weight, FragmentWeight.from_sparse, FragmentWeight.to_sparse),
    )[: 2 if bits in SPARSE_BITS else 1]:
        weight = make((out_features, size * n), bits, size, symmetric, dtype, seed)
        found = back(there(weight))
        assert found.description() == weight.description()
        tensors = weight.tensors()
        assert found.tensors().keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.tensors().items())


@settings(max_examples=15, deadline=None)
@given(**WEIGHTS)
def test_every_code_lies_where_the_page_says(bits, out_features, groups, symmetric, dtype, seed):
    size, n = groups
    weight = int_weight((out_features, size * n), bits, size, symmetric, dtype, seed)
    laid, codes, block = FragmentWeight.from_int(weight), weight.codes(), block_inputs(bits, False)
    field = field_bits(bits)
    for k in range(0, weight.in_features, 13):
        inside = k % block
        e, t, q, c = 2 * (inside // 32) + inside % 8 // 4, inside % 32 // 8, inside % 4 // 2, inside % 2
        for row in range(0, out_features, 7):
            tile, i, g = row // 32, row % 32 // 8, row % 8
            o = 16 * c + 8 * q + i * field % 8
            found = word(laid.words, k // block, 4 * g + t, e * field // 2 + i * field // 8)[tile] >> o & 2**field - 1
            if bits == 3:
                third = laid.high[tile, k // block, e // 4, 4 * g + t, e // 2 % 2]
                found |= (third >> (16 * c + 8 * q + 2 * i + e % 2) & 1) << 2
            assert found == codes[row, k]
            assert laid.scale[tile, k // size, g, i] == weight.scale[row, k // size]


@settings(max_examples=15, deadline=None)
@given(**WEIGHTS | {"bits": st.sampled_from(SPARSE_BITS)})
def test_every_kept_code_and_its_place_lie_where_the_page_says(bits, out_features, groups, symmetric, dtype, seed):
    size, n = groups
    weight = sparse_weight((out_features, size * n), bits, size, symmetric, dtype, seed)
    laid, codes, keep = FragmentWeight.from_sparse(weight), weight.to_int().codes(), weight.keep()
    for k in range(0, weight.in_features, 4 * 3):
        e, q, t = k % 128 // 32, k % 32 // 16, k % 16 // 4
        for row in range(0, out_features, 7):
            tile, i, g = row // 32, row % 32 // 8, row % 8
            lane = 4 * g + 2 * (e % 2) + q
            places = laid.places[tile, k // 128, lane, 2 * (i // 2) + e // 2] >> (4 * t + 16 * (i % 2))
            for c in (0, 1):
                at = k + (places.item() >> 2 * c & 3)
                value = word(laid.words, k // 128, 4 * g + t, e * bits // 2 + i * bits // 8)[tile]
                assert keep[row, at]
                assert value >> (16 * c + 8 * q + i * bits % 8) & 2**bits - 1 == codes[row, at]
