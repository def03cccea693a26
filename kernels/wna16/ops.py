"""Products with integer weights as torch operators; see kernels/gemm/ops.py."""

import torch

from compress.kernels.gemm.launch import unavailable
from compress.kernels.gemm.layout import ROWS
from compress.kernels.gemm.ops import dense, product, tiled
from compress.kernels.weights import IntWeight, PackedWeight
from compress.kernels.wna16.layout import BITS, SlicedWeight, block_inputs

_KERNELS = "wna16", SlicedWeight, "compress.kernels.wna16.triton"
matmul, dequantize, tilings = product(*_KERNELS), dense(*_KERNELS), tiled(_KERNELS[-1])
lay = SlicedWeight.from_int


def supports(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot multiply inputs of `dtype` on `device` with `weight`; None if they can."""
    if not isinstance(weight, IntWeight):
        return f"the weight is a {type(weight).__name__}, the kernel takes IntWeight"
    if weight.bits not in BITS:
        return f"codes have {weight.bits} bits, the kernel takes 2, 3, 4 and 8"
    block, group = block_inputs(weight.bits), weight.group_size
    fits = group % ROWS == 0 and (block % group == 0 or group % block == 0)
    if group != weight.in_features and not fits:
        return f"groups of {group} inputs do not tile blocks of {block}"
    return unavailable(device, dtype)
