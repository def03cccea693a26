"""Named protocols of perplexity: how a text becomes windows, so that a figure can stand beside another tool's.

EVALUATION.md says what each counts. All of them score in nats and divide by the tokens scored; lm-eval's also divides
by words and bytes of the text as it came.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from compress.calib.data import bos_token_id, evaluation_windows
from compress.calib.texts import DATASETS, read_text
from compress.errors import InputError
from compress.eval.wikitext import detokenized, pages
from compress.eval.windows import (
    Window,
    cut_windows,
    rolling_windows,
    second_halves,
    strided_windows,
    whole_windows,
)

DOCUMENTS, MOST_WINDOWS = 1100, 256  # of a streamed data set, by Wanda's loader of C4


@dataclass(frozen=True)
class Cut:
    """A text as a protocol reads it; `words` and `nbytes` are of the text as it came, where the protocol counts them."""

    windows: list[Window]
    words: int | None = None
    nbytes: int | None = None


@dataclass(frozen=True)
class Sizes:
    """What can be chosen of a protocol's windows."""

    seqlen: int
    stride: int
    at_most: int | None = None  # the first windows; of lm-eval the first documents


def own_windows(source: str, tokenizer: Any, sizes: Sizes) -> Cut:
    """The text without special tokens in windows of seqlen - 1, the tokenizer's BOS before each; all of it is scored."""
    return Cut(whole_windows(evaluation_windows(source, tokenizer, sizes.seqlen, sizes.at_most)))


def joined_windows(source: str, tokenizer: Any, sizes: Sizes) -> Cut:
    """As Wanda, SparseGPT and GPTQ do: rows joined, special tokens once at the start, whole windows.

    The loss of a window is over all tokens but its first. WikiText's rows, lines of the file with empty ones where it is
    blank, are joined by two line ends; those of C4 and PTB by a space. Of a streamed data set 1100 documents are read
    and 256 windows measured.
    """
    tokens = _special(_joined(source), tokenizer)
    windows = cut_windows(tokens, sizes.seqlen)
    return Cut(windows[: sizes.at_most or (MOST_WINDOWS if _streamed(source) else None)])


def strided(source: str, tokenizer: Any, sizes: Sizes) -> Cut:
    """As the guide "Perplexity of fixed-length models" of transformers does, on the text joined as above.

    Windows overlap by seqlen - stride tokens, which are context; each token but the first is scored once. (The guide's
    loop weighs those of later windows by (stride - 1) / stride, which moves the fifth digit.)
    """
    return Cut(strided_windows(_special(_joined(source), tokenizer), sizes.seqlen, sizes.stride)[: sizes.at_most])


def second_half(source: str, tokenizer: Any, sizes: Sizes) -> Cut:
    """As llama.cpp's llama-perplexity does: the file as it is but for a last line end, special tokens once at the start.

    Windows of 512 (its n_ctx); in each the BOS stands in place of the first token if the tokenizer has one, and tokens
    257 to 511 are scored.
    """
    text = _plain(source).removesuffix("\n")
    windows = second_halves(_special(text, tokenizer), sizes.seqlen, bos_token_id(tokenizer))
    return Cut(windows[: sizes.at_most])


def rolling(source: str, tokenizer: Any, sizes: Sizes) -> Cut:
    """As lm-eval's loglikelihood_rolling does: each document by itself, every token of it scored once.

    The first window reads the BOS, or the EOS of a tokenizer without one, which is not scored and is put there once
    (lm-eval itself puts a second one, and scores it, where the tokenizer adds its own). WikiText is taken apart into
    pages and detokenized as the wikitext task does; words and bytes are those of the pages as they came.
    """
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise InputError("this tokenizer has neither BOS nor EOS to begin a document with: choose another --protocol")
    windows: list[Window] = []
    words, nbytes = 0, 0
    for page in islice(_pages(source), sizes.at_most):
        windows += rolling_windows(_plain_tokens(detokenized(page), tokenizer), prefix, sizes.seqlen)
        words += len(re.split(r"\s+", page))
        nbytes += len(page.encode())
    if not windows:
        raise InputError(f"{source} holds no text to score: use a longer one")
    return Cut(windows, words, nbytes)


@dataclass(frozen=True)
class Protocol:
    """What a name stands for."""

    cut: Callable[[str, Any, Sizes], Cut]
    seqlen: int  # where nothing else is asked for


PROTOCOLS = {
    "compress": Protocol(own_windows, 2048),
    "wanda": Protocol(joined_windows, 2048),
    "gptq": Protocol(joined_windows, 2048),
    "strided": Protocol(strided, 1024),
    "llama.cpp": Protocol(second_half, 512),
    "lm-eval": Protocol(rolling, 2048),
}


def find_protocol(name: str) -> Protocol:
    """A protocol by its name. Raises InputError for another."""
    if name not in PROTOCOLS:
        raise InputError(f"no protocol {name}: choose {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def cut_text(name: str, source: str, tokenizer: Any, sizes: tuple[int | None, int | None, int | None]) -> Cut:
    """A source's text by the protocol `name`; `sizes`: seqlen, stride and most windows, each None as the protocol has it.

    Raises InputError for a protocol or a text that is not there, and for less text than one window.
    """
    protocol = find_protocol(name)
    seqlen = sizes[0] or protocol.seqlen
    return protocol.cut(source, tokenizer, Sizes(seqlen, sizes[1] or max(1, seqlen // 2), sizes[2]))


def _streamed(source: str) -> bool:
    return source in DATASETS and DATASETS[source].joined_by is None


def _documents(source: str, text: Iterable[str]) -> Iterable[str]:
    return islice(text, DOCUMENTS) if _streamed(source) else text


def _joined(source: str) -> str:
    """The rows of a source as the pruning papers' loaders join them."""
    text = read_text(source, "evaluation")
    if isinstance(text, str) and source != "ptb":
        rows: Iterable[str] = ("" if not line.strip() else line for line in text.splitlines(keepends=True))
    else:
        rows = text.splitlines() if isinstance(text, str) else _documents(source, text)
    return (" " if source in DATASETS and source != "wikitext2" else "\n\n").join(rows)


def _plain(source: str) -> str:
    """A running text as it is; documents with a blank line between them."""
    text = read_text(source, "evaluation")
    return text if isinstance(text, str) else "\n\n".join(_documents(source, text))


def _pages(source: str) -> Iterable[str]:
    text = read_text(source, "evaluation")
    return pages(text) if isinstance(text, str) else _documents(source, text)


def _special(text: str, tokenizer: Any) -> Tensor:
    """Tokens with the special ones that the tokenizer puts around a text."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _plain_tokens(text: str, tokenizer: Any) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
