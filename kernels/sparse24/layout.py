"""Kept codes and their places as planes of 16 fours, beside each other in memory for all outputs.

Inputs are cut into blocks of S slots of 64, S = 16 / w with w the bits of a field: 2, 4 or 8, the least that holds a
code. With f = 16 S b + 16 s + r the number of a four of consecutive inputs, the words in row 16 b + r of output n hold

    values[16 b + r, n] bits [2 w s, 2 w s + w), [2 w s + w, 2 w (s + 1))  =  the two codes kept of four f,
    places[16 b + r, n] bits [4 s, 4 s + 2), [4 s + 2, 4 (s + 1))          =  where they lie in it, ascending.

A slot of all words of a block is then a tile [16 fours, outputs], and inputs stay in their order. Fours beyond the last
fill up a block with zeros; kernels read zeros for their inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.gemm.layout import ROWS, turned
from compress.kernels.packing import pack, unpack
from compress.kernels.sparse24_weight import KEPT, OF, PLACE_BITS, Sparse24IntWeight

PLACE_WORDS = {2: torch.int32, 4: torch.int16, 8: torch.int8}  # by bits of a field: 4 S bits


def field_bits(bits: int) -> int:
    """Bits of a field in a word of `values`."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def block_inputs(bits: int) -> int:
    """Inputs that one row of blocks covers: 512 for 2 bits, 256 up to 4, 128 up to 8."""
    return ROWS * OF * 16 // field_bits(bits)


@dataclass(frozen=True)
class SlicedSparse24Weight:
    """A `Sparse24IntWeight` in slots, outputs side by side in memory."""

    values: Tensor  # [16 * blocks, out] int32
    places: Tensor  # [16 * blocks, out] int32, int16 or int8
    scale: Tensor  # [groups, out] float16 or bfloat16
    zero_point: Tensor | None  # [groups, out] uint8; None: symmetric, 2**(bits - 1) everywhere
    bits: int
    group_size: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.values.shape[1], self.in_features

    @classmethod
    def from_sparse(cls, weight: Sparse24IntWeight) -> "SlicedSparse24Weight":
        """The same codes and places in this order."""
        block, n_kept = block_inputs(weight.bits), weight.in_features // OF * KEPT
        values = _sliced(unpack(weight.packed, weight.bits, n_kept), block, field_bits(weight.bits))
        places = _sliced(unpack(weight.places, PLACE_BITS, n_kept), block, PLACE_BITS)
        facts = weight.bits, weight.group_size, weight.in_features
        places = places.to(PLACE_WORDS[field_bits(weight.bits)])
        return cls(values, places, *turned(weight.scale, weight.zero_point), *facts)

    def to_sparse(self) -> Sparse24IntWeight:
        """The inverse of `from_sparse`."""
        n_kept = self.in_features // OF * KEPT
        fields = 32 // field_bits(self.bits)
        codes = _in_order(self.values, field_bits(self.bits), fields)[:, :n_kept]
        places = _in_order(self.places.int(), PLACE_BITS, fields)[:, :n_kept]
        facts = self.bits, self.group_size, self.in_features
        packed = pack(codes, self.bits), pack(places, PLACE_BITS)
        return Sparse24IntWeight(*packed, *turned(self.scale, self.zero_point), *facts)


def _sliced(kept: Tensor, block: int, width: int) -> Tensor:
    """Two fields a four, [out, in / 2] in the order of the inputs, as int32 words [16 * blocks, out]."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % (block // OF * KEPT)))
    fours = padded.unflatten(1, (-1, block // OF // ROWS, ROWS, KEPT))  # [out, blocks, S, 16, 2]
    return pack(fours.permute(1, 3, 0, 2, 4).flatten(-2), width)[..., 0].flatten(0, 1)


def _in_order(words: Tensor, width: int, fields: int) -> Tensor:
    """The inverse of `_sliced`, with what fills up the last block."""
    flat = unpack(words.unsqueeze(-1), width, fields)  # [16 * blocks, out, 2 S]
    return flat.unflatten(2, (-1, KEPT)).unflatten(0, (-1, ROWS)).permute(2, 0, 3, 1, 4).flatten(1)
