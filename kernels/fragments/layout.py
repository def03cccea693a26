"""Weights in the order of tensor core fragments: what a lane of a warp multiplies with, it loads 16 bytes at a time.

Outputs are cut into tiles of 32, one for a warp, inputs into blocks of B: 128, or 64 for 8 bits. Lane 4 g + t of the
warp works on the outputs 8 i + g of a tile, i = 0 .. 3: two instructions `mma` of 16 outputs. Outputs beyond the last
fill up a tile with codes and scales of 0.

Dense weights: step e of a block is `mma.m16n8k16`. The order in which products are summed is free, so a lane takes
those inputs that it can load 16 bytes at once. For q, c = 0, 1 the code of

    input 32 (e // 2) + 8 t + 4 (e % 2) + 2 q + c of the block and output 8 i + g

has bits [o, o + b) of word e b / 2 + i b // 8 of lane 4 g + t, where o = 16 c + 8 q + i b % 8 and b is 2, 4 or 8.
Of three bits, the lower two lie like that, and the third is bit 16 c + 8 q + 2 i + e % 2 of word e // 2 of `high`.

2:4 weights: step e is `mma.sp.m16n8k32`. Code c = 0, 1 of the two kept among the four inputs from
32 e + 16 q + 4 t of the block lies in the same place, and what lies where in the fours is `places`: the fours from
32 e + 16 h + 4 u of output 8 i + g have the bits [4 u + 16 (i % 2), ... + 4) of word 2 (i // 2) + e // 2 of lane
4 g + 2 (e % 2) + h, two bits for each kept one. There inputs stay in order, and it is x whose pairs of inputs are
transposed, four by four in every 32.

Words of a block lie in planes [lanes, 4 words], so that the lanes of a warp read 512 bytes side by side, those of
`high` in halves of a block [lanes, 2 words].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.packing import pack, unpack
from compress.kernels.sparse24_weight import KEPT, OF, PLACE_BITS, Sparse24IntWeight
from compress.kernels.weights import IntWeight

TILE = 32  # outputs of a warp
ROWS = 4  # of them to a lane
LANES = 32
VECTOR = 4  # words of a load
BITS = (2, 3, 4, 8)  # of dense weights
SPARSE_BITS = (2, 4, 8)
ASCENDING = 0 | 1 << PLACE_BITS  # places of a four that fills up: tensor cores take ascending ones only


def field_bits(bits: int) -> int:
    """Bits of a code in `words`: all but the third of three."""
    return 2 if bits == 3 else bits


def block_inputs(bits: int, sparse: bool) -> int:
    """Inputs of a block: a lane has 8 or 16 words of it."""
    return 64 if bits == 8 and not sparse else 128


def block_steps(bits: int, sparse: bool) -> int:
    """Instructions `mma` of a block for 16 outputs and 8 tokens."""
    return block_inputs(bits, sparse) // (32 if sparse else 16)


@dataclass(frozen=True)
class FragmentWeight:
    """An `IntWeight` or `Sparse24IntWeight` in tiles of 32 outputs and blocks of inputs."""

    words: Tensor  # [tiles, blocks, planes, 32 lanes, 4] int32
    high: Tensor | None  # [tiles, blocks, 2, 32 lanes, 2] int32, third bits; None: there are none
    places: Tensor | None  # [tiles, blocks, 32 lanes, 4] int32; None: a dense weight
    scale: Tensor  # [tiles, groups, 8 g, 4 i] float16 or bfloat16
    zero_point: Tensor | None  # [tiles, groups, 8 g, 4 i] uint8; None: symmetric, 2**(bits - 1) everywhere
    bits: int
    group_size: int
    out_features: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def sparse(self) -> bool:
        """Whether two in every four inputs have codes."""
        return self.places is not None

    @classmethod
    def from_int(cls, weight: IntWeight) -> "FragmentWeight":
        """The same codes in this order; `weight` has 2, 3, 4 or 8 bits and whole blocks of inputs."""
        segments = block_inputs(weight.bits, sparse=False) // 32
        codes = _tiles(weight.codes()).unflatten(-1, (-1, segments, 4, 2, 2, 2))  # blocks, e // 2, t, e % 2, q, c
        ordered = codes.permute(0, 3, 2, 5, 4, 6, 1, 8, 7)  # tiles, blocks, g, t, e // 2, e % 2, i, c, q
        words = _words(ordered.flatten(4, 5) & (2 ** field_bits(weight.bits) - 1), field_bits(weight.bits))
        high = _third_bits(ordered >> 2) if weight.bits == 3 else None
        return cls(words, high, None, *_sides(weight), weight.bits, weight.group_size, *weight.shape)

    @classmethod
    def from_sparse(cls, weight: Sparse24IntWeight) -> "FragmentWeight":
        """The same codes and places in this order; `weight` has 2, 4 or 8 bits and whole blocks of inputs."""
        n_kept = weight.in_features // OF * KEPT
        kept = _tiles(unpack(weight.packed, weight.bits, n_kept)).unflatten(-1, (-1, 4, 2, 4, KEPT))
        words = _words(kept.permute(0, 3, 2, 6, 4, 1, 7, 5), weight.bits)  # tiles, blocks, g, t, e, i, c, q
        pairs = unpack(weight.places, PLACE_BITS, n_kept).unflatten(-1, (-1, KEPT))
        fours = _tiles(pairs[..., 0] | pairs[..., 1] << PLACE_BITS, ASCENDING).unflatten(-1, (-1, 2, 2, 2, 4))
        ordered = fours.unflatten(1, (2, 2)).permute(0, 4, 3, 6, 7, 1, 5, 2, 8)  # e % 2, h, i // 2, e // 2, i % 2, u
        places = pack(ordered.flatten(-2), OF).flatten(-3).flatten(2, 4)
        return cls(words, None, places.contiguous(), *_sides(weight), weight.bits, weight.group_size, *weight.shape)

    def to_int(self) -> IntWeight:
        """The inverse of `from_int`."""
        steps = block_steps(self.bits, sparse=False)
        codes = self._codes(steps).unflatten(4, (-1, 2))  # tiles, blocks, g, t, e // 2, e % 2, i, c, q
        rows = codes.permute(0, 6, 2, 1, 4, 3, 5, 8, 7).flatten(3).flatten(0, 2)
        packed = pack(rows[: self.out_features], self.bits)
        return IntWeight(packed, *self._sides(), self.bits, self.group_size, self.in_features)

    def to_sparse(self) -> Sparse24IntWeight:
        """The inverse of `from_sparse`."""
        assert self.places is not None
        kept = self._codes(block_steps(self.bits, sparse=True)).permute(0, 5, 2, 1, 4, 7, 3, 6)
        codes = kept.flatten(3).flatten(0, 2)[: self.out_features]
        nibbles = unpack(self.places.unsqueeze(-1), OF, 8).unflatten(2, (8, 2, 2)).unflatten(-1, (2, 4))
        ordered = nibbles.unflatten(5, (2, 2)).permute(0, 5, 7, 2, 1, 6, 3, 4, 8)
        fours = ordered.flatten(4).flatten(0, 3)[: self.out_features]
        places = torch.stack([fours & 3, fours >> PLACE_BITS], -1).flatten(1)
        packed = pack(codes, self.bits), pack(places, PLACE_BITS)
        return Sparse24IntWeight(*packed, *self._sides(), self.bits, self.group_size, self.in_features)

    def _codes(self, steps: int) -> Tensor:
        """[tiles, blocks, g, t, e, i, c, q]: the inverse of `_words`."""
        lanes, field = self.words.transpose(2, 3).flatten(3), field_bits(self.bits)  # [tiles, blocks, lanes, words]
        fields = unpack(lanes.unsqueeze(-1), field, 32 // field)
        fields = fields.unflatten(3, (steps, -1)).unflatten(-1, (2, 2, -1))  # ..., e, i // per, c, q, i % per
        codes = fields.permute(0, 1, 2, 3, 4, 7, 5, 6).flatten(4, 5).unflatten(2, (8, 4))
        if self.high is None:
            return codes
        pairs = self.high.transpose(2, 3).flatten(3)  # [tiles, blocks, lanes, e // 2]
        third = unpack(pairs.unsqueeze(-1), 1, 32).unflatten(-1, (2, 2, ROWS, 2))  # ..., e // 2, c, q, i, e % 2
        return codes | third.permute(0, 1, 2, 3, 7, 6, 4, 5).flatten(3, 4).unflatten(2, (8, 4)) << 2

    def _sides(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points, [out, groups]."""
        rows = (
            None if side is None else side.permute(0, 3, 2, 1).flatten(0, 2)[: self.out_features].contiguous()
            for side in (self.scale, self.zero_point)
        )
        scale, zero_point = rows
        assert scale is not None
        return scale, zero_point


