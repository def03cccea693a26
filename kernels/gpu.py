"""Triton kernels as implementations. The kernels themselves (kernels/*/triton.py) are imported when they first run."""

from collections.abc import Sequence
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compress.kernels.codebook import ops as codebook_ops
from compress.kernels.fragments import ops as fragment_ops
from compress.kernels.gemm.launch import Epilogue, Tiling
from compress.kernels.implementation import Case, Implementation
from compress.kernels.sparse24 import ops as sparse24_ops
from compress.kernels.w8a8 import ops as w8a8_ops
from compress.kernels.wna16 import ops as wna16_ops

PARTED_FROM = 65  # tokens from which weights in fragments are read three times
FRAGMENTS = "Gluon: up to 32 tokens on an NVIDIA GPU, and some more"
DENSE_FROM = 129  # tokens from which a dequantized weight and a dense product are faster


class _Laid(Implementation):
    """A weight in a layout of kernels: its tensors are buffers, all else it knows are numbers."""

    OPS: ModuleType  # of a family: `supports`, `lay`, `matmul`, `tilings` and, for weights that are decoded, `dequantize`

    @classmethod
    def supports(cls, case: Case) -> str | None:
        """What the operators say."""
        if case.device.type == "cuda" and not torch.cuda.is_available():
            return "there is no GPU here"
        reason: str | None = cls.OPS.supports(case.weight, case.device, case.dtype)
        return reason

    def __init__(self, case: Case):
        super().__init__()
        laid = self.OPS.lay(case.weight)
        self.dtype, self.layout, self.numbers = case.dtype, type(laid), {}
        for field in fields(laid):
            value = getattr(laid, field.name)
            if isinstance(value, Tensor):
                self.keep(field.name, value.to(case.device))
            else:
                self.numbers[field.name] = value

    @property
    def laid(self) -> Any:
        """The weight, its tensors wherever the module is."""
        return self.layout(**dict(self.named_buffers()), **self.numbers)


class _Tiled(_Laid):
    TILED = True

    def candidates(self, tokens: int) -> Sequence[Tiling]:
        """The tiles of its kernel."""
        found: Sequence[Tiling] = self.OPS.tilings(self.laid, tokens)
        return found


class _Product(_Tiled):
    ABOUT = "Triton: up to some hundred tokens on a GPU"
    EPILOGUE = True
    BEATEN_FROM = DENSE_FROM

    def forward(self, x: Tensor, epilogue: Epilogue = Epilogue()) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        y: Tensor = self.OPS.matmul(x, self.laid, epilogue, tilings=self.tilings)
        return y


class _Dequantized(_Laid):
    ABOUT = "Triton dequantizes for each call, then a dense product: long prompts on a GPU"
    ROLE = "decode"

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        return torch.nn.functional.linear(x, self.OPS.dequantize(self.laid, self.dtype))


class TritonW8A8(_Tiled):
    """Bytes times bytes, kernels/w8a8."""

    NAME = "triton-w8a8"
    OPS = w8a8_ops
    ABOUT = "Triton: products of bytes, any number of tokens on a GPU"
    CODES = True

    @classmethod
    def supports(cls, case: Case) -> str | None:
        """What the operators say, of inputs that are rounded."""
        return "the inputs are not quantized" if case.inputs is None else super().supports(case)

    def forward(self, x: Tensor, token_scale: Tensor | None = None) -> Tensor:
        """int8 [tokens, in], and their scales float32 [tokens, 1], to [tokens, out]."""
        return w8a8_ops.matmul(x, token_scale, self.laid, None, self.dtype, self.tilings)


def _kind(base: type[_Laid], name: str, ops: ModuleType, **facts: Any) -> type[Implementation]:
    return type(name, (base,), {"NAME": name, "OPS": ops} | facts)


GluonFragments = _kind(_Product, "gluon-fragments", fragment_ops, ABOUT=FRAGMENTS, BEATEN_FROM=PARTED_FROM)
TritonInt = _kind(_Product, "triton-wna16", wna16_ops)
TritonSparse24 = _kind(_Product, "triton-sparse24", sparse24_ops)
TritonCodebook = _kind(_Product, "triton-codebook", codebook_ops)
TritonIntDequantized = _kind(_Dequantized, "triton-wna16-dequantize", wna16_ops)
TritonSparse24Dequantized = _kind(_Dequantized, "triton-sparse24-dequantize", sparse24_ops)
TritonCodebookDequantized = _kind(_Dequantized, "triton-codebook-dequantize", codebook_ops)
