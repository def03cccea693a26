"""This package itself, as `compress run` and `compress eval` do it. It also makes the windows that every peer gets."""

from typing import Any

from protocol import LOGPROBS, Request, count_zeros, keep, main
from safetensors.torch import save_file
from torch import Tensor

from compress.calib.data import calibration_windows, evaluation_windows
from compress.eval.perplexity import perplexity
from compress.files import write_tensors
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
    """A run of the setting, which is handed the windows as the others are: its text is not read again."""
    recipe = read_recipe(None, {"model": str(request.model), "calib": request.said["calib"], **request.setting})
    (run := request.checkpoint / "run").mkdir(parents=True, exist_ok=True)
    write_tensors(run / "tokens.safetensors", {"tokens": request.calibration})
    compress(recipe, request.model, request.checkpoint, Reporter())
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
