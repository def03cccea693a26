import pytest
import torch
from inputs import input_task, random_inputs

from compress.kernels.inputs import InputQuantizer
from compress.quantize.outliertune import Options, needs, scale_inputs


def emitted(task, x):
    return (x - (0 if task.shift is None else task.shift)) / task.scale


@pytest.mark.parametrize("abits", [4, 6, 8])
@pytest.mark.parametrize("shiftable", [False, True])
def test_each_channel_spans_all_codes_and_none_saturates(abits, shiftable):
    x = random_inputs()
    done = scale_inputs(input_task(x, abits, shiftable=shiftable), Options())
    values = emitted(done, x)
    assert done.static and (done.shift is not None) == shiftable
    torch.testing.assert_close(values.abs().amax(0), torch.full((64,), float(done.highest)), rtol=1e-5, atol=1e-4)
    assert InputQuantizer(abits, True).saturated(values) == 0


def test_centred_on_the_middle_of_its_range_a_channel_reaches_as_far_down_as_up():
    x = random_inputs()
    done = scale_inputs(input_task(x, shiftable=True), Options())
    values = emitted(done, x)
    torch.testing.assert_close(values.amax(0), -values.amin(0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("symmetrize", "shiftable", "shifted"),
    [("auto", False, False), ("auto", True, True), ("yes", False, True), ("no", True, False)],
)
def test_who_is_centred(symmetrize, shiftable, shifted):
    done = scale_inputs(input_task(random_inputs(), shiftable=shiftable), Options(symmetrize=symmetrize))
    assert (done.shift is not None) == shifted
    assert ("x_sum" in needs(Options(symmetrize=symmetrize))) == (symmetrize != "no")


def test_a_shift_makes_steps_finer_where_channels_are_not_centred():
    x = random_inputs()
    plain, centred = (scale_inputs(input_task(x), Options(symmetrize=s)).scale for s in ("no", "yes"))
    assert (centred <= plain * (1 + 1e-6)).all() and (centred < 0.8 * plain).float().mean() > 0.2


def test_clipping_saturates_outliers_alone_and_leaves_small_channels_as_they_are():
    x = random_inputs()
    whole, clipped = (scale_inputs(input_task(x), Options(clip_ratio=ratio)) for ratio in (1.0, 0.5))
    small = x.abs().amax(0) < 0.4 * min(x.max(), -x.min())
    assert small.any() and torch.equal(clipped.scale[small], whole.scale[small])
    assert (emitted(clipped, x).abs().amax(0) > 127.5).any()
    assert InputQuantizer(8, True).saturated(emitted(clipped, x)) > 0


def test_a_channel_that_is_always_the_same_breaks_nothing():
    x = random_inputs()
    x[:, 5], x[:, 6] = 0.0, 3.0
    for symmetrize in ("yes", "no"):
        done = scale_inputs(input_task(x), Options(symmetrize=symmetrize))
        assert torch.isfinite(done.scale).all() and (done.scale > 0).all()
        assert (emitted(done, x)[:, 5] == 0).all()


def test_an_input_that_nothing_can_be_folded_for_is_left_to_its_tokens():
    task = input_task(random_inputs(), foldable=False)
    assert scale_inputs(task, Options(symmetrize="yes")) is task


def test_outlying_channels_no_longer_drown_the_others():
    """The outputs are closer than with one scale a token, which the largest channels decide."""
    x = random_inputs()
    task = input_task(x, 6)
    done = scale_inputs(task, Options())
    weight = task.weights[0] / x.std(0)  # every channel matters to the output
    wanted = x @ weight.T
    per_token = InputQuantizer(6).fake(x) @ weight.T
    static = InputQuantizer(6, True).fake(emitted(done, x)) @ (weight * done.scale).T
    assert (static - wanted).norm() < 0.3 * (per_token - wanted).norm()
