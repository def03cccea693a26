import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from commands import Command, Faults
from tiny import save_tiny

EVERY_STAGE = {
    "prune": "--sparsity 0.5 --pruner gblm --refine dsnot",
    "quantize": "--wbits 2 --quantizer gptq --group-size 32",
    "recover": "--recover low-rank,lrec --recover-for 256tokens --set lrec.seqlen=32 --set lrec.batch_size=2 "
    "--set lrec.lr=0.001",
    "calibrate": "--nsamples 4 --seqlen 32",
    "measure": "--eval-windows 2",
}


@pytest.fixture(scope="session")
def two_blocks(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("two"), num_hidden_layers=2, dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def every_stage(two_blocks, text_file):
    """Arguments of a run that goes through every stage."""
    flags = " ".join(EVERY_STAGE.values()).split()
    return ["run", two_blocks, *flags, "--calib", text_file, "--eval", text_file]


@pytest.fixture(scope="session")
def straight(every_stage, tmp_path_factory) -> dict[str, str]:
    """What that run ends in if nothing happens to it: the digest of each file of its checkpoint."""
    folder = tmp_path_factory.mktemp("straight")
    done = Command([*every_stage, "--out", folder / "out"], folder, Faults(save_seconds=0)).finish()
    assert done.code == 0, done.err
    return digests(folder / "out")


@pytest.fixture(scope="session")
def digested():
    return digests


def digests(out: Path) -> dict[str, str]:
    files = [file for file in sorted(out.rglob("*")) if file.is_file() and out / "run" not in file.parents]
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def out(tmp_path) -> Path:
    """A folder always of the same name, since a checkpoint's card says it."""
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    return tmp_path / "out"
