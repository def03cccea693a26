"""Shared memory of one CTA: its bytes, copies under way, bank conflicts, and races.

Two accesses to a byte by different threads, one of them a write, have to be ordered: by `bar.sync` between them, or, in
one warp, by `bar.warp.sync`. Lock step hides what happens otherwise, so every byte remembers who touched it and when.
An asynchronous copy writes when it is waited for, and until then nobody may touch its bytes.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.kernels.testing.ptx_program import Program, Trap

Array = npt.NDArray[Any]

BANKS, BANK_BYTES = 32, 4
LINE = BANKS * BANK_BYTES  # bytes that one round can bring
WARP_BITS = 6  # a thread is warp << 6 | lane; lane 32: several of that warp
SEVERAL = 32
ANYBODY = 1 << 20  # threads of several warps


@dataclass
class Banks:
    """How many rounds the accesses of one kind take: at best one for each 128 bytes of a warp."""

    ideal: int = 0
    taken: int = 0

    @property
    def factor(self) -> float:
        """1 without conflicts."""
        return self.taken / self.ideal if self.ideal else 1.0


@dataclass
class _Past:
    """Of each byte, its last access: by whom, at which step."""

    who: Array
    step: Array

    @classmethod
    def none(cls, size: int) -> "_Past":
        return cls(np.zeros(size, np.int32), np.full(size, -1, np.int64))


@dataclass
class SharedMemory:
    """Bytes [size], all ones at first, so that what nobody wrote is not a number."""

    size: int
    program: Program
    trace: list[int]  # the instruction of each step; its length is the time
    banks: dict[str, Banks] = field(default_factory=dict)

    def __post_init__(self) -> None:
        warps = -(-self.program.threads // 32)
        self._bytes = np.full(-(-self.size // 16) * 16, 0xFF, np.uint8)
        self._grain = smallest_access(self.program)  # bytes that are always touched together share their past
        grains = -(-self.size // self._grain)
        self._writes, self._reads = _Past.none(grains), _Past.none(grains)
        self._in_flight = np.zeros(grains, bool)
        self._barrier, self._warp_barriers = 0, np.zeros(warps, np.int64)
        self._open: list[tuple[Array, Array, Array]] = []  # copies of no group yet: addresses, threads, bytes
        self._groups: list[list[tuple[Array, Array, Array]]] = []

    def barrier(self) -> None:
        """All threads have met: what came before is ordered before what comes after."""
        self._barrier = len(self.trace)

    def warp_barrier(self) -> None:
        """The threads of each warp have met."""
        self._warp_barriers[:] = len(self.trace)

    def load(self, opcode: str, addresses: Array, threads: Array, dtype: np.dtype[Any], count: int) -> Array:
        """[len(threads), count] of consecutive elements from each address."""
        grains = self._grains(addresses, dtype.itemsize * count)
        self.count(opcode, addresses, threads, dtype.itemsize * count)
        who = _coded(threads)[:, None]
        self._check_order(self._writes, grains, who, "reads", "wrote")
        self._mark(self._reads, grains, who)
        return self._bytes.view(dtype)[(addresses // dtype.itemsize)[:, None] + np.arange(count)]

    def store(self, opcode: str, addresses: Array, threads: Array, values: Array) -> None:
        """Write [len(threads), count] elements to each address."""
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(addresses), -1)
        self._check_write(opcode, addresses, threads, raw.shape[1])
        self._write(addresses, threads, raw)

    def copy(self, addresses: Array, threads: Array, raw: Array) -> None:
        """Start a copy of bytes [len(threads), size]; they arrive when their group is waited for."""
        self._in_flight[self._check_write("cp.async", addresses, threads, raw.shape[1])] = True
        self._open.append((addresses, threads, raw))

    def commit(self) -> None:
        """Close a group of copies."""
        self._groups.append(self._open)
        self._open = []

    def wait(self, remaining: int) -> None:
        """Let all groups but the last `remaining` arrive."""
        while len(self._groups) > remaining:
            for addresses, threads, raw in self._groups.pop(0):
                self._in_flight[self._covered(addresses, raw.shape[1])] = False
                self._write(addresses, threads, raw)

    def count(self, opcode: str, addresses: Array, threads: Array, size: int) -> None:
        """Note the rounds that an access takes: a warp's 128 bytes in one, if no two words share a bank."""
        banks = self.banks.setdefault(opcode, Banks())
        aligned = addresses - addresses.min() // LINE * LINE  # a kernel's loop repeats few patterns
        taken, ideal = _rounds(aligned.tobytes(), threads.tobytes(), size)
        banks.taken += taken
        banks.ideal += ideal

    def _covered(self, addresses: Array, size: int) -> Array:
        return addresses[:, None] // self._grain + np.arange(size // self._grain)

    def _grains(self, addresses: Array, size: int) -> Array:
        """[threads, n] of what is touched, if it may be."""
        if (addresses % size).any():
            raise Trap(f"misaligned: {size} bytes of shared memory at {int(addresses[addresses % size != 0][0])}")
        if (addresses < 0).any() or (addresses + size > self.size).any():
            raise Trap(f"out of bounds: shared memory has {self.size} bytes, accessed at {int(addresses.max())}")
        grains = self._covered(addresses, size)
        if self._in_flight[grains].any():
            raise Trap("an access to shared memory that an asynchronous copy has not filled yet: wait for its group")
        return grains

    def _check_write(self, opcode: str, addresses: Array, threads: Array, size: int) -> Array:
        """The grains of a write, if nobody else is to be waited for."""
        grains, who = self._grains(addresses, size), _coded(threads)[:, None]
        self.count(opcode, addresses, threads, size)
        self._check_order(self._writes, grains, who, "writes", "wrote")
        self._check_order(self._reads, grains, who, "writes", "read")
        return grains

    def _check_order(self, past: _Past, grains: Array, who: Array, does: str, did: str) -> None:
        step = past.step[grains]
        if not (step >= self._barrier).any():
            return
        before = past.who[grains]
        race = self._unordered(step, before, who)
        if race.any():
            thread, grain = (int(i[0]) for i in np.nonzero(race))
            raise Trap(
                f"race: thread {_named(int(who[thread, 0]))} {does} byte {int(grains[thread, grain]) * self._grain} of"
                f" shared memory, which {_named(int(before[thread, grain]))} {did} without a barrier between, in"
                f" `{self.program.instructions[self.trace[int(step[thread, grain])]].text}`"
            )

    def _unordered(self, step: Array, before: Array, who: Array) -> Array:
        """Whether accesses at `step` by `before` are ordered neither by a barrier nor by being of the same thread."""
        warp = who >> WARP_BITS
        met = (before >> WARP_BITS == warp) & (step < self._warp_barriers[warp])
        return (step >= self._barrier) & (before != who) & ~met

    def _write(self, addresses: Array, threads: Array, raw: Array) -> None:
        places = addresses[:, None] + np.arange(raw.shape[1])
        self._bytes[places] = raw
        if (self._bytes[places] != raw).any():
            raise Trap("race: threads write different values to the same byte of shared memory at once")
        self._mark(self._writes, self._covered(addresses, raw.shape[1]), _coded(threads)[:, None])

    def _mark(self, past: _Past, grains: Array, who: Array) -> None:
        """Note an access; where several threads touched a place since they last met, it remembers that."""
        step, earlier = past.step[grains], past.who[grains]
        together = np.broadcast_to(who, grains.shape)
        if (step >= self._barrier).any():
            together = np.where(self._unordered(step, earlier, who), _merged(earlier, who), who)
        past.who[grains] = together
        lost = past.who[grains] != together
        if lost.any():  # to another thread of this very instruction
            np.maximum.at(past.who, grains[lost], _merged(past.who[grains], together)[lost])
        past.step[grains] = len(self.trace) - 1


