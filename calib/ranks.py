"""The processes that share one run: who has which sequences, who solves what, and how they hand things to one another.

torchrun starts them: `torchrun --nproc-per-node 2 --no-python compress run ...`. Nothing is summed on the way between
ranks. Everything that is summed has an owner, to whom all send what they have of it, a turn of sequences at a time, and
who adds it up in the order of the sequences. So no sum can depend on how many ranks there are.
"""

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from compress.errors import InputError, RunError

PATIENCE = timedelta(days=30)  # others may train for days meanwhile; a rank that is gone is noticed at once
FAILED = "compress/failed"  # in torchrun's store: how many ranks have ended with an error
EXIT_CODE = "compress/exit_code"  # of the first of them

GONE = "another rank is gone: finished blocks are kept, and the same command goes on, with any number of ranks"
CUT_OFF = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe", re.IGNORECASE)  # in what torch says then
INTERRUPTED = 130  # what a shell reports of a process ended by Ctrl-C

T = TypeVar("T")
Tensors = dict[str, Tensor]


class LostRank(RunError):
    """Another rank has ended. Without a line: it has said why itself, and this one ends with the same exit code."""

    def __init__(self, line: str = "", exit_code: int = RunError.exit_code):
        super().__init__(line)
        self.exit_code = exit_code


