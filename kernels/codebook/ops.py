"""Products with codebook vectors as torch operators; see kernels/gemm/ops.py."""

import torch

from compress.kernels.codebook.layout import VECTOR_SIZES, SlicedCodebookWeight
from compress.kernels.codebook_weight import CodebookWeight
from compress.kernels.gemm.launch import unavailable
from compress.kernels.gemm.ops import dense, product, tiled
from compress.kernels.weights import PackedWeight

_KERNELS = "codebook", SlicedCodebookWeight, "compress.kernels.codebook.triton"
matmul, dequantize, tilings = product(*_KERNELS), dense(*_KERNELS), tiled(_KERNELS[-1])
lay = SlicedCodebookWeight.from_codebook


def supports(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot multiply inputs of `dtype` on `device` with `weight`; None if they can."""
    if not isinstance(weight, CodebookWeight):
        return f"the weight is a {type(weight).__name__}, the kernel takes CodebookWeight"
    if weight.code_bits > 16:
        return f"codes have {weight.code_bits} bits, the kernel takes up to 16"
    if weight.vector_size not in VECTOR_SIZES:
        return f"vectors have {weight.vector_size} elements, the kernel takes powers of two from 2 to 64"
    return unavailable(device, dtype)
