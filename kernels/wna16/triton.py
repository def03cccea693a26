"""Triton kernels over `SlicedWeight`: a product for few tokens, and the weight as a dense matrix."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.gemm.configs import SIZES, KernelConfig
from compress.kernels.gemm.launch import Epilogue, Launch, Tiling, check_inputs, choose_launch
from compress.kernels.gemm.layout import ROWS
from compress.kernels.gemm.triton import code_offset, code_value, load_apart, multiply, write_tile
from compress.kernels.wna16.layout import SlicedWeight, block_inputs

LARGEST = Launch(128, 128, num_warps=8, num_stages=2)  # a third stage spills where mma.sync multiplies
TILES = (Launch(16, 128), Launch(16, 64), Launch(32, 128), Launch(64, 128), LARGEST)


@triton.jit
def plane_value(low, high, plane: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """One plane of codes [16, BLOCK_N] as `code_value` gives them."""
    FIELD: tl.constexpr = 2 if BITS == 3 else BITS
    code = (low >> (FIELD * plane)) & ((1 << FIELD) - 1)
    if BITS == 3:
        code = code | (((high >> plane) & 1) << 2)
    return code_value(code, DTYPE, BITS)


@triton.jit
def group_offset(zero_ptr, group, inside, BITS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr):
    """`code_offset` of one group of each output, [1, BLOCK_N]."""
    zero = tl.full((BLOCK_N,), 1 << (BITS - 1), tl.int32)
    if zero_ptr is not None:
        zero = tl.load(zero_ptr + group, mask=inside, other=0).to(tl.int32)
    return code_offset(zero, DTYPE, BITS)[None, :]


@triton.jit
def wna16_gemm(
    x_ptr,  # [M, K] float16 or bfloat16, rows stride_xm apart
    low_ptr,  # [16 * blocks, N] int32
    high_ptr,  # [16 * blocks, N] int16 or None
    zero_ptr,  # [groups, N] uint8 or None
    scale_ptr,  # [groups, N]
    bias_ptr,  # [N] or None
    xa_ptr,  # [M, rank] or None
    b_ptr,  # [N, rank] or None
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    rank,
    blocks_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # inputs; 0: a group is a whole row
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """y = x Wᵀ + xa bᵀ + bias. Groups are scaled in float32, where their sums of products with whole numbers are."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    PLANES: tl.constexpr = BLOCK_K // 16
    PLANES_PER_GROUP: tl.constexpr = PLANES if GROUP == 0 or GROUP >= BLOCK_K else GROUP // 16
    split = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, 16)
    in_m, in_n = (m < M)[:, None], (n < N)[None, :]
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(K, BLOCK_K))
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_xm + r[None, :]
    rows = first.to(tl.int64) * 16 * N + r[:, None] * N + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(first, last):
        low = tl.load(low_ptr + rows, mask=in_n, other=0)
        high = low
        if high_ptr is not None:
            high = load_apart(high_ptr + rows, in_n, 0).to(tl.int32)
        rows += 16 * N
        for part in tl.static_range(PLANES // PLANES_PER_GROUP):
            k = block * BLOCK_K + part * PLANES_PER_GROUP * 16
            # what fills up the last block belongs to any group: it counts for nothing
            group = n if GROUP == 0 else tl.minimum(k // GROUP, K // GROUP - 1) * N + n
            offset = group_offset(zero_ptr, group, n < N, BITS, DTYPE, BLOCK_N)
            sums = acc if GROUP == 0 else tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for plane in tl.static_range(PLANES_PER_GROUP):
                in_x = in_m if EVEN_K else in_m & (k + plane * 16 + r < K)[None, :]
                x = tl.load(x_rows + (k + plane * 16), mask=in_x, other=0.0)
                value = plane_value(low, high, part * PLANES_PER_GROUP + plane, BITS, DTYPE)
                sums = tl.dot(x, (value - offset).to(DTYPE), sums)
            if GROUP == 0:
                acc = sums
            else:
                acc += sums * tl.load(scale_ptr + group, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GROUP == 0:
        acc *= tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    write_tile(acc, bias_ptr, xa_ptr, b_ptr, y_ptr, m, n, M, N, rank, split, SPLIT)


@triton.jit
def wna16_dequantize(
    low_ptr,
    high_ptr,
    zero_ptr,
    scale_ptr,
    y_ptr,  # y[n * stride_yn + k * stride_yk] of any float dtype
    N,
    K,
    stride_yn,
    stride_yk,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The dense weight, each value rounded once: one program a block of inputs and BLOCK_N outputs."""
    PLANES: tl.constexpr = BLOCK_K // 16
    block = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, 16)
    in_n = (n < N)[None, :]
    rows = (block * 16 + r)[:, None] * N + n[None, :]
    low = tl.load(low_ptr + rows, mask=in_n, other=0)
    high = low
    if high_ptr is not None:
        high = load_apart(high_ptr + rows, in_n, 0).to(tl.int32)
    for plane in tl.static_range(PLANES):
        k = block * BLOCK_K + plane * 16
        group = n if GROUP == 0 else tl.minimum(k // GROUP, K // GROUP - 1) * N + n
        offset = group_offset(zero_ptr, group, n < N, BITS, tl.float16, BLOCK_N)
        scale = tl.load(scale_ptr + group, mask=n < N, other=0.0).to(tl.float32)
        value = plane_value(low, high, plane, BITS, tl.float16) - offset
        weight = value.to(tl.float32) * scale[None, :]
        at = n.to(tl.int64)[None, :] * stride_yn + (k + r)[:, None] * stride_yk
        tl.store(y_ptr + at, weight.to(y_ptr.dtype.element_ty), mask=in_n & (k + r < K)[:, None])


def tiles(weight: SlicedWeight) -> tuple[Launch, ...]:
    """What a product may be cut into; of those for as many tokens the first is the default."""
    return TILES


def matmul(
    x: Tensor,
    weight: SlicedWeight,
    epilogue: Epilogue = Epilogue(),
    deterministic: bool = False,
    launch: Launch | None = None,
    tilings: Sequence[Tiling] = (),
) -> Tensor:
    """y = x Wᵀ + (x Aᵀ) Bᵀ + bias, [..., out] in the dtype of x [..., in]; see `ops.matmul`."""
    out_features, in_features = weight.shape
    check_inputs(x, in_features, weight.low.device, epilogue, out_features)
    block_k = block_inputs(weight.bits)
    tokens = x.numel() // in_features
    blocks = triton.cdiv(in_features, block_k)
    sizes = tokens, out_features, blocks
    launch = launch or choose_launch(sizes, x.device, deterministic, tiles(weight), tilings)
    constants = {
        "BITS": weight.bits,
        "GROUP": _group(weight),
        "EVEN_K": in_features % block_k == 0,
        "BLOCK_K": block_k,
    }
    tensors = (weight.low, weight.high, weight.zero_point, weight.scale)
    return multiply(wna16_gemm, x, tensors, epilogue, launch, constants)


def dequantize(weight: SlicedWeight, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """The dense weight [out, in], or [in, out] if transposed, contiguous, each value rounded once to `dtype`."""
    out_features, in_features = weight.shape
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    dense = torch.empty(shape, dtype=dtype, device=weight.low.device)
    strides = dense.stride()[::-1] if transposed else dense.stride()
    block_n = 64
    grid = (triton.cdiv(out_features, block_n), len(weight.low) // ROWS)
    tensors = (weight.low, weight.high, weight.zero_point, weight.scale)
    constants = (weight.bits, _group(weight), block_inputs(weight.bits), block_n)
    wna16_dequantize[grid](*tensors, dense, out_features, in_features, *strides, *constants)
    return dense


def _group(weight: SlicedWeight) -> int:
    return 0 if weight.group_size == weight.in_features else weight.group_size


def _config(bits: int, group_size: int, symmetric: bool, dtype: str, launch: Launch) -> KernelConfig:
    """The product as `matmul` launches it on sizes that are multiples of 16."""
    block_k, split = block_inputs(bits), "none" if launch.splits == 1 else "atomic"
    pointers = {"x": dtype, "low": "i32", "scale": "fp16", "y": dtype if launch.splits == 1 else "fp32"}
    pointers |= {"high": "i16"} if bits == 3 else {}
    pointers |= {} if symmetric else {"zero": "u8"}
    absent = {f"{name}_ptr": None for name in ("high", "zero", "bias", "xa", "b") if name not in pointers}
    constants = {"BITS": bits, "GROUP": group_size, "EVEN_K": True, "BLOCK_K": block_k, "SPLIT": split}
    return KernelConfig(
        name=f"w{bits}a16 g{group_size or 'row'}{'' if symmetric else ' asym'} {dtype} {launch.block_m}x{launch.block_n}",
        function=wna16_gemm,
        signature={f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()} | SIZES,
        constexprs=absent | constants | {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n},
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        weights_per_loop=block_k * launch.block_n,
        mma="HMMA.16816.F32",
        aligned=("N", "K", "stride_xm"),
    )


CONFIGS = (
    _config(4, 128, True, "fp16", Launch(16, 128, splits=4)),
    _config(4, 128, True, "bf16", Launch(16, 128, splits=4)),
    _config(4, 128, False, "bf16", Launch(16, 128, splits=4)),
    _config(4, 32, True, "fp16", Launch(16, 128, splits=4)),
    _config(4, 0, True, "fp16", Launch(16, 128, splits=4)),
    _config(4, 128, True, "fp16", Launch(16, 64, splits=4)),
    _config(4, 128, True, "fp16", Launch(32, 128, splits=4)),
    _config(4, 128, True, "bf16", Launch(64, 128)),
    _config(4, 128, True, "fp16", LARGEST),
    _config(2, 64, False, "fp16", Launch(16, 128, splits=4)),
    _config(3, 128, True, "fp16", Launch(16, 128, splits=4)),
    _config(3, 128, False, "bf16", Launch(16, 128, splits=4)),
    _config(8, 0, True, "fp16", Launch(16, 128, splits=4)),
    _config(8, 128, True, "bf16", Launch(16, 128, splits=4)),
)
