"""Products of few tokens as a torch operator, one node to torch.compile; no gradients pass through it."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.kernels.fragments.layout import BITS, FragmentWeight, block_inputs
from compress.kernels.gemm.launch import Epilogue, unavailable
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import IntWeight, PackedWeight

PARTS = (32, 64)  # groups of inputs smaller than a block


def supports(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot multiply inputs of `dtype` on `device` with `weight`; None if it can."""
    if not isinstance(weight, IntWeight | Sparse24IntWeight):
        return f"the weight is a {type(weight).__name__}, the kernel takes IntWeight and Sparse24IntWeight"
    if weight.bits not in BITS:
        return f"codes have {weight.bits} bits, the kernel takes 2, 4 and 8"
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


def matmul(x: Tensor, weight: FragmentWeight, epilogue: Epilogue = Epilogue(), deterministic: bool = False) -> Tensor:
    """y = x Wᵀ + (x Aᵀ) Bᵀ + bias, [..., out] in the dtype of x: float16 or bfloat16 [..., in], on an NVIDIA GPU.

    Made for up to 32 tokens; more are parted. Deterministic: the same bits in every run, and for a token the same in
    every batch, as far as torch's products with A and B are; otherwise splits of the inputs are added in the order in
    which they finish. Raises InputError if `x` or the epilogue does not fit the weight, or no kernel runs there.
    """
    tensors = [weight.words, weight.places, weight.scale, weight.zero_point]
    facts = [weight.bits, weight.group_size, *weight.shape]
    tail = [epilogue.bias, epilogue.a, epilogue.b]
    return torch.ops.compress.fragment_matmul(x, tensors, facts, tail, deterministic)


@torch.library.custom_op("compress::fragment_matmul", mutates_args=())
def _matmul(
    x: Tensor,
    weight: Sequence[Tensor | None],
    facts: Sequence[int],  # bits, group size, outputs, inputs
    epilogue: Sequence[Tensor | None],
    deterministic: bool,
) -> Tensor:
    from compress.kernels.fragments.gluon import matmul as run

    words, places, scale, zero_point = weight
    assert words is not None and scale is not None
    laid = FragmentWeight(words, places, scale, zero_point, *facts)
    return run(x, laid, Epilogue(*epilogue), deterministic)


@_matmul.register_fake
def _(
    x: Tensor,
    weight: Sequence[Tensor | None],
    facts: Sequence[int],  # bits, group size, outputs, inputs
    epilogue: Sequence[Tensor | None],
    deterministic: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], facts[2])
