"""Runs in processes of their own, killed without warning and started again."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import save_tiny

KILLS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"num_hidden_layers": 16, "hidden_size": 128, "intermediate_size": 384}
    return save_tiny(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16, **sizes)


def start(folder, text, out, *more):
    flags = ["--sparsity", "0.5", "--wbits", "4", "--group-size", "32", "--head-bits", "8", "--nsamples", "16"]
    command = [sys.executable, "-m", "compress", "run", str(folder), *flags, "--seqlen", "128", "--calib", str(text)]
    return subprocess.Popen(
        [*command, "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs inherit it ignored
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    return out.decode()


def digests(out):
    files = [file for file in sorted(out.iterdir()) if file.is_file() and file.name != "README.md"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def straight(folder, text_file, tmp_path_factory):
    """The files of a run nobody disturbs."""
    out = tmp_path_factory.mktemp("straight") / "out"
    finish(start(folder, text_file, out))
    return digests(out)


def lines(out):
    log = out / "run" / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def test_killed_ten_times_at_random_and_resumed_the_files_are_the_same(folder, text_file, tmp_path, straight):
    moments = random.Random(0)
    out = tmp_path / "out"
    for _ in range(KILLS):
        process = start(folder, text_file, out)
        until = lines(out) + moments.randint(1, 24)  # journal lines: a block writes 15, a replay two
        while lines(out) < until and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        assert process.poll() is None, "it finished before it could be killed: " + process.communicate()[1].decode()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(folder, text_file, out))
    assert digests(out) == straight
    assert not list(out.rglob("*.partial")) and not list(out.glob("*.new"))


def test_finished_blocks_are_replayed_and_a_damaged_one_is_done_again(folder, text_file, tmp_path, straight):
    out = tmp_path / "out"
    process = start(folder, text_file, out)
    marks = out / "run" / "blocks"
    while len(list(marks.glob("000*.json"))) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    damaged = marks / "0001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 4
    damaged.write_bytes(data)
    finish(start(folder, text_file, out))
    events = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["file"] for line in events if line["event"] == "damaged"] == ["0001.safetensors"]
    replayed = [line["block"] for line in events if line["event"] == "replayed"]
    assert {0, 2, 3} <= set(replayed) and 1 not in replayed
    assert digests(out) == straight


def test_a_changed_recipe_is_refused_with_its_key(folder, text_file, tmp_path, straight):
    out = tmp_path / "out"
    finish(start(folder, text_file, out))
    process = start(folder, text_file, out, "--seed", "3")
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.decode().strip().splitlines()[-1].startswith(f"error: {out}/run holds a run with another calib.seed:")


def test_control_c_ends_with_one_line(folder, text_file, tmp_path):
    out = tmp_path / "out"
    process = start(folder, text_file, out)
    while not list((out / "run" / "blocks").glob("0000.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err.decode()
    assert err.decode().strip().splitlines()[-1] == "error: stopped: the same command goes on from here"
