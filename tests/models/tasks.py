"""Random layers with correlated inputs, to try methods on."""

import torch

from compress.calib.stats import LayerStats
from compress.task import LayerPlan, LayerTask


def random_task(plan: LayerPlan, out: int = 48, inputs: int = 64, seed: int = 0, **changes) -> LayerTask:
    """A layer whose inputs are correlated, of unequal size and not zero on average, as in a real model."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(1024, inputs, generator=generator) @ (mix + torch.eye(inputs))
    x = x * torch.rand(inputs, generator=generator).mul(3).exp()
    weight = torch.randn(out, inputs, generator=generator) * 0.02
    x = x + x.std(0) * torch.randn(inputs, generator=generator) / 2
    stats = LayerStats(
        len(x), x_sum=x.sum(0), x_sq=x.square().sum(0), hessian=x.T @ x, sample=x[:64], **_gradients(x, out)
    )
    return LayerTask("layer", weight, weight, stats, plan, **changes)


def _gradients(x: torch.Tensor, out: int) -> dict[str, torch.Tensor]:
    """What calib/gradients.py makes of 64 sequences of these inputs, if outputs' gradients are independent of them."""
    generator = torch.Generator().manual_seed(1)
    inputs = x.unflatten(0, (64, -1))
    outputs = torch.randn(*inputs.shape[:2], out, generator=generator)
    of_mean_loss = outputs.transpose(1, 2) @ inputs / inputs.shape[1]
    return {
        "grad_sq": inputs.shape[1] * of_mean_loss.square().mean(0),
        "grad_abs": inputs.shape[1] ** 0.5 * of_mean_loss.abs().mean(0),
    }


def error(task: LayerTask) -> float:
    """Relative squared error of the layer's output."""
    return task.stats.output_energy(task.weight - task.original) / task.stats.output_energy(task.original)
