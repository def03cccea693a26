"""SIGKILL at any moment: the same command goes on, and ends in the same bytes."""

import hashlib
import json
import math
import random
import shutil
import signal
import subprocess
import sys

import pytest
from commands import Command, Faults
from safetensors import safe_open

KILLS = 50
pytestmark = pytest.mark.slow


def whole(out, straight, digested):
    """Nothing of a killed run's folder that a reader would take is cut short."""
    for file in out.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert all(opened.get_tensor(name) is not None for name in opened.keys())
    for mark in (out / "run" / "blocks").glob("*.json"):
        data = mark.with_suffix(".safetensors").read_bytes()
        assert json.loads(mark.read_text())["sha256"] == hashlib.sha256(data).hexdigest()
    if (out / "config.json").exists():
        found = digested(out)
        unlike = {name for name in straight if found.get(name) != straight[name]}
        assert unlike <= {"README.md"}, "config.json makes it a checkpoint"


def finished(out, straight, digested):
    assert digested(out) == straight
    assert not [file for file in out.rglob("*") if file.suffix in (".partial", ".new", ".gradient")]
    assert not list((out / "run" / "blocks").iterdir()) and not list((out / "run").glob("recovery_?.*"))


def test_a_process_of_its_own_ends_in_the_same_bytes_as_a_forked_one(every_stage, straight, digested, out):
    environment = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "compress", *map(str, every_stage), "--out", str(out)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    finished(out, straight, digested)


def test_killed_at_fifty_random_moments(every_stage, straight, digested, out):
    draw, kills, ends = random.Random(0), 0, 0
    command = [*every_stage, "--out", out]
    first = Command(command, out.parent, Faults(save_seconds=0))
    assert not first.reaches(lambda: first.cpu_seconds == math.inf) and first.code == 0
    shutil.rmtree(out)
    while kills < KILLS:
        running = Command(command, out.parent, Faults(save_seconds=0))
        if running.stopped_at(draw.uniform(0, first.cpu_seconds), signal.SIGKILL) and running.code < 0:
            kills += 1
            whole(out, straight, digested)
            continue
        assert running.code == 0, running.err
        finished(out, straight, digested)
        ends += 1
        shutil.rmtree(out)
    done = Command(command, out.parent, Faults(save_seconds=0)).finish()
    assert done.code == 0, done.err
    finished(out, straight, digested)
    assert ends >= 3


def test_killed_at_thirty_changes_of_files(every_stage, straight, digested, out):
    kills, command = 0, [*every_stage, "--out", out]
    for seed in range(1000):
        ended = Command(command, out.parent, Faults(save_seconds=0, mortal=seed)).finish()
        if ended.code == -signal.SIGKILL:
            kills += 1
            whole(out, straight, digested)
            continue
        assert ended.code == 0, ended.err
        finished(out, straight, digested)
        if kills >= 30:
            break
        shutil.rmtree(out)
