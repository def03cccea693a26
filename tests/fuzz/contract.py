"""What any input may lead to: it works, or one line says what is wrong. Never code, a hang, a bomb, or a read elsewhere."""

import contextlib
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from compress.errors import CompressError

SECONDS = 20  # of computing for one input; the slowest sound one takes two
WAITING = 300  # seconds, whatever else the machine does: for what waits without computing
ROOM = 2 << 30  # bytes of addresses that one input may take beside what the process has
LONGEST = 2_000  # characters of a line
CALLS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.getaddrinfo",
         "pickle.find_class", "builtins.input"}  # fmt: skip


class Breach(AssertionError):
    """The contract does not hold."""


class _TooLong(BaseException):
    """Ends an input that takes too long; no `except Exception` takes it for a damaged file."""


class _Watch:
    """Sees what Python does meanwhile: audit hooks cannot be taken away, so there is one, switched on and off."""

    def __init__(self) -> None:
        self.folder: str | None = None  # nothing in it is code, and nothing in `outside` is read
        self.outside = ""
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in CALLS:
            self.seen.append(f"{event} {str(arguments)[:100]}")
        elif event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(self.outside):
            self.seen.append(f"{event} {arguments[0]}")
        elif event == "exec" and arguments[0].co_filename.startswith(self.folder):
            self.seen.append(f"{event} {arguments[0].co_filename}")


_WATCH = _Watch()


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """No more than so much time and memory."""

    def stop(*_: Any) -> None:
        raise _TooLong

    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WAITING)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + ROOM, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(run: Callable[[], object], folder: Path, outside: Path) -> str:
    """ "works", or the class of the one line that `run` ended in. Raises Breach for anything else.

    `folder`: of the input; `outside`: which it may not lead to.
    """
    _WATCH.seen, _WATCH.folder, _WATCH.outside = [], str(folder), str(outside)
    try:
        with _bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()
        how = "works"
    except CompressError as error:
        how, line = type(error).__name__, str(error)
        if not line.isprintable() or not 0 < len(line) <= LONGEST:
            raise Breach(f"no line to print: {line[:300]!r}") from error
    except _TooLong as error:
        raise Breach(f"hangs: {_where(error)}") from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Breach(f"{type(error).__name__} {str(error)[:200]!r}: {_where(error)}") from error
    finally:
        _WATCH.folder = None
    if _WATCH.seen:
        raise Breach(f"does what no file may ask for: {_WATCH.seen[0]}")
    return how


def _where(error: BaseException) -> str:
    """The last places of a traceback: of ours, and of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename and "/fuzz/" not in frame.filename]
    last = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*ours[-2:], *frames[-1:]]]
    return " ".join(dict.fromkeys(last))
