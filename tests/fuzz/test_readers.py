"""Damaged and hostile files through the readers that commands call: each works, or ends in one line. `make fuzz` goes on."""

import os

import pytest
from contract import Breach, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import TARGETS, Bench

from compress.errors import InputError

SLOW = {"model": 40, "config": 40, "serve": 40, "gguf-import": 40, "inspect": 60, "report": 8}  # examples


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", TARGETS)
def test_what_nobody_damaged_is_read(bench, name):
    assert set(bench.whole(name).values()) == {"works"}


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_one_works_or_ends_in_one_line(bench, name):
    @settings(
        max_examples=SLOW.get(name, 150), derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.binary(min_size=12, max_size=32))
    def holds(data):
        assert bench.attempt(name, data) in ("works", "InputError", "RunError")

    holds()


@pytest.mark.parametrize(
    ("does", "breach"),
    [
        (lambda folder, outside: (folder / "no-such-file").read_text(), "FileNotFoundError"),
        (lambda folder, outside: (outside / "secret").read_text(), "open"),
        (lambda folder, outside: os.system("true"), r"os\.system"),
        (lambda folder, outside: exec(compile("1", str(folder / "evil.py"), "exec")), "exec"),
        (lambda folder, outside: bytearray(8 << 30), "MemoryError"),
        (lambda folder, outside: {}["key"], "KeyError"),
    ],
)
def test_the_contract_sees_what_it_forbids(tmp_path, does, breach):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    for each in (folder, outside):
        each.mkdir()
    (outside / "secret").write_text("")
    with pytest.raises(Breach, match=breach):
        outcome(lambda: does(folder, outside), folder, outside)


def test_a_line_is_what_it_allows(tmp_path):
    def refuse():
        raise InputError("a name \x1b[31m of a file")

    assert outcome(refuse, tmp_path, tmp_path / "outside") == "InputError"
    assert outcome(lambda: None, tmp_path, tmp_path / "outside") == "works"
