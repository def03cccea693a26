import csv
import dataclasses
import json
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest

from compress.errors import InputError, RunError
from compress.evaluate import evaluate
from compress.pipeline import compress
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.run_dir import Journal, held
from compress.sweep import COLUMNS, Request, plan_runs, sweep

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def request_in(llama_folder, text_file):
    base = {"calib": {"source": str(text_file), "nsamples": 2, "seqlen": 32}}

    def make(out, settings=("magnitude,wanda",), sparsities=("0.4,0.6",), patterns=(), **more):
        lists = {"settings": list(settings), "sparsities": list(sparsities), "patterns": list(patterns), "wbits": []}
        asked = {"base": base, "recipe": None, "text": str(text_file), "windows": 2, "out": out, **lists, **more}
        return Request(model=str(llama_folder), **asked)

    return make


@pytest.fixture(scope="module")
def done(request_in, tmp_path_factory):
    """A sweep nobody disturbs: its folder and its report."""
    out = tmp_path_factory.mktemp("sweep")
    return out, sweep(request_in(out, patterns=["2:4"]), "cpu")


def without_clock(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_rss_bytes")} for row in rows]


def finishes(out):
    return {log.parent.parent.name: [line["event"] for line in Journal(log).read()].count("done") for log in logs(out)}


def logs(out):
    return sorted(out.glob("*/run/log.jsonl"))


def test_rows_are_settings_times_targets_in_order(done):
    runs = done[1].data["runs"]
    assert [(row["setting"], row["target"]) for row in runs] == [
        (name, target) for name in ("magnitude", "wanda") for target in ("40%", "60%", "2:4")
    ]
    assert [row["layer_sparsity"] for row in runs] == pytest.approx([0.4, 0.6, 0.5] * 2, abs=0.02)


def test_table_csv_and_json_say_the_same(done, capsys):
    out, report = done
    assert json.loads((out / "sweep.json").read_text()) == report.data
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.data["runs"]) and list(rows[0]) == COLUMNS
    for row, run in zip(rows, report.data["runs"], strict=True):
        assert float(row["perplexity"]) == run["perplexity"]
        assert float(row["ratio"]) == run["perplexity"] / report.data["dense"]["perplexity"]
        assert row["setting"] == run["setting"] and row["failed"] == ""
    cells = [list(column.cells) for column in report.tables[1].columns]
    assert cells[0] == ["magnitude", "wanda"]
    shown = [cell for index in range(2) for cell in (column[index] for column in cells[1:])]
    assert shown == [f"{run['perplexity']:.2f}" for run in report.data["runs"]]


def test_the_figures_are_those_of_a_plain_run(done, request_in, llama_folder, text_file, tmp_path):
    request = request_in(tmp_path)
    values = {**request.base, "model": str(llama_folder), "pruner": "wanda", "target": {"sparsity": 0.6}}
    result = compress(read_recipe(None, values), llama_folder, tmp_path / "plain", QUIET)
    value = evaluate(tmp_path / "plain", [str(text_file)], 32, 2, QUIET)["perplexity"]["words"]
    row = next(row for row in done[1].data["runs"] if (row["setting"], row["target"]) == ("wanda", "60%"))
    assert row["perplexity"] == value
    assert (row["layer_sparsity"], row["compressed_bytes"]) == (result["sparsity"], result["compressed_bytes"])


