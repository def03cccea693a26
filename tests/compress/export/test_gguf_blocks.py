import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.export.gguf_blocks import BLOCK, RANGES, block_type, encode, find_grids, row_bytes

KINDS = st.sampled_from(sorted(RANGES))


def on_grid(kind, rows, groups, seed, used=1.0):
    """Random weights on the grids of a type; `used`: the share of its range that codes take."""
    random, (low, high) = np.random.default_rng(seed), RANGES[kind]
    scales = (random.random((rows, groups, 1)) * 0.1 + 2.0**-14).astype(np.float16).astype(np.float32)
    least, most = min(int(low * used), 0), max(int(high * used), 1)
    codes = random.integers(least, most + 1, (rows, groups, BLOCK)).astype(np.float32)
    return (scales * codes).reshape(rows, groups * BLOCK)


@settings(max_examples=60, deadline=None)
@given(kind=KINDS, rows=st.integers(1, 3), groups=st.integers(1, 4), seed=st.integers(0, 999), used=st.floats(0.02, 1))
def test_llama_cpp_decodes_the_very_weights(kind, rows, groups, seed, used):
    weights = on_grid(kind, rows, groups, seed, used)
    blocks = encode(weights, kind)
    assert blocks.dtype == np.uint8 and blocks.shape == (rows, row_bytes(groups * BLOCK, kind))
    assert np.array_equal(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]), weights)


def test_llama_cpps_own_quantizer_would_move_them():
    weights = on_grid("Q4_0", 8, 8, seed=0, used=0.9)  # no code is -8, from which it takes the scale
    theirs = gguf.dequantize(gguf.quantize(weights, gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0)
    assert np.abs(theirs - weights).max() > 0.02 * np.abs(weights).max()


@given(kind=KINDS, seed=st.integers(0, 99))
def test_a_block_off_the_grid_is_refused(kind, seed):
    weights = on_grid(kind, 1, 2, seed)
    weights[0, 5] += np.float32(1e-3)
    with pytest.raises(ValueError, match="1 of 2 blocks"):
        find_grids(weights.reshape(-1, BLOCK), *RANGES[kind])


def test_zeros_and_a_lone_weight_are_blocks():
    weights = np.zeros((2, BLOCK), np.float32)
    weights[1, 3] = -0.5
    for kind in RANGES:
        assert np.array_equal(gguf.dequantize(encode(weights, kind), gguf.GGMLQuantizationType[kind]), weights)


@pytest.mark.parametrize(
    ("bits", "symmetric", "kind"),
    [(2, True, "Q4_0"), (3, False, "Q4_0"), (4, True, "Q4_0"), (4, False, "Q5_0"), (5, True, "Q5_0"), (6, True, "Q8_0"),
     (6, False, "Q8_0"), (8, True, "Q8_0"), (8, False, None)],
)  # fmt: skip
def test_the_smallest_type_that_holds_all_codes(bits, symmetric, kind):
    assert block_type(bits, symmetric) == kind
    if kind is not None:
        zeros = [2 ** (bits - 1)] if symmetric else range(2**bits)
        reached = {code - zero for zero in zeros for code in range(2**bits)}
        assert RANGES[kind][0] <= min(reached) and max(reached) <= RANGES[kind][1]
