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
