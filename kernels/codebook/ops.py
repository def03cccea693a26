"""Products with codebook vectors as torch operators, each one node to torch.compile; no gradients pass through them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.kernels.codebook.layout import VECTOR_SIZES, UnpackedCodebookWeight
from compress.kernels.codebook_weight import CodebookWeight
from compress.kernels.gemm.launch import Epilogue, unavailable
from compress.kernels.weights import PackedWeight


def supports(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot multiply inputs of `dtype` on `device` with `weight`; None if they can."""
    if not isinstance(weight, CodebookWeight):
        return f"the weight is a {type(weight).__name__}, the kernel takes CodebookWeight"
    if weight.code_bits > 16:
        return f"codes have {weight.code_bits} bits, the kernel takes up to 16"
    if weight.vector_size not in VECTOR_SIZES:
        return f"vectors have {weight.vector_size} elements, the kernel takes powers of two from 2 to 64"
    return unavailable(device, dtype)


def matmul(
    x: Tensor, weight: UnpackedCodebookWeight, epilogue: Epilogue = Epilogue(), deterministic: bool = False
) -> Tensor:
    """y = x Wᵀ + (x Aᵀ) Bᵀ + bias, [..., out] in the dtype of x: float16 or bfloat16 [..., in], on a GPU.

    Deterministic: the same bits in every run, and for a token the same in every batch, as far as torch's product x Aᵀ
    is; otherwise splits of the inputs are added in the order in which they finish. Raises InputError if `x` or the
    epilogue does not fit the weight, or no kernel runs there.
    """
    tail = [epilogue.bias, epilogue.a, epilogue.b]
    return torch.ops.compress.codebook_matmul(x, weight.codes, weight.codebooks, weight.scale, tail, deterministic)


def dequantize(weight: UnpackedCodebookWeight, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """The dense weight [out, in], or [in, out] if transposed, contiguous, each value rounded once to `dtype`."""
    tensors = weight.codes, weight.codebooks, weight.scale
    return torch.ops.compress.codebook_dequantize(*tensors, weight.in_features, dtype, transposed)


@torch.library.custom_op("compress::codebook_matmul", mutates_args=())
def _matmul(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scale: Tensor,
    epilogue: Sequence[Tensor | None],
    deterministic: bool,
) -> Tensor:
    from compress.kernels.codebook.triton import matmul as run

    weight = UnpackedCodebookWeight(codes, codebooks, scale, x.shape[-1])
    return run(x, weight, Epilogue(*epilogue), deterministic)


@_matmul.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scale: Tensor,
    epilogue: Sequence[Tensor | None],
    deterministic: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[2])


@torch.library.custom_op("compress::codebook_dequantize", mutates_args=())
def _dequantize(
    codes: Tensor, codebooks: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype, transposed: bool
) -> Tensor:
    from compress.kernels.codebook.triton import dequantize as run

    return run(UnpackedCodebookWeight(codes, codebooks, scale, in_features), dtype, transposed)


@_dequantize.register_fake
def _(
    codes: Tensor, codebooks: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype, transposed: bool
) -> Tensor:
    shape = (in_features, codes.shape[2]) if transposed else (codes.shape[2], in_features)
    return codes.new_empty(shape, dtype=dtype)
