"""What a user gets to see of exceptions that are not ours."""

import errno

import pytest

from compress.errors import InputError, RunError, failure

WHERE = "--debug shows where"
CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 33554432 bytes. Error code 12"
GPU = "CUDA out of memory. Tried to allocate 1.25 GiB. GPU 0 has a total capacity of 79 GiB"


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (RuntimeError(CPU), " for 32.0 MiB more"),
        (RuntimeError(GPU), " for 1.25 GiB more"),
        (MemoryError("Unable to allocate 3.00 GiB for an array with shape (1, 2)"), " for 3.00 GiB more"),
        (MemoryError(), ""),
        (RuntimeError("std::bad_alloc"), ""),
        (RuntimeError("could not create a primitive"), ""),
        (RuntimeError("can't start new thread"), ""),
        (ImportError("x.so: failed to map segment from shared object"), ""),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
    ],
)
def test_every_way_to_have_no_memory_is_one_line_with_what_takes_less(error, wanted):
    code, line = failure(error, WHERE)
    assert code == RunError.exit_code
    assert line.startswith(f"out of memory{wanted}: what is finished is kept. Take fewer or shorter --nsamples")
    assert "--dry-run" in line and "\n" not in line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_bug_wherever_it_is_met(number):
    line = "no space left: /a/b: free some space and run the same command again"
    assert failure(OSError(number, "No space left on device", "/a/b"), WHERE) == (3, line)


def test_ours_are_told_as_they_are_and_others_asked_to_be_reported():
    assert failure(InputError("x"), WHERE) == (2, "x")
    assert failure(KeyError("x"), WHERE) == (3, f"unexpected KeyError: 'x' ({WHERE}; please report it)")
    assert "\n" not in failure(ValueError("a\nb"), WHERE)[1]
