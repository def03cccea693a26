import subprocess
import sys

import pytest

from compress.calib.allocator import MAPPED, _glibc

PIECES = """
import torch
from compress.calib.allocator import MAPPED, map_large, return_freed
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
if {large}:
    map_large()
torch.ones(31 * 2**18)
before = resident()
pieces = [torch.ones({size} // 4) for _ in range(20)]
above = [torch.ones(1000) for _ in range(100)]
held = resident() - before
del pieces
if {trimmed}:
    return_freed()
print(held, resident() - before)
"""


def left(size, large=False, trimmed=False):
    done = subprocess.run(
        [sys.executable, "-c", PIECES.format(size=size, large=large, trimmed=trimmed)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    held, after = map(int, done.stdout.split())
    assert held >= 20 * size
    return after / held


@pytest.mark.skipif(_glibc() is None, reason="another allocator")
def test_what_is_freed_goes_back():
    assert left(2**20) > 0.5, "what this is about"
    assert left(2**20, trimmed=True) < 0.1
    assert left(MAPPED + 2**20) > 0.5
    assert left(MAPPED + 2**20, large=True) < 0.1
