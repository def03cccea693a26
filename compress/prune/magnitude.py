"""Magnitude: drop the weights with the smallest absolute value, in each output row.

Han et al., Learning both Weights and Connections, arXiv:1506.02626, section 3. Needs no data; the baseline every other
method has to beat. Rows are the comparison group, as for the other methods here, so that a comparison between them
changes the score and nothing else; `compare = "layer"` is the threshold for the whole matrix that others report.
"""

from compress.options import MethodOptions
from compress.prune.masks import keep_largest
from compress.task import LayerTask

NEEDS: frozenset[str] = frozenset()


class Options(MethodOptions):
    """Magnitude pruning has nothing to set."""


def prune_layer(task: LayerTask, options: Options) -> LayerTask:
    """Prune one layer to its plan's sparsity or pattern."""
    return task.pruned(task.weight, keep_largest(task.weight.abs(), task.plan))
