"""Triton kernels over `UnpackedCodebookWeight`: vectors are gathered whole, added up and multiplied."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.codebook.layout import UnpackedCodebookWeight
from compress.kernels.gemm.configs import SIZES, KernelConfig
from compress.kernels.gemm.launch import Epilogue, Launch, check_inputs, default_launch
from compress.kernels.gemm.triton import multiply, write_tile

BLOCK_K = 64  # inputs of one step
TILES = (Launch(16, 64), Launch(32, 64), Launch(64, 64))


@triton.jit
def gathered(
    codes, codebooks_ptr, g, n, N, groups, CODEBOOKS: tl.constexpr, VECTORS: tl.constexpr, VECTOR: tl.constexpr
):
    """Sums of the vectors of groups g (a column) and outputs n (a row): [len(g), len(n), VECTOR] float32."""
    element = tl.arange(0, VECTOR)[None, None, :]
    inside = (g < groups) & (n < N)
    at = n.to(tl.int64) * groups + g
    total = tl.zeros((g.shape[0], n.shape[1], VECTOR), tl.float32)
    for book in tl.static_range(CODEBOOKS):
        code = tl.load(codes + book * N.to(tl.int64) * groups + at, mask=inside, other=0).to(tl.int32) & (VECTORS - 1)
        vectors = codebooks_ptr + (book * VECTORS * VECTOR + code[:, :, None] * VECTOR + element)
        total += tl.load(vectors).to(tl.float32)
    return total


@triton.jit
def codebook_gemm(
    x_ptr,  # [M, K] float16 or bfloat16, rows stride_xm apart
    codes_ptr,  # [CODEBOOKS, N, K / VECTOR] uint8 or int16
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
    split = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    g, lanes = tl.arange(0, BLOCK_K // VECTOR)[:, None], tl.arange(0, BLOCK_K)
    begin = split * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, tl.cdiv(K, BLOCK_K))
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_xm + lanes[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(begin, end):
        first = block * (BLOCK_K // VECTOR)
        sums = gathered(codes_ptr, codebooks_ptr, first + g, n[None, :], N, K // VECTOR, CODEBOOKS, VECTORS, VECTOR)
        weight = tl.reshape(tl.permute(sums.to(x_ptr.dtype.element_ty), (0, 2, 1)), (BLOCK_K, BLOCK_N))
        in_x = (m < M)[:, None] & (block * BLOCK_K + lanes < K)[None, :]
        x = tl.load(x_rows + block * BLOCK_K, mask=in_x, other=0.0)
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
    g = tl.program_id(1) * (BLOCK_K // VECTOR) + tl.arange(0, BLOCK_K // VECTOR)
    sums = gathered(codes_ptr, codebooks_ptr, g[:, None], n[None, :], N, K // VECTOR, CODEBOOKS, VECTORS, VECTOR)
    weight = sums * tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :, None]
    k = g.to(tl.int64)[:, None, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    at = n.to(tl.int64)[None, :, None] * stride_yn + k * stride_yk
    inside = (n < N)[None, :, None] & (k < K)
    tl.store(y_ptr + at, weight.to(y_ptr.dtype.element_ty), mask=inside)


def matmul(
    x: Tensor,
    weight: UnpackedCodebookWeight,
    epilogue: Epilogue = Epilogue(),
    deterministic: bool = False,
    launch: Launch | None = None,
) -> Tensor:
    """y = x Wᵀ + (x Aᵀ) Bᵀ + bias, [..., out] in the dtype of x [..., in]; see `ops.matmul`."""
    out_features, in_features = weight.shape
    check_inputs(x, in_features, weight.codes.device, epilogue, out_features)
    tokens, blocks = x.numel() // in_features, triton.cdiv(in_features, BLOCK_K)
    launch = launch or default_launch((tokens, out_features, blocks), x.device, deterministic, TILES)
    tensors = (weight.codes, weight.codebooks, weight.scale)
    return multiply(codebook_gemm, x, tensors, epilogue, launch, _constants(weight))


def dequantize(weight: UnpackedCodebookWeight, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """The dense weight [out, in], or [in, out] if transposed, contiguous, each value rounded once to `dtype`."""
    out_features, in_features = weight.shape
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    dense = torch.empty(shape, dtype=dtype, device=weight.codes.device)
    strides = dense.stride()[::-1] if transposed else dense.stride()
    grid = (triton.cdiv(out_features, 64), triton.cdiv(in_features, BLOCK_K))
    tensors = (weight.codes, weight.codebooks, weight.scale)
    codebook_dequantize[grid](*tensors, dense, out_features, in_features, *strides, **_constants(weight), BLOCK_N=64)
    return dense


def _constants(weight: UnpackedCodebookWeight) -> dict[str, int]:
    n_codebooks, n_vectors, vector_size = weight.codebooks.shape
    return {"CODEBOOKS": n_codebooks, "VECTORS": n_vectors, "VECTOR": vector_size, "BLOCK_K": BLOCK_K}


def _config(n_codebooks: int, code_bits: int, dtype: str, launch: Launch) -> KernelConfig:
    """The product as `matmul` launches it on sizes that are multiples of 16, with vectors of 8."""
    pointers = {"x": dtype, "codes": "u8" if code_bits <= 8 else "i16", "codebooks": dtype, "scale": "fp16"}
    pointers["y"] = dtype if launch.splits == 1 else "fp32"
    constants = {"CODEBOOKS": n_codebooks, "VECTORS": 2**code_bits, "VECTOR": 8, "BLOCK_K": BLOCK_K}
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
        weights_per_loop=BLOCK_K * launch.block_n,
        mma="HMMA.16816.F32",
        aligned=("N", "K", "stride_xm"),
    )


CONFIGS = (
    _config(2, 8, "fp16", Launch(16, 64, splits=4)),
    _config(2, 8, "bf16", Launch(16, 64, splits=4)),
    _config(1, 16, "fp16", Launch(16, 64, splits=4)),
    _config(2, 8, "bf16", Launch(64, 64)),
)
