"""Round to nearest: each group of weights on its own grid, each weight to the nearest value of it.

The baseline of every quantization paper (for example GPTQ, arXiv:2210.17323, table 2). Needs no data.
"""

from pydantic import Field

from compress.kernels.weights import Grid, IntWeight
from compress.options import MethodOptions
from compress.task import LayerTask

NEEDS: frozenset[str] = frozenset()
ROWS_ALONE = True


class Options(MethodOptions):
    """How each group's scale is chosen."""

    shrink_steps: int = Field(0, ge=0, le=200, description="ranges tried below min-max for the smallest error; 0: none")


def quantize_layer(task: LayerTask, options: Options) -> LayerTask:
    """Quantize one layer to its plan's bits and groups. Zeros stay zeros."""
    plan = task.plan
    groups = task.weight.unflatten(1, (-1, task.group_size))
    grid = Grid.fit(groups, plan.wbits, plan.symmetric, task.dtype, shrink_steps=options.shrink_steps)
    codes = grid.encode_groups(groups).flatten(1)
    return task.quantized(IntWeight.from_codes(codes, grid, task.group_size, plan.symmetric, task.dtype))
