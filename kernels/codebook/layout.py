"""Codes of codebook vectors as whole bytes, those of one output side by side.

`CodebookWeight.packed` is a bit stream; a kernel that gathers vectors wants each code by itself: one byte for codes of up
to 8 bits, two for up to 16 (an int16 whose bits are the unsigned code), [n_codebooks, out, in / vector_size].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.codebook_weight import CodebookWeight


@dataclass(frozen=True)
class UnpackedCodebookWeight:
    """A `CodebookWeight` with a whole number of bytes for each code."""

    codes: Tensor  # [n_codebooks, out, in / vector_size] uint8, or int16 where codes have more than 8 bits
    codebooks: Tensor  # [n_codebooks, 2**code_bits, vector_size] float16 or bfloat16
    scale: Tensor  # [out] float16 or bfloat16

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[1], self.codes.shape[2] * self.codebooks.shape[2]

    @classmethod
    def from_codebook(cls, weight: CodebookWeight) -> "UnpackedCodebookWeight":
        """The same codes in this order; they have at most 16 bits."""
        codes = weight.codes().permute(2, 0, 1).contiguous()
        return cls(codes.to(_code_dtype(weight.code_bits)), weight.codebooks.contiguous(), weight.scale.flatten())

    def to_codebook(self) -> CodebookWeight:
        """The inverse of `from_codebook`."""
        codes = self.codes.int() & 0xFFFF
        return CodebookWeight.from_codes(codes.permute(1, 2, 0), self.codebooks, self.scale.unsqueeze(1))


def _code_dtype(code_bits: int) -> torch.dtype:
    return torch.uint8 if code_bits <= 8 else torch.int16
