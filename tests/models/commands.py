"""`compress` in processes of their own, each forked from one that has imported everything: many of them cost little.

What may go wrong around a process is arranged in it before it begins (`Faults`).
"""

import contextlib
import importlib
import itertools
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

PRELOADED = (
    "compress.cli compress.commands compress.trainer compress.tracker compress.recover.adapters compress.quantize.gptq "
    "compress.prune.gblm compress.prune.dsnot peft.tuners.lora transformers.models.llama.modeling_llama"
).split()
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.truncate", "os.link")
COUNT = itertools.count()


@dataclass(frozen=True)
class Faults:
    """What a process has to live with. Sizes in bytes."""

    memory: int | None = None  # address space beyond what it has when it begins
    file_size: int | None = None  # of any one file
    clock: int | None = None  # seed of a wall clock that jumps back and forth
    save_seconds: float | None = None  # between two states of a training
    mortal: int | None = None  # seed: just before a file is made, renamed or removed, one time in 40, it is killed
    end: tuple[str, str] | None = (
        None  # just before this happens to a file of this name, such as os.remove, it is killed
    )

    def arrange(self) -> None:
        """Let them begin, in this process."""
        if self.memory is not None:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + self.memory, resource.RLIM_INFINITY))
        if self.file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_size, resource.RLIM_INFINITY))
        if self.clock is not None:
            jumps = random.Random(self.clock)
            time.time = lambda: jumps.uniform(0, 4e9)
        if self.save_seconds is not None:
            importlib.import_module("compress.trainer").SAVE_SECONDS = self.save_seconds
        if self.mortal is not None:
            dice = random.Random(self.mortal)
            sys.addaudithook(_killing(lambda *_: not dice.randrange(40)))
        if self.end is not None:
            sys.addaudithook(_killing(lambda event, files: event == self.end[0] and self.end[1] in files))


def _killing(chosen: Callable[[str, set[str]], bool]):
    """What Python tells of each change of a file system, and ends the process at those `chosen` by event and names."""

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGES:
            names = {Path(os.fsdecode(each)).name for each in arguments if isinstance(each, str | bytes | os.PathLike)}
            if chosen(event, names):
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


class Command:
    """`compress ARGUMENTS` under way. `folder`: for what it prints."""

    def __init__(self, arguments, folder, faults=Faults()):
        self.printed = [folder / f"{next(COUNT)}.{name}" for name in ("out", "err")]
        arguments = [str(argument) for argument in arguments]
        self.process = _context().Process(target=_run, args=(arguments, self.printed, faults))
        self.process.start()
        self._cpu_seconds = 0.0

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)

    @property
    def cpu_seconds(self) -> float:
        """What its first thread has had of a processor so far, which other work on the machine does not change."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it is over: what was last seen
            self._cpu_seconds = int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[0]) / 1e9
        return self._cpu_seconds

    def ended(self, seconds: float) -> bool:
        """Whether it is over after so many seconds at most."""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def finish(self, seconds: float = 600) -> "Command":
        """Wait for its end."""
        assert self.ended(seconds), self.err
        return self

    def reaches(self, moment: Callable[[], bool]) -> bool:
        """Wait for a moment of its run. False: it was over before."""
        while not self.ended(0.002):
            if moment():
                return True
        return False

    def stopped_at(self, cpu_seconds: float, number: int) -> bool:
        """Send it a signal once it has had so much of a processor, and wait for its end. False: it was over before."""
        if not self.reaches(lambda: self.cpu_seconds >= cpu_seconds):
            return False
        self.signal(number)
        self.finish()
        return True

    @property
    def code(self) -> int:
        """Its exit code; negative: the signal that ended it."""
        return self.process.exitcode

    @property
    def out(self) -> str:
        """What it printed on stdout."""
        return self.printed[0].read_text()

    @property
    def err(self) -> str:
        """The same for stderr."""
        return self.printed[1].read_text()

    @property
    def line(self) -> str:
        """The last line of stderr, which says how it ended."""
        return (self.err.strip().splitlines() or [""])[-1]


def _context():
    """What forks from a process that has imported everything, on one thread, and has done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *PRELOADED])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"):
        forkserver.ensure_running()
    return context


def _run(arguments: list[str], printed: list[Path], faults: Faults) -> None:
    for descriptor, file in zip((1, 2), printed, strict=True):
        opened = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["compress", *arguments]
    faults.arrange()
    importlib.import_module("compress.__main__").main()
