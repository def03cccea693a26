"""vLLM on the CPU, as a reader: whether a server loads the checkpoint, and what it predicts."""

from typing import Any

import torch
from protocol import LOGPROBS, Request, keep, main
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt


def read(request: Request) -> dict[str, Any]:
    """Its log-probabilities of a short text, of the whole vocabulary."""
    ids = request.short[0].tolist()
    model = LLM(
        str(request.checkpoint),
        max_model_len=2 * len(ids),
        max_logprobs=-1,
        enforce_eager=True,
        gpu_memory_utilization=0.25,  # of this machine's memory; it takes nearly all if it is not told
    )
    asked = SamplingParams(max_tokens=1, prompt_logprobs=-1, logprobs=-1)
    (answer,) = model.generate([TokensPrompt(prompt_token_ids=ids)], asked)
    steps = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]  # the first has nothing before it
    rows = [[step[token].logprob for token in sorted(step)] for step in steps]
    return keep(request, {LOGPROBS: torch.tensor(rows)[None]})


if __name__ == "__main__":
    main({"read": read})
