"""What a user gets to see when a run cannot go on: one line, an exit code, no traceback.

This file imports nothing of the package, so every folder may raise these.
"""

import errno
import re

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # how a full disk, or a used up share of it, is said
NO_MEMORY = re.compile(
    "allocate memory|out of memory|bad_alloc|could not create a primitive|failed to map segment|start new thread",
    re.IGNORECASE,
)  # the words of torch, oneDNN, the system's loader, and Python, whose threads have stacks
ASKED = re.compile(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)")  # torch on a CPU; on a GPU, and numpy
LONGEST = 1000  # characters of a line


class CompressError(Exception):
    """One line for the user: it names the thing that is wrong and the mend. `exit_code` is the process's."""

    exit_code = 3

    def __str__(self) -> str:
        """The line, fit to be printed: names in it may come from a file that somebody else has written."""
        return printable(super().__str__())


class InputError(CompressError):
    """The request cannot be meant: a missing model, a wrong sparsity, a format that cannot hold the result."""

    exit_code = 2


class RunError(CompressError):
    """The request is fine but cannot go on: no space, no memory, a numerical failure, a damaged file."""

    exit_code = 3


def printable(text: str) -> str:
    """`text` as one line of bounded length, in which whatever moves a cursor or colours a terminal is written out."""
    cut = text if len(text) <= LONGEST else text[:LONGEST] + " ..."
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in cut)


def failure(error: Exception, where: str) -> tuple[int, str]:
    """Exit code and line of any exception; `where` says how its traceback can be seen."""
    if isinstance(error, CompressError):
        return error.exit_code, str(error)
    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        return RunError.exit_code, _out_of_memory(str(error))
    if isinstance(error, OSError) and error.strerror:
        file = f": {error.filename}" if error.filename else ""
        if error.errno in NO_ROOM:
            return RunError.exit_code, f"no space left{file}: free some space and run the same command again"
        return RunError.exit_code, f"the system says {error.strerror.lower()}{file} ({where})"
    first = printable((str(error).strip() or type(error).__name__).splitlines()[0][:300])
    return RunError.exit_code, f"unexpected {type(error).__name__}: {first} ({where}; please report it)"


def _out_of_memory(said: str) -> str:
    """The line of a machine, or of a limit, without memory; `said`: by whoever wanted some."""
    asked = ASKED.search(said)
    wanted = ""
    if asked is not None:
        wanted = f" for {asked[2] or f'{int(asked[1]) / 2**20:.1f} MiB'} more"
    return (
        f"out of memory{wanted}: what is finished is kept. Take fewer or shorter --nsamples and --seqlen, methods without a "
        "Hessian (wanda, rtn), --dtype bfloat16 where it is float32, or a machine with more; --dry-run says what a run needs"
    )
