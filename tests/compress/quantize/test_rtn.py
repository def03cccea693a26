import torch
from tasks import error, random_task

from compress.quantize.rtn import Options, quantize_layer
from compress.task import LayerPlan


def test_no_weight_moves_further_than_half_a_step_unless_clipped():
    task = random_task(LayerPlan(wbits=4, group_size=32, symmetric=False))
    done = quantize_layer(task, Options())
    step = done.packed.scale.float().repeat_interleave(32, 1)
    assert (
        (done.weight - task.weight).abs() <= 0.5 * step + 0.6 * step
    ).all()  # zero points are whole: half a step more
    assert ((done.weight - task.weight).abs() <= 0.5 * step + 1e-7).float().mean() > 0.9


def test_searching_ranges_lowers_the_error():
    task = random_task(LayerPlan(wbits=3, group_size=32))
    plain = (quantize_layer(task, Options()).weight - task.weight).square().sum()
    assert (quantize_layer(task, Options(shrink_steps=20)).weight - task.weight).square().sum() < 0.9 * plain
    assert error(quantize_layer(task, Options())) > 0


def test_weights_on_the_grid_are_kept_exactly():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (6, 64), generator=generator).float()
    codes[:, ::32] = -8.0  # every group spans its whole range
    task = random_task(LayerPlan(wbits=4, group_size=32), out=6)
    weight = codes * 0.25 * 15 / 16
    done = quantize_layer(type(task)("x", weight, weight, task.stats, task.plan), Options())
    assert (done.packed.codes().float() - 8 - codes).abs().max() <= 1
