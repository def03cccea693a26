from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import Grid, IntWeight

SEEDS = st.integers(0, 2**31)


def pruned_weight(bits, symmetric, seed, out=5, inputs=48, group_size=16, kept=2):
    """A weight with at most `kept` in each four, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(out, inputs // 4, 4, generator=generator).argsort(-1) < kept
    keep = keep.flatten(1)
    groups = (torch.randn(out, inputs, generator=generator) * keep).unflatten(1, (-1, group_size))
    grid = Grid.fit(groups, bits, symmetric)
    codes = grid.encode_groups(groups).flatten(1)
    return IntWeight.from_codes(codes, grid, group_size, symmetric, torch.float16), keep


@given(st.integers(2, 8), st.booleans(), st.sampled_from([8, 12, 16, 48]), st.integers(0, 2), SEEDS)
def test_it_is_the_same_weight_without_its_zeros(bits, symmetric, group_size, kept, seed):
    weight, keep = pruned_weight(bits, symmetric, seed, group_size=group_size, kept=kept)
    sparse = Sparse24IntWeight.from_int(weight, keep)
    back = sparse.to_int()
    assert back.description() == weight.description()
    for part, tensor in weight.tensors().items():
        assert torch.equal(back.tensors()[part], tensor)
    assert torch.equal(sparse.dequantize(), weight.dequantize())
    assert (sparse.dequantize()[~keep] == 0).all()
    places = sparse.keep()
    assert (places.unflatten(1, (-1, 4)).sum(-1) == 2).all() and places[keep].all()


@given(st.integers(2, 8), st.booleans(), SEEDS)
def test_tensors_and_description_are_all_of_it(bits, symmetric, seed):
    sparse = Sparse24IntWeight.from_int(*pruned_weight(bits, symmetric, seed))
    again = Sparse24IntWeight.from_tensors(sparse.tensors(), sparse.description())
    assert torch.equal(again.dequantize(), sparse.dequantize())
    assert torch.equal(sparse.rows(slice(1, 3)).dequantize(), sparse.dequantize()[1:3])
    planned = Sparse24IntWeight.planned(sparse.shape, bits, 16, symmetric)
    assert planned.nbytes == sparse.nbytes and planned.description() == sparse.description()
    for part, (shape, dtypes) in Sparse24IntWeight.expected(5, sparse.description()).items():
        assert sparse.tensors()[part].shape == shape and sparse.tensors()[part].dtype in dtypes


def test_bits_a_weight():
    """Half the codes, two bits for the place of each, and scales as ever: 4 bits in groups of 128 are 3.125."""
    assert Sparse24IntWeight.planned((64, 1024), 4, 128, True).nbytes * 8 == 3.125 * 64 * 1024
    assert IntWeight.planned((64, 1024), 4, 128, True).nbytes * 8 == 4.125 * 64 * 1024


def test_what_is_not_2_of_4_is_refused():
    weight, keep = pruned_weight(4, True, 0)
    dense = keep.clone()
    dense[2, :3] = True
    with pytest.raises(ValueError, match="more than 2 of 4"):
        Sparse24IntWeight.from_int(weight, dense)
    odd = replace(weight, packed=weight.packed ^ 1)  # the lowest bit of some codes: zeros become something else
    with pytest.raises(ValueError, match="not kept is not zero"):
        Sparse24IntWeight.from_int(odd, torch.zeros_like(keep))
