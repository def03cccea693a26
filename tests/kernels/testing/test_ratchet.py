"""One kernel of each kind, compiled and emulated as `make kernel-gates` does: none may get worse unseen."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the extra `gpu` is not installed")

from compress.kernels.testing import __main__ as command
from compress.kernels.testing.configs import CORE
from compress.kernels.testing.gates import known_subjects


@pytest.mark.slow
def test_kernels_pass_their_gates_and_are_no_worse_than_they_were(tmp_path, capsys):
    if json.loads(Path(command.METRICS).read_text())["triton"] != command._triton():
        pytest.skip("the figures kept are of another Triton")
    status = command.main(["--core", "--jobs", "1", "--build", str(tmp_path)])
    assert status == 0, capsys.readouterr().out


def test_the_core_is_of_kernels_that_exist():
    assert set(CORE) <= {subject.config.name for subject in known_subjects()}


def test_no_waiver_is_left_that_no_kernel_needs():
    used = {
        pair for waived in json.loads(Path(command.METRICS).read_text())["waivers"].values() for pair in waived.items()
    }
    assert {pair for subject in known_subjects() for pair in subject.waived.items()} == used