def _tiles(rows: Tensor, fill: int = 0) -> Tensor:
    """[out, ...] as [tiles, 4 i, 8 g, ...], filled up."""
    missing = -len(rows) % TILE
    padded = torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), fill)]) if missing else rows
    return padded.unflatten(0, (-1, ROWS, 8))


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [tiles, blocks, g, t, e, i, c, q] as planes of words."""
    per = 8 // bits  # outputs in a byte
    ordered = codes.unflatten(5, (-1, per)).permute(0, 1, 2, 3, 4, 5, 7, 8, 6)  # ..., i // per, c, q, i % per
    words = pack(ordered.flatten(-3), bits).flatten(4).flatten(2, 3)  # [tiles, blocks, lanes, words]
    return words.unflatten(-1, (-1, VECTOR)).transpose(2, 3).contiguous()


def _third_bits(bits: Tensor) -> Tensor:
    """Bits [tiles, blocks, g, t, e // 2, e % 2, i, c, q] as halves of blocks."""
    words = pack(bits.permute(0, 1, 2, 3, 4, 7, 8, 6, 5).flatten(-4), 1)[..., 0].flatten(2, 3)
    return words.unflatten(-1, (2, 2)).transpose(2, 3).contiguous()


def _sides(weight: IntWeight | Sparse24IntWeight) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points as [tiles, groups, g, i]."""
    scale = _tiles(weight.scale).permute(0, 3, 2, 1).contiguous()
    if weight.zero_point is None:
        return scale, None
    return scale, _tiles(weight.zero_point).permute(0, 3, 2, 1).contiguous()
