"""Weights of up to 4 bits times inputs in floats, on processors; 5 bits and more are in cpu_bytes.py.

torch's `_dyn_quant_matmul_4bit` is not used: on x86 it is a scalar reference, ten to a hundred times slower than a dense
product.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from compress.kernels.implementation import Case, Implementation, needs_cpu
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import IntWeight

GROUPS = (256, 128, 64, 32)  # what torch's 4-bit kernel takes
ROWS = 16  # it takes outputs in multiples of so many
ROWS_AT_ONCE = 8192  # packed at a time, since it wants them as int32
MIDDLE = 8  # the code that stands for zero


def integer(case: Case) -> IntWeight | Sparse24IntWeight | None:
    """The weight of a case if it is one of integers; None: it is another."""
    return case.weight if isinstance(case.weight, IntWeight | Sparse24IntWeight) else None


def group_size_of(case: Case) -> int:
    """How many inputs share a scale."""
    weight = integer(case)
    return 0 if weight is None else weight.group_size


def fits_nibbles(case: Case) -> str | None:
    """Why a weight does not lie in codes of 4 bits; None: it does. 2 and 3 bits do, whatever their zero points."""
    weight = integer(case)
    if weight is None:
        return "it multiplies codes of integers"
    return None if weight.bits <= 4 else f"it takes codes of at most 4 bits, not {weight.bits}"


def nibbles(weight: IntWeight) -> tuple[Tensor, Tensor | None]:
    """Codes of 4 bits, uint8 [out, in], and what is left of zero points: value = scale * (code - 8 + rest).

    The rest, float32 [out, groups], is None where the codes take all of it: in symmetric weights, and up to 3 bits.
    """
    codes = weight.codes()
    if weight.zero_point is None:
        return codes.add_(MIDDLE - 2 ** (weight.bits - 1)), None
    if weight.bits < 4:
        moved = (MIDDLE - weight.zero_point.to(torch.int16)).repeat_interleave(weight.group_size, 1)
        return (codes + moved).to(torch.uint8), None
    return codes, rest_of(weight)


def rest_of(weight: IntWeight) -> Tensor | None:
    """The second of `nibbles`."""
    return None if weight.zero_point is None or weight.bits < 4 else MIDDLE - weight.zero_point.float()


def dense_codes(case: Case) -> IntWeight:
    """The weight of a case that `integer` knows, with a code for every input."""
    weight = integer(case)
    if weight is None:
        raise TypeError(type(case.weight).__name__)
    return weight.to_int()


class PackedNibbles(Implementation):
    """Codes of 4 bits as torch's `_weight_int4pack_mm_for_cpu` takes them, and the product with them.

    Zero points of 4 bits go in as values, which the dtype rounds. What that loses is added to the outputs, by float32
    sums of the inputs of each group: for inputs with a mean it would be the largest error there is. These outputs are
    rounded twice.
    """

    packed: Tensor
    scale_and_zero: Tensor
    lost: Tensor | None  # of zero points, float32 [groups, out]; None: nothing

    def lay(self, codes: Iterable[Tensor], pairs: Tensor, group_size: int, dtype: torch.dtype) -> None:
        """Hold codes, uint8 [some out, in] in pieces, and `pairs`, float32 [out, groups, 2], of scales and what is added:
        value = scale * (code - 8) + added."""
        self.out_features, self.whole_group = len(pairs), group_size
        self.filled = -len(pairs) % ROWS  # rows that are no outputs
        self.group_size = next(size for size in GROUPS if group_size % size == 0)
        self.keep("packed", torch.cat([_packed(part) for part in codes]))
        rounded = pairs.to(dtype)
        lost = (pairs[..., 1] - rounded[..., 1].float()).T.contiguous()
        rounded = rounded.repeat_interleave(group_size // self.group_size, 1)
        rounded = torch.nn.functional.pad(rounded, (0, 0, 0, 0, 0, self.filled))
        self.keep("scale_and_zero", rounded.transpose(0, 1).contiguous())
        self.exact = not lost.any()
        self.register_buffer("lost", None if self.exact else lost, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        y = torch._weight_int4pack_mm_for_cpu(x, self.packed, self.group_size, self.scale_and_zero)
        if self.filled:
            y = y[:, : self.out_features]
        lost = None if self.exact else self.lost
        if lost is None:
            return y
        sums = x.unflatten(1, (-1, self.whole_group)).sum(-1, dtype=torch.float32)
        return torch.addmm(y.float(), sums, lost).to(x.dtype)


class Int4Pack(PackedNibbles):
    """2 and 3 bits are widened to 4, and the zeros of 2:4 weights filled in."""

    NAME = "cpu-int4"
    ABOUT = "torch's packed 4-bit kernel: fastest for few tokens"
    BEATEN_FROM = 16

    @classmethod
    def supports(cls, case: Case) -> str | None:
        """Integers of at most 4 bits in groups that 32 divides, on a CPU."""
        return needs_cpu(case) or fits_nibbles(case) or whole_groups(case)

    def __init__(self, case: Case):
        super().__init__()
        weight = dense_codes(case)
        scale, rest = weight.scale.float(), rest_of(weight)
        added = torch.zeros_like(scale) if rest is None else rest * scale
        codes = (nibbles(part)[0] for part in row_parts(weight))
        self.lay(codes, torch.stack([scale, added], -1), weight.group_size, case.dtype)


def whole_groups(case: Case) -> str | None:
    """Why groups are not of a size that torch's 4-bit kernel takes; None: they are."""
    size = group_size_of(case)
    return None if size % GROUPS[-1] == 0 else f"it needs groups in multiples of {GROUPS[-1]}, not {size}"


