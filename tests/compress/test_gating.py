"""`compress gate` from end to end on a tiny model, and methods broken on purpose."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from compress.cli import main
from compress.errors import InputError
from compress.evaluate import TextRequest
from compress.gate import read_baseline
from compress.gate_measure import Asked, read_asked
from compress.gating import find_targets, gate, record_baselines
from compress.kernels.weights import Grid
from compress.prune import wanda

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"wanda": "sparsity = 0.5", "rtn": "wbits = 4\ngroup_size = 32"}
NO_FILES = (None, None)


@pytest.fixture
def recipe(llama_folder, text_file, tmp_path):
    """Writes the recipe of a method and records its baseline, with two seeds."""

    def write(method, seeds=2, **asked):
        kind = "pruner" if method == "wanda" else "quantizer"
        file = tmp_path / f"{method}.toml"
        file.write_text(
            f'model = "{llama_folder}"\n{kind} = "{method}"\ndrift = 0.0\n'
            f'[target]\n{TARGETS[method]}\n[calib]\nsource = "{text_file}"\nnsamples = 2\nseqlen = 32\n'
        )
        texts = [TextRequest(str(text_file), seqlen=32, max_windows=6)]
        record_baselines(find_targets([str(file)], None), Asked(texts=texts, against=str(llama_folder)), seeds, "cpu")
        return find_targets([str(file)], None)

    return write


def says(report):
    return {one["name"].partition(",")[0]: one["says"] for one in report.data["gates"][0]["verdicts"]}


def test_a_method_holds_against_itself_and_not_with_its_score_broken(recipe, monkeypatch):
    targets = recipe("wanda")
    written = json.loads(targets[0].baseline.read_text())
    assert {name.partition(",")[0]: len(one["values"]) for name, one in written["figures"].items()} == {
        **{"size": 2, "perplexity": 2, "kl": 2, "top1": 2}
    }
    assert gate(targets, NO_FILES, "cpu").data["held"]
    keep = wanda.keep_largest
    monkeypatch.setattr(wanda, "keep_largest", lambda score, plan: keep(-score, plan))
    broken = gate(targets, NO_FILES, "cpu")
    assert not broken.data["held"] and says(broken)["kl"] == "worse" and says(broken)["size"] == "same"


def test_halved_group_scales_do_not_hold(recipe, monkeypatch):
    targets = recipe("rtn", seeds=1)
    assert gate(targets, NO_FILES, "cpu").data["held"]
    fit = Grid.fit

    def halved(*args, **kwargs):
        grid = fit(*args, **kwargs)
        return replace(grid, scale=grid.scale / 2)

    monkeypatch.setattr(Grid, "fit", halved)
    broken = gate(targets, NO_FILES, "cpu")
    assert not broken.data["held"] and says(broken)["kl"] == "worse"


def test_a_checkpoint_is_judged_where_it_lies_and_the_exit_code_says_so(
    llama_folder, text_file, tmp_path, monkeypatch, capsys
):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compress", "gate", str(llama_folder), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    file, junit, summary = tmp_path / "b.json", tmp_path / "j.xml", tmp_path / "s.md"
    flags = ["--baseline", file, "--record", "--ppl", text_file, "--protocol", "wanda", "--seqlen", 32]
    assert call(*flags, "--max-windows", 3)[0] == 0
    code, said = call("--baseline", file, "--junit", junit, "--markdown", summary, "--json")
    assert code == 0 and json.loads(said.out)["held"] and "0" in junit.read_text() and "✅" in summary.read_text()
    values = json.loads(file.read_text())
    next(one for one in values["figures"].values() if one["kind"] == "perplexity")["values"] = [20.0]
    file.write_text(json.dumps(values))
    code, said = call("--baseline", file)
    assert code == 1 and "worse in perplexity, words, wanda" in said.out
    file.write_text(json.dumps(values | {"tolerance": {"perplexity": 0.5}}))
    assert call(*flags, "--max-windows", 3)[0] == 0
    again = json.loads(file.read_text())
    assert again["tolerance"] == {"perplexity": 0.5} and again["figures"] != values["figures"]
    assert call("--baseline", tmp_path / "none.json")[0] == 2
    assert call("--baseline", file, "--ppl", text_file)[0] == 2


def test_speed_is_a_ratio_to_the_dense_model(llama_folder, tmp_path):
    targets = find_targets([str(llama_folder)], tmp_path / "b.json")
    record_baselines(targets, Asked(against=str(llama_folder), speed=True), 1, "cpu")
    figure = json.loads((tmp_path / "b.json").read_text())["figures"]["decode speed, x dense"]
    assert figure["kind"] == "speed" and figure["values"][0] > 0


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (Asked(speed=True), "--speed is a ratio to the dense model"),
        (Asked(texts=[TextRequest("no-such.txt")]), "no file no-such"),
        (Asked(texts=[TextRequest("builtin", "nonsense")]), "no protocol nonsense"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_work(llama_folder, tmp_path, asked, line):
    with pytest.raises(InputError, match=line):
        record_baselines(find_targets([str(llama_folder)], tmp_path / "b.json"), asked, 1, "cpu")


def test_targets_that_do_not_say_their_baseline_are_refused(llama_folder, tmp_path):
    with pytest.raises(InputError, match="Give --baseline FILE"):
        find_targets([str(llama_folder)], None)
    with pytest.raises(InputError, match="is of one target"):
        find_targets([str(llama_folder), "x"], tmp_path / "b.json")
    with pytest.raises(InputError, match="there is no recipe"):
        find_targets([str(tmp_path / "no.toml")], None)
    with pytest.raises(InputError, match=r"no recipe\.toml to repeat"):
        record_baselines(find_targets([str(llama_folder)], tmp_path / "b.json"), Asked(), 3, "cpu")


def test_the_gates_of_this_repository_can_be_measured(monkeypatch):
    monkeypatch.chdir(ROOT)
    targets = find_targets(sorted(map(str, Path("gates").glob("*.toml"))), None)
    for target in targets:
        asked = read_asked(read_baseline(target.baseline).asked, target.baseline)
        asked.check()
        assert asked.texts and asked.against == "gemma-3-270m"
    assert len(targets) >= 2


@pytest.mark.parametrize("asked", [{"taste": 1}, {"texts": [{"text": "builtin", "taste": 1}]}])
def test_a_baseline_that_asks_for_the_unknown_is_one_line(tmp_path, asked):
    with pytest.raises(InputError, match=r"b\.json, asked: .*taste"):
        read_asked(asked, tmp_path / "b.json")
