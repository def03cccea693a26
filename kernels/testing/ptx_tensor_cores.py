"""Matrix instructions of a warp: mma.sync, mma.sp, ldmatrix and stmatrix.

Which lane holds which element is drawn in the PTX ISA, sections 9.7.14 and 9.7.15. Lane 4g + t belongs to row g of A and
column g of B. Products and sums are taken in float64 and rounded once to float32; hardware truncates on the way.
"""

import re

import numpy as np

from compress.kernels.testing.ptx_block import Array, Block
from compress.kernels.testing.ptx_program import Instruction, Trap, UnsupportedPtx

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def _elements(block: Block, registers: tuple[str, ...], type_: str) -> Array:
    """[warps, lanes, registers, elements a register] of what a fragment holds."""
    bits = np.stack([block.read(r, "b32") for r in registers], 1)
    if type_ == "bf16":
        values = (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        dtype = {"f16": np.float16, "s8": np.int8, "u8": np.uint8}.get(type_)
        if dtype is None:
            raise UnsupportedPtx(f"matrices of {type_}")
        values = np.ascontiguousarray(bits).view(dtype)
    values = values.astype(np.int64 if type_.endswith("8") else np.float64)
    return values.reshape(-1, 32, len(registers), 4 if type_.endswith("8") else 2)


def _left(values: Array) -> Array:
    """A [warps, 16, k]: register r of a lane is in row g, or g + 8 if r is odd, and in k half r // 2."""
    warps, _, registers, width = values.shape
    matrix = np.zeros((warps, 16, 2 * registers * width), values.dtype)
    for r in range(registers):
        for j in range(width):
            matrix[:, G + 8 * (r & 1), width * T + j + 4 * width * (r >> 1)] = values[:, :, r, j]
    return matrix


def _right(values: Array) -> Array:
    """B [warps, k, 8]: register r of a lane is in column g."""
    warps, _, registers, width = values.shape
    matrix = np.zeros((warps, 4 * registers * width, 8), values.dtype)
    for r in range(registers):
        for j in range(width):
            matrix[:, width * T + j + 4 * width * r, G] = values[:, :, r, j]
    return matrix


def _sparse_left(values: Array, metadata: Array, selector: int) -> Array:
    """A [warps, 16, k] of two kept values in every four; four bits of metadata say which of a group.

    16-bit values, k 32: of the quad, lane 2 * selector + h holds k half h, row g in bits 0-15 and row g + 8 in 16-31.
    8-bit values, k 64: lane 2h holds k half h of row g, lane 2h + 1 that of row g + 8.
    """
    warps, _, registers, width = values.shape
    if registers != 4:
        raise UnsupportedPtx(f"a sparse matrix in {registers} registers")
    matrix = np.zeros((warps, 16, 16 * width), values.dtype)
    lanes = metadata.reshape(warps, 32).astype(np.int64)
    which, groups = np.arange(warps)[:, None], width // 2  # of four, in a register
    for r in range(registers):
        row, half = r & 1, r >> 1
        holder = 4 * G + 2 * (selector if width == 2 else half) + (half if width == 2 else row)
        for group in range(groups):
            number = groups * T + group  # of the group in this half of k
            places = lanes[:, holder] >> 4 * number + (16 * row if width == 2 else 0) & 15
            first, second = places & 3, places >> 2
            if (first >= second).any():
                raise Trap("the places of a 2:4 group do not ascend")
            for j, place in enumerate((first, second)):
                matrix[which, G + 8 * row, 8 * width * half + 4 * number + place] = values[:, :, r, 2 * group + j]
    return matrix


def multiply(block: Block, i: Instruction) -> None:
    """mma.sync and mma.sp of 16 rows and 8 columns, with float32 or int32 sums."""
    if not block.active.all():
        raise Trap("a matrix instruction that not all threads run")
    shape = next(m for m in i.modifiers if re.fullmatch(r"m\d+n\d+k\d+", m))
    d, a, b, c = i.modifiers[-4:]
    sparse = any(m.startswith("sp") for m in i.modifiers)
    if not shape.startswith("m16n8k") or d != c or d not in ("f32", "s32") or "row" not in i.modifiers:
        raise UnsupportedPtx(i.text)
    left = _elements(block, i.vector(1), a)
    if sparse:
        selector = block.uniform(i.operands[5])
        dense = _sparse_left(left, block.read(i.operands[4], "b32"), selector)
    else:
        dense = _left(left)
    right = _right(_elements(block, i.vector(2), b))
    depth = int(shape.removeprefix("m16n8k"))
    if dense.shape[2] != depth or right.shape[1] != depth:
        raise UnsupportedPtx(f"{i.text}: {dense.shape[2]} and {right.shape[1]} where k is {depth}")
    dtype = np.int64 if d == "s32" else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        product = dense.astype(dtype) @ right.astype(dtype)
        for place, (to, add) in enumerate(zip(i.vector(0), i.vector(3), strict=True)):
            own = product[:, G + 8 * (place >> 1), 2 * T + (place & 1)].reshape(-1)
            total = own + block.read(add, d).astype(dtype)
            if d == "s32" and "satfinite" in i.modifiers:
                total = np.clip(total, -(2**31), 2**31 - 1)
            block.write(to, total.astype(np.int32 if d == "s32" else np.float32))


def load_matrix(block: Block, i: Instruction) -> None:
    """ldmatrix: 8 x 8 tiles of 16 bits, row j of tile n from the address that lane 8n + j holds."""
    if i.type != "b16" or "m8n8" not in i.modifiers or not block.active.all():
        raise UnsupportedPtx(i.text)
    addresses = block.address(i.operands[1]).reshape(-1, 32)
    for tile, target in enumerate(i.vector(0)):
        lanes = slice(8 * tile, 8 * tile + 8)
        threads = block.threads.reshape(-1, 32)[:, lanes].reshape(-1)
        rows = block.shared.load("ldmatrix", addresses[:, lanes].reshape(-1), threads, np.dtype(np.uint16), 8)
        halves = rows.reshape(-1, 8, 8)
        if "trans" in i.modifiers:
            halves = halves.transpose(0, 2, 1)
        pair = np.stack([halves[:, G, 2 * T], halves[:, G, 2 * T + 1]], -1)
        block.write(target, pair.view(np.uint32).reshape(-1))


def store_matrix(block: Block, i: Instruction) -> None:
    """stmatrix: the inverse of ldmatrix."""
    if i.type != "b16" or "m8n8" not in i.modifiers or not block.active.all():
        raise UnsupportedPtx(i.text)
    addresses = block.address(i.operands[0]).reshape(-1, 32)
    for tile, source in enumerate(i.vector(1)):
        lanes = slice(8 * tile, 8 * tile + 8)
        pair = np.ascontiguousarray(block.read(source, "b32")).view(np.uint16).reshape(-1, 32, 2)
        halves = np.zeros((len(pair), 8, 8), np.uint16)
        for j in (0, 1):
            halves[:, G, 2 * T + j] = pair[:, :, j]
        if "trans" in i.modifiers:
            halves = halves.transpose(0, 2, 1)
        threads = block.threads.reshape(-1, 32)[:, lanes].reshape(-1)
        block.shared.store("stmatrix", addresses[:, lanes].reshape(-1), threads, halves.reshape(-1, 8))


OPCODES = {"mma": multiply, "ldmatrix": load_matrix, "stmatrix": store_matrix}
