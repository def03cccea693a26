"""A limit on memory: one line that says what was wanted and what takes less, and a command that takes less ends."""

import re

import pytest
import torch
from commands import Command, Faults
from tiny import save_tiny

pytestmark = pytest.mark.slow
ROOM = 900 * 2**20  # for libraries and their threads; a Hessian of 16384 inputs and what crosses it take 2048 MiB


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    sizes = {"num_hidden_layers": 1, "intermediate_size": 2**14}
    return save_tiny(tmp_path_factory.mktemp("wide"), dtype=torch.bfloat16, **sizes)


def test_a_limit_is_one_line_and_what_takes_less_ends(wide, text_file, tmp_path):
    flags = ["--sparsity", "0.5", "--wbits", "4", "--group-size", "32", "--nsamples", "2", "--seqlen", "32"]
    command = ["run", wide, *flags, "--calib", text_file]
    tried = Command([*command, "--out", tmp_path / "a"], tmp_path, Faults(memory=ROOM)).finish()
    assert tried.code == 3 and "Traceback" not in tried.err, tried.err
    line = (
        r"error: out of memory( for \S+ MiB more)?: what is finished is kept\. Take fewer .*wanda, rtn.*--dry-run says"
    )
    assert re.match(line, tried.line), tried.line
    assert (tmp_path / "a" / "run" / "tokens.safetensors").is_file() and not list(tmp_path.rglob("*.partial"))
    less = [*command, "--pruner", "wanda", "--quantizer", "rtn", "--drift", "0", "--out", tmp_path / "b"]
    assert Command(less, tmp_path, Faults(memory=ROOM)).finish().code == 0
