"""Memory that is freed goes back to the system.

glibc keeps freed pieces of up to 32 MiB for itself, and they come to half a gigabyte while a wide layer is solved. To map
larger ones each time costs far less than what is done with them.
"""

import ctypes
import sys

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)
MAPPED = 4 * 2**20  # bytes


def map_large() -> None:
    """From now on, larger pieces are mapped on their own, and unmapped when they are freed."""
    if (libc := _glibc()) is not None:
        libc.mallopt(MMAP_THRESHOLD, MAPPED)


def return_freed() -> None:
    """Give the system what is free now."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is one that keeps memory so."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None
