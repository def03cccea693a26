import pytest
import torch
from inputs import input_task, random_inputs

from compress.kernels.inputs import InputQuantizer
from compress.quantize.smoothquant import Options, scale_inputs


def ranges(task, x):
    weights = torch.cat(task.weights).abs().amax(0)
    return (x / task.scale).abs().amax(0), weights * task.scale


def test_half_way_inputs_and_weights_have_the_same_range_in_every_channel():
    x = random_inputs()
    inputs, weights = ranges(scale_inputs(input_task(x), Options(alpha=0.5)), x)
    torch.testing.assert_close(inputs, weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_at_the_ends_one_of_them_takes_all(alpha):
    x = random_inputs()
    flat = ranges(scale_inputs(input_task(x), Options(alpha=alpha)), x)[0 if alpha else 1]
    torch.testing.assert_close(flat, torch.ones(64), rtol=1e-4, atol=1e-4)


def test_tokens_lose_less_to_outlying_channels():
    x = random_inputs()
    task = input_task(x)
    done = scale_inputs(task, Options())
    weight = task.weights[0] / x.std(0)
    wanted = x @ weight.T
    plain = InputQuantizer(8).fake(x) @ weight.T
    smooth = InputQuantizer(8).fake(x / done.scale) @ (weight * done.scale).T
    assert not done.static and done.shift is None
    assert (smooth - wanted).norm() < 0.7 * (plain - wanted).norm()


def test_dead_channels_and_columns_break_nothing_and_other_inputs_stay():
    x = random_inputs()
    x[:, 5] = 0.0
    task = input_task(x)
    for weight in task.weights:
        weight[:, 6] = 0.0
    scale = scale_inputs(task, Options()).scale
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert scale_inputs(input_task(x, foldable=False), Options()).scale is None