def test_the_plot_is_an_svg_that_names_every_setting(done):
    svg = (done[0] / "sweep.svg").read_text()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    for label in ("magnitude", "wanda", "2:4", "dense", "perplexity on words.txt"):
        assert label in svg
    assert (done[0] / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_are_removed_and_their_figures_stay(done):
    out = done[0]
    assert {file.name for file in out.rglob("*.safetensors")} == {"tokens.safetensors"}
    for name in ("recipe.toml", "run/result.json", "run/log.jsonl", "run/recipe.toml"):
        assert (out / "wanda_2of4" / name).is_file()
    assert not (out / "wanda_2of4" / "config.json").exists()


def test_tokens_are_drawn_once_for_all_runs_that_calibrate_alike(request_in, tmp_path, text_file):
    report = sweep(request_in(tmp_path, ["wanda,sparsegpt,wanda:calib.nsamples=3"], ["0.5"]), "cpu")
    assert len(report.data["runs"]) == 3
    assert len(list(tmp_path.rglob("tokens.safetensors"))) == 2
    assert {file.parent.parent for file in tmp_path.rglob("tokens.safetensors")} == {tmp_path / "shared"}


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_are_taken_once_for_all_runs_and_give_what_each_alone_would_get(
    request_in, tmp_path, llama_folder, keep
):
    request = request_in(tmp_path, ["gradient,gblm"], ["0.5"], keep=keep)
    runs = sweep(request, "cpu").data["runs"]
    assert not any("failed" in row for row in runs)
    events = {log.parent.parent.name: {line["event"] for line in Journal(log).read()} for log in logs(tmp_path)}
    assert "gradients" in events["gradient_50"] and "gradients" not in events["gblm_50"]
    assert bool(list(tmp_path.glob("shared/*/gradients/*/*.safetensors"))) == keep
    values = {**request.base, "model": str(llama_folder), "pruner": "gblm", "target": {"sparsity": 0.5}}
    compress(read_recipe(None, values), llama_folder, tmp_path / "plain", QUIET)
    assert evaluate(tmp_path / "plain", [request.text], 32, 2, QUIET)["perplexity"]["words"] == runs[1]["perplexity"]


def test_a_second_sitting_measures_only_what_is_new(request_in, tmp_path):
    first = sweep(request_in(tmp_path), "cpu")
    again = sweep(request_in(tmp_path), "cpu")
    assert again.data == first.data
    more = sweep(request_in(tmp_path, ["magnitude", "wanda"], ["0.4", "0.6", "0.7"]), "cpu")
    assert [row for row in more.data["runs"] if row["target"] != "70%"] == first.data["runs"]
    assert set(finishes(tmp_path).values()) == {1} and len(finishes(tmp_path)) == 6


def test_killed_in_the_middle_it_goes_on_and_ends_in_the_same_figures(request_in, tmp_path, done, llama_folder):
    request = request_in(tmp_path)
    calib = request.base["calib"]
    flags = ["--method", "magnitude,wanda", "--sparsity", "0.4,0.6", "--pattern", "2:4", "--ppl", request.text]
    flags += ["--calib", calib["source"], "--nsamples", "2", "--seqlen", "32", "--max-windows", "2"]
    command = [sys.executable, "-m", "compress", "sweep", str(llama_folder), *flags, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "magnitude_40" / "run" / "measurements.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    report = sweep(request_in(tmp_path, patterns=["2:4"]), "cpu")
    assert without_clock(report.data["runs"]) == without_clock(done[1].data["runs"])
    assert finishes(tmp_path)["magnitude_40"] == 1


def test_kept_checkpoints_are_never_removed_afterwards(request_in, tmp_path):
    sweep(request_in(tmp_path, ["magnitude"], ["0.5"], keep=True), "cpu")
    assert (tmp_path / "magnitude_50" / "model.safetensors").is_file()
    sweep(request_in(tmp_path, ["magnitude"], ["0.5"]), "cpu")
    sweep(request_in(tmp_path, ["magnitude"], ["0.5"], windows=1), "cpu")
    assert (tmp_path / "magnitude_50" / "model.safetensors").is_file()


def test_another_protocol_is_measured_anew_and_the_first_is_still_known(request_in, tmp_path):
    one = sweep(request_in(tmp_path, ["magnitude"], ["0.5"]), "cpu").data
    two = sweep(request_in(tmp_path, ["magnitude"], ["0.5"], windows=1), "cpu").data
    assert two["dense"]["tokens"] * 2 == one["dense"]["tokens"]
    assert two["runs"][0]["perplexity"] != one["runs"][0]["perplexity"]
    assert finishes(tmp_path) == {"magnitude_50": 2}
    assert without_clock(sweep(request_in(tmp_path, ["magnitude"], ["0.5"]), "cpu").data["runs"]) == without_clock(
        one["runs"]
    )
    assert finishes(tmp_path) == {"magnitude_50": 2}


def test_a_run_that_fails_is_reported_and_the_others_go_on(request_in, tmp_path):
    report = sweep(request_in(tmp_path, ["wanda:calib.nsamples=9999,calib.seqlen=128,magnitude"], ["0.5"]), "cpu")
    broken, fine = report.data["runs"]
    assert "perplexity" not in broken and "words.txt" in broken["failed"]
    assert fine["perplexity"] > 0
    assert next(iter(report.tables[1].columns[1].cells)) == "failed"
    assert any("failed: " in str(line) for line in report.tables)
    assert "Traceback" in (tmp_path / "wanda,calib.nsamples=9999,calib.seqlen=128_50" / "error.txt").read_text()


def test_speed_is_measured_beside_the_dense_model(request_in, tmp_path):
    row = sweep(request_in(tmp_path, ["magnitude"], ["0.5"], speed=True), "cpu").data["runs"][0]
    assert row["speed"]["prefill_speedup"] > 0 and row["speed"]["decode_ms_per_token"] > 0


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"settings": ["wnda"]}, "did you mean wanda"),
        ({"settings": ["gptq"], "wbits": ["4"]}, "names no pruner"),
        ({"settings": ["gptq"]}, "gptq has nothing to do: give --wbits"),
        ({"settings": ["wanda"], "sparsities": []}, "nothing to do"),
        ({"settings": ["wanda:wanda.nothing=1"]}, "wanda: there is no setting nothing"),
        ({"settings": ["wanda:target.sparsity=0.1"]}, "columns of the sweep set"),
        ({"sparsities": ["1.5"]}, "target.sparsity = 1.5: should be less than 1"),
        ({"sparsities": ["half"]}, "--sparsity half: write numbers"),
        ({"patterns": ["16x16"]}, "wanda:target.pattern=16x16"),
        ({"patterns": ["5:7"]}, "7 does not divide"),
        ({"wbits": ["5"]}, "target.wbits = 5"),
        ({"settings": ["wanda@owl"], "sparsities": [], "patterns": ["2:4"]}, "owl"),
        ({"text": "no-such.txt"}, "no-such.txt"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(request_in, tmp_path, asked, line):
    with pytest.raises(InputError, match=line):
        sweep(request_in(tmp_path / "out", **asked), "cpu")
    assert not list(tmp_path.rglob("*.json"))


def test_a_folder_in_use_or_of_other_runs_is_refused(request_in, tmp_path, done):
    with held(tmp_path), pytest.raises(RunError, match="in use by another process"):
        sweep(request_in(tmp_path), "cpu")
    other = {"calib": {"source": "builtin", "nsamples": 2, "seqlen": 32}}
    with pytest.raises(InputError, match=r"holds a run with another calib\.source"):
        sweep(dataclasses.replace(request_in(done[0]), base=other), "cpu")


def test_targets_of_bits_alone_and_of_both(request_in, tmp_path):
    bits, seqlen = plan_runs(request_in(tmp_path, ["rtn,gptq"], [], wbits=["4,3"]))
    assert [(run.recipe.quantizer, run.target, run.folder.name) for run in bits] == [
        *(("rtn", "W4", "rtn_W4"), ("rtn", "W3", "rtn_W3"), ("gptq", "W4", "gptq_W4"), ("gptq", "W3", "gptq_W3"))
    ]
    assert seqlen == 32
    both, _ = plan_runs(request_in(tmp_path, ["wanda+rtn"], ["0.5"], ["2:4"], wbits=["4"]))
    assert [(run.target, run.recipe.target.density_gap, run.recipe.target.wbits) for run in both] == [
        ("50% W4", 0.5, 4),
        ("2:4 W4", 0.5, 4),
    ]


def test_a_recipe_file_is_what_settings_start_from(request_in, tmp_path):
    file = tmp_path / "base.toml"
    file.write_text('model = "x"\n[target]\nsparsity = 0.25\nallocate = "uniform"\n[calib]\nseed = 7\nseqlen = 16\n')
    runs, seqlen = plan_runs(request_in(tmp_path, ["wanda"], [], recipe=file, base={}))
    assert [(run.target, run.recipe.target.sparsity, run.recipe.calib.seed) for run in runs] == [("recipe", 0.25, 7)]
    assert seqlen == 16


def test_different_runs_have_different_folders(request_in, tmp_path):
    settings = ["wanda", "wanda:calib.nsamples=2", "wanda:calib.source=a/b.txt", "wanda:calib.source=a_b.txt"]
    names = [run.folder.name for run in plan_runs(request_in(tmp_path, settings))[0]]
    assert len(set(names)) == 8 and not any("/" in name for name in names)
