"""Gradient: drop the weights whose magnitude times root mean square gradient is smallest, in each output row.

Das et al., Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models, arXiv:2311.04902, the ablation
of its score without activations: |W| · sqrt(grad_sq), what compress.prune.gblm tends to as its alpha grows. Costs one
forward and one backward pass of each sequence. No weight is changed, only removed. A layer without any gradient, such as
an expert no token reached, goes by magnitude.
"""

import torch

from compress.options import MethodOptions
from compress.prune.masks import keep_largest
from compress.task import LayerTask

NEEDS = frozenset({"grad_sq"})


class Options(MethodOptions):
    """The gradient's score has nothing to set."""


def prune_layer(task: LayerTask, options: Options) -> LayerTask:
    """Prune one layer to its plan's sparsity or pattern."""
    assert task.stats.grad_sq is not None  # NEEDS asks for it
    gradient = task.stats.grad_sq.sqrt()
    score = task.weight.abs() * (gradient if gradient.any() else torch.ones_like(gradient))
    return task.pruned(task.weight, keep_largest(score, task.plan))
