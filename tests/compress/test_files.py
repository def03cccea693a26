import errno

import pytest
import torch

from compress import files
from compress.errors import RunError
from compress.files import disk_errors, write_tensors, write_text


def test_a_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*file/x.* \(Not a directory\): choose another --out"):
        write_text(tmp_path / "file" / "x", "text")


def test_errors_that_are_not_the_disks_pass():
    with pytest.raises(ConnectionRefusedError), disk_errors("x"):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "no")


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (28, r"no space left in .* \(.* free\) to write a\.safetensors, which takes 4 B: "),
        (27, "File too large"),
        (30, "may not write"),
    ],
)
def test_the_systems_error_inside_that_of_safetensors_is_found(tmp_path, monkeypatch, number, line):
    def fail(*_, **__):
        raise ValueError(f"Error while serializing: I/O error: something (os error {number})")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(RunError, match=line):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})


def test_who_may_read_tensors_is_what_the_umask_says(tmp_path):
    write_text(tmp_path / "text", "")
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "text").stat().st_mode
