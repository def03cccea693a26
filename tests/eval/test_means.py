import pytest
import torch

from compress.eval.means import mean_over_windows


def test_equal_windows_have_the_standard_error_of_their_means():
    means = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = mean_over_windows((means * 7).tolist(), [7] * 50)
    assert found.value == pytest.approx(means.mean().item())
    assert found.se == pytest.approx((means.std() / 50**0.5).item())


def test_the_error_is_the_spread_of_means_over_many_draws():
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(400):
        counts = torch.randint(1, 20, (30,), generator=generator)
        levels = torch.randn(30, generator=generator) + 2
        draws.append(mean_over_windows((counts * levels).tolist(), counts.tolist()))
    spread = torch.tensor([draw.value for draw in draws]).std().item()
    assert sum(draw.se for draw in draws) / 400 == pytest.approx(spread, rel=0.15)


def test_one_window_has_no_error():
    assert mean_over_windows([3.0], [2]).se is None
    assert mean_over_windows([3.0], [2]).value == 1.5
