"""Bytes times bytes on processors: oneDNN's integer product, sums in int32, scales at the end."""

import torch
from torch import Tensor

from compress.kernels.implementation import Case, Implementation, needs_cpu
from compress.kernels.wna16.cpu import dense_codes
from compress.kernels.wna16.cpu_bytes import bytes_by_output, int8_product, signed


class Int8Product(Implementation):
    """oneDNN's product of int8 inputs and int8 weights with one scale an output: exact sums, for any number of tokens."""

    NAME = "cpu-w8a8"
    ABOUT = "oneDNN's product of bytes: fastest for any number of tokens"
    CODES = True

    codes: Tensor
    scale: Tensor
    zeros: Tensor

    @classmethod
    def supports(cls, case: Case) -> str | None:
        """Symmetric integers with one scale an output, and inputs rounded to codes."""
        if case.inputs is None:
            return "the inputs are not quantized"
        return needs_cpu(case) or bytes_by_output(case)

    def __init__(self, case: Case):
        super().__init__()
        weight = dense_codes(case)
        self.keep("codes", torch.ops.onednn.qlinear_prepack(signed(weight), None))
        self.keep("scale", weight.scale[:, 0].float())
        self.keep("zeros", torch.zeros(weight.out_features, dtype=torch.int32))

    def forward(self, x: Tensor, token_scale: Tensor | None = None) -> Tensor:
        """int8 [tokens, in], and their scales float32 [tokens, 1], to float32 [tokens, out]."""
        y = int8_product(x, self.codes, self.scale, self.zeros)
        return y if token_scale is None else y.mul_(token_scale)
