"""Settle the columns of a weight one by one, and let the columns still to come absorb each one's error.

The optimal brain surgeon update that SparseGPT (arXiv:2301.00774, algorithm 1) and GPTQ (arXiv:2210.17323, algorithm 1)
share: with U the upper Cholesky factor of the inverse Hessian, an error e of column i is best made up for by adding
-e / U_ii * U_ij to every later column j.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from compress.prune.masks import keep_largest
from compress.task import LayerPlan

INNER = 32  # columns whose rank-one updates stay in the cache


def settle_columns(
    columns: Tensor,
    factor: Tensor,
    settle: Callable[[int, Tensor], Tensor],
    block_size: int,
    unit: int = 1,
    begin: Callable[[int, int], None] | None = None,
) -> None:
    """Replace each column by what `settle` makes of it, in order. `columns` is changed in place.

    `columns`: [in, out] float32, a column of the weight in each row. `factor`: [in, in], upper. `settle(i, column)`
    returns the [out] values column i ends with; `column` has taken in the errors of all columns before it.
    `begin(start, stop)` is called before each block of about `block_size` columns, when all of them have taken in the
    errors of all earlier blocks. Columns are up to date `unit` at a time: where i is a multiple of it, so are
    columns i to i + unit - 1. Errors go on as rank-one updates within `INNER` columns and as matrix products beyond.
    """
    pivots = factor.diagonal().tolist()
    block_size, inner = (max(size // unit, 1) * unit for size in (block_size, INNER))
    for start in range(0, len(columns), block_size):
        stop = min(start + block_size, len(columns))
        if begin is not None:
            begin(start, stop)
        errors = columns.new_empty(stop - start, columns.shape[1])
        for low in range(start, stop, inner):
            high = min(low + inner, stop)
            for i in range(low, high):
                settled = settle(i, columns[i])
                error = torch.sub(columns[i], settled, out=errors[i - start]).div_(pivots[i])
                columns[i] = settled
                columns[i + 1 : high].addr_(factor[i, i + 1 : high], error, alpha=-1)
            columns[high:stop].addmm_(factor[low:high, high:stop].T, errors[low - start : high - start], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)


class SweepMask:
    """A mask chosen as the sweep goes, from weights that have taken in the errors of earlier columns (SparseGPT).

    A weight's score is its squared value over the squared pivot of its column. Unstructured masks compare all rows of a
    block of columns at once, n:m masks the m columns of a group. Masks that are compared otherwise (`compare`, and
    blocks of weights) are chosen before the first update.
    """

    def __init__(self, columns: Tensor, factor: Tensor, plan: LayerPlan):
        self.columns, self.plan, self.pivots = columns, plan, factor.diagonal().unsqueeze(1)
        self.at_once = plan.block is not None or plan.compare is not None
        self.unit = 1 if plan.pattern is None else plan.pattern[1]  # columns to keep up to date together
        if self.at_once:
            self.keep = keep_largest((columns / self.pivots).abs_().T, plan).T.contiguous()
        else:
            self.keep = torch.ones_like(columns, dtype=torch.bool)  # [in, out]

    def begin(self, start: int, stop: int) -> None:
        """Choose among a block of columns, if they compete with each other."""
        if self.at_once or self.plan.pattern is not None:
            return
        score = (self.columns[start:stop] / self.pivots[start:stop]).square_().flatten()
        gone = score.topk(int(score.numel() * self.plan.sparsity), largest=False, sorted=False).indices
        self.keep[start:stop].view(-1)[gone] = False

    def reach(self, i: int) -> Tensor:
        """What is kept of column i, [out] bool, now that its turn has come."""
        if self.plan.pattern is not None and i % self.unit == 0:
            n, m = self.plan.pattern
            score = (self.columns[i : i + m] / self.pivots[i : i + m]).square_()
            self.keep[i : i + m].scatter_(0, score.argsort(dim=0, stable=True)[: m - n], False)
        return self.keep[i]
