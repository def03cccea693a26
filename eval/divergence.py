"""How far a model's next tokens are from another's on the same text: divergence, agreement, and both likelihoods."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.calib.model import Model
from compress.errors import InputError
from compress.eval.means import Mean, mean_over_windows
from compress.eval.perplexity import finite
from compress.eval.stream import LastStates, scored_logits
from compress.eval.windows import Window


@dataclass(frozen=True)
class Divergence:
    """Means over scored tokens; standard errors are by windows, those of differences over the same windows."""

    kl: Mean  # KL(dense || model) of the next token's distribution, nats
    top1: Mean  # share of tokens where both find the same one most likely
    nll: Mean  # of the model, nats a token
    dense_nll: Mean
    excess: Mean  # nll less dense_nll: the log of the ratio of perplexities
    tokens: int
    sums: list[float]  # nats of the model, of each window
    seconds: float


def divergence(
    model: Model, dense: Model, windows: Sequence[Window], on_step: Callable[[], None] = lambda: None
) -> Divergence:
    """Compare `model` with `dense` where the windows score, with one block of one of them in memory at a time.

    `on_step` is called after each block of both and after each window's logits: 2 n_blocks + len(windows) times where
    both have as many. No array of tokens x vocabulary is ever whole. Raises InputError for different vocabularies,
    RunError for a likelihood that is not finite.
    """
    sizes = [each.config.get_text_config().vocab_size for each in (model, dense)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{model.folder} knows {sizes[0]} tokens and {dense.folder} {sizes[1]}: compare models of one vocabulary"
        )
    started = time.monotonic()
    rows = []
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        of_dense = LastStates(dense, windows, Path(first), on_step)
        of_model = LastStates(model, windows, Path(second), on_step)
        for index, window in enumerate(windows):
            rows.append(_window_sums(model, dense, (of_model[index], of_dense[index]), window))
            on_step()
        of_dense.close()
        of_model.close()
    counts = [len(window.targets) for window in windows]
    kl, top1, nll, dense_nll = (mean_over_windows(column, counts) for column in zip(*rows, strict=True))
    excess = mean_over_windows([row[2] - row[3] for row in rows], counts)
    finite(dense, dense_nll)
    sums, seconds = [row[2] for row in rows], time.monotonic() - started
    return Divergence(kl, top1, finite(model, nll), dense_nll, excess, sum(counts), sums, seconds)


def _window_sums(
    model: Model, dense: Model, hidden: tuple[Tensor, Tensor], window: Window
) -> tuple[float, float, float, float]:
    """Sums over a window's targets: divergence, agreements, and both negative log-likelihoods."""
    total = torch.zeros(4, dtype=torch.float64)
    for targets, own, others in scored_logits([model, dense], hidden, window):
        log_q, log_p = own.log_softmax(-1), others.log_softmax(-1)
        word = targets.unsqueeze(1)
        likelihoods = [-each.gather(1, word).sum(dtype=torch.float64) for each in (log_q, log_p)]
        agreed = (log_q.argmax(-1) == log_p.argmax(-1)).sum()
        p = log_p.exp()
        # Words that cannot come add nothing, also where both logarithms are infinite.
        kl = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0).sum(dtype=torch.float64)
        total += torch.stack([kl, agreed.double(), *likelihoods]).cpu()
    found = total.tolist()
    return found[0], found[1], found[2], found[3]
