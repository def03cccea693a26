"""Products of few tokens on NVIDIA GPUs as a torch operator; see kernels/gemm/ops.py.

Made for up to 32 tokens; more are parted.
"""

import os

import torch

from compress.kernels.fragments.layout import BITS, SPARSE_BITS, FragmentWeight, block_inputs
from compress.kernels.gemm.launch import unavailable
from compress.kernels.gemm.ops import product, tiled
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import IntWeight, PackedWeight

PARTS = (32, 64)  # groups of inputs smaller than a block

_MODULE = "compress.kernels.fragments.gluon"
matmul, tilings = product("fragment", FragmentWeight, _MODULE), tiled(_MODULE)


def lay(weight: IntWeight | Sparse24IntWeight) -> FragmentWeight:
    """In tiles of 32 outputs."""
    return FragmentWeight.from_int(weight) if isinstance(weight, IntWeight) else FragmentWeight.from_sparse(weight)


def supports(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot multiply inputs of `dtype` on `device` with `weight`; None if it can."""
    if not isinstance(weight, IntWeight | Sparse24IntWeight):
        return f"the weight is a {type(weight).__name__}, the kernel takes IntWeight and Sparse24IntWeight"
    if weight.bits not in (SPARSE_BITS if isinstance(weight, Sparse24IntWeight) else BITS):
        return f"codes have {weight.bits} bits, the kernel takes 2, 3 if dense, 4 and 8"
    block, group = block_inputs(weight.bits, isinstance(weight, Sparse24IntWeight)), weight.group_size
    if weight.in_features % block:
        return f"{weight.in_features} inputs are no whole blocks of {block}"
    if group != weight.in_features and group not in PARTS and group % block:
        return f"groups of {group} inputs do not tile blocks of {block}"
    if torch.version.hip is not None:
        return "it is written in instructions of NVIDIA GPUs"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter does not run Gluon"
    return unavailable(device, dtype)
