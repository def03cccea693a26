"""Means over the tokens of windows, and their standard errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mean:
    """A mean, and the standard error it has as an estimate for texts of this kind; None for a single window."""

    value: float
    se: float | None


def mean_over_windows(sums: Sequence[float], counts: Sequence[int]) -> Mean:
    """The mean over all tokens, from the sum over each window's tokens and their number.

    Tokens of one window are alike, so windows are what is drawn: the standard error is that of a ratio of sums over
    clusters (Cochran, Sampling Techniques, 1977, eq. 6.13).
    """
    x, n = torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)
    value = x.sum() / n.sum()
    if len(sums) < 2:
        return Mean(value.item(), None)
    variance = len(sums) / (len(sums) - 1) * (x - value * n).square().sum() / n.sum().square()
    return Mean(value.item(), math.sqrt(variance.item()))
