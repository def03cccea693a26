"""GBLM-Pruner: Wanda's score plus magnitude times gradient, so that inputs and the loss both have a say.

Das et al., Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models, arXiv:2311.04902, section 3:
score = |W| · (x_rms + alpha · g), with x_rms an input channel's root mean square over tokens and g = sqrt(grad_sq) for
norm l2, grad_abs for l1; compress.calib.gradients says what means these are. Costs one forward and one backward pass of
each sequence beside Wanda's pass of activations. No weight is changed, only removed.

The paper scores |W| · (sqrt(1/N Σ_j ‖X_j‖²) + 100 sqrt(Σ_j g_j²)) with N = 128 sequences of T = 2048 tokens, which says
something else for every N and T. Divided by sqrt(T) that is |W| · (x_rms + 100 sqrt(N)/T · sqrt(mean_j T g_j²)): its
alpha = 100 is 100 sqrt(128)/2048 = 0.552 here, whatever N and T. The public code differs further: it takes gradients in
float16 without scaling the loss, where small ones vanish, adds up l1 in float16, and rounds |W| · g to float16; here the
hidden gradients are scaled, and sums and scores are float32.
"""

from typing import Literal

from pydantic import Field

from compress.options import MethodOptions
from compress.prune.masks import keep_largest
from compress.task import LayerTask

NEEDS = frozenset({"x_sq", "grad_sq", "grad_abs"})


class Options(MethodOptions):
    """How much the gradient counts, and which mean of it."""

    alpha: float = Field(0.55, ge=0, description="weight of the gradient beside the input's root mean square")
    norm: Literal["l1", "l2"] = Field("l2", description="mean over sequences: of absolute values, or root of squares")


def needs(options: Options) -> frozenset[str]:
    """The statistics that these options read."""
    return frozenset({"x_sq", "grad_sq" if options.norm == "l2" else "grad_abs"})


def prune_layer(task: LayerTask, options: Options) -> LayerTask:
    """Prune one layer to its plan's sparsity or pattern."""
    stats = task.stats
    mean = stats.grad_sq if options.norm == "l2" else stats.grad_abs
    assert stats.x_sq is not None and mean is not None  # needs() asks for them
    gradient = options.alpha * (mean.sqrt() if options.norm == "l2" else mean)
    x_rms = (stats.x_sq / max(stats.n_tokens, 1)).sqrt()
    score = gradient.add_(x_rms).mul_(task.weight.abs())
    return task.pruned(task.weight, keep_largest(score, task.plan))
