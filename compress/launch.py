"""`compress run --ranks N`: several ranks on this machine, by what torchrun is made of, with one line where one fails."""

import logging
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from compress.errors import InputError, RunError

INTERRUPTED = 130


def launched() -> bool:
    """Whether this process is one of several ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `compress` with `arguments` as `count` ranks and return the exit code. They share this machine's cores.

    Raises InputError for fewer than one.
    """
    if count < 1:
        raise InputError(f"--ranks {count} is too few: give 1 or more")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say what is wrong
    config = LaunchConfig(
        1, 1, count, run_id="compress", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "compress", *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return max(
            [code for code in codes if code > 0], default=RunError.exit_code
        )  # those the system killed have none
    except (SignalException, KeyboardInterrupt):
        return INTERRUPTED
    return 0
