import io
import json
import tempfile

import pytest
from rich.console import Console

from compress.commands import run_command
from compress.estimate import bar
from compress.recipe import read_recipe


def shown(report, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(*report.tables, sep="\n")
    return console.file.getvalue()


@pytest.fixture
def ask(llama_folder, text_file):
    def ask(out, dry_run, target, **more):
        calib = {"source": str(text_file), "nsamples": 4, "seqlen": 32}
        values = {"model": str(llama_folder), "calib": calib, "target": {"sparsity": 0.6, **target}, **more}
        return run_command(read_recipe(None, values), out, (None, 2), dry_run)

    return ask


@pytest.mark.parametrize(
    ("allocate", "more"), [("owl", {"options": {"owl": {"threshold": 3}}}), ("sensitivity", {"pruner": "wanda"})]
)
def test_a_dry_run_shows_the_very_plan_of_the_run_and_leaves_nothing(tmp_path, monkeypatch, ask, allocate, more):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    target = {"allocate": allocate, "wbits": 4, "group_size": 32, "head_bits": 8}
    report = ask(tmp_path / "out", True, target, **more)
    assert not (tmp_path / "out").exists() and not any((tmp_path / "tmp").iterdir())
    planned = report.data["plan"]
    assert len({plan["sparsity"] for plan in planned.values()}) > 1
    text = shown(report)
    assert "sparsity of each block" in text and text.count("█") > 3 * 10
    ask(tmp_path / "out", False, target, **more)
    assert json.loads((tmp_path / "out" / "run" / "plan.json").read_text()) == json.loads(json.dumps(planned))


def test_the_plan_says_what_layers_of_one_kind_have_in_common(tmp_path, ask):
    for target, words in (
        ({}, "60 % unstructured"),
        ({"pattern": "16x32"}, "60 % in blocks of 16x32"),
        ({"pattern": "2:4", "sparsity": 0.0}, "50 % 2:4"),
        ({"sparsity": 0.0, "wbits": 4, "group_size": 32}, "dense"),
    ):
        text = shown(ask(tmp_path / "out", True, target), width=120)
        rows = [line for line in text.splitlines() if "down_proj" in line]
        assert len(rows) == 1 and words in rows[0]
        assert "█" not in text, "one sparsity needs no picture"
    spread = shown(ask(tmp_path / "out", True, {"allocate": "owl"}, options={"owl": {"threshold": 3}}), width=120)
    (row,) = [line for line in spread.splitlines() if "down_proj" in line]
    low, high = (float(word) for word in row.split("unstructured")[0].split()[-4:-1:2])
    assert 52 <= low < high <= 76


def test_bars_are_as_long_as_the_share():
    assert [bar(share) for share in (0, 0.5, 1)] == ["", "█" * 20, "█" * 40]
    assert bar(0.5 + 1 / 80) == "█" * 20 + "▌"
    assert len({bar(k / 320) for k in range(321)}) == 321
