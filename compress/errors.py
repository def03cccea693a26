"""What a user gets to see when a run cannot go on: one line, an exit code, no traceback.

This file imports nothing, so every folder may raise these.
"""


class CompressError(Exception):
    """One line for the user: it names the thing that is wrong and the mend. `exit_code` is the process's."""

    exit_code = 3


class InputError(CompressError):
    """The request cannot be meant: a missing model, a wrong sparsity, a format that cannot hold the result."""

    exit_code = 2


class RunError(CompressError):
    """The request is fine but cannot go on: no space, no memory, a numerical failure, a damaged file."""

    exit_code = 3


def failure(error: Exception, where: str) -> tuple[int, str]:
    """Exit code and line of any exception; `where` says how its traceback can be seen."""
    if isinstance(error, CompressError):
        return error.exit_code, str(error)
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error).lower():
        mend = "use fewer or shorter --nsamples/--seqlen, or a machine with more memory; finished blocks are kept"
        return RunError.exit_code, f"out of memory: {mend}"
    if isinstance(error, OSError) and error.strerror:
        file = f": {error.filename}" if error.filename else ""
        return RunError.exit_code, f"the system says {error.strerror.lower()}{file} ({where})"
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return RunError.exit_code, f"unexpected {type(error).__name__}: {first} ({where}; please report it)"
