"""Quantized inputs and their products with int8 weights as torch operators, each one node to torch.compile."""

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.kernels.gemm.launch import Tiling, as_numbers, from_numbers, unavailable
from compress.kernels.gemm.ops import tiled
from compress.kernels.inputs import InputQuantizer
from compress.kernels.w8a8.layout import Int8Weight
from compress.kernels.weights import IntWeight, PackedWeight

LONGEST = 2**16  # inputs: sums of 128 * 255 * inputs stay within int32

lay = Int8Weight.from_int
tilings = tiled("compress.kernels.w8a8.triton")


def supports(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot multiply quantized inputs with `weight` to outputs of `dtype`; None if they can."""
    if not isinstance(weight, IntWeight):
        return f"the weight is a {type(weight).__name__}, the kernel takes IntWeight"
    if weight.group_size != weight.in_features:
        return f"the weight has groups of {weight.group_size} inputs, the kernel one scale an output"
    if weight.in_features > LONGEST:
        return f"rows of {weight.in_features} inputs overflow int32, the kernel takes up to {LONGEST}"
    return unavailable(device, dtype)


def offset_of(weight: IntWeight, inputs: InputQuantizer, bias: Tensor | None) -> Tensor | None:
    """What does not depend on the input, W shift + bias, float32 [out]; None if there is neither."""
    if inputs.shift is None:
        return None if bias is None else bias.float()
    shifted = weight.dequantize().double() @ inputs.shift.double().to(weight.packed.device)
    return (shifted if bias is None else shifted + bias.double()).float()


def quantize(x: Tensor, inputs: InputQuantizer) -> tuple[Tensor, Tensor | None]:
    """Codes int8 of x [..., in], and the scale of each token, float32 [..., 1], None if static.

    Both are those of `InputQuantizer` to the last bit. Raises InputError where no kernel runs.
    """
    codes, scale = torch.ops.compress.w8a8_quantize(x, inputs.shift, inputs.bits, inputs.static)
    return codes, None if inputs.static else scale


def matmul(
    codes: Tensor,
    token_scale: Tensor | None,
    weight: Int8Weight,
    offset: Tensor | None,
    dtype: torch.dtype,
    tilings: Sequence[Tiling] = (),
) -> Tensor:
    """y = token scale * scale * (q (c - z)ᵀ) + offset, [..., out] in `dtype`, of codes q int8 [..., in].

    Sums of products are exact in int32, so the same inputs give the same bits in any batch and any run. `token_scale`:
    float32 [..., 1], None if inputs are static; `offset`: float32 [out], see `offset_of`; `tilings`: what was measured
    (`choose_launch`). Raises InputError if shapes or dtypes do not fit, or no kernel runs there.
    """
    beside = [token_scale, offset]
    return torch.ops.compress.w8a8_matmul(codes, _tensors(weight), weight.bits, beside, dtype, as_numbers(tilings))


@torch.library.custom_op("compress::w8a8_quantize", mutates_args=())
def _quantize(x: Tensor, shift: Tensor | None, bits: int, static: bool) -> tuple[Tensor, Tensor]:
    from compress.kernels.w8a8.triton import quantize as run

    codes, scale = run(x, InputQuantizer(bits, static, shift))
    return codes, x.new_empty(0, dtype=torch.float32) if scale is None else scale


@_quantize.register_fake
def _(x: Tensor, shift: Tensor | None, bits: int, static: bool) -> tuple[Tensor, Tensor]:
    shape = (0,) if static else (*x.shape[:-1], 1)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("compress::w8a8_matmul", mutates_args=())
def _matmul(
    codes: Tensor,
    weight: Sequence[Tensor | None],
    bits: int,
    beside: Sequence[Tensor | None],
    dtype: torch.dtype,
    tilings: Sequence[int],
) -> Tensor:
    from compress.kernels.w8a8.triton import matmul as run

    rows, scale, zero_point = weight
    assert rows is not None and scale is not None
    token_scale, offset = beside
    laid = Int8Weight(rows, scale, zero_point, bits)
    return run(codes, token_scale, laid, offset, dtype, tilings=from_numbers(tilings))


@_matmul.register_fake
def _(
    codes: Tensor,
    weight: Sequence[Tensor | None],
    bits: int,
    beside: Sequence[Tensor | None],
    dtype: torch.dtype,
    tilings: Sequence[int],
) -> Tensor:
    rows = weight[0]
    assert rows is not None
    return codes.new_empty(*codes.shape[:-1], len(rows), dtype=dtype)


def _tensors(weight: Int8Weight) -> list[Tensor | None]:
    return [weight.codes, weight.scale, weight.zero_point]
