"""Triton kernels as implementations. The kernels themselves (kernels/*/triton.py) are imported when they first run."""

from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compress.kernels.codebook import ops as codebook_ops
from compress.kernels.codebook.layout import UnpackedCodebookWeight
from compress.kernels.codebook_weight import CodebookWeight
from compress.kernels.fragments import ops as fragment_ops
from compress.kernels.fragments.layout import FragmentWeight
from compress.kernels.implementation import Case, Implementation
from compress.kernels.sparse24 import ops as sparse24_ops
from compress.kernels.sparse24.layout import SlicedSparse24Weight
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.w8a8 import ops as w8a8_ops
from compress.kernels.w8a8.layout import Int8Weight
from compress.kernels.weights import IntWeight, PackedWeight
from compress.kernels.wna16 import ops as wna16_ops
from compress.kernels.wna16.layout import SlicedWeight

PARTED_FROM = 65  # tokens from which weights in fragments are read three times
DENSE_FROM = 129  # tokens from which a dequantized weight and a dense product are faster


class _Laid(Implementation):
    """A weight in a layout of kernels: its tensors are buffers, all else it knows are numbers."""

    OPS: ModuleType

    @classmethod
    def supports(cls, case: Case) -> str | None:
        """What the operators say."""
        if case.device.type == "cuda" and not torch.cuda.is_available():
            return "there is no GPU here"
        reason: str | None = cls.OPS.supports(case.weight, case.device, case.dtype)
        return reason

    @classmethod
    def lay(cls, weight: PackedWeight) -> Any:
        """The weight in the kernels' layout."""
        layouts: dict[type[PackedWeight], Callable[[Any], Any]] = {
            IntWeight: SlicedWeight.from_int,
            Sparse24IntWeight: SlicedSparse24Weight.from_sparse,
            CodebookWeight: UnpackedCodebookWeight.from_codebook,
        }
        return layouts[type(weight)](weight)

    def __init__(self, case: Case):
        super().__init__()
        laid = self.lay(case.weight)
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


class _Product(_Laid):
    ABOUT = "Triton: up to some hundred tokens on a GPU"
    BEATEN_FROM = DENSE_FROM

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        y: Tensor = self.OPS.matmul(x, self.laid)
        return y


class _Dequantized(_Laid):
    ABOUT = "Triton dequantizes for each call, then a dense product: long prompts on a GPU"
    ROLE = "decode"

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        return torch.nn.functional.linear(x, self.OPS.dequantize(self.laid, self.dtype))


class GluonFragments(_Product):
    """Codes of integers, dense or 2:4, in the order of fragments: kernels/fragments."""

    NAME = "gluon-fragments"
    ABOUT = "Gluon: up to 32 tokens on an NVIDIA GPU, and some more"
    OPS = fragment_ops
    BEATEN_FROM = PARTED_FROM

    @classmethod
    def lay(cls, weight: PackedWeight) -> FragmentWeight:
        """In tiles of 32 outputs."""
        if isinstance(weight, Sparse24IntWeight):
            return FragmentWeight.from_sparse(weight)
        if not isinstance(weight, IntWeight):
            raise TypeError(type(weight).__name__)
        return FragmentWeight.from_int(weight)


class TritonInt(_Product):
    """Codes of integers, kernels/wna16."""

    NAME = "triton-wna16"
    OPS = wna16_ops


class TritonIntDequantized(_Dequantized):
    """The same, dequantized."""

    NAME = "triton-wna16-dequantize"
    OPS = wna16_ops


class TritonSparse24(_Product):
    """2:4 weights, kernels/sparse24."""

    NAME = "triton-sparse24"
    OPS = sparse24_ops


class TritonSparse24Dequantized(_Dequantized):
    """The same, dequantized."""

    NAME = "triton-sparse24-dequantize"
    OPS = sparse24_ops


class TritonCodebook(_Product):
    """Codebooks, kernels/codebook."""

    NAME = "triton-codebook"
    OPS = codebook_ops


class TritonCodebookDequantized(_Dequantized):
    """The same, dequantized."""

    NAME = "triton-codebook-dequantize"
    OPS = codebook_ops


class TritonW8A8(_Laid):
    """Bytes times bytes, kernels/w8a8."""

    NAME = "triton-w8a8"
    OPS = w8a8_ops
    ABOUT = "Triton: products of bytes, any number of tokens on a GPU"
    CODES = True

    @classmethod
    def supports(cls, case: Case) -> str | None:
        """What the operators say, of inputs that are rounded."""
        return "the inputs are not quantized" if case.inputs is None else super().supports(case)

    @classmethod
    def lay(cls, weight: PackedWeight) -> Int8Weight:
        """Signed bytes."""
        if not isinstance(weight, IntWeight):
            raise TypeError(type(weight).__name__)
        return Int8Weight.from_int(weight)

    def forward(self, x: Tensor, token_scale: Tensor | None = None) -> Tensor:
        """int8 [tokens, in], and their scales float32 [tokens, 1], to [tokens, out]."""
        return w8a8_ops.matmul(x, token_scale, self.laid, None, self.dtype)
