"""How protocols of perplexity cut text into windows, and which tokens of a window each scores."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import InputError


@dataclass(frozen=True)
class Window:
    """What a model reads at once and what is scored of it: targets[i] follows inputs[: first + i + 1]."""

    inputs: Tensor  # [n] int64
    targets: Tensor  # [m] int64, m <= n - first
    first: int = 0


def whole_windows(tokens: Tensor) -> list[Window]:
    """Every token of `tokens` [n, seqlen] but a window's first, given those before it in the window."""
    return [Window(row, row[1:]) for row in tokens]


def cut_windows(tokens: Tensor, seqlen: int) -> list[Window]:
    """`tokens` [n] side by side in windows of `seqlen`; a window's first token is read and not scored.

    What is left over is dropped. Raises InputError for less than one window.
    """
    return whole_windows(_rows(tokens, seqlen))


def second_halves(tokens: Tensor, seqlen: int, bos: int | None) -> list[Window]:
    """The same windows; `bos` stands in place of each one's first token, and what follows the first half is scored.

    Of 512 tokens those at 257 to 511 are: llama.cpp reads half a window for context and one token more.
    """
    rows = _rows(tokens, seqlen).clone()
    if bos is not None:
        rows[:, 0] = bos
    half = seqlen // 2
    return [Window(row, row[half + 1 :], half) for row in rows]


def strided_windows(tokens: Tensor, seqlen: int, stride: int) -> list[Window]:
    """Windows of `seqlen` that begin every `stride` tokens; each scores what the one before did not reach.

    The very first token is not scored, and the last window is shorter. Raises InputError for fewer than two tokens, or
    a stride that leaves tokens out.
    """
    if not 1 <= stride <= seqlen:
        raise InputError(f"--stride {stride} leaves tokens out between windows of {seqlen}: take 1 to {seqlen}")
    if len(tokens) < 2:
        raise InputError(f"a text of {len(tokens)} tokens has none to score: use a longer one")
    windows, reached = [], 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + seqlen, len(tokens))
        scored = max(reached, begin + 1)  # a window's first token follows nothing
        if end > scored:
            windows.append(Window(tokens[begin:end], tokens[scored:end], scored - begin - 1))
        reached = end
        if end == len(tokens):
            break
    return windows


def rolling_windows(tokens: Tensor, prefix: int, seqlen: int) -> Iterator[Window]:
    """Every token of one document, [n], once: after `prefix` in the first window, later after one token at least.

    lm-eval's get_rolling_token_windows with context_len 1. The last window scores what is left and is filled up with
    tokens from before.
    """
    begun = torch.cat([torch.tensor([prefix], dtype=tokens.dtype), tokens])
    for start in range(0, len(tokens), seqlen):
        end = min(start + seqlen, len(tokens))
        back = 0 if start == 0 else seqlen - (end - start)
        yield Window(begun[start - back : end], tokens[start:end], back)


def _rows(tokens: Tensor, seqlen: int) -> Tensor:
    count = len(tokens) // seqlen
    if not count:
        raise InputError(f"the text has {len(tokens)} tokens, less than one window of {seqlen}: lower --seqlen")
    return tokens[: count * seqlen].view(count, seqlen)
