"""Triton kernels over `SlicedCodebookWeight`: vectors are gathered whole, added up and multiplied."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.codebook.layout import SlicedCodebookWeight, block_inputs
from compress.kernels.gemm.configs import SIZES, KernelConfig
from compress.kernels.gemm.launch import Epilogue, Launch, Tiling, check_inputs, choose_launch
from compress.kernels.gemm.triton import multiply, write_tile

TILES = tuple(Launch(tokens, 64, num_stages=1) for tokens in (16, 32, 64))  # more stages would gather past the L1 cache


@triton.jit
def load_words(codes_ptr, row, n, N, rows, CODEBOOKS: tl.constexpr, ROWS: tl.constexpr):
    """Words of codes of one block and outputs n, [ROWS, len(n)] int32 of each codebook; `rows` of all blocks."""
    at = (row + tl.arange(0, ROWS))[:, None].to(tl.int64) * N + n[None, :]
    words = ()
    for book in tl.static_range(CODEBOOKS):
        words += (tl.load(codes_ptr + book * rows.to(tl.int64) * N + at, mask=(n < N)[None, :], other=0),)
    return words


@triton.jit
def gathered(words, codebooks_ptr, plane: tl.constexpr, VECTORS: tl.constexpr, VECTOR: tl.constexpr):
    """Sums of the vectors of one plane: [ROWS, BLOCK_N, VECTOR] float32, or as stored if there is one codebook."""
    FIELD: tl.constexpr = 8 if VECTORS <= 256 else 16
    element = tl.arange(0, VECTOR)[None, None, :]
    for book in tl.static_range(len(words)):
        code = (words[book] >> (FIELD * plane)) & ((1 << FIELD) - 1)
        vectors = tl.load(codebooks_ptr + (book * VECTORS * VECTOR + code[:, :, None] * VECTOR + element))
        total = vectors if book == 0 else total.to(tl.float32) + vectors.to(tl.float32)  # noqa: F821
    return total


@triton.jit
def codebook_gemm(
    x_ptr,  # [M, K] float16 or bfloat16, rows stride_xm apart
    codes_ptr,  # [CODEBOOKS, 64 / VECTOR * blocks, N] int32
    codebooks_ptr,  # [CODEBOOKS, VECTORS, VECTOR]
    scale_ptr,  # [N]
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
    CODEBOOKS: tl.constexpr,
    VECTORS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """y = x Wᵀ + xa bᵀ + bias; sums of vectors are rounded to the dtype of x, and scaled at the end in float32."""
    ROWS: tl.constexpr = 64 // VECTOR
    split = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, 64)
    begin, blocks = split * blocks_per_split, tl.cdiv(K, BLOCK_K)
    end = tl.minimum(begin + blocks_per_split, blocks)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_xm + lanes[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(begin, end):
        words = load_words(codes_ptr, block * ROWS, n, N, blocks * ROWS, CODEBOOKS, ROWS)
        for plane in tl.static_range(BLOCK_K // 64):
            sums = gathered(words, codebooks_ptr, plane, VECTORS, VECTOR)
            weight = tl.reshape(tl.permute(sums.to(x_ptr.dtype.element_ty), (0, 2, 1)), (64, BLOCK_N))
            k = block * BLOCK_K + plane * 64
            x = tl.load(x_rows + k, mask=(m < M)[:, None] & (k + lanes < K)[None, :], other=0.0)
            acc = tl.dot(x, weight, acc)
    acc *= tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    write_tile(acc, bias_ptr, xa_ptr, b_ptr, y_ptr, m, n, M, N, rank, split, SPLIT)


@triton.jit
def codebook_dequantize(
    codes_ptr,
    codebooks_ptr,
    scale_ptr,
    y_ptr,  # y[n * stride_yn + k * stride_yk] of any float dtype
    N,
    K,
    stride_yn,
    stride_yk,
    CODEBOOKS: tl.constexpr,
    VECTORS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The dense weight, each value rounded once: one program a block of inputs and BLOCK_N outputs."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ROWS: tl.constexpr = 64 // VECTOR
    block = tl.program_id(1)
    words = load_words(codes_ptr, block * ROWS, n, N, tl.num_programs(1) * ROWS, CODEBOOKS, ROWS)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :, None]
    lanes = tl.arange(0, ROWS)[:, None, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    for plane in tl.static_range(BLOCK_K // 64):
        weight = gathered(words, codebooks_ptr, plane, VECTORS, VECTOR).to(tl.float32) * scale
        k = block.to(tl.int64) * BLOCK_K + plane * 64 + lanes
        at = n.to(tl.int64)[None, :, None] * stride_yn + k * stride_yk
        tl.store(y_ptr + at, weight.to(y_ptr.dtype.element_ty), mask=(n < N)[None, :, None] & (k < K))


def tiles(weight: SlicedCodebookWeight) -> tuple[Launch, ...]:
    """What a product may be cut into."""
    return TILES


def matmul(
    x: Tensor,
    weight: SlicedCodebookWeight,
    epilogue: Epilogue = Epilogue(),
    deterministic: bool = False,
    launch: Launch | None = None,
    tilings: Sequence[Tiling] = (),
) -> Tensor:
    """y = x Wᵀ + (x Aᵀ) Bᵀ + bias, [..., out] in the dtype of x [..., in]; see `ops.matmul`."""
    out_features, in_features = weight.shape
    check_inputs(x, in_features, weight.codes.device, epilogue, out_features)
    tokens, blocks = x.numel() // in_features, triton.cdiv(in_features, block_inputs(weight.code_bits))
    sizes = tokens, out_features, blocks
    launch = launch or choose_launch(sizes, x.device, deterministic, tiles(weight), tilings)
    tensors = (weight.codes, weight.codebooks, weight.scale)
    return multiply(codebook_gemm, x, tensors, epilogue, launch, _constants(weight))


def dequantize(weight: SlicedCodebookWeight, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """The dense weight [out, in], or [in, out] if transposed, contiguous, each value rounded once to `dtype`."""
    out_features, in_features = weight.shape
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    dense = torch.empty(shape, dtype=dtype, device=weight.codes.device)
    strides = dense.stride()[::-1] if transposed else dense.stride()
    grid = (triton.cdiv(out_features, 64), triton.cdiv(in_features, block_inputs(weight.code_bits)))
    tensors = (weight.codes, weight.codebooks, weight.scale)
    codebook_dequantize[grid](*tensors, dense, out_features, in_features, *strides, **_constants(weight), BLOCK_N=64)
    return dense


def _constants(weight: SlicedCodebookWeight) -> dict[str, int]:
    n_codebooks, n_vectors, vector_size = weight.codebooks.shape
    block_k = block_inputs(weight.code_bits)
    return {"CODEBOOKS": n_codebooks, "VECTORS": n_vectors, "VECTOR": vector_size, "BLOCK_K": block_k}


def _config(n_codebooks: int, code_bits: int, dtype: str, launch: Launch) -> KernelConfig:
    """The product as `matmul` launches it on sizes that are multiples of 16, with vectors of 8."""
    pointers = {"x": dtype, "codes": "i32", "codebooks": dtype, "scale": "fp16"}
    pointers["y"] = dtype if launch.splits == 1 else "fp32"
    constants = {"CODEBOOKS": n_codebooks, "VECTORS": 2**code_bits, "VECTOR": 8, "BLOCK_K": block_inputs(code_bits)}
    constants |= {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}
    return KernelConfig(
        name=f"codebook {n_codebooks}x{code_bits} {dtype} {launch.block_m}x{launch.block_n}",
        function=codebook_gemm,
        signature={f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()} | SIZES,
        constexprs={"bias_ptr": None, "xa_ptr": None, "b_ptr": None}
        | constants
        | {"SPLIT": "none" if launch.splits == 1 else "atomic"},
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        weights_per_loop=block_inputs(code_bits) * launch.block_n,
        mma="HMMA.16816.F32",
        aligned=("N", "K", "stride_xm"),
    )


CONFIGS = (
    _config(2, 8, "fp16", replace(TILES[0], splits=4)),
    _config(2, 8, "bf16", replace(TILES[0], splits=4)),
    _config(1, 16, "fp16", replace(TILES[0], splits=4)),
    _config(2, 8, "fp16", TILES[1]),
    _config(2, 8, "bf16", TILES[2]),
)
