"""Products with integer weights as torch operators, each one node to torch.compile; no gradients pass through them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.kernels.gemm.launch import Epilogue, unavailable
from compress.kernels.weights import IntWeight, PackedWeight
from compress.kernels.wna16.layout import BITS, ROWS, SlicedWeight, block_inputs


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


def matmul(x: Tensor, weight: SlicedWeight, epilogue: Epilogue = Epilogue(), deterministic: bool = False) -> Tensor:
    """y = x Wᵀ + (x Aᵀ) Bᵀ + bias, [..., out] in the dtype of x: float16 or bfloat16 [..., in], on a GPU.

    Deterministic: the same bits in every run, and for a token the same in every batch, as far as torch's product x Aᵀ
    is; otherwise splits of the inputs are added in the order in which they finish. Raises InputError if `x` or the
    epilogue does not fit the weight, or no kernel runs there.
    """
    tail = [epilogue.bias, epilogue.a, epilogue.b]
    facts = weight.bits, weight.group_size
    return torch.ops.compress.wna16_matmul(x, _tensors(weight), *facts, tail, deterministic)


def dequantize(weight: SlicedWeight, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """The dense weight [out, in], or [in, out] if transposed, contiguous, each value rounded once to `dtype`."""
    facts = weight.bits, weight.group_size, weight.in_features
    return torch.ops.compress.wna16_dequantize(_tensors(weight), *facts, dtype, transposed)


@torch.library.custom_op("compress::wna16_matmul", mutates_args=())
def _matmul(
    x: Tensor,
    weight: Sequence[Tensor | None],
    bits: int,
    group_size: int,
    epilogue: Sequence[Tensor | None],
    deterministic: bool,
) -> Tensor:
    from compress.kernels.wna16.triton import matmul as run

    sliced = _weight(weight, bits, group_size, x.shape[-1])
    return run(x, sliced, Epilogue(*epilogue), deterministic)


@_matmul.register_fake
def _(
    x: Tensor,
    weight: Sequence[Tensor | None],
    bits: int,
    group_size: int,
    epilogue: Sequence[Tensor | None],
    deterministic: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], _weight(weight, bits, group_size, x.shape[-1]).shape[0])


@torch.library.custom_op("compress::wna16_dequantize", mutates_args=())
def _dequantize(
    weight: Sequence[Tensor | None],
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
    transposed: bool,
) -> Tensor:
    from compress.kernels.wna16.triton import dequantize as run

    return run(_weight(weight, bits, group_size, in_features), dtype, transposed)


@_dequantize.register_fake
def _(
    weight: Sequence[Tensor | None],
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
    transposed: bool,
) -> Tensor:
    low = _weight(weight, bits, group_size, in_features).low
    shape = (in_features, low.shape[1]) if transposed else (low.shape[1], in_features)
    return low.new_empty(shape, dtype=dtype)


def _tensors(weight: SlicedWeight) -> list[Tensor | None]:
    return [weight.low, weight.high, weight.scale, weight.zero_point]


def _weight(tensors: Sequence[Tensor | None], bits: int, group_size: int, in_features: int) -> SlicedWeight:
    low, high, scale, zero_point = tensors
    assert low is not None and scale is not None
    return SlicedWeight(low, high, scale, zero_point, bits, group_size, in_features)
