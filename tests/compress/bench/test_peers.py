import importlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from compress.bench.peers.driver import PeersRequest, measure_rows
from compress.bench.peers.environments import REPOSITORY, SCRIPTS, ask, python_of
from compress.bench.peers.readers import FORMS, Form, chosen_forms, differences
from compress.bench.peers.rows import COLUMNS, LLAMA_CPP, METHODS, PEERS, TRANSFORMERS, VLLM, Peer, Row, chosen_rows
from compress.errors import InputError, RunError
from compress.eval.perplexity import perplexity
from compress.evaluate import evaluate
from compress.pipeline import open_model
from compress.progress import Reporter
from compress.recipe import read_recipe

OURS = PEERS[0]
STAND_IN = """
import json, os, sys
from pathlib import Path

action, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
checkpoint, setting = Path(request["checkpoint"]), request["setting"]
if setting.get("dies"):
    os.abort()
if setting.get("fails"):
    answer = {"failed": setting["fails"]}
    print("a traceback")
elif action == "quantize":
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(bytes(setting["bytes"]))
    answer = {"working_seconds": 0.001}
else:
    assert not setting or (checkpoint / "model.safetensors").exists()
    answer = {"perplexity": 10.0 + len(setting), "tokens": 62, "working_seconds": 0.001, "threads": 1, "versions": {}}
Path(request["answer"]).write_text(json.dumps(answer))
"""  # no imports that take long


@pytest.fixture(scope="module")
def with_windows(llama_folder, text_file, tmp_path_factory):
    """A request whose windows are made."""
    out = tmp_path_factory.mktemp("peers")
    request = PeersRequest(str(llama_folder), (str(text_file), 3, 32), (str(text_file), 2), out, None, [], False)
    with pytest.MonkeyPatch.context() as patch:  # paths are those of the folder that the command is given in
        patch.chdir(text_file.parent)
        measure_rows(replace(request, calib=(text_file.name, 3, 32), text=(text_file.name, 2)), [])
    return request


@pytest.fixture
def request_(with_windows, tmp_path):
    """The same, in a folder of this test's own."""
    shutil.copytree(with_windows.out, tmp_path / "out", ignore=shutil.ignore_patterns("lock"))
    return replace(with_windows, out=tmp_path / "out")


@pytest.fixture
def stand_in(tmp_path):
    script = tmp_path / "run_stand_in.py"
    script.write_text(STAND_IN)
    return Peer("stand-in", str(script))


@pytest.fixture
def scripts(monkeypatch):
    """The scripts as they import one another: by name."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("run_compress"), importlib.import_module("protocol")


def asked(protocol, folder, request, setting):
    """A script's request."""
    said = {
        "model": request.model,
        "windows": str(request.out / "windows.safetensors"),
        "checkpoint": str(folder / "checkpoint"),
        "answer": str(folder / "answer.json"),
        "calib": {"source": request.calib[0], "nsamples": request.calib[1], "seqlen": request.calib[2]},
        "text": {"source": request.text[0], "windows": request.text[1]},
        "setting": setting,
    }
    (folder / "request.json").write_text(json.dumps(said))
    return protocol.Request(folder / "request.json")


