"""SmoothQuant: channels with outliers are divided by a scale that goes into the weights, then each token has its own.

arXiv:2211.10438, equation 4: s_j = max|x_j|^alpha / max|W_j|^(1 - alpha), folded in the norm that emits the input and in
the columns of all layers that read it. It reads the range of each input channel. Inputs that no norm emits, or that
something else reads as well, are left as they come. What is written is an ordinary model with inputs quantized per token.
"""

import torch
from pydantic import Field

from compress.options import MethodOptions
from compress.task import InputTask

NEEDS = frozenset({"x_min", "x_max"})
STATIC = False
SMALLEST = 1e-5  # of a range, as in the official code


class Options(MethodOptions):
    """How much of the difficulty goes into the weights."""

    alpha: float = Field(0.5, ge=0, le=1, description="share that moves from inputs to weights; 1: all of it")


def scale_inputs(task: InputTask, options: Options) -> InputTask:
    """Give a foldable input a scale for each channel."""
    low, high = task.stats.x_min, task.stats.x_max
    assert low is not None and high is not None  # NEEDS asks for them
    if not task.foldable:
        return task
    inputs = torch.maximum(-low, high).clamp(min=SMALLEST)
    weights = torch.stack([weight.abs().amax(0).float() for weight in task.weights]).amax(0).clamp(min=SMALLEST)
    scale = inputs**options.alpha / weights ** (1 - options.alpha)
    return task.scaled(scale.clamp(min=SMALLEST))
