"""Wanda: drop the weights whose magnitude times input norm is smallest, in each output row.

Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv:2306.11695, eq. 1. Needs one pass
of activations; costs a partial sort per row. No weight is changed, only removed.
"""

from compress.options import MethodOptions
from compress.prune.masks import keep_largest
from compress.task import LayerTask

NEEDS = frozenset({"x_sq"})


class Options(MethodOptions):
    """Wanda has nothing to set."""


def prune_layer(task: LayerTask, options: Options) -> LayerTask:
    """Prune one layer to its plan's sparsity or pattern."""
    assert task.stats.x_sq is not None  # NEEDS asks for it
    score = task.weight.abs() * task.stats.x_sq.sqrt()
    return task.pruned(task.weight, keep_largest(score, task.plan))
