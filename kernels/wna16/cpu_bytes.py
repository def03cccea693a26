"""Weights of a byte times inputs in floats, on processors."""

import math

import torch
from torch import Tensor

from compress.kernels.implementation import Case, Implementation, needs_cpu
from compress.kernels.weights import IntWeight
from compress.kernels.wna16.cpu import (
    MIDDLE,
    PackedNibbles,
    dense_codes,
    fits_nibbles,
    group_size_of,
    integer,
    row_parts,
    whole_groups,
)


class Int8Pack(Implementation):
    """torch's `_weight_int8pack_mm`: bytes with one scale an output."""

    NAME = "cpu-int8"
    ABOUT = "torch's kernel for bytes with a scale an output: fastest for few tokens"
    BEATEN_FROM = 8

    codes: Tensor
    scale: Tensor

    @classmethod
    def supports(cls, case: Case) -> str | None:
        """Symmetric integers with one scale an output, and inputs in multiples of 16 (it reads past the end of others)."""
        if reason := needs_cpu(case) or bytes_by_output(case):
            return reason
        return None if case.weight.shape[1] % 16 == 0 else "it needs inputs in multiples of 16"

    def __init__(self, case: Case):
        super().__init__()
        weight = dense_codes(case)
        self.keep("codes", signed(weight))
        self.keep("scale", weight.scale[:, 0].to(case.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        return torch._weight_int8pack_mm(x, self.codes, self.scale)


def bytes_by_output(case: Case) -> str | None:
    """Why a weight is not one of symmetric codes with one scale an output; None: it is."""
    if integer(case) is None:
        return "it multiplies codes of integers"
    if "zero_point" in case.weight.tensors():
        return "it takes symmetric codes"
    size = group_size_of(case)
    return None if size == case.weight.shape[1] else f"it needs one scale an output, not one for {size} inputs"


def signed(weight: IntWeight) -> Tensor:
    """Codes around zero, int8 [out, in]: less 2**(bits - 1)."""
    return (weight.codes().to(torch.int16) - 2 ** (weight.bits - 1)).to(torch.int8)


class DecodedBytes(Implementation):
    """Bytes times scales for each call, then a dense product."""

    NAME = "cpu-decode8"
    ABOUT = "decodes bytes for each call: long prompts, without a dense copy"
    ROLE = "decode"

    codes: Tensor
    scale: Tensor
    rest: Tensor | None

    @classmethod
    def supports(cls, case: Case) -> str | None:
        """Integers with 5 bits or more, on a CPU."""
        if reason := needs_cpu(case):
            return reason
        if integer(case) is None:
            return "it multiplies codes of integers"
        return "it holds a byte a code, which 4 bits and fewer do not need" if fits_nibbles(case) is None else None

    def __init__(self, case: Case):
        super().__init__()
        weight = dense_codes(case)
        self.group_size = weight.group_size
        self.keep("codes", signed(weight))
        self.keep("scale", weight.scale.to(case.dtype).unsqueeze(-1))
        middle = 2 ** (weight.bits - 1)
        rest = None if weight.zero_point is None else (middle - weight.zero_point.to(torch.int16)).unsqueeze(-1)
        self.register_buffer("rest", rest, False)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        groups = self.codes.unflatten(1, (-1, self.group_size))
        if self.rest is None:
            weight = groups.to(x.dtype).mul_(self.scale)
        else:
            weight = (groups + self.rest).float().mul_(self.scale).to(x.dtype)  # 9 bits, which bfloat16 would round
        return torch.nn.functional.linear(x, weight.flatten(1))


class NibblePairs(PackedNibbles):
    """Bytes as two codes of 4 bits each, high and low, side by side in the inputs: torch's 4-bit product, twice as wide.

    A code is 16 high + low, so a group of the high codes has 16 times the scale, and what is left of the zero point
    goes with the low ones.
    """

    NAME = "cpu-int4x2"
    ABOUT = "torch's packed 4-bit kernel on both halves of each byte: layers of bytes in groups, few tokens"
    BEATEN_FROM = 8

    @classmethod
    def supports(cls, case: Case) -> str | None:
        """Integers with 5 bits or more in groups that 32 divides, on a CPU."""
        return DecodedBytes.supports(case) or whole_groups(case)

    def __init__(self, case: Case):
        super().__init__()
        weight = dense_codes(case)
        scale, apart = weight.scale.float(), weight.zero_point if weight.bits == 8 else None
        added = MIDDLE * scale if apart is None else (MIDDLE + 128 - apart.float()) * scale  # halves are stored less 8
        high, low = torch.stack([16 * scale, 0 * scale], -1), torch.stack([scale, added], -1)
        codes = (_halves(part) for part in row_parts(weight))
        self.lay(codes, torch.cat([high, low], 1), weight.group_size, case.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        return super().forward(torch.cat([x, x], 1))


def _halves(weight: IntWeight) -> Tensor:
    """uint8 [out, 2 in], of codes around 128: zero points of fewer than 8 bits are in them."""
    codes = weight.codes()
    if weight.zero_point is None:
        codes.add_(128 - 2 ** (weight.bits - 1))
    elif weight.bits < 8:
        moved = (128 - weight.zero_point.to(torch.int16)).repeat_interleave(weight.group_size, 1)
        codes = (codes + moved).to(torch.uint8)
    return torch.cat([codes >> 4, codes & 15], 1)


class Digits(Implementation):
    """Bytes times bytes: each input is digits to base 256 of a scale of its token, each digit a row of its own.

    oneDNN's integer product is memory-bound for few rows, so two cost what one does. For bfloat16 two digits hold 14
    bits of the token's largest input, for other dtypes three hold 22: more than the output's dtype shows. Each group of
    the inputs is a product of its own, which oneDNN adds to the sum of those before.
    """

    NAME = "cpu-digits8"
    ABOUT = "oneDNN's integer product on digits of the inputs: large layers of bytes, few tokens"
    BEATEN_FROM = 4
    MOST_GROUPS = 16  # beyond, so many calls cost more than they save

    zeros: Tensor

    @classmethod
    def supports(cls, case: Case) -> str | None:
        """Symmetric integers with 5 bits or more in at most 16 groups, on a CPU."""
        if reason := DecodedBytes.supports(case):
            return reason
        if "zero_point" in case.weight.tensors():
            return "it takes symmetric codes"
        n_groups = case.weight.shape[1] // group_size_of(case)
        return None if n_groups <= cls.MOST_GROUPS else f"it takes up to {cls.MOST_GROUPS} groups, not {n_groups}"

    def __init__(self, case: Case):
        super().__init__()
        weight = dense_codes(case)
        self.group_size, self.n_groups = weight.group_size, weight.in_features // weight.group_size
        self.n_digits = 2 if case.dtype == torch.bfloat16 else 3
        codes = signed(weight)
        for group in range(self.n_groups):
            inputs = slice(group * self.group_size, (group + 1) * self.group_size)
            self.keep(f"codes{group}", torch.ops.onednn.qlinear_prepack(codes[:, inputs].contiguous(), None))
            self.keep(f"scale{group}", weight.scale[:, group].float())
        self.keep("zeros", torch.zeros(weight.out_features, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        digits, exponent = _digits(x, self.n_digits)  # [digits, tokens, in]
        groups = digits.flatten(0, 1).unflatten(1, (self.n_groups, -1)).transpose(0, 1).contiguous()
        sums: Tensor | None = None
        for group, rows in enumerate(groups):
            codes, scale = getattr(self, f"codes{group}"), getattr(self, f"scale{group}")
            sums = int8_product(rows, codes, scale, self.zeros, sums)
        assert sums is not None
        lowest, *higher = sums.view(self.n_digits, len(x), -1)
        total = higher.pop() if higher else lowest
        for row in (*reversed(higher), lowest):
            torch.add(row, total, alpha=BASE, out=total)
        return total.mul_(exponent.exp2()).to(x.dtype)


BASE = 256


def _digits(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """int8 [count, tokens, in], the lowest digit first, and an exponent int32 [tokens, 1]: x = number * 2**exponent."""
    _, exponent = torch.frexp(x.abs().amax(1, keepdim=True).float())
    shift = exponent - (int(math.log2(BASE)) * count - 2)  # the highest digit stays at 64 or below
    number = torch.ldexp(x.float(), -shift).round_()
    digits = []
    for _ in range(count - 1):
        higher = ((number + BASE // 2) / BASE).floor_()  # what is left lies in -128 .. 127
        digits.append(number - higher * BASE)
        number = higher
    return torch.stack([*digits, number]).to(torch.int8), shift


def int8_product(rows: Tensor, codes: Tensor, scale: Tensor, zeros: Tensor, sums: Tensor | None = None) -> Tensor:
    """float32 [tokens, out]: int8 rows [tokens, in] times prepacked int8 codes, sums of int32 times `scale` [out].

    They are added to `sums` if there are such, in place.
    """
    common = (rows, 1.0, 0, codes, scale, zeros)
    if sums is None:
        found: Tensor = QLINEAR(*common, None, 1.0, 0, torch.float32, "none", [], "")
        return found
    found = QLINEAR_BINARY(*common, sums, None, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "")
    return found


QLINEAR = torch.ops.onednn.qlinear_pointwise.default
QLINEAR_BINARY = torch.ops.onednn.qlinear_pointwise.binary
