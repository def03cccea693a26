"""The model of a checkpoint in torch, in float32 and with nothing rounded: what other runtimes are held to."""

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress.errors import InputError
from compress.export.source import Source

PROBE = 24  # tokens on which logits are compared


class Corrected(nn.Module):
    """A linear layer, and a product of low rank that is added to what it gives."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor):
        super().__init__()
        self.base, self.a, self.b = base, nn.Parameter(a, False), nn.Parameter(b, False)

    def forward(self, x: Tensor) -> Tensor:
        """y = base(x) + x Aᵀ Bᵀ."""
        return torch.add(self.base(x), x @ self.a.T @ self.b.T)


class Logits(nn.Module):
    """A model without a cache: tokens [batch, tokens] to logits [batch, tokens, vocabulary]."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of every token."""
        return self.model(input_ids=input_ids, use_cache=False).logits


def reference_model(source: Source) -> PreTrainedModel:
    """The whole model, corrections beside their layers.

    Raises InputError where transformers has other names for its tensors than the checkpoint.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(source.dense_config), encoding="utf-8")
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    state = {name: source.read(name) for name in source.names()}
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if lacking := [*unexpected, *(name for name in missing if name not in model.all_tied_weights_keys)]:
        raise InputError(
            f"transformers has another name for {lacking[0]} of {source.folder}: only its GGUF is exported"
        )
    for layer in source.layers:
        correction = source.correction(layer.name)
        if correction is not None:
            model.set_submodule(
                layer.name, Corrected(model.get_submodule(layer.name), correction.a.float(), correction.b.float())
            )
    return model.requires_grad_(False)


def probe(vocabulary: int) -> Tensor:
    """Token ids [1, PROBE], all over the vocabulary."""
    return (torch.arange(1, PROBE + 1)[None] * 7919) % vocabulary


def reference_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """float32 [1, tokens, vocabulary]."""
    with torch.no_grad():
        logits: Tensor = Logits(model)(ids)
    return logits
