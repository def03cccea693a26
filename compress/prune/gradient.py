"""Gradient: drop the weights whose magnitude times root mean square gradient is smallest, in each output row.

Das et al., Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models, arXiv:2311.04902, the ablation
of its score without activations: |W| · sqrt(grad_sq), what compress.prune.gblm tends to as its alpha grows. Costs one
forward and one backward pass of each sequence. No weight is changed, only removed.
"""

from compress.options import MethodOptions
from compress.prune.masks import keep_largest
from compress.task import LayerTask

NEEDS = frozenset({"grad_sq"})


class Options(MethodOptions):
    """The gradient's score has nothing to set."""


def prune_layer(task: LayerTask, options: Options) -> LayerTask:
    """Prune one layer to its plan's sparsity or pattern."""
    assert task.stats.grad_sq is not None  # NEEDS asks for it
    score = task.weight.abs() * task.stats.grad_sq.sqrt()
    return task.pruned(task.weight, keep_largest(score, task.plan))
