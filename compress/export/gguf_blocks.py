"""Blocks of llama.cpp that hold our weights exactly: 32 weights d q, with d float16 and q whole numbers in a range.

llama.cpp's own quantizer takes d from the largest weight, whether or not it was rounded before: a block whose largest
code is not the outermost one moves off its grid (11 % of the largest weight, in Q4_0). Here d and q are found again.
Layouts: ggml's block_q4_0, block_q5_0, block_q8_0 (ggml-common.h).
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
ROWS_AT_ONCE = 2**16  # blocks whose grids are searched together: they stay in the cache

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

RANGES = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}  # of q, smallest type first
BLOCK_BYTES = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}


def block_type(bits: int, symmetric: bool) -> str | None:
    """The smallest type that holds every code of so many bits less its zero point; None: there is none."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (1 - 2**bits, 2**bits - 1)
    return next((name for name, (least, most) in RANGES.items() if least <= low and high <= most), None)


def find_grids(blocks: Floats, low: int, high: int) -> tuple[Floats, Floats]:
    """d [n, 1] and q [n, 32], both float32, with d q equal to `blocks` [n, 32], d float16 and low <= q <= high.

    Raises ValueError if a block lies on no such grid.
    """
    scales, codes = np.zeros((len(blocks), 1), np.float32), np.zeros_like(blocks)
    largest = np.abs(blocks).max(axis=1)
    left = np.flatnonzero(largest)
    for code in range(max(-low, high), 0, -1):  # of the largest weight
        if not len(left):
            break
        scale = (largest[left] / code).astype(np.float16).astype(np.float32)
        likely = np.flatnonzero((scale * code == largest[left]) & (scale > 0))
        wanted, steps = blocks[left[likely]], scale[likely, None]
        found = np.rint(wanted / steps)
        fits = ((steps * found == wanted) & (found >= low) & (found <= high)).all(axis=1)
        places = left[likely[fits]]
        scales[places], codes[places] = steps[fits], found[fits]
        left = np.delete(left, likely[fits])
    if len(left):
        raise ValueError(f"{len(left)} of {len(blocks)} blocks lie on no grid of {low} to {high}")
    return scales, codes


def encode(values: Floats, kind: str) -> Bytes:
    """Weights [..., in] as blocks of `kind`, [..., bytes of a row]; `in` is a multiple of 32.

    Raises ValueError if a block is not one of this type.
    """
    blocks = values.reshape(-1, BLOCK)
    parts = [_encode(blocks[start : start + ROWS_AT_ONCE], kind) for start in range(0, len(blocks), ROWS_AT_ONCE)]
    return np.concatenate(parts).reshape(*values.shape[:-1], row_bytes(values.shape[-1], kind))


def row_bytes(in_features: int, kind: str) -> int:
    """Bytes of one row."""
    return in_features // BLOCK * BLOCK_BYTES[kind]


def _encode(blocks: Floats, kind: str) -> Bytes:
    scales, codes = find_grids(blocks, *RANGES[kind])
    return np.concatenate([scales.astype(np.float16).view(np.uint8), *LAYOUTS[kind](codes)], axis=1)


def _nibbles(codes: Bytes) -> Bytes:
    """Low halves of the first 16 codes of each block beside those of the last 16."""
    return np.bitwise_or(codes[:, :16] & 15, (codes[:, 16:] & 15) << 4, dtype=np.uint8)


def _four(codes: Floats) -> list[Bytes]:
    return [_nibbles((codes + 8).astype(np.uint8))]


def _five(codes: Floats) -> list[Bytes]:
    unsigned = (codes + 16).astype(np.uint8)
    return [np.packbits(unsigned >> 4, axis=1, bitorder="little"), _nibbles(unsigned)]


def _eight(codes: Floats) -> list[Bytes]:
    return [codes.astype(np.int8).view(np.uint8)]


LAYOUTS: dict[str, Callable[[Floats], list[Bytes]]] = {"Q4_0": _four, "Q5_0": _five, "Q8_0": _eight}
