"""How many bytes a plan comes to in a checkpoint: what a budget is held against."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.allocate.choices import Budget
from compress.calib.layers import Layer
from compress.calib.model import Model
from compress.checkpoint.adapter import PEFT_PREFIX
from compress.checkpoint.formats import as_held, find_format
from compress.checkpoint.manifest import CorrectionEntry
from compress.checkpoint.stored import StoredLayer
from compress.checkpoint.writer import most_bytes, overhead_bytes
from compress.kernels.correction import Correction

SHARE = 64  # bytes of what an adapter's file has beside its layers, for each of them
UNKNOWN_FORMAT = "native"  # what is counted in while the format is not chosen: no other has smaller layers


@dataclass(frozen=True)
class Sizes:
    """What the layers of a model take of a budget, in one format."""

    model: Model
    budget: Budget
    format_name: str  # "auto": as in UNKNOWN_FORMAT; "dense": nothing is packed

    def of(self, layer: Layer, stored: StoredLayer | None) -> int:
        """Bytes of one layer of the blocks; `stored`: without values, None if it is not quantized.

        For a budget in bits the bytes of the weight and its correction, otherwise at most what they take in the files.
        """
        out_features, in_features = layer.shape
        if self.budget.unit == "bits":
            dense = out_features * in_features * self.model.dtype.itemsize
            return dense if stored is None else as_held(self._named, stored).packed.nbytes + _added(stored)
        if stored is None:
            return most_bytes({layer.name: torch.empty(layer.shape, dtype=self.model.dtype, device="meta")})
        added = 0 if stored.correction is None else _most_adapter_bytes(stored.name, stored.correction)
        return most_bytes(_layer_tensors(self.model, self._named, stored)) + added

    def room(self, layers: list[Layer], head: list[StoredLayer]) -> int:
        """The bytes that the budget leaves for `layers`, all of the blocks; `head`: embeddings and head if packed."""
        if self.budget.unit == "bits":
            return int(self.budget.amount * sum(layer.shape[0] * layer.shape[1] for layer in layers) / 8)
        total = self.budget.nbytes(dense_bytes(self.model))
        return total - overhead_bytes(total) - self.outside(layers, head)

    def outside(self, layers: list[Layer], head: list[StoredLayer]) -> int:
        """At most the bytes of everything but `layers`."""
        replaced = {layer.param for layer in layers} | {layer.param for layer in head}
        kept = {name: tensor for name, tensor in _tensors(self.model).items() if name not in replaced}
        return most_bytes(kept) + sum(most_bytes(_layer_tensors(self.model, self._named, layer)) for layer in head)

    @property
    def _named(self) -> str:
        return UNKNOWN_FORMAT if self.format_name in ("auto", "dense") else self.format_name


def checkpoint_bytes(model: Model, format_name: str, packed: list[StoredLayer]) -> int:
    """Bytes of all tensors of a checkpoint in which these layers are packed; headers of files not counted."""
    replaced = {layer.param for layer in packed}
    dense = sum(tensor.nbytes for name, tensor in _tensors(model).items() if name not in replaced)
    inside = sum(t.nbytes for layer in packed for t in _layer_tensors(model, format_name, layer).values())
    return dense + inside + sum(map(_added, packed))


def dense_bytes(model: Model) -> int:
    """Bytes of the model's parameters as they came, tied ones once."""
    unique = {id(p): p.numel() * p.element_size() for p in model.lm.parameters()}
    return sum(unique.values())


def n_parameters(model: Model) -> int:
    """How many parameters the model has, tied ones once."""
    return sum(p.numel() for p in {id(p): p for p in model.lm.parameters()}.values())


def _tensors(model: Model) -> dict[str, Tensor]:
    """Every tensor that a checkpoint of the model has, by name; those of the blocks without values."""
    blocks = enumerate(model.modules)
    inside = {f"{model.path}.{i}.{name}": t for i, block in blocks for name, t in block.state_dict().items()}
    return model.outside() | inside


def _layer_tensors(model: Model, format_name: str, stored: StoredLayer) -> Mapping[str, Tensor]:
    """The tensors of one packed layer in a format's files, without values; its correction is in a file of its own."""
    held = as_held(format_name, replace(stored, correction=None))
    tensors: Mapping[str, Tensor] = find_format(format_name).layer_tensors(held, model.dtype)
    return tensors


def _most_adapter_bytes(name: str, correction: Correction) -> int:
    """At most what a layer's correction takes in the adapter's file, with a share of the file's beginning."""
    parts = {f"{PEFT_PREFIX}{name}.{part}{'.' * 13}": tensor for part, tensor in correction.tensors().items()}
    line = CorrectionEntry.of(correction).model_dump_json()
    return most_bytes(parts) + len(json.dumps(f'"{name}":{line},')) + SHARE


def _added(stored: StoredLayer) -> int:
    return 0 if stored.correction is None else stored.correction.nbytes