@lru_cache(4096)
def _rounds(addresses: bytes, threads: bytes, size: int) -> tuple[int, int]:
    """Rounds that an access takes, and how many it would take without conflicts. Both arguments: int64 [threads]."""
    phase = np.frombuffer(threads, np.int64) // min(32, LINE // size)
    words = np.frombuffer(addresses, np.int64)[:, None] + np.arange(0, max(size, BANK_BYTES), BANK_BYTES)
    keys = np.unique(phase[:, None] << 32 | words // BANK_BYTES)
    used = (keys >> 32) * BANKS + keys % BANKS
    rounds = np.bincount(used, minlength=(int(phase.max()) + 1) * BANKS).reshape(-1, BANKS).max(1)
    return int(rounds.sum()), int((rounds > 0).sum())


def smallest_access(program: Program) -> int:
    """The fewest bytes that one thread of a program touches in shared memory at once."""
    sizes = [16]
    for i in program.instructions:
        if i.opcode in ("ld", "st") and any(m.startswith("shared") for m in i.modifiers):
            sizes.append(int(i.type[1:]) // 8 * len(i.vector(1 if i.opcode == "st" else 0)))
        elif i.opcode == "cp" and len(i.operands) > 2:
            sizes.append(int(i.register(2), 0))
    return min(sizes)


def _coded(threads: Array) -> Array:
    return ((threads >> 5) << WARP_BITS | threads & 31).astype(np.int32)


def _merged(a: Array, b: Array) -> Array:
    """Who two accessors are together."""
    same_warp = a >> WARP_BITS == b >> WARP_BITS
    return np.where(a == b, a, np.where(same_warp, (b >> WARP_BITS) << WARP_BITS | SEVERAL, ANYBODY))


def _named(who: int) -> str:
    if who >= ANYBODY:
        return "threads of several warps"
    lane = who & (1 << WARP_BITS) - 1
    return f"several threads of warp {who >> WARP_BITS}" if lane == SEVERAL else str((who >> WARP_BITS) * 32 + lane)
