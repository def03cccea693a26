"""The layout of compress itself, version 1: any layer the other formats cannot hold, and the blocks of a run.

A layer NAME is the tensors NAME.packed, NAME.scale and, if asymmetric, NAME.zero_point, exactly as `IntWeight` keeps
them. A pruning mask is NAME.keep, eight weights a byte. A manifest says what the tensors cannot: bits, group size, row
length, and which parameter a layer belongs to. It is JSON: the metadata of a block's file, `quantization_config` of a
checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from compress.checkpoint.dense_view import PackedFiles, decoded
from compress.checkpoint.stored import StoredLayer
from compress.errors import InputError, RunError
from compress.kernels.packing import pack_mask, unpack_mask, words_for
from compress.kernels.weights import IntWeight

QUANT_METHOD = "compress"
VERSION = 1
PARTS = ("packed", "scale", "zero_point")
KEEP = "keep"


class LayerEntry(BaseModel):
    """A layer's line in the manifest. What its name already says is left out of the JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bits: int = Field(ge=2, le=8)
    group_size: int = Field(ge=1)
    in_features: int = Field(ge=1)
    symmetric: bool = True
    param: str | None = None  # None: NAME.weight
    index: int | None = Field(default=None, ge=0)
    transposed: bool = False
    embedding: bool = False

    @classmethod
    def of(cls, layer: StoredLayer) -> "LayerEntry":
        """The line that describes `layer`."""
        return cls(
            **layer.packed.description(),
            symmetric=layer.packed.symmetric,
            param=None if layer.param == f"{layer.name}.weight" else layer.param,
            index=layer.index,
            transposed=layer.transposed,
            embedding=layer.embedding,
        )

    def build(self, name: str, tensors: Mapping[str, Tensor]) -> StoredLayer:
        """The layer from its tensors, by part. Raises RunError where they do not fit this line."""
        groups, rest = divmod(self.in_features, self.group_size)
        packed, scale = tensors["packed"], tensors["scale"]
        out = packed.shape[0] if packed.dim() else 0
        wanted: dict[str, tuple[tuple[int, int], tuple[torch.dtype, ...]]] = {
            "packed": ((out, words_for(self.in_features, self.bits)), (torch.int32,)),
            "scale": ((out, groups), (torch.float16, torch.bfloat16)),
            "zero_point": ((out, groups), (torch.uint8,)),
        }
        for part, tensor in tensors.items():
            shape, dtypes = wanted[part]
            if rest or tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
                raise RunError(
                    f"{name}.{part} is {tensor.dtype} {list(tensor.shape)}, which does not fit {self.bits} bits in "
                    f"groups of {self.group_size} of {self.in_features} inputs: the file is damaged, restore it"
                )
        facts = {"bits": self.bits, "group_size": self.group_size, "in_features": self.in_features}
        weight = IntWeight(packed, scale, tensors.get("zero_point"), **facts)
        param = self.param or f"{name}.weight"
        return StoredLayer(name, param, self.index, self.transposed, weight, self.embedding)

    @property
    def parts(self) -> tuple[str, ...]:
        """Which tensors the layer has."""
        return PARTS[:2] if self.symmetric else PARTS


class Manifest(BaseModel):
    """What the tensors of one file cannot say themselves."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: int = VERSION
    layers: dict[str, LayerEntry] = {}
    masks: dict[str, int] = {}  # layer -> how many weights a row of its mask has

    @classmethod
    def parse(cls, raw: Any, where: str) -> "Manifest":
        """Check what a file says. Raises InputError for a newer version, RunError for anything that makes no sense."""
        version = raw.get("version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise InputError(
                f"{where} is in version {version} of the native layout, and this compress reads {VERSION}: update compress"
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(step) for step in first["loc"]) or "manifest"
            raise RunError(
                f"the manifest of {where} is damaged ({place}: {first['msg']}): restore this file"
            ) from error

    def dump(self) -> dict[str, Any]:
        """As JSON-able values, without what has its default."""
        return {"version": self.version, **self.model_dump(exclude_defaults=True, exclude={"version"})}


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
    layers = {layer.name: LayerEntry.of(layer) for layer in contents.layers}
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


def layer_tensors(layer: StoredLayer, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a layer by name; scales keep their own dtype whatever the model's `dtype` is."""
    return {f"{layer.name}.{part}": tensor for part, tensor in layer.packed.tensors().items()}


def quantization_config(layers: Sequence[StoredLayer], ignore: Sequence[str] = ()) -> dict[str, Any]:
    """What config.json says of a native checkpoint. `ignore` is not needed: what is not listed is dense."""
    return {"quant_method": QUANT_METHOD, **encode_entries(layers)}


def encode_entries(layers: Sequence[StoredLayer]) -> dict[str, Any]:
    """The manifest of `layers` alone."""
    return Manifest(layers={layer.name: LayerEntry.of(layer) for layer in layers}).dump()


def side_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """JSON files that stand beside a checkpoint's config.json, by name: none."""
    return {}


class NativeFiles(PackedFiles):
    """The dense view of a native checkpoint: slices stacked and Conv1D turned back as the model has them."""

    PARTS = PARTS

    def find_packed(self) -> dict[str, tuple[str, ...]]:
        """Layers by parameter, slices in order. Raises RunError if a layer's tensors or a slice are missing."""
        described = {name: value for name, value in self.settings.items() if name != "quant_method"}
        self.layers = Manifest.parse(described, str(self.folder)).layers
        found: dict[str, dict[int | None, str]] = {}
        for name, entry in self.layers.items():
            for part in entry.parts:
                if f"{name}.{part}" not in self.entries:
                    raise RunError(f"{self.folder} lacks the tensor {name}.{part}: restore or download it again")
            found.setdefault(entry.param or f"{name}.weight", {})[entry.index] = name
        for param, slices in found.items():
            if slices.keys() not in ({None}, set(range(len(slices)))):
                raise RunError(f"{self.folder} lacks slices of {param}: restore or download it again")
        return {param: tuple(name for _, name in sorted(slices.items())) for param, slices in found.items()}

    def layer(self, name: str) -> StoredLayer:
        """One packed layer as it lies in the file."""
        entry = self.layers[name]
        return entry.build(name, {part: self.part(name, part) for part in entry.parts})

    def decode(self, layer: str) -> Tensor:
        """One layer in the model's dtype, [out, in], or [in, out] if its parameter is so."""
        stored = self.layer(layer)
        weight = decoded(stored.packed, self.dtype)
        return weight.T.contiguous() if stored.transposed else weight

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
