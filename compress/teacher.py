"""The dense model as a teacher: its last hidden states on the training text, made once with one block in memory.

Its logits are made of them again, by its own head, where they are wanted: those of Gemma's vocabulary would take four
hundred times the disk. The file is named after the text's tokens, so that runs on the same text share it.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from compress.calib.gradients import Records
from compress.calib.model import Model
from compress.files import disk_errors
from compress.progress import Reporter

WHOLE = ".states"  # the ending of a file's name once all of it is there


class LastHidden:
    """The dense model's last hidden states: [seqlen, hidden_size] in its dtype for each window of a text."""

    def __init__(self, model: Model, windows: Tensor, file: Path):
        self._records = Records(file, _like(model, windows), len(windows), fresh=False)
        self._device = model.device

    def __getitem__(self, at: Tensor) -> Tensor:
        """Those of some windows: [n, seqlen, hidden_size]."""
        return torch.stack([self._records[index][0] for index in at.tolist()]).to(self._device)

    def close(self) -> None:
        """Let go of the file."""
        self._records.close()


def last_hidden_states(model: Model, windows: Tensor, folder: Path, reporter: Reporter) -> LastHidden:
    """What enters the dense model's head, of `windows` [n, seqlen] int64: from `folder` if it is there, else made.

    `model`: nothing was done to its embeddings, final norm and files. One block is in memory at a time. The file counts
    once it is whole. Raises RunError if there is no room for it.
    """
    name = hashlib.sha256(windows.numpy().tobytes() + str(tuple(windows.shape)).encode()).hexdigest()[:16]
    file = folder / f"{name}{WHOLE}"
    if not file.exists():
        with disk_errors(file):
            folder.mkdir(parents=True, exist_ok=True)
            _make(model, windows, file, reporter)
    return LastHidden(model, windows, file)


def _make(model: Model, windows: Tensor, file: Path, reporter: Reporter) -> None:
    n = len(windows)
    hidden = Records(file.with_suffix(".hidden"), (model.embed(windows[0]),), n, keep=False)
    states = Records(file, _like(model, windows), n)  # the last to ask for room: it has a name, and would stay
    for index, window in enumerate(windows):
        hidden[index] = (model.embed(window),)
    with reporter.stage(f"teacher on {windows.numel()} tokens, block", model.n_blocks) as stage:
        for block in model.blocks():
            last = block.index + 1 == model.n_blocks
            for index in range(n):
                out = block(hidden[index][0])
                if last:
                    states[index] = (model.last_hidden(out)[0],)
                else:
                    hidden[index] = (out,)
            stage.step()
    hidden.close()
    states.finish()


def _like(model: Model, windows: Tensor) -> tuple[Tensor]:
    """The last hidden states of one window, without values."""
    width = model.lm.get_output_embeddings().weight.shape[1]
    return (torch.empty(windows.shape[1], width, dtype=model.dtype),)
