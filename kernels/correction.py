"""What is added to a packed weight without packing it anew: a product of low rank, and a few single weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compress.kernels.adapter_codes import NormalCodes

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Correction:
    """y = x (W + B A + S)ᵀ with W packed; A and B as LoRA has them (any scale multiplied into B), S sparse."""

    a: Tensor  # [rank, in] float; rank may be 0
    b: Tensor  # [out, rank] float
    index: Tensor | None = None  # [n] int32, places of S in the flattened [out, in], ascending; None: S is zero
    value: Tensor | None = None  # [n] float, S there

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.a)

    @property
    def bits(self) -> int:
        """Of each number of A and B in a file; 16: they are floats."""
        return 16

    @property
    def single(self) -> int:
        """How many weights S has."""
        return 0 if self.index is None else len(self.index)

    def delta(self) -> Tensor:
        """B A + S, float32 [out, in]."""
        delta = self.b.float() @ self.a.float()
        if self.index is not None and self.value is not None:
            delta.view(-1).index_add_(0, self.index.long(), self.value.float())
        return delta

    def tensors(self) -> dict[str, Tensor]:
        """What a file has to hold."""
        named = {"a": self.a, "b": self.b, "index": self.index, "value": self.value}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def scattered(self, rows: Tensor | None, columns: Tensor | None) -> "Correction":
        """The product for a weight that has more outputs and inputs: zeros where `rows` and `columns` are False.

        `rows`: bool [out of that weight], True as often as this one has outputs, None: it has no more; `columns` likewise
        of inputs. There are no single weights (LoRAM, arXiv:2502.13533, eq. 5).
        """
        assert not self.single
        a, b = self.a, self.b
        if columns is not None:
            a = a.new_zeros(self.rank, len(columns)).index_copy_(1, columns.nonzero().flatten().to(a.device), a)
        if rows is not None:
            b = b.new_zeros(len(rows), self.rank).index_copy_(0, rows.nonzero().flatten().to(b.device), b)
        return Correction(a, b)

    def to(self, dtype: torch.dtype) -> "Correction":
        """The same with its numbers rounded to `dtype`."""
        value = None if self.value is None else self.value.to(dtype)
        return Correction(self.a.to(dtype), self.b.to(dtype), self.index, value)

    def rounded(self, dtype: torch.dtype, bits: int = 16) -> "Correction":
        """The same as a checkpoint of a model in `dtype` keeps it, with A and B in codes of so many bits below 16.

        To round what is rounded already changes nothing.
        """
        return self.to(dtype) if bits == 16 or not self.rank else CodedCorrection.of(self.to(dtype), bits)


@dataclass(frozen=True)
class CodedCorrection(Correction):
    """A correction whose A and B are kept as codes; `a` and `b` are what they decode to, float32."""

    codes: tuple[NormalCodes, NormalCodes] = field(kw_only=True)  # of A and of Bᵀ, [rank, in] and [rank, out]

    @classmethod
    def of(cls, correction: Correction, bits: int) -> "CodedCorrection":
        """The nearest codes of a correction's factors; its single weights stay as they are."""
        codes = NormalCodes.of(correction.a, bits), NormalCodes.of(correction.b.T, bits)
        return cls.decoded(codes, correction.index, correction.value)

    @classmethod
    def decoded(
        cls, codes: tuple[NormalCodes, NormalCodes], index: Tensor | None, value: Tensor | None
    ) -> "CodedCorrection":
        """From codes of A and of Bᵀ."""
        return cls(codes[0].decode(), codes[1].decode().T.contiguous(), index, value, codes=codes)

    @property
    def bits(self) -> int:
        """Of each code."""
        return self.codes[0].bits

    def tensors(self) -> dict[str, Tensor]:
        """What a file has to hold."""
        coded = {
            f"{name}_{part}": getattr(codes, part)
            for name, codes in zip("ab", self.codes, strict=True)
            for part in ("packed", "normal")
        }
        return coded | {name: tensor for name, tensor in super().tensors().items() if name in ("index", "value")}

    def to(self, dtype: torch.dtype) -> "CodedCorrection":
        """The same with its single weights rounded to `dtype`: codes stay codes."""
        return replace(self, value=None if self.value is None else self.value.to(dtype))

    def rounded(self, dtype: torch.dtype, bits: int = 16) -> Correction:
        """The same as a checkpoint keeps it, with codes of so many bits, or floats of `dtype`."""
        if bits == self.bits:
            return self.to(dtype)
        return Correction(self.a, self.b, self.index, self.value).rounded(dtype, bits)


def correction_from(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], rank: int, bits: int, single: int
) -> Correction:
    """The inverse of `Correction.tensors`, for a weight of `shape` (out, in) with `single` weights of S.

    Raises ValueError, naming the tensor, where one does not fit what is said of it.
    """
    expected = part_shapes(shape, rank, bits, single)
    for name, (wanted, dtypes) in expected.items():
        if tuple(tensors[name].shape) != wanted or tensors[name].dtype not in dtypes:
            raise ValueError(f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}, not {list(wanted)}")
    index, value = tensors.get("index"), tensors.get("value")
    if index is not None:
        places = index.long()
        if places[0] < 0 or places[-1] >= shape[0] * shape[1] or bool((places.diff() <= 0).any()):
            raise ValueError(f"index does not name places of {list(shape)} in order")
    if bits == 16:
        return Correction(tensors["a"], tensors["b"], index, value)
    a, b = (
        NormalCodes(tensors[f"{name}_packed"], tensors[f"{name}_normal"], bits, length)
        for name, length in zip("ab", reversed(shape), strict=True)
    )
    return CodedCorrection.decoded((a, b), index, value)


def planned_correction(shape: tuple[int, int], rank: int, single: int, bits: int, dtype: torch.dtype) -> Correction:
    """A correction of these sizes without values, on the meta device; `dtype`: of its floats."""
    bits = bits if rank else 16
    parts = {
        name: torch.empty(size, dtype=dtype if dtypes == FLOATS else dtypes[0], device="meta")
        for name, (size, dtypes) in part_shapes(shape, rank, bits, single).items()
    }
    index, value = parts.get("index"), parts.get("value")
    if bits == 16:
        return Correction(parts["a"], parts["b"], index, value)
    a, b = (
        NormalCodes(parts[f"{name}_packed"], parts[f"{name}_normal"], bits, length)
        for name, length in zip("ab", reversed(shape), strict=True)
    )
    factors = torch.empty(rank, shape[1], device="meta"), torch.empty(shape[0], rank, device="meta")
    return CodedCorrection(factors[0], factors[1], index, value, codes=(a, b))


def part_shapes(
    shape: tuple[int, int], rank: int, bits: int, single: int
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """The tensors of a correction for a weight of `shape` (out, in): of each its shape and the dtypes it may have."""
    out_features, in_features = shape
    parts: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {}
    if bits == 16:
        parts |= {"a": ((rank, in_features), FLOATS), "b": ((out_features, rank), FLOATS)}
    else:
        for name, length in (("a", in_features), ("b", out_features)):
            for part, (size, dtype) in NormalCodes.expected(rank, length, bits).items():
                parts[f"{name}_{part}"] = (size, (dtype,))
    if single:
        parts |= {"index": ((single,), (torch.int32,)), "value": ((single,), FLOATS)}
    return parts
