"""transformers with our plug-in, as a reader: what `compress serve` predicts with packed layers."""

from typing import Any

import torch
from protocol import LOGPROBS, Request, keep, main

from compress.hf import load_model


@torch.no_grad()
def read(request: Request) -> dict[str, Any]:
    """Its log-probabilities of a short text."""
    logits = load_model(request.checkpoint)(input_ids=request.short, use_cache=False).logits
    return keep(request, {LOGPROBS: logits.float().log_softmax(-1)})


if __name__ == "__main__":
    main({"read": read})
