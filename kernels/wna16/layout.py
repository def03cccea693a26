"""Integer codes as planes of 16 inputs: each word is loaded once, and each of its fields feeds its own small product.

Inputs are cut into blocks of 16 P, P = 32 / w planes in fields of w bits (w = bits, but 2 for 3 bits). The word in row
16 b + r of output n holds, for p = 0 .. P - 1,

    low[16 b + r, n] bits [w p, w (p + 1))  =  code of input 16 P b + 16 p + r  (its lower two bits of three),
    high[16 b + r, n] bit p                 =  its third bit.

A field of all words of a block is a tile [16 inputs, outputs] in the order of the inputs, so nothing is transposed or
shuffled. Inputs beyond the last fill up a block with code 0; kernels read zeros for them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.gemm.layout import ROWS, turned
from compress.kernels.packing import pack, unpack
from compress.kernels.weights import IntWeight

BITS = (2, 3, 4, 8)


def field_bits(bits: int) -> int:
    """Bits of a field in a word of `low`."""
    return 2 if bits == 3 else bits


def block_inputs(bits: int) -> int:
    """Inputs that one row of blocks covers: 256 for 2 and 3 bits, 128 for 4, 64 for 8."""
    return ROWS * 32 // field_bits(bits)


@dataclass(frozen=True)
class SlicedWeight:
    """An `IntWeight` in planes, outputs side by side in memory."""

    low: Tensor  # [16 * blocks, out] int32
    high: Tensor | None  # [16 * blocks, out] int16; only for 3 bits
    scale: Tensor  # [groups, out] float16 or bfloat16
    zero_point: Tensor | None  # [groups, out] uint8; None: symmetric, 2**(bits - 1) everywhere
    bits: int
    group_size: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.low.shape[1], self.in_features

    @classmethod
    def from_int(cls, weight: IntWeight) -> "SlicedWeight":
        """The same codes in this order; `weight` has 2, 3, 4 or 8 bits."""
        field, block = field_bits(weight.bits), block_inputs(weight.bits)
        codes = torch.nn.functional.pad(weight.codes(), (0, -weight.in_features % block))
        planes = codes.unflatten(1, (-1, block // ROWS, ROWS)).permute(1, 3, 0, 2)  # [blocks, 16, out, P]
        low = pack(planes & (2**field - 1), field)[..., 0].flatten(0, 1)
        high = pack(planes >> 2, 1)[..., 0].flatten(0, 1).to(torch.int16) if weight.bits == 3 else None
        facts = weight.bits, weight.group_size, weight.in_features
        return cls(low, high, *turned(weight.scale, weight.zero_point), *facts)

    def to_int(self) -> IntWeight:
        """The inverse of `from_int`."""
        planes_of = block_inputs(self.bits) // ROWS
        planes = unpack(self.low.unsqueeze(-1), field_bits(self.bits), planes_of)  # [16 * blocks, out, P]
        if self.high is not None:
            planes = planes | unpack(self.high.int().unsqueeze(-1), 1, planes_of) << 2
        codes = planes.unflatten(0, (-1, ROWS)).permute(2, 0, 3, 1).flatten(1)[:, : self.in_features]
        sides, facts = turned(self.scale, self.zero_point), (self.bits, self.group_size, self.in_features)
        return IntWeight(pack(codes, self.bits), *sides, *facts)
