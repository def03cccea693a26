"""Weights of a byte times inputs in floats, on processors."""

import math

import torch
from torch import Tensor

from compress.kernels.implementation import Case, Implementation, needs_cpu
from compress.kernels.weights import IntWeight
from compress.kernels.wna16.cpu import dense_codes, fits_nibbles, group_size_of, integer


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


class Digits(Implementation):
    """Bytes times bytes: each input is three digits to base 128 of a scale of its token, each digit a row of its own.

    oneDNN's integer product is memory-bound for few rows, so three cost what one does. 21 bits of the token's largest
    input are kept, which is beyond what the output's dtype shows. Groups are rows of their own as well, with zeros
    where another group's inputs are.
    """

    NAME = "cpu-digits8"
    ABOUT = "oneDNN's integer product on digits of the inputs: large layers of bytes, few tokens"
    BEATEN_FROM = 4
    MOST_GROUPS = 16  # beyond, rows of zeros cost more than they save

    codes: Tensor
    ones: Tensor
    zeros: Tensor
    scale: Tensor

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
        self.keep("codes", torch.ops.onednn.qlinear_prepack(signed(weight), None))
        self.keep("ones", torch.ones(weight.out_features))
        self.keep("zeros", torch.zeros(weight.out_features, dtype=torch.int32))
        self.keep("scale", weight.scale.float().T.unsqueeze(1).contiguous())  # [groups, 1, out]

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        digits, exponent = _digits(x)  # [3, tokens, in]
        rows = digits.new_zeros(self.n_groups, *digits.shape)
        for group in range(self.n_groups):
            inputs = slice(group * self.group_size, (group + 1) * self.group_size)
            rows[group, :, :, inputs] = digits[:, :, inputs]
        products = int8_product(rows.flatten(0, 2), self.codes, self.ones, self.zeros)
        products = products.view(self.n_groups, 3, len(x), -1)
        sums = torch.add(products[:, 2], products[:, 1], alpha=BASE).add_(products[:, 0], alpha=BASE**2)
        return torch.ldexp((sums * self.scale).sum(0), exponent).to(x.dtype)


BASE = 128


def _digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [3, tokens, in], the highest digit first, and an exponent int32 [tokens, 1]: x = number * 2**exponent."""
    _, exponent = torch.frexp(x.abs().amax(1, keepdim=True).float())
    shift = exponent - int(math.log2(BASE) * 3 - 1)  # the highest digit stays below 64, so rounding cannot overflow
    number = torch.ldexp(x.float(), -shift).round_()
    high = (number / BASE**2).round_()
    number -= high * BASE**2
    middle = (number / BASE).round_()
    return torch.stack([high, middle, number - middle * BASE]).to(torch.int8), shift


def int8_product(rows: Tensor, codes: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """float32 [tokens, out]: int8 rows [tokens, in] times prepacked int8 codes, sums of int32 times `scale` [out]."""
    found: Tensor = torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 0, codes, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return found
