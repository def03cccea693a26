"""The end of a tile, split-K and launches of the Triton products.

Every product has the arguments x, the weight's tensors, bias, xa, b, y, M, N, K, stride_xm, rank, blocks_per_split,
then its constants, then BLOCK_M, BLOCK_N and SPLIT. A tensor that is not there is None, which Triton compiles away.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.gemm.launch import Epilogue, Launch

FLAT = 1024  # elements of one program that goes over a tensor


@triton.jit
def add_low_rank(acc, xa_ptr, b_ptr, m, n, M, N, rank):
    """acc [BLOCK_M, BLOCK_N] float32 plus xa bᵀ of rows m and n; xa: [M, rank], b: [N, rank]."""
    in_m, in_n = (m < M)[:, None], (n < N)[None, :]
    lane = tl.arange(0, 16)
    for first in range(0, rank, 16):
        r = first + lane
        left = tl.load(xa_ptr + m[:, None] * rank + r[None, :], mask=in_m & (r < rank)[None, :], other=0.0)
        right = tl.load(b_ptr + n[None, :] * rank + r[:, None], mask=in_n & (r < rank)[:, None], other=0.0)
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def write_tile(acc, bias_ptr, xa_ptr, b_ptr, y_ptr, m, n, M, N, rank, split, SPLIT: tl.constexpr):
    """Finish a tile: SPLIT "none" writes y [M, N], "buffer" its own slice of [splits, M, N], "atomic" adds to [M, N]."""
    if xa_ptr is not None:
        if split == 0:
            acc = add_low_rank(acc, xa_ptr, b_ptr, m, n, M, N, rank)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if SPLIT == "atomic":
        tl.atomic_add(y_ptr + at, acc, mask=inside, sem="relaxed")
    else:
        if SPLIT == "buffer":
            at += split.to(tl.int64) * M * N
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_splits(partial_ptr, bias_ptr, y_ptr, N, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y [M, N] = partial [SPLITS, M, N] summed in the order of the splits, plus bias; size is M * N."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(partial_ptr + at, mask=inside, other=0.0)
    for split in range(1, SPLITS):
        total += tl.load(partial_ptr + split * size + at, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_apart(pointers, inside, axis: tl.constexpr):
    """Load a tile by pointers to it, 0 outside; loads of one `axis` get a memory layout of their own.

    Triton gives loads of one shape one layout: beside elements of two bytes, words would be read in halves of sectors.
    """
    tile = tl.load(tl.expand_dims(pointers, axis), mask=tl.expand_dims(inside, axis), other=0)
    return tl.reshape(tile, pointers.shape)


@triton.jit
def code_value(code, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """A number of BITS bits (int32) in a dtype whose mantissa it is put into, plus `code_offset`: no conversion."""
    if DTYPE == tl.float16:
        return (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)  # 1024 + code
    elif BITS < 8:
        return (code | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)  # 128 + code
    else:
        return (code | 0x4B000000).to(tl.float32, bitcast=True)  # 2**23 + code: bfloat16 has 7 bits for it


@triton.jit
def code_offset(zero, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """What `code_value` gives for the zero point: the difference is exact, and so is its rounding to DTYPE."""
    return code_value(zero.to(tl.int32), DTYPE, BITS)


def multiply(
    kernel: Any,
    x: Tensor,
    weight: tuple[Tensor | None, ...],
    epilogue: Epilogue,
    launch: Launch,
    constants: Mapping[str, Any],
) -> Tensor:
    """Run a product over x [..., in]; `constants` has BLOCK_K, the inputs of one step, beside the kernel's own.

    The last of `weight` is its scale, [..., out]. Returns [..., out] in the dtype of x.
    """
    flat, scale = x.reshape(-1, x.shape[-1]), weight[-1]
    assert scale is not None
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    (tokens, in_features), out_features = flat.shape, scale.shape[-1]
    y = flat.new_empty(tokens, out_features)
    if tokens == 0:
        return y.unflatten(0, x.shape[:-1])
    blocks = triton.cdiv(in_features, constants["BLOCK_K"])
    blocks_per_split = triton.cdiv(blocks, launch.splits)
    splits = triton.cdiv(blocks, blocks_per_split)
    how, target = "none", y
    if splits > 1:
        how = "buffer" if launch.deterministic else "atomic"
        shape = (splits if launch.deterministic else 1, tokens, out_features)
        target = (torch.empty if launch.deterministic else torch.zeros)(shape, dtype=torch.float32, device=x.device)
    xa = flat @ epilogue.a.T if epilogue.a is not None and epilogue.rank else None
    grid = (triton.cdiv(out_features, launch.block_n), triton.cdiv(tokens, launch.block_m), splits)
    kernel[grid](
        flat,
        *weight,
        epilogue.bias if splits == 1 else None,
        xa,
        None if xa is None or epilogue.b is None else epilogue.b.contiguous(),
        target,
        tokens,
        out_features,
        in_features,
        flat.stride(0),
        epilogue.rank,
        blocks_per_split,
        **constants,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        SPLIT=how,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if splits > 1:
        flat_grid = (triton.cdiv(y.numel(), FLAT),)
        sum_splits[flat_grid](target, epilogue.bias, y, out_features, y.numel(), len(target), FLAT)
    return y.unflatten(0, x.shape[:-1])
