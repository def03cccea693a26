"""The layout of compress itself, version 2: any layer the other formats cannot hold, and the blocks of a run.

A layer NAME is the tensors NAME.packed, NAME.scale and so on, exactly as its `PackedWeight` keeps them. A pruning mask is
NAME.keep, eight weights a byte; what a layer subtracts from its inputs is NAME.input_shift; what a run has added to its
weight is NAME.correction.a and so on, which a checkpoint keeps apart (adapter.py). A manifest (manifest.py) says
what the tensors cannot: the memory layout, bits, group size, row length, and which parameter a layer belongs to. It is
JSON: the metadata of a block's file, `quantization_config` of a checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.dense_view import PackedFiles
from compress.checkpoint.manifest import CORRECTION, PARTS, SHIFT, Manifest, entry_of
from compress.checkpoint.stored import StoredLayer
from compress.errors import RunError
from compress.kernels.inputs import InputQuantizer
from compress.kernels.packing import pack_mask, unpack_mask
from compress.kernels.weights import PackedWeight

QUANT_METHOD = "compress"
KEEP = "keep"


@dataclass(frozen=True)
class Contents:
    """Everything one file holds."""

    layers: list[StoredLayer]
    dense: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)  # layer -> bool [out, in], False where pruned


def encode(contents: Contents) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name and the manifest, to write; `decode` is the inverse.

    Raises ValueError if two things would share a name.
    """
    tensors = dict(contents.dense)
    layers = {layer.name: entry_of(layer) for layer in contents.layers}
    packed = {name: tensor for layer in contents.layers for name, tensor in layer_tensors(layer).items()}
    masks = {f"{name}.{KEEP}": pack_mask(keep) for name, keep in contents.masks.items()}
    for added in (packed, masks):
        if twice := tensors.keys() & added.keys():
            raise ValueError(f"two tensors are called {min(twice)}")
        tensors |= added
    if len(layers) < len(contents.layers):
        raise ValueError("two layers share a name")
    rows = {name: keep.shape[1] for name, keep in contents.masks.items()}
    return tensors, Manifest(layers=layers, masks=rows).dump()


