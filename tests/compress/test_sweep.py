import csv
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from compress.errors import InputError, RunError
from compress.eval.speed import SpeedProtocol
from compress.evaluate import evaluate
from compress.pipeline import compress
from compress.plots import draw_sweep
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.run_dir import Journal, held
from compress.runs import Bench, Protocol, run_all
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
    shown = [cell for index in range(2) for cell in (column[index] for column in cells[1:-1])]
    assert shown == [f"{run['perplexity']:.2f}" for run in report.data["runs"]]
    assert report.tables[1].columns[-1].header == "mean seconds"
    seconds = [run["seconds"] for run in report.data["runs"]]
    assert cells[-1] == [f"{sum(each) / 3:.0f}" for each in (seconds[:3], seconds[3:])]


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


def test_patterns_have_a_panel_of_their_own_only_beside_lines(done, tmp_path):
    runs, plot = done[1].data["runs"], tmp_path / "plot.svg"
    fixed = [row for row in runs if ":" in row["pattern"]]
    lines = [row for row in runs if ":" not in row["pattern"]]
    for kept, titles in ((runs, (True, True)), (fixed, (True, False)), (lines, (False, True))):
        draw_sweep(done[1].data | {"runs": kept}, [plot])
        svg = plot.read_text()
        assert ("n:m pattern" in svg, "sparsity of the blocks" in svg) == titles
        assert svg.count('<g id="axes_') == sum(titles)


def test_a_plot_of_what_failed_or_is_beyond_all_use_can_be_drawn(done, tmp_path):
    lost = [row | {"perplexity": 1e304} for row in done[1].data["runs"][:3]]
    failed = [{key: value for key, value in row.items() if key != "perplexity"} | {"failed": "x"} for row in lost]
    for runs in (lost, failed):
        draw_sweep(done[1].data | {"runs": runs}, [tmp_path / "plot.svg"])
        assert "dense" in (tmp_path / "plot.svg").read_text()


def test_long_settings_leave_room_for_the_plot(done, tmp_path):
    named = [
        row | {"setting": f"wanda+gptq:{'target.group_size=32,' * 8}drift={i}"}
        for i, row in enumerate(done[1].data["runs"])
    ]
    draw_sweep(done[1].data | {"runs": named}, [tmp_path / "plot.svg"])  # matplotlib warns where none is left
    svg = (tmp_path / "plot.svg").read_text()
    assert all(f"drift={i}<" in svg for i in range(len(named)))


def test_checkpoints_are_removed_and_their_figures_stay(done):
    out = done[0]
    assert {file.name for file in out.rglob("*.safetensors")} == {"tokens.safetensors"}
    for name in ("recipe.toml", "run/result.json", "run/log.jsonl", "run/recipe.toml"):
        assert (out / "wanda_2of4" / name).is_file()
    assert not (out / "wanda_2of4" / "config.json").exists()


def test_tokens_are_drawn_once_for_all_runs_that_calibrate_alike(done, request_in, tmp_path):
    assert [file.parent.parent for file in done[0].rglob("tokens.safetensors")] == [done[0] / "shared"]
    sweep(request_in(tmp_path, ["wanda,wanda:calib.nsamples=3"], ["0.5"]), "cpu")
    assert [file.parent.parent for file in tmp_path.rglob("tokens.safetensors")] == [tmp_path / "shared"] * 2


def test_runs_that_only_train_differently_compress_their_blocks_once(request_in, tmp_path, text_file):
    base = {
        "calib": {"source": str(text_file), "nsamples": 2, "seqlen": 32},
        "target": {"group_size": 32, "wbits": 4},
        "recover": ["grid"],
        "recover_for": "500tokens",
        "options": {"grid": {"seqlen": 32}},
    }
    settings = ["gptq", "gptq:grid.lr=1e-3"]
    others = ["gptq:recover=low-rank+grid", "gptq:drift=0.5"]
    runs = sweep(request_in(tmp_path, settings + others, sparsities=(), base=base), "cpu").data["runs"]
    assert not [row["failed"] for row in runs if "failed" in row]
    solved = {log.parent.parent.name: [line["event"] for line in Journal(log).read()] for log in logs(tmp_path)}
    assert sum("layer" not in events for events in solved.values()) == 1
    assert not list(tmp_path.glob("shared/*/blocks"))
    alone = plan_runs(request_in(tmp_path, settings[1:], sparsities=(), base=base))[0][0].recipe
    compress(alone, Path(alone.model), tmp_path / "alone", QUIET)
    assert runs[1]["perplexity"] == perplexity_of(tmp_path / "alone", text_file)


