import pytest
import torch

from compress.pipeline import open_model
from compress.plan import plan_layers
from compress.recipe import read_recipe
from compress.rehearsal import INPUTS, Rehearsal, factor_flops, flops_of
from compress.steps import find_steps


@pytest.fixture
def rehearse(llama_folder):
    def rehearse(**values):
        recipe = read_recipe(None, {"model": str(llama_folder), **values})
        layers = plan_layers(open_model(llama_folder), recipe)
        return layers, Rehearsal(find_steps(recipe), torch.bfloat16, 1e10)

    return rehearse


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"pruner": "wanda", "target": {"pattern": "2:4", "wbits": 4, "group_size": 32}}, ["wanda", "gptq"]),
        ({"pruner": "gptq", "target": {"pattern": "2:4", "wbits": 4, "group_size": -1}}, ["gptq"]),
        ({"pruner": "sparsegpt", "target": {"pattern": "16x16", "sparsity": 0.5}}, ["sparsegpt"]),
        ({"pruner": "gblm", "refine": "dsnot", "target": {"sparsity": 0.5}}, ["gblm", "dsnot"]),
        ({"quantizer": "codebook", "target": {"wbits": 2}}, ["codebook"]),
        ({"recover": ["low-rank"], "target": {"wbits": 2, "group_size": 32}}, ["gptq", "low-rank"]),
    ],
)
def test_every_method_can_be_gone_over(rehearse, values, names):
    layers, rehearsal = rehearse(**values)
    for layer in layers:
        seconds = rehearsal.seconds(layer)
        assert list(seconds) == names and all(0 < value < 60 for value in seconds.values())


def test_each_kind_of_layer_is_gone_over_once(rehearse, monkeypatch):
    layers, rehearsal = rehearse(target={"wbits": 4, "group_size": 32})
    gone_over = []
    plain = Rehearsal._go_over
    monkeypatch.setattr(Rehearsal, "_go_over", lambda self, *kind: gone_over.append(kind) or plain(self, *kind))
    for layer in layers:
        rehearsal.seconds(layer)
    shapes = {layer.shape for layer in layers}
    assert len(gone_over) == 1 + len(shapes) < len(layers)
    assert all(shape[1] <= INPUTS for _, shape in gone_over)


def test_operations_grow_as_the_method_says(rehearse):
    (gptq,) = rehearse(target={"wbits": 4, "group_size": 32})[1].steps
    (wanda,) = rehearse(pruner="wanda", target={"sparsity": 0.5})[1].steps
    assert flops_of(gptq, 8, 2048) == 4 * flops_of(gptq, 8, 1024) == 8 * flops_of(gptq, 4, 1024) > 0
    assert factor_flops(gptq, 2048) == 8 * factor_flops(gptq, 1024) > 0
    assert flops_of(wanda, 8, 1024) == factor_flops(wanda, 1024) == 0