def decode(tensors: Mapping[str, Tensor], manifest: Any, where: str = "the block") -> Contents:
    """The layers, dense tensors and masks of one file; `where` is what errors call it.

    Raises InputError for a newer version and RunError for a manifest or tensors that are damaged.
    """
    described = Manifest.parse(manifest, where)
    left = dict(tensors)

    def take(name: str) -> Tensor:
        if name not in left:
            raise RunError(f"{where} lacks the tensor {name}: restore this file")
        return left.pop(name)

    layers = [
        entry.build(name, {part: take(f"{name}.{part}") for part in entry.parts})
        for name, entry in described.layers.items()
    ]
    masks = {}
    for name, length in described.masks.items():
        bits = take(f"{name}.{KEEP}")
        if bits.dtype != torch.uint8 or bits.dim() != 2 or bits.shape[1] != -(-length // 8):
            raise RunError(f"the mask of {name} in {where} does not have rows of {length} weights: restore this file")
        masks[name] = unpack_mask(bits, length)
    return Contents(layers, left, masks)


def refusal(layers: Sequence[StoredLayer]) -> str | None:
    """None: this layout holds every layer."""
    return None


def unread(layers: Sequence[StoredLayer]) -> str | None:
    """None: what reads this layout reads all of it."""
    return None


def held(layer: StoredLayer) -> StoredLayer:
    """A layer as this layout stores it: as it is."""
    return layer


def layer_tensors(layer: StoredLayer, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a layer by name; scales keep their own dtype whatever the model's `dtype` is.

    With a `dtype`, which a checkpoint has and a block's file has not, an empty tensor goes by the name of the parameter:
    a loader that does not know this layout finds a parameter of the wrong shape and stops. Without it, transformers
    would say that it skips an unknown quantization, and give the layer random weights.
    """
    shift = None if layer.inputs is None else layer.inputs.shift
    parts = layer.packed.tensors() | ({} if shift is None else {SHIFT: shift.clone()})  # layers share it, files do not
    if layer.correction is not None:
        parts |= {f"{CORRECTION}{part}": tensor for part, tensor in layer.correction.tensors().items()}
    guard = {layer.param: torch.empty(0, dtype=dtype)} if dtype is not None and not layer.index else {}
    return guard | {f"{layer.name}.{part}": tensor for part, tensor in parts.items()}


def quantization_config(layers: Sequence[StoredLayer], ignore: Sequence[str] = ()) -> dict[str, Any]:
    """What config.json says of a native checkpoint. `ignore` is not needed: what is not listed is dense."""
    return {"quant_method": QUANT_METHOD, **encode_entries(layers)}


def encode_entries(layers: Sequence[StoredLayer]) -> dict[str, Any]:
    """The manifest of `layers` alone."""
    return Manifest(layers={layer.name: entry_of(layer) for layer in layers}).dump()


def side_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """JSON files that stand beside a checkpoint's config.json, by name: none."""
    return {}


class NativeFiles(PackedFiles):
    """The dense view of a native checkpoint: slices stacked and Conv1D turned back as the model has them."""

    PARTS = (*PARTS, SHIFT)

    def find_packed(self) -> dict[str, tuple[str, ...]]:
        """Layers by parameter, slices in order. Raises RunError if a layer's tensors or a slice are missing."""
        described = {name: value for name, value in self.settings.items() if name != "quant_method"}
        self.layers = Manifest.parse(described, str(self.folder)).layers
        found: dict[str, dict[int | None, str]] = {}
        for name, entry in self.layers.items():
            for part in entry.parts:
                if f"{name}.{part}" not in self.entries:
                    raise RunError(f"{self.folder} lacks the tensor {name}.{part}: restore or download it again")
            slices = found.setdefault(entry.param or f"{name}.weight", {})
            if entry.index in slices:
                raise RunError(f"{self.folder} has both {slices[entry.index]} and {name} for one parameter: restore it")
            slices[entry.index] = name
        for param, slices in found.items():
            if slices.keys() not in ({None}, set(range(len(slices)))):
                raise RunError(f"{self.folder} lacks slices of {param}: restore or download it again")
        return {param: tuple(name for _, name in sorted(slices.items())) for param, slices in found.items()}

    def layer(self, name: str) -> StoredLayer:
        """One packed layer as it lies in the file."""
        entry = self.layers[name]
        return entry.build(name, {part: self.part(name, part) for part in entry.parts})

    def input_quantizer(self, name: str) -> InputQuantizer | None:
        """How the layer whose weight is the tensor `name` rounds what enters it."""
        if name not in self.packed:
            return None
        layer = self.packed[name][0]
        entry = self.layers[layer]
        return entry.inputs(layer, self.part(layer, SHIFT) if entry.shifted_inputs else None)

    def unpacked(self, layer: str) -> PackedWeight:
        """One layer's weight as it lies in the file."""
        return self.layer(layer).packed

    def decode(self, layer: str) -> Tensor:
        """One layer in the model's dtype, [out, in], or [in, out] if its parameter is so."""
        weight = super().decode(layer)
        return weight.T.contiguous() if self.layers[layer].transposed else weight

    def read(self, name: str) -> Tensor:
        """One dense tensor; slices of a parameter are decoded one after another into one of the model's dtype."""
        names = self.packed.get(name, ())
        if not names or self.layers[names[0]].index is None:
            return super().read(name)
        first = self.decode(names[0])
        whole = torch.empty(len(names), *first.shape, dtype=self.dtype)
        whole[0] = first
        for i, other in enumerate(names[1:], start=1):
            decoded = self.decode(other)
            if decoded.shape != first.shape:
                raise RunError(f"{other} has another shape than {names[0]}: the file is damaged, restore it")
            whole[i] = decoded
        return whole


READER = NativeFiles
