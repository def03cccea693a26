"""Perplexity of a streamed model over windows of tokens."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.calib.hidden import HiddenStates
from compress.calib.model import Model
from compress.errors import RunError

LOGITS_AT_ONCE = 2**26  # in the model's dtype; a window of 512 tokens over 262,144 words would be 2**27
FLOATS_AT_ONCE = 2**21  # of those, taken to float32 at a time: they stay in the cache


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood in nats, and what it was taken over."""

    perplexity: float
    nll: float  # nats a token
    tokens: int  # tokens scored
    seconds: float


def perplexity(model: Model, windows: Tensor, on_step: Callable[[], None] = lambda: None) -> Perplexity:
    """Perplexity over `windows` [n, seqlen] int64; every token but a window's first is scored, given those before it.

    With a BOS at the start of each window that is every token of the text. `on_step` is called after each block and
    after each window's logits: model.n_blocks + n times. No array of tokens x vocabulary is ever whole in memory.
    Raises RunError if the likelihood is not finite.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        total = _nll(model, windows, on_step, Path(folder))
    if not math.isfinite(total):
        raise RunError(f"{model.folder} gives logits that are not finite: its weights are damaged")
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    nll = total / tokens
    return Perplexity(math.exp(min(nll, 700.0)), nll, tokens, time.monotonic() - started)


def _nll(model: Model, windows: Tensor, on_step: Callable[[], None], folder: Path) -> float:
    """Negative log-likelihood of all scored tokens, in nats; hidden states that are too many go to a file in `folder`."""
    hidden = HiddenStates(model.embed(windows[0]), len(windows), folder)
    for index, window in enumerate(windows):
        hidden[index] = model.embed(window)
    for block in model.blocks():
        for index in range(len(hidden)):
            hidden[index] = block(hidden[index])
        on_step()
    total = 0.0
    for index, window in enumerate(windows):
        total += _window_nll(model, hidden[index], window.to(model.device))
        on_step()
    hidden.close()
    return total


def _window_nll(model: Model, hidden: Tensor, window: Tensor) -> float:
    """Negative log-likelihood in nats of window[1:], from hidden states [1, seqlen, hidden_size]."""
    vocab_size = model.config.get_text_config().vocab_size
    total = 0.0
    for positions in torch.arange(len(window) - 1, device=window.device).split(max(1, LOGITS_AT_ONCE // vocab_size)):
        logits = model.logits(hidden[:, positions])[0]
        rows = max(1, FLOATS_AT_ONCE // vocab_size)
        for part, targets in zip(logits.split(rows), window[positions + 1].split(rows), strict=True):
            nll = torch.nn.functional.cross_entropy(part.float(), targets, reduction="none")
            total += nll.sum(dtype=torch.float64).item()
    return total
