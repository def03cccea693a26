"""Per token: what enters a layer is rounded with a scale for each token, found at run time from its largest value.

ZeroQuant (arXiv:2206.01861, section 4.1, token-wise quantization). Needs no data, and no weight changes. A product of
integers costs one multiplication an output more, by the token's scale. Readers of compressed-tensors know it at 8 bits.
"""

from compress.options import MethodOptions
from compress.task import InputTask

NEEDS: frozenset[str] = frozenset()
STATIC = False


class Options(MethodOptions):
    """A scale for each token has nothing to set."""


def scale_inputs(task: InputTask, options: Options) -> InputTask:
    """The input as it comes."""
    return task
