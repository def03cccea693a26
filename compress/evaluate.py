"""`compress eval`: perplexity of a checkpoint on named texts."""

import time
from pathlib import Path
from typing import Any

from compress.calib.data import evaluation_windows
from compress.calib.model import Model
from compress.eval.perplexity import perplexity
from compress.pipeline import open_model
from compress.progress import Reporter


def evaluate(
    folder: Path, texts: list[str], seqlen: int, max_windows: int | None, reporter: Reporter, device: str = "cpu"
) -> dict[str, Any]:
    """Perplexity of the checkpoint in `folder` on each text (a name or a file).

    Returns {"checkpoint", "perplexity": {text: value}, "tokens": scored in all, "seconds"}.
    """
    started = time.monotonic()
    model = open_model(folder, device=device)
    values, tokens = {}, 0
    for text in texts:
        measured = _measure(model, text, seqlen, max_windows, reporter)
        values[Path(text).stem if Path(text).suffix else text] = measured.perplexity
        tokens += measured.tokens
    seconds = round(time.monotonic() - started, 2)
    return {"checkpoint": str(folder), "perplexity": values, "tokens": tokens, "seconds": seconds}


def _measure(model: Model, text: str, seqlen: int, max_windows: int | None, reporter: Reporter) -> Any:
    windows = evaluation_windows(text, model.tokenizer, seqlen, max_windows)
    with reporter.stage(f"perplexity on {Path(text).name}", model.n_blocks + len(windows)) as stage:
        return perplexity(model, windows, stage.step)
