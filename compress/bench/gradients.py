"""`compress bench gradients`: the streamed pass beside the whole model in memory, in seconds, bytes and values.

Each is measured in a process of its own. The baseline is what one would write with transformers: the model in memory,
its own loss, one sequence at a time, squares of each layer weight's gradient added up in float32. It is spared what it
could do without (gradients of embeddings and norms), and its time is that of forward, backward and sums alone; ours is
that of the whole pass, with reading blocks, keeping their inputs and writing the result.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from compress.calib.data import calibration_windows
from compress.calib.gradients import GradientPass, LayerGradients, Span
from compress.calib.layers import linear_layers
from compress.calib.skeleton import quiet
from compress.calib.weight_files import read_all
from compress.clock import Measured, alone, peak_rss_bytes
from compress.files import write_tensors
from compress.pipeline import open_model
from compress.progress import Reporter
from compress.report import Report, duration, size, table

FIELD = "grad_sq"


def bench_gradients(model_folder: Path, calib: tuple[str, int, int], device: str) -> Report:
    """Measure both ways on the model in `model_folder`. `calib`: (source, nsamples, seqlen), seed 0."""
    model, reporter = open_model(model_folder, device=device), Reporter()
    tokens = calibration_windows(calib[0], model.tokenizer, calib[1], calib[2], 0).tolist()
    blocks = [f"{model.path}.{index}" for index in range(model.n_blocks)]
    dtype = str(model.dtype).removeprefix("torch.")
    del model
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs = Path(temporary) / "streamed", Path(temporary) / "in_memory"
        reporter.say("measuring the streamed pass")
        streamed = alone(_streamed, model_folder, tokens, ours, device)
        reporter.say("measuring the whole model in memory")
        whole = alone(_in_memory, model_folder, tokens, theirs, device, blocks, dtype)
        differences = _differences(ours, theirs, len(blocks))
    worst = max(differences, key=lambda name: differences[name])
    ratios = {key: streamed[key] / whole[key] for key in streamed}
    data: dict[str, Any] = {"calib": {"source": calib[0], "nsamples": calib[1], "seqlen": calib[2]}, "dtype": dtype}
    data |= {"streamed": streamed, "in_memory": whole, "ratio": ratios, "difference": differences}
    rows = [
        ["seconds", duration(streamed["seconds"]), duration(whole["seconds"]), f"{ratios['seconds']:.2f}"],
        ["peak memory", *(size(way["peak_rss_bytes"]) for way in (streamed, whole)), f"{ratios['peak_rss_bytes']:.2f}"],
    ]
    closing = f"{FIELD} differs by {differences[worst]:.2g} of its norm at most ({worst}), computed in {dtype}"
    return Report(data, [table("", ["", "streamed", "in memory", "ratio"], rows), closing])


def _streamed(folder: Path, tokens: list[list[int]], out: Path, device: str) -> Measured:
    model, windows = open_model(folder, device=device), torch.tensor(tokens)
    started = time.monotonic()
    going = GradientPass(model, windows, frozenset({FIELD}), Span(range(model.n_blocks)), out)
    going.run((model.embed(window) for window in windows), lambda index, found: _write(out, index, found))
    return {"seconds": time.monotonic() - started, "peak_rss_bytes": peak_rss_bytes()}


def _in_memory(
    folder: Path, tokens: list[list[int]], out: Path, device: str, blocks: list[str], dtype: str
) -> Measured:
    with quiet():
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).requires_grad_(False)
    layers = {name: linear_layers(name, lm.get_submodule(name)) for name in blocks}
    weights = {layer.param: lm.get_parameter(layer.param) for each in layers.values() for layer in each}
    sums = {name: torch.zeros(weight.shape, device=device) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_()
    started = time.monotonic()
    for window in torch.tensor(tokens, device=device).split(1):
        lm(window, labels=window, use_cache=False).loss.backward()
        for name, weight in weights.items():
            if weight.grad is not None:
                gradient = weight.grad.float()
                sums[name].addcmul_(gradient, gradient, value=(window.shape[1] - 1) / len(tokens))
                weight.grad = None
    measured = {"seconds": time.monotonic() - started, "peak_rss_bytes": peak_rss_bytes()}
    for index, each in enumerate(layers.values()):
        parts = {x.name: sums[x.param] if x.index is None else sums[x.param][x.index] for x in each}
        _write(out, index, {x.name: {FIELD: parts[x.name].T if x.transposed else parts[x.name]} for x in each})
    return measured


def _write(out: Path, index: int, gradients: LayerGradients) -> None:
    out.mkdir(exist_ok=True)
    write_tensors(out / f"{index:04d}.safetensors", {name: fields[FIELD] for name, fields in gradients.items()})


def _differences(ours: Path, theirs: Path, n_blocks: int) -> dict[str, float]:
    """By layer, the norm of the difference over the norm of the baseline's."""
    found: dict[str, float] = {}
    for index in range(n_blocks):
        a, b = (read_all(folder / f"{index:04d}.safetensors")[0] for folder in (ours, theirs))
        found |= {name: ((a[name] - b[name]).norm() / b[name].norm().clamp_min(1e-30)).item() for name in a}
    return found
