"""Weights of additive codebooks: a few codes for several consecutive inputs, each the number of a vector to add up.

AQLM (Egiazarian et al., arXiv:2401.06118) and its kin. The layout that PV-Tuning (arXiv:2405.14852) changes: codes,
codebooks and scales are all there is to a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.kernels.packing import pack, unpack, words_for
from compress.kernels.weights import HALF, Expected, PackedWeight


@dataclass(frozen=True)
class CodebookWeight(PackedWeight):
    """weight[r, g * d : (g + 1) * d] = scale[r] * sum over m of codebooks[m, codes[r, g, m]], d the vector size."""

    WHOLE: ClassVar[tuple[str, ...]] = ("codebooks",)

    packed: Tensor  # [out, ceil(in / d * n_codebooks * code_bits / 32)] int32: for each d inputs, a code a codebook
    codebooks: Tensor  # [n_codebooks, 2**code_bits, d] float16 or bfloat16
    scale: Tensor  # [out, 1] float16 or bfloat16
    in_features: int

    @classmethod
    def from_codes(cls, codes: Tensor, codebooks: Tensor, scale: Tensor) -> "CodebookWeight":
        """Pack codes [out, in / d, n_codebooks] (integers) into `codebooks` [n_codebooks, 2**code_bits, d]."""
        code_bits = (codebooks.shape[1] - 1).bit_length()
        return cls(pack(codes.flatten(1), code_bits), codebooks, scale, codes.shape[1] * codebooks.shape[2])

    @classmethod
    def planned(cls, shape: tuple[int, int], n_codebooks: int, code_bits: int, vector_size: int) -> "CodebookWeight":
        """A weight of (out, in) features without values, on the meta device: it knows its size and its description."""
        facts = {"n_codebooks": n_codebooks, "code_bits": code_bits, "vector_size": vector_size}
        return cls.without_values(shape[0], {**facts, "in_features": shape[1]})

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return len(self.packed), self.in_features

    @property
    def n_codebooks(self) -> int:
        """How many vectors are added up."""
        return self.codebooks.shape[0]

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return (self.codebooks.shape[1] - 1).bit_length()

    @property
    def vector_size(self) -> int:
        """How many consecutive inputs share their codes."""
        return self.codebooks.shape[2]

    def codes(self) -> Tensor:
        """[out, in / vector_size, n_codebooks], uint8, or int32 where codes have more than 8 bits."""
        n_groups = self.in_features // self.vector_size
        flat = unpack(self.packed, self.code_bits, n_groups * self.n_codebooks)
        return flat.unflatten(1, (n_groups, self.n_codebooks))

    def dequantize(self) -> Tensor:
        """float32 [out, in]; vectors are added in the order of their codebooks."""
        return decode_vectors(self.codes(), self.codebooks.float()).mul_(self.scale.float())

    def tensors(self) -> dict[str, Tensor]:
        """`packed`, `codebooks` and `scale`."""
        return {"packed": self.packed, "codebooks": self.codebooks, "scale": self.scale}

    def description(self) -> dict[str, int]:
        """Codebooks and their sizes, and the row length."""
        return {
            "n_codebooks": self.n_codebooks,
            "code_bits": self.code_bits,
            "vector_size": self.vector_size,
            "in_features": self.in_features,
        }

    @classmethod
    def expected(cls, out_features: int, description: Mapping[str, int]) -> Expected:
        """The tensors that a weight of this description has, each with its shape and the dtypes it may have."""
        n_codebooks, code_bits, vector_size = (
            description[name] for name in ("n_codebooks", "code_bits", "vector_size")
        )
        n_codes = description["in_features"] // vector_size * n_codebooks
        return {
            "packed": ((out_features, words_for(n_codes, code_bits)), (torch.int32,)),
            "codebooks": ((n_codebooks, 2**code_bits, vector_size), HALF),
            "scale": ((out_features, 1), HALF),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], description: Mapping[str, int]) -> "CodebookWeight":
        """The inverse of `tensors` and `description`."""
        return cls(tensors["packed"], tensors["codebooks"], tensors["scale"], description["in_features"])


def decode_vectors(codes: Tensor, codebooks: Tensor) -> Tensor:
    """The sums that codes [out, groups, n_codebooks] (integers) stand for, [out, groups * d], in the codebooks' dtype."""
    total = codebooks[0][codes[..., 0].long()]
    for m in range(1, len(codebooks)):
        total += codebooks[m][codes[..., m].long()]
    return total.flatten(1)
