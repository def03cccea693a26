"""A disk that fills up, at any stage: one line, and with room the same command ends as if nothing had been."""

import re
import shutil
import subprocess

import pytest
from commands import Command, Faults

LINE = r"error: (no space left in \S+ \(\S+ \S+ free\) to write \S+|\S+ takes \S+ MiB for hidden states, and \S+ MiB are free)"
STEP = 64 * 2**10  # bytes more each time
pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(out):
    """A disk of a few pages at `out`, and what gives it another size."""
    out.mkdir()

    def mount(*options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", *options, "tmpfs", str(out)], capture_output=True, text=True
        )

    if shutil.which("mount") is None or (failed := mount(f"size={STEP}")).returncode:
        pytest.skip(f"no disk of a given size may be mounted here: {failed.stderr.strip()}")
    yield lambda size: mount(f"remount,size={size}")
    subprocess.run(["umount", str(out)], check=True)


def test_room_given_bit_by_bit_ends_in_the_same_bytes(every_stage, straight, digested, out, small_disk):
    full, command = set(), [*every_stage, "--out", out]
    for size in range(STEP, 100 * STEP, STEP):
        small_disk(size)
        tried = Command(command, out.parent, Faults(save_seconds=0)).finish()
        if tried.code == 0:
            break
        assert tried.code == 3 and "Traceback" not in tried.err, tried.err
        assert re.match(LINE, tried.line), tried.line
        assert not list(out.rglob("*.partial")), "what has no room is not left behind"
        full.add(re.search(r"(?:to write|error: (?!no )) ?(\S+?)[,:]? ", tried.line)[1])
    assert tried.code == 0 and digested(out) == straight
    assert len(full) >= 4


@pytest.mark.parametrize("limit", [1_000, 4_000, 20_000, 100_000])
def test_a_file_that_may_not_grow_is_one_line(every_stage, straight, digested, out, limit):
    command = [*every_stage, "--out", out]
    tried = Command(command, out.parent, Faults(save_seconds=0, file_size=limit)).finish()
    assert tried.code == 3 and "Traceback" not in tried.err, tried.err
    assert re.match(r"error: .*\(File too large\)", tried.line), tried.line
    ended = Command(command, out.parent, Faults(save_seconds=0)).finish()
    assert ended.code == 0 and digested(out) == straight