def perplexity_of(folder, text):
    return next(iter(evaluate(folder, [str(text)], 32, 2, QUIET)["perplexity"].values()))


def gradient_files(out):
    return list(out.glob("shared/*/gradients/*/*.safetensors"))


def test_gradients_are_taken_once_for_all_runs_and_give_what_each_alone_would_get(request_in, tmp_path, llama_folder):
    request = request_in(tmp_path, ["gradient,gblm"], ["0.5"], keep=True)
    runs = sweep(request, "cpu").data["runs"]
    assert not any("failed" in row for row in runs)
    events = {log.parent.parent.name: {line["event"] for line in Journal(log).read()} for log in logs(tmp_path)}
    assert "gradients" in events["gradient_50"] and "gradients" not in events["gblm_50"]
    assert len(gradient_files(tmp_path)) == 3
    sweep(dataclasses.replace(request, keep=False), "cpu")
    assert not gradient_files(tmp_path), "they are as large as the model"
    values = {**request.base, "model": str(llama_folder), "pruner": "gblm", "target": {"sparsity": 0.5}}
    compress(read_recipe(None, values), llama_folder, tmp_path / "plain", QUIET)
    assert evaluate(tmp_path / "plain", [request.text], 32, 2, QUIET)["perplexity"]["words"] == runs[1]["perplexity"]


def test_a_second_sitting_measures_only_what_is_new(done, request_in, tmp_path):
    out, first = shutil.copytree(done[0], tmp_path / "out"), done[1].data
    assert sweep(request_in(out, patterns=["2:4"]), "cpu").data == first
    more = sweep(request_in(out, ["magnitude", "wanda"], ["0.4", "0.6", "0.7"]), "cpu").data
    known = [row for row in first["runs"] if row["target"] != "2:4"]
    assert [row for row in more["runs"] if row["target"] != "70%"] == known
    assert set(finishes(out).values()) == {1} and len(finishes(out)) == 8


