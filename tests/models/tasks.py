"""Random layers with correlated inputs, to try methods on."""

import torch

from compress.calib.stats import LayerStats
from compress.task import LayerPlan, LayerTask


def random_task(plan: LayerPlan, out: int = 48, inputs: int = 64, seed: int = 0, **changes) -> LayerTask:
    """A layer whose inputs are correlated and of unequal size, as in a real model."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(1024, inputs, generator=generator) @ (mix + torch.eye(inputs))
    x = x * torch.rand(inputs, generator=generator).mul(3).exp()
    weight = torch.randn(out, inputs, generator=generator) * 0.02
    stats = LayerStats(len(x), x_sq=x.square().sum(0), hessian=x.T @ x, sample=x[:64])
    return LayerTask("layer", weight, weight, stats, plan, **changes)


def error(task: LayerTask) -> float:
    """Relative squared error of the layer's output."""
    return task.stats.output_energy(task.weight - task.original) / task.stats.output_energy(task.original)
