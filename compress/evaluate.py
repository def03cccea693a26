"""What `compress eval` measures of a checkpoint on texts: perplexity by named protocols, and how far it is from another."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from compress.calib.model import Model
from compress.calib.texts import check_source
from compress.errors import InputError
from compress.eval.divergence import divergence
from compress.eval.perplexity import exp, score
from compress.eval.protocols import Cut, cut_text, find_protocol
from compress.pipeline import open_model
from compress.progress import Reporter


@dataclass(frozen=True)
class TextRequest:
    """A text and how it is read; None where the protocol says it."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # where a baseline's file has it
    text: str  # a name or a file
    protocol: str = "compress"
    seqlen: int | None = None
    stride: int | None = None
    max_windows: int | None = None

    @property
    def title(self) -> str:
        """The text for a table: a file by its stem."""
        return Path(self.text).stem if Path(self.text).suffix else self.text

    def check(self) -> None:
        """Raise InputError for a text or a protocol that is not there. Reads nothing."""
        check_source(self.text, "evaluation")
        find_protocol(self.protocol)

    def cut(self, tokenizer: Any) -> Cut:
        """The text in windows."""
        return cut_text(self.protocol, self.text, tokenizer, (self.seqlen, self.stride, self.max_windows))


def evaluate(
    folder: Path, texts: list[str], seqlen: int, max_windows: int | None, reporter: Reporter, device: str = "cpu"
) -> dict[str, Any]:
    """Perplexity of the checkpoint in `folder` on each text (a name or a file), by our own protocol.

    Returns {"checkpoint", "perplexity": {text: value}, "tokens": scored in all, "seconds"}.
    """
    started = time.monotonic()
    requests = [TextRequest(text, seqlen=seqlen, max_windows=max_windows) for text in texts]
    measured = measure_texts(open_model(folder, device=device), requests, reporter)
    return {
        "checkpoint": str(folder),
        "perplexity": {row["text"]: row["perplexity"] for row in measured},
        "tokens": sum(row["tokens"] for row in measured),
        "seconds": round(time.monotonic() - started, 2),
    }


def measure_texts(
    model: Model, requests: list[TextRequest], reporter: Reporter, dense: Model | None = None
) -> list[dict[str, Any]]:
    """A row for each request: {"text", "protocol", "perplexity", "perplexity_se", "nll", "tokens", "windows", "seconds"}.

    "window_nll" and "window_tokens" say of each window the nats and the tokens that are scored, so that models can be
    compared window by window.
    lm-eval's protocol has "word_perplexity", "byte_perplexity" and "bits_per_byte" as well. With `dense`, the model to
    compare with: "dense_perplexity", "kl", "top1" and "excess_nll" (the log of the ratio of perplexities), each with its
    "_se". Standard errors are by windows, None for a single one. Raises InputError for models that do not read the text
    alike.
    """
    for request in requests:
        request.check()
    return [_measure(model, request, reporter, dense) for request in requests]


def _measure(model: Model, request: TextRequest, reporter: Reporter, dense: Model | None) -> dict[str, Any]:
    cut = request.cut(model.tokenizer)
    windows = cut.windows
    row: dict[str, Any] = {"text": request.title, "protocol": request.protocol}
    steps = model.n_blocks + len(windows) + (dense.n_blocks if dense else 0)
    title = "perplexity" if dense is None else "divergence"
    with reporter.stage(f"{title} on {Path(request.text).name}, {request.protocol}", steps) as stage:
        if dense is None:
            found = score(model, windows, stage.step)
            nll, se, sums, seconds = found.nll, found.se, found.sums, found.seconds
        else:
            _check_alike(dense, request, cut)
            compared = divergence(model, dense, windows, stage.step)
            nll, se = compared.nll.value, compared.nll.se
            sums, seconds = compared.sums, compared.seconds
            row["dense_perplexity"] = exp(compared.dense_nll.value)
            for key, mean in (("kl", compared.kl), ("top1", compared.top1), ("excess_nll", compared.excess)):
                row |= {key: mean.value, f"{key}_se": mean.se}
    row["perplexity"] = exp(nll)
    row["perplexity_se"] = None if se is None else exp(nll) * se
    counts = [len(window.targets) for window in windows]
    row |= {"nll": nll, "tokens": sum(counts), "windows": len(windows), "seconds": round(seconds, 2)}
    row |= {"window_nll": sums, "window_tokens": counts}
    return row | _by_words(cut, nll * sum(counts))


def _by_words(cut: Cut, nll: float) -> dict[str, float]:
    """lm-eval's figures, from the negative log-likelihood of a whole text in nats."""
    if not cut.words or not cut.nbytes:
        return {}
    return {
        "word_perplexity": exp(nll / cut.words),
        "byte_perplexity": exp(nll / cut.nbytes),
        "bits_per_byte": nll / cut.nbytes / math.log(2),
    }


def _check_alike(dense: Model, request: TextRequest, cut: Cut) -> None:
    """Raise InputError if the dense model's tokenizer reads a text in another way."""
    others = request.cut(dense.tokenizer).windows
    same = len(others) == len(cut.windows) and all(
        torch.equal(a.inputs, b.inputs) for a, b in zip(others, cut.windows, strict=True)
    )
    if not same:
        raise InputError(
            f"{dense.folder} has another tokenizer: compare with the model that the checkpoint was made of"
        )
