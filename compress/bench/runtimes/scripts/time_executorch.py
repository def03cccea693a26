"""ExecuTorch with XNNPACK; the program has no cache, and gives logits of the whole text."""

from typing import Any

import torch
from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
from executorch.runtime import Runtime
from turns import UNCACHED, WholeTexts, serve


def load(request: dict[str, Any]) -> WholeTexts:
    """A .pte file. Raises ValueError for a text longer than memory is planned for."""
    _unsafe_reset_threadpool(request["threads"])  # before any kernel runs
    method = Runtime.get().load_program(request["file"]).load_method("forward")
    longest = method.metadata.input_tensor_meta(0).sizes()[1]
    if len(request["prompt"]) + UNCACHED > longest:
        raise ValueError(f"a call takes {longest} tokens at most: --prompt-tokens {longest - UNCACHED}")

    def next_token(ids: list[int]) -> int:
        logits: torch.Tensor = method.execute([torch.tensor([ids])])[0]
        return int(logits[0, -1].argmax())

    return WholeTexts(next_token)


if __name__ == "__main__":
    serve(load, ("executorch",))
