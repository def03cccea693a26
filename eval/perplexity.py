"""Perplexity of a streamed model over windows of tokens."""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.calib.model import Model
from compress.errors import RunError
from compress.eval.means import Mean, mean_over_windows
from compress.eval.stream import LastStates, scored_logits
from compress.eval.windows import Window, whole_windows


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood in nats, and what it was taken over."""

    perplexity: float
    nll: float  # nats a token
    se: float | None  # of nll, by windows; times `perplexity` it is that of the perplexity
    tokens: int  # tokens scored
    sums: list[float]  # of each window, nats
    seconds: float


def perplexity(model: Model, windows: Tensor, on_step: Callable[[], None] = lambda: None) -> Perplexity:
    """Perplexity over `windows` [n, seqlen] int64; every token but a window's first is scored, given those before it.

    With a BOS at the start of each window that is every token of the text. Otherwise as `score`.
    """
    return score(model, whole_windows(windows), on_step)


def score(model: Model, windows: Sequence[Window], on_step: Callable[[], None] = lambda: None) -> Perplexity:
    """Perplexity over what the windows score.

    `on_step` is called after each block and after each window's logits: model.n_blocks + len(windows) times. No array
    of tokens x vocabulary is ever whole in memory. Raises RunError if the likelihood is not finite.
    """
    started = time.monotonic()
    sums = []
    with tempfile.TemporaryDirectory() as folder:
        hidden = LastStates(model, windows, Path(folder), on_step)
        for index, window in enumerate(windows):
            sums.append(_window_nll(model, hidden[index], window))
            on_step()
        hidden.close()
    nll = finite(model, mean_over_windows(sums, [len(window.targets) for window in windows]))
    tokens = sum(len(window.targets) for window in windows)
    return Perplexity(exp(nll.value), nll.value, nll.se, tokens, sums, time.monotonic() - started)


def exp(nll: float) -> float:
    """exp(nll), or the largest power that is still a number."""
    return math.exp(min(nll, 700.0))


def finite(model: Model, nll: Mean) -> Mean:
    """A mean as it is. Raises RunError if it is no number."""
    if not math.isfinite(nll.value):
        raise RunError(f"{model.folder} gives logits that are not finite: its weights are damaged")
    return nll


def _window_nll(model: Model, hidden: Tensor, window: Window) -> float:
    """Negative log-likelihood in nats of a window's targets, from hidden states [1, n, hidden_size]."""
    total = 0.0
    for targets, logits in scored_logits([model], [hidden], window):
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        total += nll.sum(dtype=torch.float64).item()
    return total