class Ranks:
    """This process among those of the run, and the device it computes on.

    By itself it is number 0 of 1, and nothing is sent.
    """

    def __init__(self, number: int = 0, count: int = 1, device: str = "cpu"):
        self.number, self.count, self.device = number, count, device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes, and talks to the user."""
        return self.number == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @cached_property
    def _mesh(self) -> DeviceMesh:
        return init_device_mesh(self.device, (self.count,))

    def own_folder(self, folder: Path) -> Path:
        """Where this rank keeps what is its own."""
        return folder if self.alone else folder / f"rank-{self.number}-of-{self.count}"

    def share(self, n: int) -> range:
        """Which of `n` sequences are this rank's: every `count`-th. Raises InputError if some rank would have none."""
        if n < self.count:
            raise InputError(f"{n} calibration sequences are too few for {self.count} ranks: raise --nsamples")
        return range(self.number, n, self.count)

    def turns(self, n: int) -> Iterator[tuple[int | None, list[tuple[int, int]]]]:
        """`n` sequences, one a rank at a time: the place of this rank's among its own (None: none is left for it), and
        the turn's (rank, sequence) in the order of the sequences.
        """
        for start in range(0, n, self.count):
            turn = [(index - start, index) for index in range(start, min(start + self.count, n))]
            yield (start // self.count if self.number < len(turn) else None), turn

    def gather(self, value: T) -> list[T]:
        """What each rank gives here, in their order; anything that JSON can hold."""
        if self.alone:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value), "utf-8"), dtype=torch.uint8)
        with _noticing():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
            dist.all_gather(sizes, torch.tensor([len(own)]))
            longest = max(int(size) for size in sizes)
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
            dist.all_gather(texts, torch.nn.functional.pad(own, (0, longest - len(own))))
        return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)]

    def agree(self, make: Callable[[], T]) -> T:
        """What `make` gives the first rank, for all of them; anything that JSON can hold."""
        return self.gather(make() if self.first else None)[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first rank does what is inside, then the others, who find what it has left on disk."""
        if not self.first:
            self.gather(None)
        yield
        if self.first:
            self.gather(None)

    def exchange(self, parcels: Sequence[Tensors]) -> list[Tensors]:
        """Send `parcels[r]` to rank r, and get what each rank has for this one, in their order."""
        if self.alone:
            return list(parcels)
        told = self.gather([_described(parcel) for parcel in parcels])  # [from][to]
        received = [_room(each[self.number]) for each in told]
        received[self.number] = parcels[self.number]
        transfers = []
        for other in range(self.count):
            if other != self.number:
                transfers += [dist.P2POp(dist.isend, each, other) for each in _bytes(parcels[other])]
                transfers += [dist.P2POp(dist.irecv, each, other) for each in _bytes(received[other])]
        with _noticing():
            for request in dist.batch_isend_irecv(transfers) if transfers else []:
                request.wait()
        return received

    def share_out(self, own: Tensors) -> list[Tensors]:
        """Show all ranks what each of them has, in their order."""
        if self.alone:
            return [own]
        shown = [_room(each) for each in self.gather(_described(own))]
        shown[self.number] = own
        with _noticing():
            for source, tensors in enumerate(shown):
                for each in _bytes(tensors):
                    dist.broadcast(each, source)
        return shown

    def deal_out(self, module: nn.Module, parameters: Collection[nn.Parameter]) -> None:
        """Leave each rank a share of frozen `parameters` of a module, which is whole only while it runs.

        This is torch's `fully_shard` (FSDP; ZeRO's third stage, arXiv:1910.02054). The ranks gather the module before its
        forward and its backward, and let go of what is not theirs afterwards: from now on all of them run it, or none does.
        """
        if not self.alone and parameters:
            from torch.distributed.fsdp import fully_shard

            others = set(module.parameters()).difference(parameters)
            fully_shard(module, mesh=self._mesh, reshard_after_forward=True, ignored_params=others)

    @contextlib.contextmanager
    def noticing(self) -> Iterator[None]:
        """Raise LostRank where what is inside ends because another rank has gone."""
        try:
            yield
        except RuntimeError as error:
            if self.alone or not CUT_OFF.search(str(error)):
                raise
            raise LostRank(GONE) from error

    def owners(self, costs: Mapping[str, float]) -> "Owners":
        """Who has each of several things, the dearest first to whoever has least to do; the same on every rank."""
        load, found = [0.0] * self.count, {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            found[name] = load.index(min(load))
            load[found[name]] += costs[name]
        return Owners(self, found)


@dataclass(frozen=True)
class Owners:
    """Which rank has what."""

    ranks: Ranks
    of: Mapping[str, int]

    def has(self, name: str) -> bool:
        """Whether this rank has it."""
        return self.ranks.alone or self.of[name] == self.ranks.number


ALONE = Ranks()
NOBODY_ELSE = Owners(ALONE, {})


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks of this run while the context lasts: those that torchrun has started, or this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(device=device)
        return
    store, number, count = next(rendezvous("env://"))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    before = signal.signal(signal.SIGTERM, _ended)  # how torchrun ends the others
    try:
        with _noticing():
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
        yield Ranks(number, count, device)
    except KeyboardInterrupt:
        if number:
            raise LostRank(exit_code=INTERRUPTED) from None
        raise
    except Exception as error:
        exit_code = int(getattr(error, "exit_code", RunError.exit_code))
        if (earlier := _failed_before(store, exit_code)) is not None:  # one line is enough
            raise LostRank(exit_code=earlier) from error
        if number and isinstance(error, RunError) and not isinstance(error, LostRank):
            raise RunError(f"rank {number}: {error}") from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def _failed_before(store: Any, exit_code: int) -> int | None:
    """The exit code that another rank has ended with; None: this is the first, and the others are told its own."""
    try:
        if store.add(FAILED, 1) > 1:
            return int(store.get(EXIT_CODE))
        store.set(EXIT_CODE, str(exit_code))
    except RuntimeError:  # the rank that kept the store has ended
        return exit_code
    return None


def _ended(*_: Any) -> None:
    raise LostRank("the system or torchrun has ended the run: the same command goes on, with any number of ranks")


@contextlib.contextmanager
def _noticing() -> Iterator[None]:
    """Turn the failure of a transfer into one line."""
    try:
        yield
    except RuntimeError as error:
        raise LostRank(GONE) from error


def _described(tensors: Tensors) -> dict[str, list[Any]]:
    return {
        name: [str(each.dtype).removeprefix("torch."), list(each.shape), each.device.type]
        for name, each in tensors.items()
    }


def _room(described: Mapping[str, list[Any]]) -> Tensors:
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        for name, (dtype, shape, device) in described.items()
    }


def _bytes(tensors: Tensors) -> list[Tensor]:
    """The memory of those that have any; not every backend sends every dtype."""
    return [each.contiguous().view(-1).view(torch.uint8) for each in tensors.values() if each.numel()]
