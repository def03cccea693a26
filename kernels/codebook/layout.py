"""Codes of codebook vectors as whole bytes, four or two in a word, those of all outputs side by side.

`CodebookWeight.packed` is a bit stream; a kernel that gathers vectors wants codes that no word parts. Inputs are cut into
blocks of P planes of 64, with P codes in a word: 4 of up to 8 bits, or 2 of up to 16. A plane has W = 64 / d vectors of d
inputs, and the word in row W b + r of output n holds, for p = 0 .. P - 1,

    codes[m, W b + r, n] bits [32 p / P, 32 (p + 1) / P)  =  code in codebook m of vector W P b + W p + r.

A field of all words of a block then stands for 64 consecutive inputs. Vectors beyond the last fill up a block with code
0; kernels read zeros for their inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.codebook_weight import CodebookWeight
from compress.kernels.packing import pack, unpack

PLANE = 64  # inputs
VECTOR_SIZES = (2, 4, 8, 16, 32, 64)


def field_bits(code_bits: int) -> int:
    """Bits of a field in a word of `codes`: 8, or 16 for codes of more."""
    return 8 if code_bits <= 8 else 16


def block_inputs(code_bits: int) -> int:
    """Inputs that one row of blocks covers: 256 for codes of up to 8 bits, 128 for more."""
    return PLANE * 32 // field_bits(code_bits)


@dataclass(frozen=True)
class SlicedCodebookWeight:
    """A `CodebookWeight` with a whole number of bytes for each code."""

    codes: Tensor  # [n_codebooks, 64 / vector_size * blocks, out] int32
    codebooks: Tensor  # [n_codebooks, 2**code_bits, vector_size] float16 or bfloat16
    scale: Tensor  # [out] float16 or bfloat16
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[2], self.in_features

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return (self.codebooks.shape[1] - 1).bit_length()

    @classmethod
    def from_codebook(cls, weight: CodebookWeight) -> "SlicedCodebookWeight":
        """The same codes in this order; they have at most 16 bits, and vectors a size of `VECTOR_SIZES`."""
        field, in_word = field_bits(weight.code_bits), 32 // field_bits(weight.code_bits)
        rows = PLANE // weight.vector_size
        codes = weight.codes()  # [out, vectors, n_codebooks]
        codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[1] % (rows * in_word)))
        planes = codes.unflatten(1, (-1, in_word, rows)).permute(4, 1, 3, 0, 2)  # [n_codebooks, blocks, W, out, P]
        words = pack(planes, field)[..., 0].flatten(1, 2)
        return cls(words, weight.codebooks.contiguous(), weight.scale.flatten(), weight.in_features)

    def to_codebook(self) -> CodebookWeight:
        """The inverse of `from_codebook`."""
        field, vector_size = field_bits(self.code_bits), self.codebooks.shape[2]
        planes = unpack(self.codes.unsqueeze(-1), field, 32 // field).unflatten(1, (-1, PLANE // vector_size))
        codes = planes.permute(3, 1, 4, 2, 0).flatten(1, 3)[:, : self.in_features // vector_size]
        return CodebookWeight.from_codes(codes, self.codebooks, self.scale.unsqueeze(1))
