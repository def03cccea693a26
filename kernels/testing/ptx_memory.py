"""Global memory of named tensors with their own bounds, and what accesses to it cost."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.kernels.testing.ptx_program import Trap

Array = npt.NDArray[Any]

GAP = 512  # bytes between tensors, which belong to none; also their alignment
SECTOR = 32  # bytes: what memory hands out at least
NONE = -(2**62)  # the address of a thread that takes no part


@dataclass
class Traffic:
    """What all requests of one kind to one tensor have asked for. A request is one instruction of one warp."""

    requests: int = 0
    sectors: int = 0  # of 32 bytes, each counted once a request
    wanted: int = 0  # distinct bytes of each request

    @property
    def efficiency(self) -> float:
        """The part of the fetched bytes that was wanted, at most 1."""
        return self.wanted / (SECTOR * self.sectors) if self.sectors else 1.0


@dataclass(frozen=True)
class Region:
    """Where a tensor lies."""

    name: str
    start: int
    end: int
    writable: bool


class GlobalMemory:
    """Bytes that tensors were copied into. Accesses outside of them, misaligned ones and stores to inputs trap."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.traffic: dict[tuple[str, str], Traffic] = {}  # of (tensor, opcode)
        self.block = 0  # which CTA is running
        self._tensors: list[Tensor] = []
        self._written: set[str] = set()
        self._bytes = np.zeros(GAP, np.uint8)
        self._stored_by = np.zeros(0, np.int32)  # of each byte, the CTA whose plain store it holds; -1: none

    def add(self, name: str, tensor: Tensor, writable: bool) -> int:
        """Copy a CPU tensor in, strided as it is; returns its address. All are added before anything runs."""
        values = _span(tensor)
        start = len(self._bytes)
        self.regions.append(Region(name, start, start + len(values), writable))
        self._tensors.append(tensor)
        padding = np.full(GAP + -len(values) % GAP, 0xFF, np.uint8)
        self._bytes = np.concatenate([self._bytes, values, padding])
        self._stored_by = np.full(len(self._bytes), -1, np.int32)
        return start

    def copy_back(self) -> None:
        """Give the tensors that were written what memory holds of them now."""
        for region, tensor in zip(self.regions, self._tensors, strict=True):
            if region.name in self._written:
                _span(tensor)[:] = self._bytes[region.start : region.end]

    def load(self, opcode: str, addresses: Array, active: Array, dtype: np.dtype[Any], count: int) -> Array:
        """[threads, count] of `count` consecutive elements a thread; zeros where it is not active."""
        at = addresses[active]
        self._check(at, dtype.itemsize * count, store=False)
        self._count(opcode, addresses, active, dtype.itemsize * count)
        values = np.zeros((len(addresses), count), dtype)
        values[active] = self._view(dtype)[_elements(at, dtype.itemsize, count)]
        written = self._stored_by[at] if len(at) else at
        if ((written >= 0) & (written != self.block)).any():
            raise Trap("a load of what another CTA has stored in the same launch")
        return values

    def store(self, addresses: Array, active: Array, values: Array) -> None:
        """Write [threads, count]; two CTAs may not store to the same byte."""
        at, size = addresses[active], values.dtype.itemsize * values.shape[1]
        self._check(at, size, store=True)
        self._count("st", addresses, active, size)
        taken = at[:, None] + np.arange(size)
        if ((self._stored_by[taken] >= 0) & (self._stored_by[taken] != self.block)).any():
            raise Trap("two CTAs store to the same address")
        self._stored_by[taken] = self.block
        places = _elements(at, values.dtype.itemsize, values.shape[1])
        self._view(values.dtype)[places] = values[active]
        if (self._view(values.dtype)[places] != values[active]).any() and values.dtype.kind != "f":
            raise Trap("two threads store different values to the same address")

    def update(self, opcode: str, addresses: Array, active: Array, change: Any) -> Array:
        """Atomically replace each element by `change(element, thread)`, one thread after another; returns the old ones.

        `change` has the attribute `dtype`, of the elements.
        """
        at = addresses[active]
        self._check(at, change.dtype.itemsize, store=True)
        self._count(opcode, addresses, active, change.dtype.itemsize)
        elements, old = self._view(change.dtype), np.zeros(len(addresses), change.dtype)
        for thread in np.flatnonzero(active):
            place = addresses[thread] // change.dtype.itemsize
            old[thread] = elements[place]
            with np.errstate(over="ignore"):
                elements[place] = change(elements[place], thread)
        return old

    def _view(self, dtype: np.dtype[Any]) -> Array:
        return self._bytes.view(dtype)

    def _check(self, at: Array, size: int, store: bool) -> None:
        if not len(at):
            return
        if (at % size).any():
            raise Trap(f"misaligned: {size} bytes at {int(at[at % size != 0][0]):#x}")
        starts = np.array([r.start for r in self.regions])
        owner = np.searchsorted(starts, at, side="right") - 1
        ends = np.array([r.end for r in self.regions])
        outside = (owner < 0) | (at + size > ends[owner])
        if outside.any():
            worst = int(at[outside][0])
            near = self.regions[max(int(owner[outside][0]), 0)]
            beyond = f"byte {worst - near.start} of {near.name}, which has {near.end - near.start}"
            raise Trap(f"out of bounds: {int(outside.sum())} threads access {size} bytes, the first at {beyond}")
        if store:
            for region in (self.regions[i] for i in np.unique(owner)):
                if not region.writable:
                    raise Trap(f"a store to {region.name}, which is no output")
                self._written.add(region.name)

    def _count(self, opcode: str, addresses: Array, active: Array, size: int) -> None:
        if not active.any():
            return
        first = int(addresses[active][0])
        name = next(r.name for r in self.regions if r.start <= first < r.end)
        traffic = self.traffic.setdefault((name, opcode), Traffic())
        requests, sectors, distinct = _cost(np.where(active, addresses - first // GAP * GAP, NONE).tobytes())
        traffic.requests += requests
        traffic.sectors += sectors
        traffic.wanted += distinct * size


@lru_cache(4096)
def _cost(addresses: bytes) -> tuple[int, int, int]:
    """Warps that take part, sectors and distinct addresses, each counted once a warp. int64 [threads]."""
    lanes = np.frombuffer(addresses, np.int64).reshape(-1, 32)
    sectors = np.where(lanes == NONE, NONE, lanes // SECTOR)
    return int((lanes != NONE).any(1).sum()), _distinct(sectors), _distinct(lanes)


def _span(tensor: Tensor) -> Array:
    """The bytes from a tensor's first element to its last, in its own memory."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    flat = tensor.detach().as_strided((length,), (1,), tensor.storage_offset())
    return flat.view(torch.uint8).numpy()


def _elements(at: Array, itemsize: int, count: int) -> Array:
    return (at // itemsize)[:, None] + np.arange(count)


def _distinct(rows: Array) -> int:
    """How many different numbers each row has, in sum; NONE does not count."""
    ordered = np.sort(rows, 1)
    new = np.concatenate([np.ones((len(rows), 1), bool), ordered[:, 1:] != ordered[:, :-1]], 1)
    return int((new & (ordered != NONE)).sum())
