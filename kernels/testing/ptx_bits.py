"""Instructions that move bits within registers: shifts, logic, permutations, fields."""

import numpy as np

from compress.kernels.testing.ptx_block import Array, Block
from compress.kernels.testing.ptx_program import Instruction, UnsupportedPtx


def _shifted_left(a: Array, by: Array) -> Array:
    return np.where(by < 8 * a.itemsize, a << np.minimum(by, 8 * a.itemsize - 1).astype(a.dtype), 0).astype(a.dtype)


def _shifted_right(a: Array, by: Array) -> Array:
    within = a >> np.minimum(by, 8 * a.itemsize - 1).astype(a.dtype)
    return within if a.dtype.kind == "i" else np.where(by < 8 * a.itemsize, within, 0).astype(a.dtype)


def shift(block: Block, i: Instruction) -> None:
    """shl and shr: amounts beyond the width leave zeros, or copies of the sign."""
    by = block.read(i.operands[2], "u32")
    rule = _shifted_left if i.opcode == "shl" else _shifted_right
    block.write(i.register(0), rule(block.read(i.operands[1], i.type), by))


def funnel_shift(block: Block, i: Instruction) -> None:
    """shf: the middle of two registers, shifted."""
    low, high = (block.read(o, "u32").astype(np.uint64) for o in i.operands[1:3])
    by = block.read(i.operands[3], "u32").astype(np.uint64)
    by = by & np.uint64(31) if "wrap" in i.modifiers else np.minimum(by, np.uint64(32))
    joined = high << np.uint64(32) | low
    result = joined >> by if i.modifiers[0] == "r" else joined << by >> np.uint64(32)
    block.write(i.register(0), result.astype(np.uint32))


def any_logic(block: Block, i: Instruction) -> None:
    """lop3: each bit of the result is looked up by three bits."""
    a, b, c = (block.read(o, "b32") for o in i.operands[1:4])
    table, result = block.uniform(i.operands[4]), np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    block.write(i.register(0), result)


def permute(block: Block, i: Instruction) -> None:
    """prmt: four bytes, each any of eight, or its sign."""
    if i.modifiers != ("b32",):
        raise UnsupportedPtx(i.text)
    low, high, selector = (block.read(o, "b32").astype(np.uint64) for o in i.operands[1:4])
    joined, result = high << np.uint64(32) | low, np.zeros(len(low), np.uint64)
    for place in range(4):
        chosen = selector >> np.uint64(4 * place) & np.uint64(15)
        byte = joined >> (chosen & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
        result |= np.where(chosen >> np.uint64(3), sign, byte) << np.uint64(8 * place)
    block.write(i.register(0), result.astype(np.uint32))


def extract(block: Block, i: Instruction) -> None:
    """bfe: some consecutive bits, extended by their sign if the type is signed."""
    values = block.read(i.operands[1], i.type)
    start, length = (np.minimum(block.read(o, "u32") & 255, 32).astype(np.int64) for o in i.operands[2:4])
    if values.itemsize != 4:
        raise UnsupportedPtx(i.text)
    length = np.minimum(length, 32 - start) if values.dtype.kind == "i" else length
    kept = values.astype(np.int64) >> start & (1 << length) - 1
    if values.dtype.kind == "i":
        kept = np.where(length > 0, kept << 64 - length >> 64 - length, 0)
    block.write(i.register(0), kept.astype(values.dtype))


def insert(block: Block, i: Instruction) -> None:
    """bfi.b32: put the low bits of one register somewhere into another."""
    if i.type != "b32":
        raise UnsupportedPtx(i.text)
    new, old, start, length = (block.read(o, "b32").astype(np.uint64) for o in i.operands[1:5])
    mask = ((np.uint64(1) << length) - np.uint64(1)) << start
    block.write(i.register(0), (old & ~mask | new << start & mask).astype(np.uint32))


def dot_bytes(block: Block, i: Instruction) -> None:
    """dp4a: a product of four bytes by four, added up."""
    kinds = [np.int8 if m == "s32" else np.uint8 for m in i.modifiers]
    a, b = (
        block.read(o, "b32").view(k).reshape(-1, 4).astype(np.int64)
        for o, k in zip(i.operands[1:3], kinds, strict=True)
    )
    total = (a * b).sum(1) + block.read(i.operands[3], "s32")
    block.write(i.register(0), total.astype(np.int32))


OPCODES = {
    "shl": shift,
    "shr": shift,
    "shf": funnel_shift,
    "lop3": any_logic,
    "prmt": permute,
    "bfe": extract,
    "bfi": insert,
    "dp4a": dot_bytes,
}
