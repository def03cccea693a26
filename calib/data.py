"""Windows of tokens: what calibration sees, and what perplexity is measured on.

A window is the tokenizer's BOS, if it puts one before a text, and then text: without it Gemma, for one, is a broken model.
Text is tokenized without special tokens, so a window never holds a second one.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from compress.calib.texts import DATASETS, read_text
from compress.errors import InputError

DOCUMENTS = 64  # tokenized at a time


def bos_token_id(tokenizer: Any) -> int | None:
    """The token a tokenizer puts before every text, or None.

    Found by encoding: `tokenizer.add_bos_token` reads False for Gemma, whose tokenizer does add one.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a", add_special_tokens=True)["input_ids"]
    if special[:1] == plain[:1] or (
        not plain and special[0] != tokenizer.bos_token_id
    ):  # "a" may not be in a small vocabulary
        return None
    return special[0]


def calibration_windows(source: str, tokenizer: Any, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """`nsamples` windows of a source's text (see `read_text`), int64 [nsamples, seqlen].

    A running text is tokenized whole; documents are shuffled, each followed by a blank line, and as many taken as it
    needs. Windows lie side by side; the seed chooses among them.
    Raises InputError if the source is out of reach or has too little text: fewer windows are never given silently.
    """
    bos, windows = _shuffled_windows(source, tokenizer, nsamples, seqlen, seed)
    available = len(windows)
    if available < nsamples:
        raise InputError(
            f"{source} gives {available} windows of {seqlen} tokens, not {nsamples}: "
            f"lower --nsamples{f' to {available}' if available else ''} or --seqlen, or use a longer text"
        )
    return _with_bos(windows, bos)


def training_windows(source: str, tokenizer: Any, at_most: int, seqlen: int, seed: int) -> Tensor:
    """As many windows of a source's text as it has, up to `at_most`, in the order and form of `calibration_windows`.

    int64 [n, seqlen]; n is 0 for a text shorter than a window.
    """
    bos, windows = _shuffled_windows(source, tokenizer, at_most, seqlen, seed)
    return _with_bos(windows, bos)


def _shuffled_windows(source: str, tokenizer: Any, at_most: int, seqlen: int, seed: int) -> tuple[int | None, Tensor]:
    """The BOS, and up to `at_most` windows of a source without it, [n, length], in the order that the seed gives."""
    bos, length = _layout(tokenizer, seqlen)
    text = read_text(source, "calibration", seed)
    tokens = _tokens(text, tokenizer) if isinstance(text, str) else _document_tokens(text, tokenizer, at_most * length)
    available = len(tokens) // length
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return bos, tokens[: available * length].view(available, length)[order[:at_most]]


def evaluation_windows(source: str, tokenizer: Any, seqlen: int, max_windows: int | None = None) -> Tensor:
    """The first windows of a source's text in its own order, int64 [n, seqlen]; all of them if `max_windows` is None.

    The text is tokenized whole and cut into windows of `seqlen` less the BOS that goes before each; what is left over
    at the end is dropped. Raises InputError if the source is out of reach or shorter than one window.
    """
    bos, length = _layout(tokenizer, seqlen)
    text = read_text(source, "evaluation")
    if isinstance(text, str):
        tokens = _tokens(text, tokenizer)
    elif max_windows is None and source in DATASETS:
        raise InputError(
            f"{source} is too big to be measured whole: say how much of it with --max-windows, such as 256"
        )
    else:
        tokens = _document_tokens(text, tokenizer, None if max_windows is None else max_windows * length)
    available = len(tokens) // length
    if not available:
        raise InputError(f"{source} has {len(tokens)} tokens, less than one window of {seqlen}: lower --seqlen")
    count = available if max_windows is None else min(available, max_windows)
    return _with_bos(tokens[: count * length].view(count, length), bos)


def _layout(tokenizer: Any, seqlen: int) -> tuple[int | None, int]:
    """The BOS, and how many tokens of text a window has beside it."""
    bos = bos_token_id(tokenizer)
    length = seqlen - (bos is not None)
    if length < 1:
        raise InputError(f"a window of {seqlen} tokens has no room for text: raise --seqlen")
    return bos, length


def _with_bos(windows: Tensor, bos: int | None) -> Tensor:
    """Windows [n, length] with the BOS before each, or as they are."""
    if bos is None:
        return windows.contiguous()
    return torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)


def _tokens(text: str, tokenizer: Any) -> Tensor:
    """A text's tokens, int64 [n], without special ones and without the warning that they exceed the model's length."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def _document_tokens(documents: Iterable[str], tokenizer: Any, enough: int | None) -> Tensor:
    """Tokens of documents joined by blank lines, int64 [n]; no more documents than give `enough`."""
    remaining = iter(documents)
    tokens: list[int] = []
    while enough is None or len(tokens) < enough:
        texts = [f"{document}\n\n" for document in islice(remaining, DOCUMENTS)]
        if not texts:
            break
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            tokens += ids
    return torch.tensor(tokens, dtype=torch.int64)
