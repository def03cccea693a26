"""Kernels small enough to compile in a test."""

import triton
import triton.language as tl


@triton.jit
def scale_rows(x_ptr, s_ptr, y_ptr, M, BLOCK: tl.constexpr):
    """y = x s, a program a row of BLOCK."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) * tl.load(s_ptr + tl.program_id(0)))


@triton.jit
def gram(x_ptr, y_ptr, K, BLOCK: tl.constexpr):
    """y = x xᵀ [BLOCK, BLOCK] float32 of x [BLOCK, K]; K is a multiple of 32."""
    row, column = tl.arange(0, BLOCK), tl.arange(0, 32)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, 32):
        x = tl.load(x_ptr + row[:, None] * K + k + column[None, :])
        total = tl.dot(x, x.trans(), total)
    tl.store(y_ptr + row[:, None] * BLOCK + row[None, :], total)
