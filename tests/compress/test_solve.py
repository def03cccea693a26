import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import compress.solve
from compress.calib.layers import Layer
from compress.calib.stats import LayerStats
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.recipe import read_recipe
from compress.solve import Reader, compress_layers, run_step
from compress.steps import find_steps
from compress.task import LayerPlan, LayerTask

IN = 64


def seen(drift=False):
    x = torch.randn(200, IN, generator=torch.Generator().manual_seed(0))
    away = 0.1 * torch.randn(200, IN, generator=torch.Generator().manual_seed(1))
    moved = {"drift": away.T @ x, "drift_sum": away.sum(0)} if drift else {}
    return LayerStats(200, x_sq=x.square().sum(0), hessian=x.T @ x, sample=x[:50], **moved)


def layers(*outs):
    generator = torch.Generator().manual_seed(2)
    for i, out in enumerate(outs):
        module = nn.Linear(IN, out, bias=False).requires_grad_(False)
        module.weight.copy_(torch.randn(out, IN, generator=generator))
        yield Layer(f"layer{i}", f"layer{i}.weight", module, "weight", None, False)


def work(recipe, layers):
    """As much of a run's work as layers are compressed with."""
    return SimpleNamespace(
        of_layers=find_steps(recipe),
        needs=frozenset({"hessian"}),
        drift=0.25,
        model=SimpleNamespace(dtype=torch.bfloat16),
        plans={layer.name: SimpleNamespace(plan=recipe.target.layer_plan()) for layer in layers},
        adapter_bits=16,
        format_name="native",
    )


@pytest.mark.parametrize("values", [{"pruner": "wanda"}, {"pruner": "gptq"}])
@pytest.mark.parametrize("at_once", [16 * IN, 64 * IN])
def test_layers_are_the_same_however_many_are_solved_together(values, at_once, monkeypatch):
    recipe = read_recipe(None, {"model": "m", "target": {"pattern": "2:4", "wbits": 4, "group_size": 32}, **values})
    outs, found = (48, 30, 80, 10), {}
    for limit in (2**22, at_once):
        monkeypatch.setattr(compress.solve, "WEIGHTS_AT_ONCE", limit)
        own = list(layers(*outs))
        finished = compress_layers(work(recipe, own), (Reader(layer, seen(drift=True), None) for layer in own))
        assert [done.layer.name for done in finished] == [layer.name for layer in own]
        for done in finished:
            assert isinstance(done.packed, Sparse24IntWeight)
            assert (done.keep.unflatten(1, (-1, 4)).sum(-1) == 2).all()
            assert torch.equal(done.layer.weight, done.packed.dequantize())
            assert not done.layer.weight[~done.keep].any()
            assert [line["method"] for line in done.journal] == [step.name for step in find_steps(recipe)]
        found[limit] = finished
    for one, other in zip(*(found[limit] for limit in (2**22, at_once)), strict=True):
        assert (one.keep == other.keep).float().mean() > 0.99
        assert one.error == pytest.approx(other.error, rel=0.05)


def test_large_layers_are_begun_one_after_another_and_drift_goes_once_it_is_made_up_for(monkeypatch):
    recipe = read_recipe(None, {"model": "m", "target": {"wbits": 4, "group_size": 32}})
    monkeypatch.setattr(compress.solve, "WEIGHTS_AT_ONCE", 40 * IN)
    own, drifts, events = list(layers(48, 48, 8, 8, 48)), [], []

    def reader(layer):
        stats = seen(drift=True)
        drifts.append(weakref.ref(stats.drift))
        events.append(layer.name)
        return Reader(layer, stats, None)

    plain = compress.solve._compress

    def watched(work, begun):
        gc.collect()
        assert not any(drift() is not None for drift in drifts)
        events.append(len(begun))
        return plain(work, begun)

    monkeypatch.setattr(compress.solve, "_compress", watched)
    compress_layers(work(recipe, own), map(reader, own))
    assert events == ["layer0", 1, "layer1", 1, "layer2", "layer3", "layer4", 3, 0]


def test_a_mask_that_compares_outputs_is_chosen_for_the_whole_layer(monkeypatch):
    monkeypatch.setattr(compress.solve, "WEIGHTS_AT_ONCE", 8 * IN)
    recipe = read_recipe(None, {"model": "m", "pruner": "gptq", "target": {"sparsity": 0.5, "wbits": 4}})
    (step,) = find_steps(recipe)
    weight = torch.randn(48, IN, generator=torch.Generator().manual_seed(3))
    weight[:8] *= 10  # by rows alone as many would go here as elsewhere
    task = LayerTask("layer", weight, weight, seen(), LayerPlan(0.5, wbits=4, group_size=32))
    (done,) = run_step(step, [task])
    assert done.keep[:8].float().mean() > 0.8 and done.keep.float().mean() == pytest.approx(0.5, abs=0.01)
