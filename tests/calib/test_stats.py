"""Statistics of inputs that were shifted and divided are those that calibration would have seen."""

import pytest
import torch

from compress.calib.stats import LayerStats, damped

SUMS = ("x_sum", "x_sq", "x_min", "x_max", "hessian", "sample")


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(200, 12, generator=generator) * 3 + torch.linspace(-8, 8, 12)


def seen(x, *fields):
    sums = {
        "x_sum": x.sum(0), "x_sq": x.square().sum(0), "x_min": x.amin(0), "x_max": x.amax(0), "hessian": x.T @ x,
        "sample": x[:9],
    }  # fmt: skip
    return LayerStats(len(x), **{name: sums[name] for name in fields or SUMS})


def assert_same(one, other):
    for name in SUMS:
        if getattr(other, name) is None:
            assert getattr(one, name) is None
        else:
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-2)


def test_of_shifted_inputs():
    x, shift = inputs(), torch.linspace(-9, 7, 12)
    assert_same(seen(x).shifted(shift), seen(x - shift))
    hessian = seen(x).shifted(shift).hessian
    assert torch.equal(hessian, hessian.T)


def test_of_divided_inputs():
    x, scale = inputs(), torch.logspace(-2, 2, 12)
    assert_same(seen(x).divided(scale), seen(x / scale))
    assert_same(seen(x, "x_min", "x_max").divided(scale), seen(x / scale, "x_min", "x_max"))


def test_ranges_alone_are_shifted_without_sums_and_squares_are_not():
    x, shift = inputs(), torch.ones(12)
    assert_same(seen(x, "x_min", "x_max").shifted(shift), seen(x - shift, "x_min", "x_max"))
    with pytest.raises(AssertionError):
        seen(x, "hessian").shifted(shift)


def test_what_was_factorized_before_is_forgotten():
    stats = seen(inputs())
    stats.factors["any"] = 1
    assert stats.shifted(torch.ones(12)).factors == stats.divided(torch.ones(12)).factors == {}


@pytest.mark.parametrize("field", ["grad_sq", "grad_abs"])
def test_gradients_go_on_to_say_what_a_weight_is_worth(field):
    """|W| |G| is what it was, as with |W| ||x||: the fold changes no mask of Wanda or GBLM."""
    scale, weight, gradient = torch.logspace(-2, 2, 12), torch.randn(5, 12), torch.rand(5, 12)
    power = 2 if field == "grad_sq" else 1
    divided = getattr(LayerStats(0, **{field: gradient}).divided(scale), field)
    torch.testing.assert_close((weight * scale).abs() ** power * divided, weight.abs() ** power * gradient)


def test_the_energy_of_outputs_needs_half_of_a_hessian():
    x, weight = torch.randn(700, 600, dtype=torch.float64), torch.randn(5, 600, dtype=torch.float64)
    stats = LayerStats(700, hessian=x.T @ x)
    assert stats.output_energy(weight) == pytest.approx((x @ weight.T).square().sum().item(), rel=1e-12)


def test_damping_lasts_as_long_as_it_is_wanted():
    x = inputs()
    x[:, 3] = 0
    stats = seen(x, "hessian")
    before = stats.hessian.clone()
    mean = before.diagonal().mean()
    with pytest.raises(KeyError), damped(stats, 0.1) as hessian:
        assert hessian is stats.hessian, "not a copy"
        added = (hessian - before).diagonal()
        torch.testing.assert_close(added[:3], 0.1 * mean.expand(3), rtol=1e-3, atol=0)
        assert added[3] == pytest.approx(mean.item()), "of an input that is always zero"
        raise KeyError
    assert torch.equal(stats.hessian, before)
