"""Products with 2:4 weights as torch operators, each one node to torch.compile; no gradients pass through them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.kernels.gemm.launch import Epilogue, unavailable
from compress.kernels.sparse24.layout import SlicedSparse24Weight
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import PackedWeight


def supports(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot multiply inputs of `dtype` on `device` with `weight`; None if they can."""
    if not isinstance(weight, Sparse24IntWeight):
        return f"the weight is a {type(weight).__name__}, the kernel takes Sparse24IntWeight"
    if weight.bits < 2:
        return "codes have 1 bit, the kernel takes 2 to 8"
    if weight.group_size != weight.in_features and weight.group_size % 64:
        return f"groups of {weight.group_size} inputs are no multiple of the kernel's 64"
    return unavailable(device, dtype)


def matmul(
    x: Tensor, weight: SlicedSparse24Weight, epilogue: Epilogue = Epilogue(), deterministic: bool = False
) -> Tensor:
    """y = x Wᵀ + (x Aᵀ) Bᵀ + bias, [..., out] in the dtype of x: float16 or bfloat16 [..., in], on a GPU.

    Deterministic: the same bits in every run, and for a token the same in every batch, as far as torch's product x Aᵀ
    is; otherwise splits of the inputs are added in the order in which they finish. Raises InputError if `x` or the
    epilogue does not fit the weight, or no kernel runs there.
    """
    tail = [epilogue.bias, epilogue.a, epilogue.b]
    facts = weight.bits, weight.group_size
    return torch.ops.compress.sparse24_matmul(x, _tensors(weight), *facts, tail, deterministic)


def dequantize(weight: SlicedSparse24Weight, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """The dense weight [out, in], or [in, out] if transposed, contiguous, each value rounded once to `dtype`."""
    facts = weight.bits, weight.group_size, weight.in_features
    return torch.ops.compress.sparse24_dequantize(_tensors(weight), *facts, dtype, transposed)


@torch.library.custom_op("compress::sparse24_matmul", mutates_args=())
def _matmul(
    x: Tensor,
    weight: Sequence[Tensor | None],
    bits: int,
    group_size: int,
    epilogue: Sequence[Tensor | None],
    deterministic: bool,
) -> Tensor:
    from compress.kernels.sparse24.triton import matmul as run

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


@torch.library.custom_op("compress::sparse24_dequantize", mutates_args=())
def _dequantize(
    weight: Sequence[Tensor | None],
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
    transposed: bool,
) -> Tensor:
    from compress.kernels.sparse24.triton import dequantize as run

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
    values = _weight(weight, bits, group_size, in_features).values
    shape = (in_features, values.shape[1]) if transposed else (values.shape[1], in_features)
    return values.new_empty(shape, dtype=dtype)


def _tensors(weight: SlicedSparse24Weight) -> list[Tensor | None]:
    return [weight.values, weight.places, weight.scale, weight.zero_point]


def _weight(tensors: Sequence[Tensor | None], bits: int, group_size: int, in_features: int) -> SlicedSparse24Weight:
    values, places, scale, zero_point = tensors
    assert values is not None and places is not None and scale is not None
    return SlicedSparse24Weight(values, places, scale, zero_point, bits, group_size, in_features)
