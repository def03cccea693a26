"""Models that are damaged, that say what is not so, or that go away: one line each."""

import json
import re
import shutil
import signal

import pytest
import torch
from commands import Command, Faults
from safetensors.torch import load_file, save_file
from tiny import save_tiny

INDEX = "model.safetensors.index.json"
NOT_FINITE = float("nan")


@pytest.fixture
def sharded(tmp_path):
    """A model in three shards with their index."""
    folder = save_tiny(tmp_path / "sharded", num_hidden_layers=2, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[shard::3]}
        save_file(part, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def shard(folder):
    return folder / "model-00002-of-00003.safetensors"


def truncate(folder):
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data[: len(data) // 2])


def flip(folder):
    data = bytearray(shard(folder).read_bytes())
    data[1] ^= 0x40  # of the header's length
    shard(folder).write_bytes(data)


def misname(folder):
    said = json.loads((folder / INDEX).read_text())
    said["weight_map"] = dict.fromkeys(said["weight_map"], "../elsewhere.safetensors")
    (folder / INDEX).write_text(json.dumps(said))


def misplace(folder):
    """Let the index say that all lies in the first shard."""
    said = json.loads((folder / INDEX).read_text())
    said["weight_map"] = dict.fromkeys(said["weight_map"], "model-00001-of-00003.safetensors")
    (folder / INDEX).write_text(json.dumps(said))


def lie(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "code", "line"),
    [
        (truncate, 2, r"model-00002-of-00003\.safetensors is not a whole safetensors file .*download it again"),
        (flip, 2, r"model-00002-of-00003\.safetensors is not a whole safetensors file .*download it again"),
        (lambda folder: shard(folder).unlink(), 2, r"lacks model-00002-of-00003\.safetensors"),
        (misname, 2, r"index\.json points outside its folder"),
        (misplace, 2, r"lacks \S+ \(\d+ tensors\): download it again"),
        (lie(hidden_size=48), 2, r"\S+ is \[.*\] in .* but config\.json says \[.*\]"),
        (lie(num_hidden_layers=5), 2, r"holds nothing of block 2, but config\.json says 5 blocks: download it again"),
        (lie(vocab_size=2**40), 2, r"config\.json"),
    ],
)
def test_damaged_models_are_named_before_any_work(sharded, text_file, tmp_path, damage, code, line):
    damage(sharded)
    flags = ["--wbits", "4", "--group-size", "16", "--calib", text_file, "--nsamples", "2", "--seqlen", "32"]
    done = Command(["run", sharded, *flags, "--out", tmp_path / "out"], tmp_path).finish()
    assert done.code == code and "Traceback" not in done.err, done.err
    assert re.match(f"error: .*{line}", done.line), done.line
    assert not (tmp_path / "out").exists()


def poisoned(two_blocks, folder, name):
    shutil.copytree(two_blocks, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5] = NOT_FINITE
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "flags", "line"),
    [
        ("model.layers.1.mlp.up_proj.weight", "--wbits 4", r"model\.layers\.1\.mlp\.up_proj holds NaN or infinity"),
        ("model.embed_tokens.weight", "--wbits 4", r"the inputs of model\.layers\.0\.\S+ hold NaN or infinity"),
        ("model.layers.1.mlp.up_proj.weight", "--sparsity 0.5 --pruner gblm", r"a gradient is NaN or infinite"),
        ("model.norm.weight", "--sparsity 0.5 --pruner gblm", r"a gradient is NaN or infinite"),
    ],
)
def test_what_is_not_a_number_is_named(two_blocks, tmp_path, name, flags, line):
    folder = poisoned(two_blocks, tmp_path / "m", name)
    (text := tmp_path / "text.txt").write_text("<pad> w3 w4 w5 " * 100)  # the first row of the embeddings, among others
    more = ["--group-size", "32", "--calib", text, "--nsamples", "2", "--seqlen", "32", "--out", tmp_path / "out"]
    done = Command(["run", folder, *flags.split(), *more], tmp_path).finish()
    assert done.code == 3 and "Traceback" not in done.err, done.err
    assert re.match(f"error: {line}", done.line), done.line
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["0000.json", "0000-1.json"])
def test_a_model_that_vanishes_is_named_and_the_run_goes_on_once_it_is_back(
    every_stage, straight, digested, two_blocks, out, stage
):
    command, away = [*every_stage, "--out", out], two_blocks.with_name("away")
    running = Command(command, out.parent, Faults(save_seconds=0))
    assert running.reaches((out / "run" / "blocks" / stage).exists)
    running.signal(signal.SIGSTOP)
    two_blocks.rename(away)
    try:
        running.signal(signal.SIGCONT)
        running.finish()
        again = Command(command, out.parent).finish()
    finally:
        away.rename(two_blocks)
    assert running.code == 3 and "Traceback" not in running.err, running.err
    assert re.search(rf"cannot read .*{two_blocks}\S*[ :].*restore or download", running.line), running.line
    assert again.code == 2 and str(two_blocks) in again.line
    assert not (out / "config.json").exists()
    ended = Command(command, out.parent, Faults(save_seconds=0)).finish()
    assert ended.code == 0 and digested(out) == straight
