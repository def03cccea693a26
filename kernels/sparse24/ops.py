"""Products with 2:4 weights as torch operators; see kernels/gemm/ops.py."""

import torch

from compress.kernels.gemm.launch import unavailable
from compress.kernels.gemm.ops import dense, product, tiled
from compress.kernels.sparse24.layout import SlicedSparse24Weight
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import PackedWeight

_KERNELS = "sparse24", SlicedSparse24Weight, "compress.kernels.sparse24.triton"
matmul, dequantize, tilings = product(*_KERNELS), dense(*_KERNELS), tiled(_KERNELS[-1])
lay = SlicedSparse24Weight.from_sparse


def supports(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot multiply inputs of `dtype` on `device` with `weight`; None if they can."""
    if not isinstance(weight, Sparse24IntWeight):
        return f"the weight is a {type(weight).__name__}, the kernel takes Sparse24IntWeight"
    if weight.bits < 2:
        return "codes have 1 bit, the kernel takes 2 to 8"
    if weight.group_size != weight.in_features and weight.group_size % 64:
        return f"groups of {weight.group_size} inputs are no multiple of the kernel's 64"
    return unavailable(device, dtype)
