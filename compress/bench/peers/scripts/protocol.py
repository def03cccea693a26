"""What every peer's script has in common: the request it reads, perplexity, and the answer it writes.

A script is run as `python SCRIPT ACTION REQUEST`, and REQUEST is a JSON file: model (a folder), setting (what the model
is to become), windows (safetensors: calibration and evaluation, int64 [n, seqlen]), checkpoint (a folder to write or to
read) and answer (a JSON file to write).
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

AT_ONCE = 64  # positions whose logits are float32 at a time
LOGPROBS = "logprobs"  # their name among the tensors that are read
SHORT = 64  # tokens that readers are compared on
TOLD = ("torch", "transformers", "compressed-tensors")  # packages whose versions say what was measured


class Request:
    """One request, read from its file."""

    def __init__(self, file: Path):
        self.said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        self.model, self.checkpoint = Path(self.said["model"]), Path(self.said["checkpoint"])
        self.setting: dict[str, Any] = self.said["setting"]

    @cached_property
    def windows(self) -> dict[str, Tensor]:
        """Calibration and evaluation windows, int64 [n, seqlen] each."""
        return load_file(self.said["windows"])

    @property
    def calibration(self) -> Tensor:
        """What the model may be calibrated on, int64 [n, seqlen]."""
        return self.windows["calibration"]

    @property
    def examples(self) -> list[dict[str, list[int]]]:
        """The calibration windows as datasets have them."""
        return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in self.calibration.tolist()]

    @property
    def short(self) -> Tensor:
        """The beginning of the evaluation text, int64 [1, SHORT]."""
        return self.windows["evaluation"][:1, :SHORT]


Action = Callable[[Request], dict[str, Any]]


def main(actions: Mapping[str, Action]) -> None:
    """Serve one request. The answer has what the action returns, working_seconds, threads and versions.

    Where the action fails the answer is {"failed": one line}; the traceback goes to stderr, and the exit code is 1.
    """
    action, request = actions[sys.argv[1]], Request(Path(sys.argv[2]))
    answer, started = Path(request.said["answer"]), time.monotonic()
    try:
        found = action(request)
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0][:300]
        answer.write_text(json.dumps({"failed": f"{type(error).__name__}: {first}"}), encoding="utf-8")
        raise
    found |= {"working_seconds": time.monotonic() - started, "threads": torch.get_num_threads(), "versions": versions()}
    answer.write_text(json.dumps(found), encoding="utf-8")


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights [out, in] of the linear layers in the blocks by name, where they are kept dense."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def peer_actions(
    quantize: Callable[[Request], None],
    load: Callable[[Path], nn.Module],
    weights_of: Callable[[nn.Module], dict[str, Tensor]] = linear_weights,
) -> dict[str, Action]:
    """The actions of a library that quantizes a model of transformers and opens what it wrote as one.

    quantize writes the checkpoint. measure returns perplexity, tokens (scored), sparsity and two_of_four of it, or of the
    model if the setting is empty. read saves the weights it decodes, and its log-probabilities of a short text.
    """

    def quantized(request: Request) -> dict[str, Any]:
        quantize(request)
        return {}

    def opened(request: Request) -> nn.Module:
        return (load(request.checkpoint) if request.setting else load_dense(request.model)).eval()

    def measured(request: Request) -> dict[str, Any]:
        model = opened(request)
        return perplexity(model, request.windows["evaluation"]) | count_zeros(weights_of(model).values())

    @torch.no_grad()
    def read(request: Request) -> dict[str, Any]:
        model = opened(request)
        logits = model(input_ids=request.short, use_cache=False).logits
        return keep(request, weights_of(model) | {LOGPROBS: logits.float().log_softmax(-1)})

    return {"quantize": quantized, "measure": measured, "read": read}


def load_dense(folder: Path) -> nn.Module:
    """An ordinary checkpoint in its own dtype."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> dict[str, Any]:
    """exp of the mean negative log-likelihood in nats over `windows` [n, seqlen], as `compress eval` takes it.

    Every token but a window's first is scored; windows go through one at a time, and float32 logits in pieces.
    """
    total, scored = 0.0, 0
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        for part, targets in zip(logits.split(AT_ONCE), window[1:].split(AT_ONCE), strict=True):
            nll = nn.functional.cross_entropy(part.float(), targets, reduction="none")
            total += nll.sum(dtype=torch.float64).item()
        scored += len(window) - 1
    return {"perplexity": math.exp(min(total / scored, 700.0)), "tokens": scored}


def count_zeros(weights: Iterable[Tensor]) -> dict[str, Any]:
    """sparsity: the share of zeros; two_of_four: that of groups of four inputs with two zeros or more.

    Empty if there are no weights to look at.
    """
    total = zero = groups = held = 0
    for weight in weights:
        none = weight == 0
        total, zero = total + none.numel(), zero + int(none.sum())
        if weight.shape[1] % 4 == 0:
            fours = none.unflatten(1, (-1, 4)).sum(-1)
            groups, held = groups + fours.numel(), held + int((fours >= 2).sum())
    return {"sparsity": zero / total, "two_of_four": held / groups} if groups else {}


def keep(request: Request, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Save what was read beside the answer: weights [out, in] by layer, log-probabilities [1, tokens, vocab_size]."""
    file = Path(request.said["answer"]).with_suffix(".safetensors")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    return {"tensors": str(file)}


def versions() -> dict[str, str]:
    """Of the packages that decide what was measured, those that are installed."""
    found = {}
    for package in TOLD:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