def row_parts(weight: IntWeight) -> list[IntWeight]:
    """A weight in pieces of some outputs each, a multiple of what the kernel takes."""
    return [weight.rows(slice(start, start + ROWS_AT_ONCE)) for start in range(0, weight.out_features, ROWS_AT_ONCE)]


def _packed(codes: Tensor) -> Tensor:
    """uint8 [out, in / 2], in the order of this processor's kernel; the last rows are filled up to a multiple of 16."""
    codes = torch.nn.functional.pad(codes.int(), (0, 0, 0, -len(codes) % ROWS), value=MIDDLE)
    return torch._convert_weight_to_int4pack_for_cpu(codes, 1)


class DecodedNibbles(Implementation):
    """Four codes looked up at once in a table of all 65,536, times the scales, then a dense product."""

    NAME = "cpu-decode4"
    ABOUT = "decodes 4-bit codes by table for each call: long prompts, without a dense copy"
    ROLE = "decode"

    words: Tensor
    scale: Tensor
    table: Tensor
    rest: Tensor | None

    @classmethod
    def supports(cls, case: Case) -> str | None:
        """Integers of at most 4 bits in rows that 4 divides, on a CPU, in a dtype of 16 bits."""
        if reason := needs_cpu(case) or fits_nibbles(case):
            return reason
        if case.dtype.itemsize != 2:
            return "its table holds float16 or bfloat16"
        return None if case.weight.shape[1] % 4 == 0 else "it needs inputs in multiples of 4"

    def __init__(self, case: Case):
        super().__init__()
        weight = dense_codes(case)
        self.dtype, self.shape, self.group_size = case.dtype, weight.shape, weight.group_size
        codes, rest = nibbles(weight)
        fours = codes.unflatten(1, (-1, 4)).int()
        words = fours[..., 0] | fours[..., 1] << 4 | fours[..., 2] << 8 | fours[..., 3] << 12
        self.keep("words", (words - 2**15).to(torch.int16))  # [out, in / 4]
        self.keep("scale", weight.scale.to(case.dtype).unsqueeze(-1))  # [out, groups, 1]
        self.register_buffer("rest", None if rest is None else rest.to(case.dtype).unsqueeze(-1), False)
        self.keep("table", table_of_fours(case.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        found = self.table.index_select(0, self.words.flatten().int().add_(2**15))
        groups = found.view(self.dtype).view(self.shape[0], -1, self.group_size)
        if self.rest is not None:
            groups.add_(self.rest)  # whole numbers below 16: exact
        return torch.nn.functional.linear(x, groups.mul_(self.scale).view(self.shape))


_TABLES: dict[torch.dtype, Tensor] = {}


def table_of_fours(dtype: torch.dtype) -> Tensor:
    """int64 [65536]: the bits of four values code - 8 in `dtype`, the lowest code first. Made once for all layers."""
    if dtype not in _TABLES:
        words = torch.arange(2**16).unsqueeze(1) >> torch.tensor([0, 4, 8, 12])
        _TABLES[dtype] = ((words & 15) - MIDDLE).to(dtype).view(torch.int64).flatten()
    return _TABLES[dtype]