def test_the_protocol_is_that_of_our_own_evaluation(tmp_path, scripts):
    _, protocol = scripts
    windows = torch.randint(3, 200, (3, 100), generator=torch.Generator().manual_seed(0))
    folder = save_tiny(tmp_path)
    measured = protocol.perplexity(protocol.load_dense(folder), windows)
    expected = perplexity(open_model(folder), windows)
    assert measured["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert measured["tokens"] == expected.tokens == 3 * 99


def test_ours_is_an_ordinary_run_on_the_windows_that_everyone_gets(request_, scripts, tmp_path):
    ours, protocol = scripts
    setting = {"quantizer": "gptq", "target": {"wbits": 4, "group_size": 32}}
    request = asked(protocol, tmp_path, request_, setting)
    ours.quantize(request)
    tokens = load_file(tmp_path / "checkpoint" / "run" / "tokens.safetensors")["tokens"]
    assert torch.equal(tokens, request.calibration) and tokens.shape == (3, 32)
    found = ours.measure(request)
    expected = evaluate(tmp_path / "checkpoint", [request_.text[0]], 32, 2, Reporter(quiet=True))
    assert found["perplexity"] == expected["perplexity"]["words"] and found["tokens"] == expected["tokens"]
    assert ours.measure(asked(protocol, tmp_path, request_, {}))["perplexity"] != found["perplexity"]
    shutil.rmtree(tmp_path / "checkpoint")
    ours.quantize(asked(protocol, tmp_path, replace(request_, calib=("gone.txt", 3, 32)), setting))
    assert ours.measure(request)["perplexity"] == found["perplexity"]


def test_a_row_has_its_figures_and_they_are_set_beside_ours(request_, stand_in):
    dense, step = Row("dense", stand_in, "", {}), Row("W4", stand_in, "step", {"bytes": 1000})
    ours = Row("W4", OURS, "default", {"quantizer": "rtn", "target": {"wbits": 4, "group_size": 32}})
    report = measure_rows(request_, [dense, step, ours])
    first, second, own = report.data["runs"]
    assert (first["perplexity"], first["ratio"], "seconds" in first) == (10.0, 1.0, False)
    assert (second["perplexity"], second["ratio"], second["weight_bytes"]) == (11.0, 1.1, 1000)
    assert second["seconds"] > second["working_seconds"] and second["peak_rss_bytes"] > 2**20
    assert own["sparsity"] > 0 and own["weight_bytes"] > 2**14 and own["seconds"] > own["working_seconds"] > 0
    (beside,) = report.data["beside"]
    assert (beside["column"], beside["by"]) == ("W4", "stand-in step")
    assert beside["ratios"]["perplexity"] == own["perplexity"] / 11.0
    assert json.loads((request_.out / "peers.json").read_text()) == report.data
    assert not list(request_.out.glob("rows/*/checkpoint"))


def test_a_second_call_repeats_nothing_and_again_repeats_all(request_, stand_in):
    rows = [Row("W4", stand_in, "step", {"bytes": 8}), Row("W4", stand_in, "fails", {"fails": "ValueError: no"})]
    first = measure_rows(request_, rows).data["runs"]
    assert first[1]["failed"] == "ValueError: no"
    assert "a traceback" in (request_.out / "rows" / "stand-in-fails-w4" / "quantize.log").read_text()
    files = [*(request_.out / "rows").rglob("*"), request_.out / "windows.safetensors"]
    written = {file: file.stat().st_mtime_ns for file in files}
    assert measure_rows(request_, rows).data["runs"] == first
    assert {file: file.stat().st_mtime_ns for file in files} == written
    assert measure_rows(replace(request_, again=True), rows).data["runs"][0]["seconds"] != first[0]["seconds"]
    changed = [Row("W4", stand_in, "step", {"bytes": 8, "more": 1})]
    assert measure_rows(request_, changed).data["runs"][0]["perplexity"] == 12.0


def test_whatever_a_peer_fails_with_is_its_row_and_the_rest_goes_on(request_, stand_in, tmp_path):
    (tmp_path / "file").write_text("")
    request = replace(request_, environments=tmp_path / "file")
    absent = Peer("absent", stand_in.script, ("absent==1",))
    rows = [
        Row("W4", absent, "", {"bytes": 1}),
        Row("W4", stand_in, "dies", {"dies": 1}),
        Row("dense", stand_in, "", {}),
    ]
    without, died, whole = measure_rows(request, rows).data["runs"]
    assert "cannot make the environment of absent" in without["failed"]
    assert "stand-in ended with exit code -6 and no answer" in died["failed"]
    assert whole["perplexity"] == 10.0


def test_what_a_peer_takes_of_ours_has_to_be_here(tmp_path):
    assert all((REPOSITORY / part / "pyproject.toml").exists() for part in VLLM.ours)
    with pytest.raises(RunError, match="only a clone"):
        python_of(Peer("other", "any.py", ("any==1",), ours=("kernels",)), tmp_path, Reporter(quiet=True))
    assert not list(tmp_path.iterdir())


def test_the_packed_layers_are_read_with_our_plugin(request_, scripts, tmp_path):
    """run_transformers.py beside run_compress.py, on a native checkpoint."""
    setting = {"quantizer": "rtn", "format": "native", "target": {"wbits": 4, "group_size": 32}}
    request = asked(scripts[1], tmp_path, request_, setting)
    scripts[0].quantize(request)
    found = {}
    for script in ("run_compress", "run_transformers"):
        (folder := tmp_path / script).mkdir()
        reading = asked(scripts[1], folder, request_, setting)
        reading.checkpoint = request.checkpoint
        found[script] = load_file(importlib.import_module(script).read(reading)["tensors"])["logprobs"]
    assert (found["run_compress"] - found["run_transformers"]).abs().max() < 0.05


def test_text_that_is_too_short_is_the_users_to_mend(request_, scripts, stand_in, tmp_path):
    ours, protocol = scripts
    with pytest.raises(InputError, match="gives 129 windows of 32 tokens, not 999"):
        ours.windows(asked(protocol, tmp_path, replace(request_, calib=(request_.calib[0], 999, 32)), {}))
    request = {"setting": {"fails": "InputError: lower --nsamples"}, "checkpoint": "none"}
    with pytest.raises(InputError, match="lower --nsamples"):
        ask(stand_in, Path(sys.executable), "windows", request, tmp_path / "row")


def test_zeros_are_counted_in_groups_of_four(scripts):
    count_zeros = scripts[1].count_zeros
    weight = torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, 1], [1, 1, 1, 0, 1, 1, 1, 1]])
    assert count_zeros([weight]) == {"sparsity": 6 / 16, "two_of_four": 0.5}
    assert count_zeros([]) == {}


