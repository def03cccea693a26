"""Tiny checkpoints of every format that is read, with a model, a tokenizer and packed layers of random codes."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from packed_weights import codebook_weight, int_weight, sparse_weight
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from compress.checkpoint.adapter import write_adapter
from compress.checkpoint.formats import find_format
from compress.checkpoint.stored import StoredLayer
from compress.kernels.correction import Correction
from compress.kernels.inputs import InputQuantizer

HIDDEN, MLP, LAYERS = 32, 64, 2
SMALL = {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}


def save_small(folder: Path, **changes) -> Path:
    """An ordinary checkpoint of two blocks, small enough to be copied hundreds of times."""
    return save_tiny(folder, dtype=torch.float16, **SMALL, **changes)


def save_packed(folder: Path, format_name: str, adapter: str | None = None) -> Path:
    """The same with most layers packed; `adapter`: "peft" or "own", as adapter.py writes it."""
    save_small(folder)
    layers = [packed_layer(f"model.layers.{i}.{name}", format_name, adapter) for i in range(LAYERS) for name in SHAPES]
    form = find_format(format_name)
    tensors = load_file(folder / "model.safetensors")
    for layer in layers:
        del tensors[layer.param]
    for layer in layers:
        tensors |= form.layer_tensors(form.held(replace(layer, correction=None)), torch.float16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    ignore = [f"model.layers.{i}.self_attn.v_proj" for i in range(LAYERS)] + ["lm_head"]
    plain = [replace(layer, correction=None) for layer in layers]
    config["quantization_config"] = form.quantization_config(plain, ignore)
    config |= write_adapter(folder, [layer for layer in layers if layer.correction is not None])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def packed_layer(name: str, format_name: str, adapter: str | None) -> StoredLayer:
    """One packed layer; those of an attention and of an MLP lie differently where the format has several layouts."""
    shape = SHAPES[name.partition("layers.")[2].partition(".")[2]]
    weight, inputs, correction = int_weight(shape, 4, 32), None, None
    if format_name == "native" and name.endswith("q_proj"):
        weight = sparse_weight(shape, 4, 16, symmetric=False)
    elif format_name == "native" and name.endswith("k_proj"):
        weight = codebook_weight(shape, code_bits=4)
    elif format_name == "native" and name.endswith("o_proj"):
        inputs = InputQuantizer(8, shift=torch.zeros(shape[1]))
    elif format_name == "compressed-tensors" and name.endswith("down_proj"):
        weight, inputs = int_weight(shape, 8, shape[1]), InputQuantizer(8)
    elif format_name == "compressed-tensors" and name.endswith("gate_proj"):
        weight = int_weight(shape, 3, 32, symmetric=False)
    if adapter is not None and "mlp" in name:
        random = torch.Generator().manual_seed(0)
        factors = torch.randn(4, shape[1], generator=random), torch.randn(shape[0], 4, generator=random)
        single = (torch.arange(0, 60, 10, dtype=torch.int32), torch.ones(6)) if adapter == "own" else ()
        correction = Correction(*factors, *single).rounded(torch.float16, 2 if adapter == "own" else 16)
    return StoredLayer(name, f"{name}.weight", None, False, weight, inputs=inputs, correction=correction)
