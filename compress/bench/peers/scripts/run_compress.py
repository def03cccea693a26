"""This package itself, as `compress run` and `compress eval` do it. It also makes the windows that every peer gets."""

from typing import Any

import torch
from protocol import LOGPROBS, Request, count_zeros, keep, main
from safetensors.torch import save_file
from torch import Tensor

from compress.calib.data import calibration_windows, evaluation_windows
from compress.calib.weight_files import read_all
from compress.errors import RunError
from compress.eval.perplexity import perplexity
from compress.pipeline import compress, open_model
from compress.progress import Reporter
from compress.recipe import read_recipe


def windows(request: Request) -> dict[str, Any]:
    """Write the windows: those that a run calibrates on, and those that `compress eval` scores."""
    calib, text = request.said["calib"], request.said["text"]
    tokenizer = open_model(request.model).tokenizer
    made = {
        "calibration": calibration_windows(calib["source"], tokenizer, calib["nsamples"], calib["seqlen"], seed=0),
        "evaluation": evaluation_windows(text["source"], tokenizer, calib["seqlen"], text["windows"]),
    }
    save_file(made, request.said["windows"])
    return {}


def quantize(request: Request) -> dict[str, Any]:
    """A run of the setting. Raises RunError should it have seen other windows than the peers did."""
    recipe = read_recipe(None, {"model": str(request.model), "calib": request.said["calib"], **request.setting})
    compress(recipe, request.model, request.checkpoint, Reporter())
    tokens = request.checkpoint / "run" / "tokens.safetensors"
    if tokens.exists() and not torch.equal(read_all(tokens)[0]["tokens"], request.calibration):
        raise RunError(f"{tokens} are not the windows in {request.said['windows']}: remove those and run it again")
    return {}


def measure(request: Request) -> dict[str, Any]:
    """Perplexity and zeros of the checkpoint, or of the model if the setting is empty."""
    model = open_model(request.checkpoint if request.setting else request.model)
    measured = perplexity(model, request.windows["evaluation"])
    weights = (layer.weight for block in model.blocks() for layer in block.layers)
    return {"perplexity": measured.perplexity, "tokens": measured.tokens} | count_zeros(weights)


def read(request: Request) -> dict[str, Any]:
    """The weights that the checkpoint decodes to, and its log-probabilities of a short text."""
    model = open_model(request.checkpoint)
    tensors: dict[str, Tensor] = {}
    hidden = model.embed(request.short[0])
    for block in model.blocks():
        hidden = block(hidden)
        tensors |= {layer.name: layer.weight.clone() for layer in block.layers}
    return keep(request, tensors | {LOGPROBS: model.logits(hidden).float().log_softmax(-1)})


if __name__ == "__main__":
    main({"windows": windows, "quantize": quantize, "measure": measure, "read": read})
