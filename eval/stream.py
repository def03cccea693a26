"""Sequences through a model with one block in memory at a time, and the logits of a few positions at a time."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.calib.hidden import HiddenStates
from compress.calib.model import Model
from compress.eval.windows import Window

LOGITS_AT_ONCE = 2**26  # in the model's dtype; a window of 512 tokens over 262,144 words would be 2**27
FLOATS_AT_ONCE = 2**21  # of those, taken to float32 at a time: they stay in the cache


class LastStates:
    """What leaves a model's last block: [1, n, hidden_size] for each sequence, in memory or in files of `folder`."""

    def __init__(self, model: Model, windows: Sequence[Window], folder: Path, on_step: Callable[[], None]):
        """Sends the windows through the model. `on_step` is called after each block."""
        counts = Counter(len(window.inputs) for window in windows)
        firsts = {len(window.inputs): window.inputs for window in reversed(windows)}
        self._stores = {n: HiddenStates(model.embed(firsts[n]), count, folder) for n, count in counts.items()}
        self._places = list(_places(windows))
        for (length, index), window in zip(self._places, windows, strict=True):
            self._stores[length][index] = model.embed(window.inputs)
        for block in model.blocks():
            for store in self._stores.values():
                for index in range(len(store)):
                    store[index] = block(store[index])
            on_step()

    def __getitem__(self, index: int) -> Tensor:
        length, place = self._places[index]
        return self._stores[length][place]

    def close(self) -> None:
        """Drop the states and their files."""
        for store in self._stores.values():
            store.close()


def _places(windows: Sequence[Window]) -> Iterator[tuple[int, int]]:
    """The length of each window, and how many of that length came before it."""
    before: Counter[int] = Counter()
    for window in windows:
        length = len(window.inputs)
        yield length, before[length]
        before[length] += 1


def scored_logits(models: Sequence[Model], hidden: Sequence[Tensor], window: Window) -> Iterator[list[Tensor]]:
    """For some of a window's targets at a time: their tokens [k], then each model's logits there, [k, vocab_size] float32.

    `hidden`: what leaves each model's last block, [1, n, hidden_size].
    """
    vocab_size = models[0].config.get_text_config().vocab_size
    device = models[0].device
    targets = window.targets.to(device)
    positions = torch.arange(window.first, window.first + len(targets), device=device)
    rows = max(1, FLOATS_AT_ONCE // vocab_size)
    for some in torch.arange(len(targets), device=device).split(max(1, LOGITS_AT_ONCE // vocab_size)):
        logits = [model.logits(states[:, positions[some]])[0] for model, states in zip(models, hidden, strict=True)]
        for part in zip(targets[some].split(rows), *(each.split(rows) for each in logits), strict=True):
            yield [part[0], *(each.float() for each in part[1:])]
