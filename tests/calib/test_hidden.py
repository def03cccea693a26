import errno
import os

import pytest
import torch

from compress.calib.hidden import HiddenStates
from compress.errors import RunError


def test_states_beyond_the_limit_go_to_a_file_and_read_back_equal(tmp_path):
    first = torch.randn(1, 6, 4).bfloat16()
    small, large = HiddenStates(first, 3), HiddenStates(first, 3, tmp_path, limit=10)
    assert small.file is None
    assert large.file is not None
    assert not large.file.exists()  # its space is free again however the process ends
    for index in range(3):
        small[index] = large[index] = first * index
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))
    assert torch.equal(large[2], first * 2)
    large.close()
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_them_is_found_before_a_mapping_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        RunError, match=r"hidden_states\.bin takes .* MiB for hidden states, and .* MiB are free \(No space left"
    ):
        HiddenStates(torch.randn(1, 6, 4), 3, tmp_path, limit=10)
    assert not list(tmp_path.iterdir())
