"""Ours, as `compress serve` runs a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from turns import serve

from compress.hf import load_model


class Ours:
    """A checkpoint on our layers, with transformers' cache."""

    cached = True

    def __init__(self, request: dict[str, Any]):
        torch.set_num_threads(request["threads"])
        self._model: Any = load_model(Path(request["file"]), request["setting"]["prompts"])
        self.begin()

    def begin(self) -> None:
        """Drop the cache."""
        self._cache: Any = None

    def prompt(self, ids: Sequence[int]) -> int:
        """Take a text; the most likely token after it."""
        return self._forward(torch.tensor([ids]))

    def token(self) -> int:
        """Take the token given last; the most likely one after it."""
        return self._forward(self._next)

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> int:
        out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._next, self._cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        return int(self._next.item())


if __name__ == "__main__":
    serve(Ours, ("torch", "transformers"))
