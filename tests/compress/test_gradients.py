"""Gradients in the loop: where they lie, when they are taken anew, and what a kill leaves."""

import pytest
import torch
from tiny import save_tiny

from compress.calib.model import Model
from compress.errors import InputError, RunError
from compress.estimate import estimate
from compress.inspection import inspect
from compress.pipeline import compress, open_model
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.run_dir import Journal, Shared

QUIET = Reporter(quiet=True)


def run(folder, out, text, shared=None, refresh=0, **more):
    calib = {"source": str(text), "nsamples": 4, "seqlen": 32, "refresh_gradients": refresh}
    values = {"model": str(folder), "calib": calib, "target": {"sparsity": 0.5}, "pruner": "gblm", **more}
    return compress(read_recipe(None, values), folder, out, QUIET, shared=None if shared is None else Shared(shared))


def weights(out):
    model = open_model(out)
    return {layer.name: layer.weight.clone() for block in model.blocks() for layer in block.layers}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(out, event):
    return [line for line in Journal(out / "run" / "log.jsonl").read() if line["event"] == event]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mixtral", "gpt2"])
def test_a_whole_run(tmp_path, text_file, architecture):
    folder, out = save_tiny(tmp_path / "dense", architecture), tmp_path / "out"
    assert run(folder, out, text_file)["sparsity"] == pytest.approx(0.5)
    assert [line["blocks"] for line in lines(out, "gradients")] == [[2], [1], [0]]
    assert inspect(out).data["seconds"]["gradients"] > 0
    assert not (out / "run" / "gradients").exists()


@pytest.mark.parametrize(("pruner", "options"), [("gradient", {}), ("gblm", {"norm": "l1", "alpha": 100})])
def test_gradients_change_the_masks(tmp_path, llama_folder, text_file, pruner, options):
    run(llama_folder, tmp_path / "wanda", text_file, options={"gblm": {"alpha": 0}})
    run(llama_folder, tmp_path / "out", text_file, pruner=pruner, options={pruner: options})
    assert not same(weights(tmp_path / "out"), weights(tmp_path / "wanda"))


def test_gradients_taken_anew_change_the_blocks_after_the_first(tmp_path, llama_folder, text_file):
    found = []
    for refresh in (0, 1, 2):
        run(llama_folder, tmp_path / str(refresh), text_file, refresh=refresh, pruner="gradient")
        found.append(weights(tmp_path / str(refresh)))
    assert [line["gradients"] for line in lines(tmp_path / "1", "gradients")] == [
        "0000-0000_grad_sq",
        "0001-0001_grad_sq",
        "0002-0002_grad_sq",
    ]
    never, each, two = found
    for name in never:
        block = int(name.split(".")[2])
        assert torch.equal(each[name], never[name]) or block >= 1
        assert torch.equal(two[name], never[name]) or block == 2
    assert any(not torch.equal(each[n], never[n]) for n in never if ".layers.1." in n)
    assert any(not torch.equal(two[n], never[n]) for n in never if ".layers.2." in n)


def test_taken_anew_after_more_blocks_than_there_are_they_are_taken_once(tmp_path, llama_folder, text_file):
    for refresh in (0, 3, 9):
        run(llama_folder, tmp_path / str(refresh), text_file, refresh=refresh)
        assert {line["gradients"] for line in lines(tmp_path / str(refresh), "gradients")} == {"0000-0002_grad_sq"}
    assert same(weights(tmp_path / "9"), weights(tmp_path / "0"))


class _Killed(Exception):
    pass


@pytest.mark.parametrize("refresh", [0, 2])
def test_killed_at_every_block_and_resumed_the_result_is_the_same(
    tmp_path, llama_folder, text_file, monkeypatch, refresh
):
    run(llama_folder, tmp_path / "straight", text_file, refresh=refresh)
    loads, load = [], Model.load_block
    until = 1

    def killing(self, index):
        loads.append(index)
        if len(loads) > until:
            raise _Killed
        return load(self, index)

    monkeypatch.setattr(Model, "load_block", killing)
    done = 0
    while not done:
        loads.clear()
        try:
            run(llama_folder, tmp_path / "out", text_file, refresh=refresh)
            done = len(loads)
        except _Killed:
            until += 1
    assert until > 5
    monkeypatch.undo()
    assert same(weights(tmp_path / "out"), weights(tmp_path / "straight"))
    taken = [(line["gradients"], *line["blocks"]) for line in lines(tmp_path / "out", "gradients")]
    assert len(set(taken)) == len(taken) == 3  # none twice


def test_runs_of_one_model_share_gradients_of_the_dense_one_only(tmp_path, llama_folder, text_file):
    shared = tmp_path / "shared"
    run(llama_folder, tmp_path / "a", text_file, shared)
    run(llama_folder, tmp_path / "b", text_file, shared, options={"gblm": {"alpha": 3}})
    run(llama_folder, tmp_path / "alone", text_file, options={"gblm": {"alpha": 3}})
    assert lines(tmp_path / "a", "gradients") and not lines(tmp_path / "b", "gradients")
    assert [line["blocks"] for line in lines(tmp_path / "b", "replayed")] == [[0, 1, 2]]
    assert same(weights(tmp_path / "b"), weights(tmp_path / "alone"))
    run(llama_folder, tmp_path / "c", text_file, shared, refresh=1)
    assert {file.parent.name for file in shared.rglob("000*.safetensors")} == {"0000-0000_grad_sq", "0000-0002_grad_sq"}


def test_a_damaged_file_is_named_with_the_mend(tmp_path, llama_folder, text_file, monkeypatch):
    out, shared = tmp_path / "out", tmp_path / "shared"
    run(llama_folder, tmp_path / "first", text_file, shared)
    file = next(shared.rglob("0001.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        RunError, match=r"0001\.safetensors is damaged .* remove it, and the same command makes it again"
    ):
        run(llama_folder, out, text_file, shared)
    file.unlink()
    run(llama_folder, out, text_file, shared)
    assert same(weights(out), weights(tmp_path / "first"))


def test_nothing_to_take_anew_is_refused(tmp_path, llama_folder, text_file):
    with pytest.raises(InputError, match="refresh_gradients has nothing to do"):
        run(llama_folder, tmp_path, text_file, refresh=1, pruner="wanda")


def test_a_dry_run_counts_the_gradients(tmp_path, llama_folder, text_file):
    found = {}
    for pruner, refresh in (("wanda", 0), ("gblm", 0), ("gblm", 1)):
        calib = {"source": str(text_file), "nsamples": 4, "seqlen": 32, "refresh_gradients": refresh}
        recipe = read_recipe(
            None, {"model": str(llama_folder), "calib": calib, "pruner": pruner, "target": {"sparsity": 0.5}}
        )
        found[pruner, refresh] = estimate(recipe, llama_folder, tmp_path / "out", "cpu", QUIET).data
    wanda, gblm, anew = found.values()
    states, weights = 4 * 32 * 64 * 2, 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert gblm["disk_bytes"] - wanda["disk_bytes"] == 5 * states + 4 * weights
    assert "gradients" in gblm["seconds_by_stage"] and "gradients" not in wanda["seconds_by_stage"]
    assert anew["peak_rss_bytes"] == gblm["peak_rss_bytes"] > wanda["peak_rss_bytes"]
    assert not (tmp_path / "out").exists()
