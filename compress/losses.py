"""How far a changed model is from the dense one, on the same text: what allocations weigh, and what their plan came to."""

from collections.abc import Iterator

import torch
from torch import Tensor

from compress.calib.gradients import LOGITS_AT_ONCE
from compress.calib.hidden import HiddenStates
from compress.calib.model import Model


def losses(loss: str, model: Model, streams: HiddenStates, n: int, positions: int) -> Tensor:
    """The loss of each changed model, [n_models] float64, against the dense one; infinite where that is no number.

    `streams`: what leaves the last block, a [1, tokens, hidden_size] a sequence: `n` of the dense model, then `n` of each
    changed one. `loss` "output": the squared error at a token relative to its square; "logits": the Kullback-Leibler
    divergence, in nats, of the next token's distribution at `positions` tokens of each sequence, spread evenly. Both are
    means over tokens. `model` lends its head.
    """
    of = _of_outputs(streams, n) if loss == "output" else _of_logits(model, streams, n, positions)
    found = torch.tensor(list(of), dtype=torch.float64).view(n, -1).mean(0)
    return found.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _of_outputs(streams: HiddenStates, n: int) -> Iterator[float]:
    """By sequence, then model."""
    for sequence in range(n):
        dense = streams[sequence].double()
        for other in range(sequence + n, len(streams), n):
            error = (streams[other].double() - dense).square().sum(-1)
            yield (error / dense.square().sum(-1)).mean().item()


def _of_logits(model: Model, streams: HiddenStates, n: int, positions: int) -> Iterator[float]:
    """By sequence, then model; of a few positions at a time, since vocabularies are long."""
    at_once = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    for sequence in range(n):
        others = range(sequence + n, len(streams), n)
        length = streams[sequence].shape[1]
        taken = torch.linspace(0, length - 1, min(positions, length)).round().long()
        totals = torch.zeros(len(others), dtype=torch.float64)
        for some in taken.split(at_once):
            dense = model.logits(streams[sequence][:, some]).float().log_softmax(-1)
            for place, other in enumerate(others):
                log_q = model.logits(streams[other][:, some]).float().log_softmax(-1)
                totals[place] += (dense.exp() * (dense - log_q)).sum(dtype=torch.float64).item()
        yield from (totals / len(taken)).tolist()
