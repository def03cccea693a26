"""Triton kernels over `SlicedSparse24Weight`: kept codes are put in their places in registers, then multiplied densely."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.gemm.configs import SIZES, KernelConfig
from compress.kernels.gemm.launch import Epilogue, Launch, Tiling, check_inputs, choose_launch
from compress.kernels.gemm.layout import ROWS
from compress.kernels.gemm.triton import code_offset, code_value, load_apart, multiply, write_tile
from compress.kernels.sparse24.layout import PLACE_WORDS, SlicedSparse24Weight, block_inputs, field_bits

TILES = {  # by bits of a field: what NVIDIA's GPUs do not spill, nor hold in more than 99 KiB of shared memory
    2: (Launch(16, 64, num_warps=8, num_stages=3),),
    4: (Launch(16, 64), Launch(32, 64, num_warps=8)),
    8: (Launch(16, 64), Launch(32, 64)),
}


@triton.jit
def kept_value(values, slot: tl.constexpr, which: tl.constexpr, offset, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    """The first or second kept code of each four of a slot, less its zero point: [16, BLOCK_N] of DTYPE."""
    code = (values >> (FIELD * (2 * slot + which))) & ((1 << FIELD) - 1)
    return (code_value(code, DTYPE, FIELD) - offset).to(DTYPE)


@triton.jit
def placed(first, second, places, slot: tl.constexpr, lane: tl.constexpr):
    """The weights of one lane of each four: whichever kept one lies there, else 0."""
    here = ((places >> (4 * slot)) & 3) == lane
    also = ((places >> (4 * slot + 2)) & 3) == lane
    return tl.where(here, first, tl.where(also, second, 0.0)).to(first.dtype)


@triton.jit
def sparse24_gemm(
    x_ptr,  # [M, K] float16 or bfloat16, rows stride_xm apart
    values_ptr,  # [16 * blocks, N] int32
    places_ptr,  # [16 * blocks, N] int32, int16 or int8
    zero_ptr,  # [groups, N] uint8 or None
    scale_ptr,  # [groups, N]
    bias_ptr,
    xa_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    rank,
    blocks_per_split,
    FIELD: tl.constexpr,  # bits of a field
    MIDDLE: tl.constexpr,  # zero point where there is none stored
    GROUP: tl.constexpr,  # inputs, a multiple of 64; 0: a group is a whole row
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """y = x Wᵀ + xa bᵀ + bias; a tile [BLOCK_M, 64] of x is parted into the four lanes of its fours."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SLOTS: tl.constexpr = BLOCK_K // 64
    split = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r, lanes = tl.arange(0, 16), tl.arange(0, 64)
    in_m, in_n = (m < M)[:, None], (n < N)[None, :]
    begin = split * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, tl.cdiv(K, BLOCK_K))
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_xm + lanes[None, :]
    rows = begin.to(tl.int64) * 16 * N + r[:, None] * N + n[None, :]
    if zero_ptr is None:
        offset = code_offset(tl.full((1, BLOCK_N), MIDDLE, tl.int32), DTYPE, FIELD)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(begin, end):
        values = load_apart(values_ptr + rows, in_n, 0)  # apart from x as well
        places = load_apart(places_ptr + rows, in_n, 1).to(tl.int32)
        rows += 16 * N
        for slot in tl.static_range(SLOTS):
            k = block * BLOCK_K + slot * 64
            group = n
            if GROUP != 0:
                group = (
                    tl.minimum(k // GROUP, K // GROUP - 1) * N + n
                )  # what fills up the last block counts for nothing
            if zero_ptr is not None:
                offset = code_offset(tl.load(zero_ptr + group, mask=n < N, other=0)[None, :], DTYPE, FIELD)
            first = kept_value(values, slot, 0, offset, FIELD, DTYPE)
            second = kept_value(values, slot, 1, offset, FIELD, DTYPE)
            in_x = in_m if EVEN_K else in_m & (k + lanes < K)[None, :]
            x = tl.load(x_rows + k, mask=in_x, other=0.0)
            even, odd = tl.split(tl.reshape(x, (BLOCK_M, 16, 2, 2)))
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            sums = tl.dot(x0, placed(first, second, places, slot, 0), sums)
            sums = tl.dot(x1, placed(first, second, places, slot, 1), sums)
            sums = tl.dot(x2, placed(first, second, places, slot, 2), sums)
            sums = tl.dot(x3, placed(first, second, places, slot, 3), sums)
            acc += sums * tl.load(scale_ptr + group, mask=n < N, other=0.0).to(tl.float32)[None, :]
    write_tile(acc, bias_ptr, xa_ptr, b_ptr, y_ptr, m, n, M, N, rank, split, SPLIT)


@triton.jit
def sparse24_dequantize(
    values_ptr,
    places_ptr,
    zero_ptr,
    scale_ptr,
    y_ptr,  # y[n * stride_yn + k * stride_yk] of any float dtype
    N,
    K,
    stride_yn,
    stride_yk,
    FIELD: tl.constexpr,
    MIDDLE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The dense weight with its zeros, each value rounded once: one program a block of inputs and BLOCK_N outputs."""
    SLOTS: tl.constexpr = BLOCK_K // 64
    block = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r, lanes = tl.arange(0, 16), tl.arange(0, 64)
    in_n = (n < N)[None, :]
    rows = (block * 16 + r)[:, None] * N + n[None, :]
    values = tl.load(values_ptr + rows, mask=in_n, other=0)
    places = load_apart(places_ptr + rows, in_n, 0).to(tl.int32)
    for slot in tl.static_range(SLOTS):
        k = block * BLOCK_K + slot * 64
        group = n if GROUP == 0 else tl.minimum(k // GROUP, K // GROUP - 1) * N + n
        zero = tl.full((BLOCK_N,), MIDDLE, tl.int32)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + group, mask=n < N, other=0).to(tl.int32)
        scale = tl.load(scale_ptr + group, mask=n < N, other=0.0).to(tl.float32)[None, :]
        offset = code_offset(zero, tl.float16, FIELD)[None, :]
        first = kept_value(values, slot, 0, offset, FIELD, tl.float16).to(tl.float32) * scale
        second = kept_value(values, slot, 1, offset, FIELD, tl.float16).to(tl.float32) * scale
        even = tl.join(placed(first, second, places, slot, 0), placed(first, second, places, slot, 2))
        odd = tl.join(placed(first, second, places, slot, 1), placed(first, second, places, slot, 3))
        fours = tl.permute(tl.join(even, odd), (1, 0, 2, 3))  # [BLOCK_N, 16, 2, 2]
        weight = tl.reshape(fours, (BLOCK_N, 64))
        at = n.to(tl.int64)[:, None] * stride_yn + (k + lanes)[None, :] * stride_yk
        inside = (n < N)[:, None] & (k + lanes < K)[None, :]
        tl.store(y_ptr + at, weight.to(y_ptr.dtype.element_ty), mask=inside)


def tiles(weight: SlicedSparse24Weight) -> tuple[Launch, ...]:
    """What a product may be cut into."""
    known = TILES[field_bits(weight.bits)]
    return known if torch.version.hip is None else known[:1]  # 32 tokens spill on gfx1100


def matmul(
    x: Tensor,
    weight: SlicedSparse24Weight,
    epilogue: Epilogue = Epilogue(),
    deterministic: bool = False,
    launch: Launch | None = None,
    tilings: Sequence[Tiling] = (),
) -> Tensor:
    """y = x Wᵀ + (x Aᵀ) Bᵀ + bias, [..., out] in the dtype of x [..., in]; see `ops.matmul`."""
    out_features, in_features = weight.shape
    check_inputs(x, in_features, weight.values.device, epilogue, out_features)
    constants = _constants(weight)
    tokens, blocks = x.numel() // in_features, triton.cdiv(in_features, constants["BLOCK_K"])
    sizes = tokens, out_features, blocks
    launch = launch or choose_launch(sizes, x.device, deterministic, tiles(weight), tilings)
    tensors = (weight.values, weight.places, weight.zero_point, weight.scale)
    constants["EVEN_K"] = in_features % constants["BLOCK_K"] == 0
    return multiply(sparse24_gemm, x, tensors, epilogue, launch, constants)


def dequantize(weight: SlicedSparse24Weight, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """The dense weight [out, in], or [in, out] if transposed, contiguous, each value rounded once to `dtype`."""
    out_features, in_features = weight.shape
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    dense = torch.empty(shape, dtype=dtype, device=weight.values.device)
    strides = dense.stride()[::-1] if transposed else dense.stride()
    block_n = 64
    grid = (triton.cdiv(out_features, block_n), len(weight.values) // ROWS)
    tensors = (weight.values, weight.places, weight.zero_point, weight.scale)
    sparse24_dequantize[grid](
        *tensors, dense, out_features, in_features, *strides, **_constants(weight), BLOCK_N=block_n
    )
    return dense


def _constants(weight: SlicedSparse24Weight) -> dict[str, int]:
    return {
        "FIELD": field_bits(weight.bits),
        "MIDDLE": 2 ** (weight.bits - 1),
        "GROUP": 0 if weight.group_size == weight.in_features else weight.group_size,
        "BLOCK_K": block_inputs(weight.bits),
    }


def _config(bits: int, group_size: int, symmetric: bool, dtype: str, launch: Launch) -> KernelConfig:
    """The product as `matmul` launches it on sizes that are multiples of 16."""
    split = "none" if launch.splits == 1 else "atomic"
    places = str(PLACE_WORDS[field_bits(bits)]).removeprefix("torch.int")
    pointers = {"x": dtype, "values": "i32", "places": f"i{places}", "scale": "fp16"}
    pointers |= {"y": dtype if launch.splits == 1 else "fp32"} | ({} if symmetric else {"zero": "u8"})
    absent = {f"{name}_ptr": None for name in ("zero", "bias", "xa", "b") if name not in pointers}
    constants = {"FIELD": field_bits(bits), "MIDDLE": 2 ** (bits - 1), "GROUP": group_size, "EVEN_K": True}
    constants |= {"BLOCK_K": block_inputs(bits), "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "SPLIT": split}
    return KernelConfig(
        name=f"2:4 w{bits} g{group_size or 'row'}{'' if symmetric else ' asym'} {dtype} {launch.block_m}x{launch.block_n}",
        function=sparse24_gemm,
        signature={f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()} | SIZES,
        constexprs=absent | constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        weights_per_loop=block_inputs(bits) * launch.block_n,
        mma="HMMA.16816.F32",
        nvidia_only=launch.block_m > 16,
        aligned=("N", "K", "stride_xm"),
    )


CONFIGS = (
    _config(4, 128, True, "fp16", Launch(16, 64, splits=4)),
    _config(4, 128, False, "bf16", Launch(16, 64, splits=4)),
    _config(4, 128, True, "bf16", TILES[4][1]),
    _config(2, 128, False, "bf16", TILES[2][0]),
    _config(8, 0, True, "fp16", Launch(16, 64, splits=4)),
    _config(8, 128, False, "bf16", TILES[8][1]),
)
