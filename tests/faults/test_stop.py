"""Ctrl-C at any moment, a second run in the folder, and a clock that jumps."""

import json
import random
import signal
import subprocess
import sys

import pytest
from commands import Command, Faults

LINE = "error: stopped: the same command goes on from here"
IMPORTING = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
class Pressed:
    module = sys.argv.pop(1)
    def find_spec(self, name, *_):
        if name == self.module:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Pressed())
runpy.run_module("compress", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["compress.cli", "typer", "torch"])
def test_control_c_while_modules_are_imported_is_one_line(module):
    command = [sys.executable, "-c", IMPORTING, module, "run", "no-such-model", "--wbits", "4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (130, LINE)  # after the end of the line that ^C stands in


DROPPING = """
import os, runpy, signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)
class Dropping:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
def command_line():
    Dropping()  # where Python drops what is raised
    for _ in range(100_000_000):
        pass
sys.modules["compress.cli"] = types.SimpleNamespace(main=command_line)
runpy.run_module("compress", run_name="__main__")
"""


def test_control_c_where_python_drops_exceptions_is_told_again():
    done = subprocess.run([sys.executable, "-c", DROPPING], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (130, LINE)


WRAPPING = """
import compress.cli
from compress.__main__ import main
from pydantic_core import SchemaSerializer
class Meta(type):
    def __getattribute__(cls, name):
        if name == "__name__":
            raise KeyboardInterrupt
        return super().__getattribute__(name)
class Stopped(metaclass=Meta):
    pass
def app(**flags):
    SchemaSerializer({"type": "model", "cls": Stopped, "schema": {"type": "model-fields", "fields": {}}})
compress.cli.app = app
main()
"""


def test_control_c_that_a_library_makes_another_error_of():
    done = subprocess.run([sys.executable, "-c", WRAPPING], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (130, LINE)


@pytest.mark.slow
def test_control_c_at_ten_moments_is_one_line_and_the_command_goes_on(every_stage, straight, digested, out):
    draw, command = random.Random(1), [*every_stage, "--out", out]
    for _ in range(10):
        running = Command(command, out.parent, Faults(save_seconds=0))
        if running.stopped_at(draw.uniform(0.05, 0.6), signal.SIGINT):
            assert running.code == 130 and "Traceback" not in running.err, running.err
            assert running.line == LINE
    ended = Command(command, out.parent, Faults(save_seconds=0)).finish()
    assert ended.code == 0 and digested(out) == straight


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_turned_away(every_stage, straight, digested, out):
    command = [*every_stage, "--out", out]
    first = Command(command, out.parent, Faults(save_seconds=0))
    assert first.reaches((out / "run" / "blocks" / "0000.json").exists)
    first.signal(signal.SIGSTOP)
    second = Command(command, out.parent).finish()
    first.signal(signal.SIGCONT)
    line = f"error: {out}/run is in use by another process: wait for it, or take another --out"
    assert (second.code, second.line) == (3, line)
    assert first.finish().code == 0 and digested(out) == straight


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(every_stage, straight, digested, out):
    ended = Command([*every_stage, "--out", out, "--json"], out.parent, Faults(save_seconds=0, clock=0)).finish()
    assert ended.code == 0 and digested(out) == straight
    result = json.loads(ended.out)
    assert 0 < result["seconds"] < 1000 and 0 < result["recovery"][0]["training_seconds"] < 1000
    times = [json.loads(line)["time"] for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    assert sorted(times) != times, "it did jump"
    for reader in ("inspect", "report"):
        assert Command([reader, out], out.parent).finish().code == 0
