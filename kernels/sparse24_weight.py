"""Integer weights of which two in every four consecutive inputs are kept: the 2:4 pattern that sparse hardware reads.

The kept codes lie side by side, and beside each its place among the four, two bits: at 4 bits in groups of 128 that is
3.125 bits a weight where `IntWeight` takes 4.125.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.packing import pack, unpack, words_for
from compress.kernels.weights import Expected, IntWeight, PackedWeight

KEPT, OF = 2, 4
PLACE_BITS = 2  # of a place among four


@dataclass(frozen=True)
class Sparse24IntWeight(PackedWeight):
    """Codes of the kept weights, their places, and a scale and a zero point for each group of inputs.

    Groups are of inputs, kept or not, as in `IntWeight`. What is not kept is exactly zero.
    """

    packed: Tensor  # [out, ceil(in / 2 * bits / 32)] int32, codes of the kept weights in the order of their inputs
    places: Tensor  # [out, ceil(in / 2 * 2 / 32)] int32, where each lies in its four inputs
    scale: Tensor  # [out, in / group_size] float16 or bfloat16
    zero_point: Tensor | None  # [out, in / group_size] uint8; None: symmetric, 2**(bits - 1) everywhere
    bits: int
    group_size: int
    in_features: int

    @classmethod
    def from_int(cls, weight: IntWeight, keep: Tensor) -> "Sparse24IntWeight":
        """The same values; `keep`: bool [out, in], False where a weight is zero.

        Where fewer than two of four are kept, others that are zero fill up. Raises ValueError if some four keep more
        than two, or a weight that is not kept is not zero.
        """
        fours = keep.unflatten(1, (-1, OF))
        if (fours.sum(-1) > KEPT).any():
            raise ValueError(f"more than {KEPT} of {OF} weights are kept")
        places = fours.byte().argsort(dim=-1, descending=True, stable=True)[..., :KEPT].sort(dim=-1).values
        codes = weight.codes().unflatten(1, (-1, OF)).gather(-1, places)
        sparse = cls(
            packed=pack(codes.flatten(1), weight.bits),
            places=pack(places.flatten(1), PLACE_BITS),
            scale=weight.scale,
            zero_point=weight.zero_point,
            bits=weight.bits,
            group_size=weight.group_size,
            in_features=weight.in_features,
        )
        if not torch.equal(sparse.to_int().packed, weight.packed):
            raise ValueError("a weight that is not kept is not zero")
        return sparse

    @classmethod
    def planned(cls, shape: tuple[int, int], bits: int, group_size: int, symmetric: bool) -> "Sparse24IntWeight":
        """A weight of (out, in) features without values, on the meta device: it knows its size and its description."""
        return cls.without_values(shape[0], IntWeight.planned(shape, bits, group_size, symmetric).description())

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return len(self.packed), self.in_features

    @property
    def symmetric(self) -> bool:
        """Whether zero lies in the middle of the codes, so that no zero points are stored."""
        return self.zero_point is None

    def keep(self) -> Tensor:
        """bool [out, in]: which weights have a code; two in every four."""
        fours = torch.zeros(len(self.packed), self.in_features // OF, OF, dtype=torch.bool, device=self.packed.device)
        return fours.scatter_(-1, self._places(), True).flatten(1)

    def to_int(self) -> IntWeight:
        """The same values with codes for the zeros as well."""
        if self.zero_point is None:
            zeros = torch.full((len(self.packed), self.in_features), 2 ** (self.bits - 1), dtype=torch.uint8)
            zeros = zeros.to(self.packed.device)
        else:
            zeros = self.zero_point.repeat_interleave(self.group_size, dim=1)
        kept = unpack(self.packed, self.bits, self.in_features // OF * KEPT).unflatten(1, (-1, KEPT))
        codes = zeros.unflatten(1, (-1, OF)).scatter(-1, self._places(), kept).flatten(1)
        packed = pack(codes, self.bits)
        return IntWeight(packed, self.scale, self.zero_point, self.bits, self.group_size, self.in_features)

    def dequantize(self) -> Tensor:
        """float32 [out, in], exact."""
        return self.to_int().dequantize()

    def _places(self) -> Tensor:
        """int64 [out, in / 4, 2]."""
        places = unpack(self.places, PLACE_BITS, self.in_features // OF * KEPT)
        return places.unflatten(1, (-1, KEPT)).long()

    def tensors(self) -> dict[str, Tensor]:
        """`packed`, `places`, `scale` and, if asymmetric, `zero_point`."""
        named = {"packed": self.packed, "places": self.places, "scale": self.scale, "zero_point": self.zero_point}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def description(self) -> dict[str, int]:
        """Bits of a kept code, group size, row length, and whether it is symmetric."""
        facts = {"bits": self.bits, "group_size": self.group_size, "in_features": self.in_features}
        return facts | {"symmetric": self.symmetric}

    @classmethod
    def expected(cls, out_features: int, description: Mapping[str, int]) -> Expected:
        """The tensors that a weight of this description has, each with its shape and the dtypes it may have."""
        n_kept = description["in_features"] // OF * KEPT
        return IntWeight.expected(out_features, description) | {
            "packed": ((out_features, words_for(n_kept, description["bits"])), (torch.int32,)),
            "places": ((out_features, words_for(n_kept, PLACE_BITS)), (torch.int32,)),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], description: Mapping[str, int]) -> "Sparse24IntWeight":
        """The inverse of `tensors` and `description`."""
        facts = {name: description[name] for name in ("bits", "group_size", "in_features")}
        return cls(tensors["packed"], tensors["places"], tensors["scale"], tensors.get("zero_point"), **facts)
