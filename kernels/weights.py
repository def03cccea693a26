"""Packed weights: the values a compressed layer may take, and how they lie in memory.

A memory layout is one small frozen class that derives from `PackedWeight`: `IntWeight` here, one file for each other
(sparse24_weight.py, codebook_weight.py). A new layout is a new class, never a flag on an old one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from compress.kernels.packing import pack, unpack, words_for

WEIGHTS_AT_ONCE = 2**18  # whose ranges are searched together: more would leave the cache
SMALLEST_SCALE = 2.0**-14  # smallest normal float16: below it a rounded scale loses mantissa bits


@dataclass(frozen=True)
class Grid:
    """The values each group of weights may take: scale * (code - zero_point), code in 0 .. 2**bits - 1.

    Zero is always one of them, so a pruned weight is exactly zero on any grid.
    """

    scale: Tensor  # [out, groups] float32, already rounded to what a checkpoint stores
    zero_point: Tensor  # [out, groups] float32, whole numbers; 2**(bits - 1) everywhere if symmetric
    bits: int

    @classmethod
    def fit(
        cls,
        groups: Tensor,
        bits: int,
        symmetric: bool = True,
        scale_dtype: torch.dtype = torch.float16,
        importance: Tensor | None = None,
        shrink_steps: int = 0,
    ) -> "Grid":
        """The grid of each group of weights.

        `groups`: [out, groups, group_size] float32. Min-max if `shrink_steps` is 0; otherwise ranges shrunk to
        1, 1 - 0.8/shrink_steps, ... of min-max are tried and each group keeps the one with the smallest squared
        error, weighted by `importance` ([groups, group_size], such as the Hessian's diagonal).
        `scale_dtype` is what the checkpoint stores; scales are also kept float16-representable.
        """
        if len(groups) > (rows := max(1, WEIGHTS_AT_ONCE * len(groups) // max(1, groups.numel()))) and shrink_steps:
            parts = [
                cls.fit(part, bits, symmetric, scale_dtype, importance, shrink_steps) for part in groups.split(rows)
            ]
            return cls(torch.cat([each.scale for each in parts]), torch.cat([each.zero_point for each in parts]), bits)
        best = cls._spanning(groups, 1.0, bits, symmetric, scale_dtype)
        if not shrink_steps:
            return best
        least = best._error(groups, importance)
        for step in range(1, shrink_steps):
            grid = cls._spanning(groups, 1.0 - 0.8 * step / shrink_steps, bits, symmetric, scale_dtype)
            error = grid._error(groups, importance)
            better = error < least
            least = torch.where(better, error, least)
            best = cls(
                torch.where(better, grid.scale, best.scale),
                torch.where(better, grid.zero_point, best.zero_point),
                bits,
            )
        return best

    @classmethod
    def _spanning(cls, groups: Tensor, ratio: float, bits: int, symmetric: bool, scale_dtype: torch.dtype) -> "Grid":
        """The grid over `ratio` of each group's range."""
        levels = 2**bits - 1
        low, high = groups.amin(-1).clamp(max=0) * ratio, groups.amax(-1).clamp(min=0) * ratio
        if symmetric:
            scale = torch.maximum(-low, high) / (levels / 2)
            scale = storable(scale, scale_dtype)
            return cls(scale, torch.full_like(scale, 2 ** (bits - 1)), bits)
        scale = storable((high - low) / levels, scale_dtype)
        return cls(scale, (-low / scale).round().clamp(0, levels), bits)

    def _error(self, groups: Tensor, importance: Tensor | None) -> Tensor:
        codes = self.encode_groups(groups)
        square = codes.sub_(self.zero_point.unsqueeze(-1)).mul_(self.scale.unsqueeze(-1)).sub_(groups).square_()
        return square.sum(-1) if importance is None else (square * importance).sum(-1)

    def encode_groups(self, groups: Tensor) -> Tensor:
        """The nearest codes (float32, whole numbers) of weights [out, groups, group_size]."""
        codes = torch.addcdiv(self.zero_point.unsqueeze(-1), groups, self.scale.unsqueeze(-1))
        return codes.round_().clamp_(0, 2**self.bits - 1)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest positive scale that both `dtype` and float16 hold exactly."""
    stored = torch.float16 if dtype == torch.float32 else dtype
    return scale.clamp(SMALLEST_SCALE, 32768.0).to(stored).float()


HALF = (torch.float16, torch.bfloat16)  # what scales are stored in

Expected = dict[
    str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]
]  # of each tensor: its shape, the dtypes it may have


class PackedWeight(ABC):
    """A weight [out, in] in a memory layout of its own. The tensors `packed` and `scale` of every layout have a row an output."""

    WHOLE: ClassVar[tuple[str, ...]] = ()  # tensors that all rows share

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """float32 [out, in]."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a file has to hold, beside `description`."""

    @abstractmethod
    def description(self) -> dict[str, int]:
        """What the tensors do not say themselves, and what they must agree with."""

    @classmethod
    @abstractmethod
    def expected(cls, out_features: int, description: Mapping[str, int]) -> Expected:
        """The tensors that a weight of this description has, each with its shape and the dtypes it may have."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], description: Mapping[str, int]) -> Self:
        """The inverse of `tensors` and `description`."""

    @classmethod
    def without_values(cls, out_features: int, description: Mapping[str, int]) -> Self:
        """A weight on the meta device: it knows its size and its description, and takes no memory."""
        parts = cls.expected(out_features, description).items()
        tensors = {name: torch.empty(shape, dtype=dtypes[0], device="meta") for name, (shape, dtypes) in parts}
        return cls.from_tensors(tensors, description)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def rows(self, which: slice) -> Self:
        """Some of its outputs, as a weight of their own."""
        tensors = {name: t if name in self.WHOLE else t[which] for name, t in self.tensors().items()}
        return self.from_tensors(tensors, self.description())


def stacked_rows(parts: Sequence[PackedWeight]) -> PackedWeight:
    """The outputs of several weights of one description as one; the inverse of `rows`. None may share tensors among rows."""
    tensors = [part.tensors() for part in parts]
    joined = {name: torch.cat([each[name] for each in tensors]) for name in tensors[0]}
    return parts[0].from_tensors(joined, parts[0].description())


@dataclass(frozen=True)
class IntWeight(PackedWeight):
    """Integer codes of one linear layer with a scale and a zero point for each group of its inputs."""

    packed: Tensor  # [out, ceil(in * bits / 32)] int32, a bit stream along the inputs (kernels/packing.py)
    scale: Tensor  # [out, in / group_size] float16 or bfloat16
    zero_point: Tensor | None  # [out, in / group_size] uint8; None: symmetric, 2**(bits - 1) everywhere
    bits: int
    group_size: int
    in_features: int

    @classmethod
    def from_codes(
        cls, codes: Tensor, grid: Grid, group_size: int, symmetric: bool, scale_dtype: torch.dtype
    ) -> "IntWeight":
        """Pack codes [out, in] (whole numbers, any dtype) that lie on `grid`."""
        stored = torch.float16 if scale_dtype == torch.float32 else scale_dtype
        return cls(
            packed=pack(codes.to(torch.uint8), grid.bits),
            scale=grid.scale.to(stored),
            zero_point=None if symmetric else grid.zero_point.to(torch.uint8),
            bits=grid.bits,
            group_size=group_size,
            in_features=codes.shape[1],
        )

    @classmethod
    def planned(cls, shape: tuple[int, int], bits: int, group_size: int, symmetric: bool) -> "IntWeight":
        """A weight of (out, in) features without values, on the meta device: it knows its size and its description."""
        return cls.without_values(shape[0], _description(bits, group_size, shape[1], symmetric))

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return len(self.packed), self.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.packed.shape[0]

    @property
    def symmetric(self) -> bool:
        """Whether zero lies in the middle of the codes, so that no zero points are stored."""
        return self.zero_point is None

    def codes(self) -> Tensor:
        """Unsigned codes, uint8 [out, in]."""
        return unpack(self.packed, self.bits, self.in_features)

    def dequantize(self) -> Tensor:
        """float32 [out, in]; exact, since a code has at most 8 bits and a scale at most 11."""
        zero_point = 2 ** (self.bits - 1) if self.zero_point is None else self.zero_point.float().unsqueeze(-1)
        groups = self.codes().float().unflatten(1, (-1, self.group_size))
        return groups.sub_(zero_point).mul_(self.scale.float().unsqueeze(-1)).flatten(1)

    def to_int(self) -> "IntWeight":
        """Itself: the layout that formats of integers without gaps hold."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """`packed`, `scale` and, if asymmetric, `zero_point`."""
        named = {"packed": self.packed, "scale": self.scale, "zero_point": self.zero_point}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def description(self) -> dict[str, int]:
        """Bits, group size, row length, and whether it is symmetric."""
        return _description(self.bits, self.group_size, self.in_features, self.symmetric)

    @classmethod
    def expected(cls, out_features: int, description: Mapping[str, int]) -> Expected:
        """The tensors that a weight of this description has, each with its shape and the dtypes it may have."""
        length, groups = description["in_features"], description["in_features"] // description["group_size"]
        parts: Expected = {
            "packed": ((out_features, words_for(length, description["bits"])), (torch.int32,)),
            "scale": ((out_features, groups), HALF),
        }
        if not description["symmetric"]:
            parts["zero_point"] = ((out_features, groups), (torch.uint8,))
        return parts

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], description: Mapping[str, int]) -> "IntWeight":
        """The inverse of `tensors` and `description`."""
        facts = {name: description[name] for name in ("bits", "group_size", "in_features")}
        return cls(tensors["packed"], tensors["scale"], tensors.get("zero_point"), **facts)


def _description(bits: int, group_size: int, in_features: int, symmetric: bool) -> dict[str, int]:
    return {"bits": bits, "group_size": group_size, "in_features": in_features, "symmetric": symmetric}
