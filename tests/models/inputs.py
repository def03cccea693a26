"""Inputs of layers with outlying channels, to try methods that make codes of inputs on."""

from dataclasses import replace

import torch

from compress.calib.stats import LayerStats
from compress.task import InputTask


def random_inputs(features: int = 64, tokens: int = 512, seed: int = 0) -> torch.Tensor:
    """[tokens, features]: a few channels are fifty times as large as others, and few are centred."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(features, generator=generator).mul(2).exp()
    sizes[:: features // 4] *= 50
    return (torch.randn(tokens, features, generator=generator) + torch.randn(features, generator=generator)) * sizes


def input_task(x: torch.Tensor, abits: int = 8, **changes) -> InputTask:
    """What a norm emits and two layers read."""
    generator = torch.Generator().manual_seed(1)
    weights = tuple(torch.randn(out, x.shape[1], generator=generator) * 0.02 for out in (32, 48))
    stats = LayerStats(len(x), x_sum=x.sum(0), x_min=x.amin(0), x_max=x.amax(0))
    return replace(InputTask(stats, weights, abits, foldable=True, shiftable=False), **changes)