def test_names_choose_peers_and_columns():
    rows = chosen_rows(["hqq", "W4 g128"])
    assert [(row.peer.name, row.column) for row in rows] == [("hqq", "dense"), ("hqq", "W4 g128")]
    everything = chosen_rows([])
    assert {row.column for row in everything} == {"dense", *COLUMNS}
    assert len({row.folder for row in everything}) == len(everything)
    assert {name for name, *_ in METHODS} <= {peer.name for peer in PEERS}
    with pytest.raises(InputError, match="'W5'"):
        chosen_rows(["W5"])


def test_vllm_has_to_be_asked_for():
    assert chosen_forms([]) == chosen_forms(["readers"]) == FORMS and chosen_forms(["hqq"]) == ()
    forms = chosen_forms(["vllm"])
    assert all(VLLM in form.readers for form in forms) and chosen_rows(["vllm", "readers"]) == []
    for form in forms:
        read_recipe(None, {"model": "any", **form.setting})


def test_our_rows_are_recipes():
    for row in chosen_rows([OURS.name]):
        if row.setting:
            read_recipe(None, {"model": "any", **row.setting})


def test_every_script_is_there_and_shadows_no_package():
    for peer in (*PEERS, LLAMA_CPP, TRANSFORMERS, VLLM):
        assert (SCRIPTS / peer.script).is_file() and peer.script.startswith("run_")


def test_readers_are_compared_tensor_by_tensor(tmp_path):
    a, b, logprobs = torch.randn(4, 8), torch.randn(4, 8), torch.randn(1, 3, 5)
    save_file({"a": a, "b": b, "logprobs": logprobs}, tmp_path / "ours")
    save_file({"a": a, "b": b + 0.5, "logprobs": 2 * logprobs, "more": b}, tmp_path / "theirs")
    save_file({"a": a, "b": b}, tmp_path / "weights")
    found = differences(tmp_path / "ours", tmp_path / "theirs")
    assert found == {"weights": pytest.approx(0.5, abs=1e-6), "logprobs": logprobs.abs().max().item()}
    assert differences(tmp_path / "ours", tmp_path / "weights") == {"weights": 0.0}
    save_file({"a": a}, tmp_path / "less")
    with pytest.raises(RunError, match="no weight of b"):
        differences(tmp_path / "ours", tmp_path / "less")


def test_a_form_that_is_not_read_is_tried_again(request_, stand_in):
    forms = [Form("garbage", stand_in, {"bytes": 8}, (stand_in,))]
    (found,) = measure_rows(request_, [], forms).data["readers"]
    assert (found["form"], found["reader"]) == ("garbage", "compress") and "config.json" in found["failed"]
    assert not list(request_.out.rglob("readers.json"))
