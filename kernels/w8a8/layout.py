"""Whole rows of int8 weights, inputs side by side in memory, as units that multiply 8-bit numbers read them.

`IntWeight` holds unsigned codes c of up to 8 bits; here they are c - 2**(bits - 1), one byte each, and zero points
likewise. Symmetric weights then have none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.packing import pack
from compress.kernels.weights import IntWeight


@dataclass(frozen=True)
class Int8Weight:
    """An `IntWeight` with one scale an output, as signed bytes."""

    codes: Tensor  # [out, in] int8
    scale: Tensor  # [out] float16 or bfloat16
    zero_point: Tensor | None  # [out] int8; None: 0 everywhere
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    @classmethod
    def from_int(cls, weight: IntWeight) -> "Int8Weight":
        """The same codes, signed; a group of `weight` is a whole row."""
        middle = 2 ** (weight.bits - 1)
        codes = (weight.codes().to(torch.int16) - middle).to(torch.int8)
        zero_point = weight.zero_point
        signed = None if zero_point is None else (zero_point.flatten().to(torch.int16) - middle).to(torch.int8)
        return cls(codes, weight.scale.flatten(), signed, weight.bits)

    def to_int(self) -> IntWeight:
        """The inverse of `from_int`."""
        middle, in_features = 2 ** (self.bits - 1), self.codes.shape[1]
        codes = self.codes.to(torch.int16) + middle
        zero_point = None if self.zero_point is None else (self.zero_point.to(torch.int16) + middle).byte()
        column = None if zero_point is None else zero_point.unsqueeze(1)
        return IntWeight(pack(codes, self.bits), self.scale.unsqueeze(1), column, self.bits, in_features, in_features)
