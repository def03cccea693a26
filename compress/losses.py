"""How far a changed model is from the dense one, on the same text: what allocations weigh, and what their plan came to."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from compress.calib.gradients import LOGITS_AT_ONCE
from compress.calib.hidden import HiddenStates
from compress.calib.model import Model


def losses(
    loss: str, model: Model, streams: HiddenStates, n: int, positions: int, step: Callable[[], None] = lambda: None
) -> Tensor:
    """The loss of each changed model, [n_models] float64, against the dense one; infinite where that is no number.

    `streams`: what leaves the last block, a [1, tokens, hidden_size] a sequence: `n` of the dense model, then `n` of each
    changed one. `loss` "output": the squared error at a token relative to its square; "logits": the Kullback-Leibler
    divergence, in nats, of the next token's distribution at `positions` tokens of each sequence, spread evenly. Both are
    means over tokens. `model` lends its head. `step` is called once for each changed model and sequence.
    """
    found = torch.empty(n, len(streams) // n - 1, dtype=torch.float64)
    of = _of_outputs(streams, n) if loss == "output" else _of_logits(model, streams, n, positions)
    for place, each in enumerate(of):
        found.view(-1)[place] = each
        step()
    found = found.mean(0)
    return found.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _of_outputs(streams: HiddenStates, n: int) -> Iterator[float]:
    """By sequence, then model."""
    for sequence in range(n):
        dense = streams[sequence].double()
        for other in range(sequence + n, len(streams), n):
            error = (streams[other].double() - dense).square().sum(-1)
            yield (error / dense.square().sum(-1)).mean().item()


def _of_logits(model: Model, streams: HiddenStates, n: int, positions: int) -> Iterator[float]:
    """By sequence, then model; of a few positions at a time, since vocabularies are long.

    Buffers are used again: at this size new memory costs more than the arithmetic.
    """
    vocab_size = model.config.get_text_config().vocab_size
    length = streams[0].shape[1]
    taken = torch.linspace(0, length - 1, min(positions, length)).round().long()
    at_once = min(len(taken), max(1, LOGITS_AT_ONCE // vocab_size))
    buffers = [torch.empty(at_once, vocab_size, device=model.device) for _ in range(2)]
    for sequence in range(n):
        dense = [_log_softmax(model, streams[sequence][:, some], buffers[0]).clone() for some in taken.split(at_once)]
        for other in range(sequence + n, len(streams), n):
            total = 0.0
            for some, log_p in zip(taken.split(at_once), dense, strict=True):
                p, log_q = (buffer[: len(some)] for buffer in buffers)
                torch.exp(log_p, out=p)
                ratio = _log_softmax(model, streams[other][:, some], log_q).sub_(log_p)
                total -= sum(torch.dot(*each).item() for each in zip(p, ratio, strict=True))
            yield total / len(taken)


def _log_softmax(model: Model, hidden: Tensor, out: Tensor) -> Tensor:
    """log p of every next token, [positions, vocab_size] float32, in `out`."""
    out = out[: hidden.shape[1]]
    out.copy_(model.logits(hidden)[0])
    return torch.log_softmax(out, -1, out=out)
