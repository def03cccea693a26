"""Instructions that move data between registers and memory, and those that order it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.kernels.testing.ptx_block import BITS, DTYPES, Block
from compress.kernels.testing.ptx_program import Instruction, Trap, UnsupportedPtx


def load(block: Block, i: Instruction) -> None:
    """ld: from parameters, global or shared memory."""
    if i.modifiers[0] == "param":
        name = i.register(1).strip("[] ")
        size = DTYPES[i.type].itemsize
        value = np.array([block.parameters[name] & (1 << 8 * size) - 1], BITS[size])
        block.write(i.register(0), np.repeat(value.view(DTYPES[i.type]), block.program.threads))
        return
    targets, dtype = i.vector(0), DTYPES[i.type]
    addresses = block.address(i.operands[1])
    if _space(i) == "global":
        values = block.memory.load("ld", addresses, block.active, dtype, len(targets))
    else:
        values = np.zeros((block.program.threads, len(targets)), dtype)
        if block.active.any():
            taken = addresses[block.active], block.threads[block.active]
            values[block.active] = block.shared.load("ld", *taken, dtype, len(targets))
    for place, target in enumerate(targets):
        block.write(target, values[:, place])


def store(block: Block, i: Instruction) -> None:
    """st: to global or shared memory."""
    values = np.stack([block.read(each, i.type) for each in i.vector(1)], 1)
    addresses = block.address(i.operands[0])
    if not block.active.any():
        return
    if _space(i) == "global":
        block.memory.store(addresses, block.active, values)
    else:
        block.shared.store("st", addresses[block.active], block.threads[block.active], values[block.active])


def copy(block: Block, i: Instruction) -> None:
    """cp.async: a copy from global to shared memory, its groups, and waiting for them."""
    if i.modifiers[:2] == ("async", "commit_group"):
        block.shared.commit()
    elif i.modifiers[:2] == ("async", "wait_group"):
        block.shared.wait(block.uniform(i.operands[0]))
    elif i.modifiers[:2] == ("async", "wait_all"):
        block.shared.commit()
        block.shared.wait(0)
    elif i.modifiers[0] == "async" and i.modifiers[1] in ("ca", "cg") and "shared" in i.modifiers[2]:
        _copy_async(block, i)
    else:
        raise UnsupportedPtx(f"{i.text}: only cp.async of sm_80")


def _copy_async(block: Block, i: Instruction) -> None:
    size = block.uniform(i.operands[2])
    wanted = block.read(i.operands[3], "s32") if len(i.operands) > 3 else np.full(block.program.threads, size)
    if not np.isin(wanted[block.active], (0, size)).all():
        raise UnsupportedPtx(f"{i.text}: part of a copy")
    if not block.active.any():
        return
    raw = block.memory.load(
        "cp.async", block.address(i.operands[1]), block.active & (wanted > 0), np.dtype(np.uint8), size
    )
    to, threads = block.address(i.operands[0])[block.active], block.threads[block.active]
    block.shared.copy(to, threads, raw[block.active])


@dataclass
class _Change:
    """What an atomic operation makes of an element."""

    dtype: np.dtype[Any]
    rule: Callable[[Any, int], Any]

    def __call__(self, old: Any, thread: int) -> Any:
        return self.rule(old, thread)


_RULES: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "exch": lambda _, new: new,
}


def atomic(block: Block, i: Instruction) -> None:
    """red and atom on global memory: add, and, or, xor, min, max, exch, cas; vectors one element after another."""
    returns = i.opcode == "atom"
    kind = next((m for m in i.modifiers if m in (*_RULES, "cas")), None)
    if _space(i) != "global" or kind is None or i.type.startswith(("f16", "bf16")):
        raise UnsupportedPtx(i.text)
    addresses = block.address(i.operands[1 if returns else 0])
    for place, value in enumerate(i.vector(2 if returns else 1)):
        change = _change(block, i, kind, value)
        at = addresses + place * change.dtype.itemsize
        old = block.memory.update(i.opcode, at, block.active, change)
        if returns:
            block.write(i.vector(0)[place], old)


def _change(block: Block, i: Instruction, kind: str, value: str) -> _Change:
    dtype, own = DTYPES[i.type], block.read(value, i.type)
    if kind == "cas":
        new = block.read(i.operands[3], i.type)
        return _Change(dtype, lambda now, thread: new[thread] if now == own[thread] else now)
    return _Change(dtype, lambda now, thread: _RULES[kind](now, own[thread]))


def barrier(block: Block, i: Instruction) -> None:
    """bar.sync and barrier.sync of all threads; bar.warp.sync."""
    if i.modifiers[0] == "warp":
        block.shared.warp_barrier()
    elif i.modifiers[:1] == ("sync",) or i.modifiers[:2] == ("cta", "sync"):
        if len(i.operands) > 1 and block.uniform(i.operands[1]) != block.program.threads:
            raise UnsupportedPtx(f"{i.text}: a barrier of some of the threads")
        if not block.active.all():
            raise Trap("a barrier that not all threads reach")
        block.shared.barrier()
    else:
        raise UnsupportedPtx(i.text)


def shuffle(block: Block, i: Instruction) -> None:
    """shfl.sync: a value of another lane of the warp, all 32 lanes in one segment."""
    kind, lane = i.modifiers[1], np.arange(32)
    if block.uniform(i.operands[3]) not in (31, 0) or not block.active.all():
        raise UnsupportedPtx(i.text)
    by = block.read(i.operands[2], "s32").reshape(-1, 32)
    source = {"bfly": lane ^ by, "down": lane + by, "up": lane - by, "idx": by & 31}[kind]
    inside = (source >= 0) & (source < 32)
    source = np.where(inside, source, lane)
    target, *valid = re.split(r"\s*\|\s*", i.register(0))
    values = block.read(i.operands[1], i.type).reshape(-1, 32)
    block.write(target, np.take_along_axis(values, source, 1).reshape(-1))
    if valid:
        block.write(valid[0], np.broadcast_to(inside, values.shape).reshape(-1))


def nothing(block: Block, i: Instruction) -> None:
    """Hints and fences: each instruction has ended before the next one starts."""


def _space(i: Instruction) -> str:
    spaces = [m for m in i.modifiers if m in ("global", "shared", "shared::cta", "local", "const")]
    if len(spaces) != 1 or spaces[0] in ("local", "const"):
        raise UnsupportedPtx(f"{i.text}: neither global nor shared memory")
    return spaces[0].partition(":")[0]


OPCODES = {
    "ld": load,
    "st": store,
    "cp": copy,
    "red": atomic,
    "atom": atomic,
    "bar": barrier,
    "barrier": barrier,
    "shfl": shuffle,
    **dict.fromkeys(("membar", "fence", "prefetch", "discard", "applypriority", "griddepcontrol"), nothing),
}
