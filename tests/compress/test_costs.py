import json

import pytest
import torch
from tiny import save_tiny

from compress.costs import Costs
from compress.inspection import expected, inspect, split, within
from compress.pipeline import compress, open_model
from compress.plan import plan_layers
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.run_dir import Journal

QUIET = Reporter(quiet=True)
GPTQ = {"target": {"wbits": 4, "group_size": 32}}


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 2, "dtype": torch.bfloat16}
    return save_tiny(tmp_path_factory.mktemp("wide"), **sizes)


@pytest.fixture
def costs(wide_folder, text_file):
    def costs(nsamples=4, seqlen=64, **values):
        calib = {"source": str(text_file), "nsamples": nsamples, "seqlen": seqlen}
        recipe = read_recipe(None, {"model": str(wide_folder), "calib": calib, **values})
        model = open_model(wide_folder)
        return Costs(model, recipe, plan_layers(model, recipe))

    return costs


def test_the_stages_are_those_that_the_journal_has(tmp_path, wide_folder, text_file):
    calib = {"source": str(text_file), "nsamples": 4, "seqlen": 64}
    recipe = read_recipe(
        None, {"model": str(wide_folder), "calib": calib, "pruner": "gblm", "target": {"sparsity": 0.5, "wbits": 4}}
    )
    compress(recipe, wide_folder, tmp_path / "out", QUIET)
    journal = Journal(tmp_path / "out" / "run" / "log.jsonl").read()
    took, said = split(journal), expected(journal)
    assert set(took) - set(said) == {"opened", "embed"}, "what no estimate is made of"
    assert set(said) <= set(took)
    assert [name for name in said if within(name)] == ["  solve: gblm", "  solve: gptq"]
    assert sum(said[name] for name in said if within(name)) <= said["solve"]
    report = inspect(tmp_path / "out")
    assert report.data["expected_seconds"] == said
    assert json.loads(json.dumps(report.data))["seconds"] == took


def test_what_a_run_was_expected_to_take_is_said_once(tmp_path, wide_folder):
    recipe = read_recipe(None, {"model": str(wide_folder), "pruner": "magnitude", "target": {"sparsity": 0.5}})
    compress(recipe, wide_folder, tmp_path / "out", QUIET)
    (tmp_path / "out" / "run" / "result.json").unlink()
    compress(recipe, wide_folder, tmp_path / "out", QUIET)
    lines = Journal(tmp_path / "out" / "run" / "log.jsonl").read()
    assert [line["event"] for line in lines].count("expected") == 1
    assert not {"observe", "forward", "gradients"} & set(expected(lines)), "nothing is calibrated"


def test_memory_grows_with_what_is_kept(costs):
    rounded, pruned = {"quantizer": "rtn", **GPTQ}, {"pruner": "wanda", "target": {"sparsity": 0.5}}
    gradients = {"pruner": "gblm", "target": {"sparsity": 0.5}}
    plain, wanda, gblm, gptq = (costs(**each).peak_bytes() for each in (rounded, pruned, gradients, GPTQ))
    assert plain < wanda < gblm and plain < gptq
    assert costs(drift=0, **GPTQ).peak_bytes() < gptq
    assert gptq - plain > 4 * 1024**2, "a Hessian of 1,024 inputs"
    longer = costs(nsamples=400, seqlen=64, **GPTQ).peak_bytes()
    assert longer > gptq, "hidden states of more sequences, and sums in float64"


def test_disk_holds_gradients_of_every_block(costs):
    both = costs(pruner="gblm", options={"gblm": {"norm": "l1"}}, target={"sparsity": 0.5})
    weights = sum(layer.n_weights for layer in both.layers)
    assert both.gradient_disk_bytes() == 4 * weights + (2 + 2) * 4 * 64 * 384 * 2
    assert costs(**GPTQ).gradient_disk_bytes() == 0


def test_more_tokens_take_longer_to_see_and_no_longer_to_solve(costs, monkeypatch):
    few = costs(nsamples=4, **GPTQ)
    many = costs(nsamples=400, **GPTQ)
    monkeypatch.setitem(vars(many), "_tried", few._tried)
    monkeypatch.setitem(vars(many), "_speeds", few._speeds)
    assert many._products() > 5 * few._products()
    assert many._gradients() > 10 * few._gradients()
