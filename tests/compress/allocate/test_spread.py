import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import layer_sizes

from compress.allocate.spread import SpreadOptions, spread
from compress.steps import methods
from compress.task import LayerPlan


def removed(layers, plans):
    return sum(layer.n_weights * plans[layer.name].sparsity for layer in layers)


def figures(name, module, layers, target, options):
    """Random numbers of the kind that a rule has measured."""
    generator = torch.Generator().manual_seed(len(layers))
    n = len(module.trials(layers, target, options)) if hasattr(module, "trials") else len(layers)
    return torch.rand(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("sparsity", [0.01, 0.1, 0.31, 0.5, 0.6180339, 0.7, 0.9, 0.95, 0.97])
@pytest.mark.parametrize("name", [name for name, m in methods("allocate").items() if hasattr(m, "allocate_layers")])
def test_every_rule_removes_exactly_the_target_and_stays_in_bounds(name, sparsity):
    module, layers, target = methods("allocate")[name], layer_sizes(), LayerPlan(sparsity=sparsity, wbits=4)
    options = module.Options()
    plans = module.allocate_layers(layers, figures(name, module, layers, target, options), target, options)
    total = sum(layer.n_weights for layer in layers)
    assert removed(layers, plans) == pytest.approx(sparsity * total, abs=1e-6)
    assert set(plans) == {layer.name for layer in layers}
    for plan in plans.values():
        assert 0 <= plan.sparsity <= max(0.95, sparsity)
        assert (plan.wbits, plan.pattern) == (4, None)


@settings(max_examples=60)
@given(st.lists(st.floats(-1, 2), min_size=8, max_size=8), st.floats(0.001, 0.999), st.floats(0.05, 0.95))
def test_the_order_of_the_layers_is_kept_and_the_total_met(wanted, sparsity, highest):
    layers = layer_sizes()
    plans = spread(layers, np.array(wanted), LayerPlan(sparsity=sparsity), SpreadOptions(max_sparsity=highest))
    total = sum(layer.n_weights for layer in layers)
    assert removed(layers, plans) == pytest.approx(sparsity * total, abs=1e-6)
    shares = np.array([plans[layer.name].sparsity for layer in layers])
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(shares[order]) >= -1e-12).all()


def test_within_bounds_differences_are_kept():
    layers = layer_sizes()
    wanted = np.linspace(0.3, 0.6, 8)
    plans = spread(layers, wanted, LayerPlan(sparsity=0.5), SpreadOptions())
    shares = [plans[layer.name].sparsity for layer in layers]
    np.testing.assert_allclose(np.diff(shares), np.diff(wanted), atol=1e-9)
