"""Triton kernels for quantized inputs and `Int8Weight`: codes of the inputs, and the product in int32."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.errors import InputError
from compress.kernels.gemm.configs import KernelConfig
from compress.kernels.gemm.launch import TILES, Launch, Tiling, choose_launch, unavailable
from compress.kernels.inputs import SMALLEST_SCALE, InputQuantizer
from compress.kernels.w8a8.layout import Int8Weight

BLOCK_K = 128  # inputs of one step
TOKEN_BLOCK = 1024  # inputs of one token that are quantized at a time
FLAT = 1024
NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to the nearest whole number, ties to even
LEAST = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def nearest_code(value, HIGHEST: tl.constexpr):
    """int8 codes of float32 values."""
    within = tl.minimum(tl.maximum(value, -HIGHEST - 1.0), HIGHEST + 0.0)
    return ((within + NEAREST) - NEAREST).to(tl.int8)


@triton.jit
def bfloat16_value(value):
    """A positive float32 rounded to the nearest bfloat16, ties to even, and still float32."""
    bits = value.to(tl.int32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def quantize_tokens(
    x_ptr,  # [M, K], rows stride_xm apart
    shift_ptr,  # [K] float32 or None, of static inputs
    codes_ptr,  # [M, K] int8
    scale_ptr,  # [M] float32; None: static
    K,
    stride_xm,
    HIGHEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes of one token, as `InputQuantizer.codes` has them to the last bit."""
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    if scale_ptr is not None:
        largest = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, K, BLOCK):
            x = tl.load(x_ptr + token * stride_xm + first + lanes, mask=first + lanes < K, other=0.0)
            largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
        scale = bfloat16_value(tl.maximum(tl.div_rn(tl.max(largest, axis=0), HIGHEST + 0.0), LEAST))
        tl.store(scale_ptr + token, scale)
    for first in range(0, K, BLOCK):
        inside = first + lanes < K
        value = tl.load(x_ptr + token * stride_xm + first + lanes, mask=inside, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            value = tl.div_rn(value, scale)
        if shift_ptr is not None:
            value -= tl.load(shift_ptr + first + lanes, mask=inside, other=0.0)
        tl.store(codes_ptr + token * K + first + lanes, nearest_code(value, HIGHEST), mask=inside)


@triton.jit
def scaled(sums, scale_ptr, token_scale_ptr, offset_ptr, m, n, M, N):
    """float32 outputs of int32 sums: token scale * (scale * sum) + offset; m and n give the sums' rows and columns."""
    y = sums.to(tl.float32) * tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if token_scale_ptr is not None:
        y *= tl.load(token_scale_ptr + m, mask=m < M, other=0.0)
    if offset_ptr is not None:
        y += tl.load(offset_ptr + n, mask=n < N, other=0.0)
    return y


@triton.jit
def w8a8_gemm(
    x_ptr,  # [M, K] int8
    codes_ptr,  # [N, K] int8
    zero_ptr,  # [N] int8 or None
    scale_ptr,  # [N]
    token_scale_ptr,  # [M] float32 or None
    offset_ptr,  # [N] float32 or None
    y_ptr,  # [M, N]; int32 where K is split
    M,
    N,
    K,
    blocks_per_split,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """y = token scale * scale * (q (c - z)ᵀ) + offset. Sums are exact, so splits may be added in any order."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    split = tl.program_id(2)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(K, BLOCK_K))
    x_rows = x_ptr + m.to(tl.int64)[:, None] * K + lanes[None, :]
    columns = codes_ptr + n.to(tl.int64)[None, :] * K + lanes[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    totals = tl.zeros((BLOCK_M,), tl.int32)
    for block in range(first, last):
        k = block * BLOCK_K
        in_x, in_w = (m < M)[:, None], (n < N)[None, :]
        if not EVEN_K:
            in_x &= (k + lanes < K)[None, :]
            in_w &= (k + lanes < K)[:, None]
        x = tl.load(x_rows + k, mask=in_x, other=0)
        acc = tl.dot(x, tl.load(columns + k, mask=in_w, other=0), acc)
        if zero_ptr is not None:
            totals += tl.sum(x.to(tl.int32), axis=1)
    if zero_ptr is not None:
        acc -= totals[:, None] * tl.load(zero_ptr + n, mask=n < N, other=0).to(tl.int32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if SPLIT:
        tl.atomic_add(y_ptr + at, acc, mask=inside, sem="relaxed")
    else:
        y = scaled(acc, scale_ptr, token_scale_ptr, offset_ptr, m[:, None], n[None, :], M, N)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_sums(sums_ptr, scale_ptr, token_scale_ptr, offset_ptr, y_ptr, M, N, BLOCK: tl.constexpr):
    """What `w8a8_gemm` does with sums that it did not split; one program a token and BLOCK outputs."""
    token = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = token.to(tl.int64) * N + n
    sums = tl.load(sums_ptr + at, mask=n < N, other=0)
    y = scaled(sums, scale_ptr, token_scale_ptr, offset_ptr, token, n, M, N)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=n < N)


def quantize(x: Tensor, inputs: InputQuantizer) -> tuple[Tensor, Tensor | None]:
    """Codes int8 of x [..., in], and the scale of each token, float32 [..., 1], None if static; see `ops.quantize`."""
    if reason := unavailable(x.device, x.dtype):
        raise InputError(f"no Triton kernel: {reason}")
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    codes = torch.empty(flat.shape, dtype=torch.int8, device=x.device)
    scale = None if inputs.static else torch.empty(len(flat), dtype=torch.float32, device=x.device)
    shift = None if inputs.shift is None else inputs.shift.to(x.device)
    if len(flat):
        arguments = (flat, shift, codes, scale, flat.shape[1], flat.stride(0))
        quantize_tokens[(len(flat),)](*arguments, HIGHEST=inputs.highest, BLOCK=TOKEN_BLOCK)
    return codes.view(x.shape), None if scale is None else scale.view(*x.shape[:-1], 1)


def tiles(weight: Int8Weight) -> tuple[Launch, ...]:
    """What a product may be cut into."""
    return TILES


def matmul(
    codes: Tensor,
    token_scale: Tensor | None,
    weight: Int8Weight,
    offset: Tensor | None,
    dtype: torch.dtype,
    launch: Launch | None = None,
    tilings: Sequence[Tiling] = (),
) -> Tensor:
    """y = token scale * scale * (q (c - z)ᵀ) + offset, [..., out] in `dtype`; see `ops.matmul`."""
    out_features, in_features = weight.shape
    if reason := unavailable(codes.device, dtype):
        raise InputError(f"no Triton kernel: {reason}")
    if codes.dtype != torch.int8 or codes.shape[-1] != in_features or codes.device != weight.codes.device:
        found = f"{codes.dtype} {list(codes.shape)} on {codes.device}"
        raise InputError(f"codes are {found}: pass int8 [..., {in_features}] on {weight.codes.device}")
    flat = codes.reshape(-1, in_features).contiguous()
    tokens, blocks = len(flat), triton.cdiv(in_features, BLOCK_K)
    y = torch.empty(tokens, out_features, dtype=dtype, device=codes.device)
    if tokens:
        sizes = tokens, out_features, blocks
        launch = launch or choose_launch(sizes, codes.device, tiles=tiles(weight), tilings=tilings)
        _multiply(flat, token_scale, weight, offset, y, launch)
    return y.view(*codes.shape[:-1], out_features)


def _multiply(
    flat: Tensor, token_scale: Tensor | None, weight: Int8Weight, offset: Tensor | None, y: Tensor, launch: Launch
) -> None:
    (tokens, out_features), in_features = y.shape, flat.shape[1]
    blocks = triton.cdiv(in_features, BLOCK_K)
    blocks_per_split = triton.cdiv(blocks, launch.splits)
    splits = triton.cdiv(blocks, blocks_per_split)
    target = y if splits == 1 else torch.zeros(y.shape, dtype=torch.int32, device=y.device)
    scales = (weight.scale, token_scale, offset)
    grid = (triton.cdiv(out_features, launch.block_n), triton.cdiv(tokens, launch.block_m), splits)
    w8a8_gemm[grid](
        flat,
        weight.codes,
        weight.zero_point,
        *scales,
        target,
        tokens,
        out_features,
        in_features,
        blocks_per_split,
        EVEN_K=in_features % BLOCK_K == 0,
        BLOCK_K=BLOCK_K,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        SPLIT=splits > 1,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if splits > 1:
        scale_sums[(triton.cdiv(out_features, FLAT), tokens)](target, *scales, y, tokens, out_features, BLOCK=FLAT)


def _config(dtype: str, per_token: bool, symmetric: bool, launch: Launch) -> KernelConfig:
    """The product as `matmul` launches it on sizes that are multiples of 16."""
    pointers = {
        "x": "i8",
        "codes": "i8",
        "scale": "fp16",
        "offset": "fp32",
        "y": dtype if launch.splits == 1 else "i32",
    }
    pointers |= ({"token_scale": "fp32"} if per_token else {}) | ({} if symmetric else {"zero": "i8"})
    absent = {f"{name}_ptr": None for name in ("zero", "token_scale") if name not in pointers}
    constants = {"EVEN_K": True, "BLOCK_K": BLOCK_K, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}
    kind = f"{'per token' if per_token else 'static'}{'' if symmetric else ' asym'}"
    return KernelConfig(
        name=f"w8a8 {kind} {dtype} {launch.block_m}x{launch.block_n}",
        function=w8a8_gemm,
        signature={f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()}
        | dict.fromkeys(("M", "N", "K", "blocks_per_split"), "i32"),
        constexprs=absent | constants | {"SPLIT": launch.splits > 1},
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        weights_per_loop=BLOCK_K * launch.block_n,
        mma="IMMA.16832.S8.S8",
        aligned=("N", "K"),
    )


CONFIGS = (
    _config("fp16", False, True, Launch(16, 128, splits=4)),
    _config("fp16", True, False, Launch(16, 128)),
    _config("fp16", True, True, Launch(32, 128)),
    _config("bf16", True, True, Launch(64, 128)),
    _config("bf16", False, True, Launch(128, 128, num_warps=8, num_stages=3)),
)