def test_killed_in_the_middle_it_goes_on_and_ends_in_the_same_figures(request_in, tmp_path, done, llama_folder):
    request = request_in(tmp_path)
    calib = request.base["calib"]
    flags = ["--method", "magnitude,wanda", "--sparsity", "0.4,0.6", "--ppl", request.text]
    flags += ["--calib", calib["source"], "--nsamples", "2", "--seqlen", "32", "--max-windows", "2"]
    command = [sys.executable, "-m", "compress", "sweep", str(llama_folder), *flags, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "magnitude_40" / "run" / "measurements.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    report = sweep(request, "cpu")
    straight = [row for row in done[1].data["runs"] if row["target"] != "2:4"]
    assert without_clock(report.data["runs"]) == without_clock(straight)
    assert finishes(tmp_path)["magnitude_40"] == 1


def test_kept_checkpoints_are_never_removed_afterwards(request_in, tmp_path):
    sweep(request_in(tmp_path, ["magnitude"], ["0.5"], keep=True), "cpu")
    assert (tmp_path / "magnitude_50" / "model.safetensors").is_file()
    sweep(request_in(tmp_path, ["magnitude"], ["0.5"]), "cpu")
    sweep(request_in(tmp_path, ["magnitude"], ["0.5"], windows=1), "cpu")
    assert (tmp_path / "magnitude_50" / "model.safetensors").is_file()


def test_checkpoints_asked_for_later_are_made_again(done, request_in, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "out")
    runs = sweep(request_in(out, ["magnitude"], ["0.4"], keep=True), "cpu").data["runs"]
    assert (out / "magnitude_40" / "model.safetensors").is_file()
    assert without_clock(runs) == without_clock(done[1].data["runs"][:1])


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


def test_speed_is_measured_beside_the_dense_model_or_the_reason_is_given(request_in, tmp_path, llama_folder):
    settings = ["magnitude:target.sparsity=0.5", "rtn:target.wbits=4,target.group_size=32,format=native"]
    runs, _ = plan_runs(request_in(tmp_path, settings, []))
    text = runs[0].recipe.calib.source
    bench = Bench(llama_folder, tmp_path, Protocol(text, 1, 32), QUIET, "cpu", False, SpeedProtocol(8, 2, 1))
    _, fast, other = run_all(bench, runs)
    assert fast["speed"]["prefill_speedup"] > 0 and fast["speed"]["decode_ms_per_token"] > 0
    assert "so it cannot be timed" in other["speed"]["none"] and other["perplexity"] > 0


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"settings": ["wnda"]}, "did you mean wanda"),
        ({"settings": ["gptq"], "wbits": ["4"]}, "names no pruner"),
        ({"settings": ["gptq"]}, "gptq has nothing to do: give --wbits"),
        ({"settings": ["wanda@owl"], "wbits": ["4"]}, r"names no quantizer .* such as wanda\+gptq"),
        ({"settings": ["atp"]}, "atp at 40%: atp learns from text: give --train FILE, or atp:train=FILE"),
        ({"settings": ["atp+dsnot:train=builtin"]}, "leave out refine dsnot"),
        ({"settings": ["atp@owl:train=builtin"]}, "leave out allocate owl"),
        ({"settings": ["atp:train=builtin"], "patterns": ["2:4"]}, "leave out pattern 2:4"),
        ({"settings": ["wanda"], "sparsities": []}, "nothing to do"),
        ({"settings": ["wanda:wanda.nothing=1"]}, "wanda: there is no setting nothing"),
        ({"settings": ["wanda:target.sparsity=0.1"]}, "columns of the sweep set"),
        ({"sparsities": ["1.5"]}, "target.sparsity = 1.5: should be less than 1"),
        ({"sparsities": ["half"]}, "--sparsity half: write numbers"),
        ({"patterns": ["16x16"]}, "wanda:target.pattern=16x16"),
        ({"patterns": ["5:7"]}, "7 does not divide"),
        ({"wbits": ["7"]}, "target.wbits = 7"),
        ({"settings": ["wanda@owl"], "sparsities": [], "patterns": ["2:4"]}, "2:4 fixes .* leave out allocate owl"),
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


def test_budgets_are_columns_of_their_own(request_in, tmp_path):
    setting = "wanda+rtn:budget.choices=['3g64', '4g64+2:4']"
    runs, _ = plan_runs(request_in(tmp_path, [setting], ["0.5"], wbits=["4"], budgets=("3bits,0.25x",)))
    assert [(run.target, run.recipe.target.wbits, run.recipe.target.budget) for run in runs[1:]] == [
        *(("3bits", 16, "3bits"), ("0.25x", 16, "0.25x"))
    ]
    with pytest.raises(InputError, match=r"at 3bits: it names no pruner to come to that with"):
        plan_runs(request_in(tmp_path, ["rtn:budget.choices=['3g64', '4g64+2:4']"], [], budgets=("3bits",)))
    alone = plan_runs(request_in(tmp_path, ["rtn"], [], budgets=("3bits",)))[0]
    assert [run.recipe.steps for run in alone] == [[("quantize", "rtn")]]
    assert alone[0].description()["budget"] == "3bits"


def test_a_setting_may_say_itself_what_to_come_to(request_in, tmp_path):
    settings = ["wanda:target.sparsity=0.5,calib.seqlen=64", "rtn:target.wbits=4"]
    runs, seqlen = plan_runs(request_in(tmp_path, settings, []))
    assert [(run.target, run.recipe.target.sparsity, run.recipe.target.wbits) for run in runs] == [
        *(("recipe", 0.5, 16), ("recipe", 0.0, 4))
    ]
    assert seqlen == 32, "windows are alike for all settings"


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
