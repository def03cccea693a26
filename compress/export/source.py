"""What an export reads: a checkpoint in any format of ours, its packed layers and its dense tensors, nothing rounded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.calib.model_files import CODE
from compress.calib.weight_files import WeightFiles
from compress.checkpoint.adapter import AdapterFiles
from compress.checkpoint.dense_view import PackedFiles, model_dtype, read_config
from compress.checkpoint.formats import open_weights
from compress.kernels.correction import Correction
from compress.kernels.inputs import InputQuantizer
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import HALF, IntWeight, PackedWeight

NOT_DENSE = ("quantization_config", "compress_adapter", CODE)


@dataclass(frozen=True)
class ExportLayer:
    """What is known of one packed layer before its values are asked for."""

    name: str  # "model.layers.0.mlp.down_proj"
    param: str  # the parameter it is, or is a part of
    alone: bool  # False: a slice of a parameter for all experts
    packed: PackedWeight | Tensor  # without values; a tensor (meta) where the file's groups of inputs are scattered
    inputs: InputQuantizer | None
    rank: int | None  # of the correction beside it; None: there is none
    scales: frozenset[torch.dtype] = frozenset()  # the half floats that hold its scales exactly

    @property
    def integers(self) -> IntWeight | Sparse24IntWeight | None:
        """The packed weight, where it is one of integers on a grid."""
        return self.packed if isinstance(self.packed, IntWeight | Sparse24IntWeight) else None

    @property
    def kind(self) -> str:
        """The layer in a few words, such as "4 bits symmetric, groups of 64"."""
        weight = self.integers
        if weight is None:
            return "scattered groups" if isinstance(self.packed, Tensor) else "codebooks"
        facts = weight.description()
        size = facts["group_size"]
        groups = "one scale a row" if size == facts["in_features"] else f"groups of {size}"
        return f"{facts['bits']} bits {'symmetric' if facts['symmetric'] else 'asymmetric'}, {groups}"


class Source:
    """A checkpoint folder to export. Values are float32 and exact; corrections are kept apart from them.

    Raises InputError for a folder that is no checkpoint, RunError for a damaged one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: dict[str, Any] = read_config(folder)
        self.files: WeightFiles = open_weights(folder)
        self.dtype = model_dtype(self.config, self.files.entries)
        self._adapter: AdapterFiles | None = None
        if isinstance(self.files, PackedFiles):
            self._adapter = self.files.adapter
            self.files.adapter = AdapterFiles(folder, {})  # no correction is added to what is read
            self.files.dtype = torch.float32  # nor is it rounded to the model's dtype

    @property
    def dense_config(self) -> dict[str, Any]:
        """config.json as it is of an ordinary checkpoint."""
        return {key: value for key, value in self.config.items() if key not in NOT_DENSE}

    @property
    def packed(self) -> Mapping[str, tuple[str, ...]]:
        """The layers that make up each packed parameter."""
        return self.files.packed if isinstance(self.files, PackedFiles) else {}

    @cached_property
    def layers(self) -> list[ExportLayer]:
        """Every packed layer; each is read once, and nothing of its values kept."""
        return list(self._layers())

    def _layers(self) -> Iterator[ExportLayer]:
        for param, names in self.packed.items():
            for name in names:
                weight = self.weight(name)
                sized: PackedWeight | Tensor = (
                    weight.to("meta")
                    if isinstance(weight, Tensor)
                    else weight.without_values(weight.shape[0], weight.description())
                )
                correction = self.correction(name)
                rank = None if correction is None else correction.rank
                inputs = self.files.input_quantizer(param)
                yield ExportLayer(name, param, len(names) == 1, sized, inputs, rank, _held_by(weight))

    def weight(self, layer: str) -> PackedWeight | Tensor:
        """A packed layer, or float32 [out, in] where the file's groups of inputs are scattered."""
        assert isinstance(self.files, PackedFiles)  # there is no layer otherwise
        return self.files.unpacked(layer)

    def integers(self, layer: str) -> IntWeight:
        """A packed layer with a code for every weight. Raises TypeError for one that is not of integers."""
        weight = self.weight(layer)
        if not isinstance(weight, IntWeight | Sparse24IntWeight):
            raise TypeError(f"{layer} is a {type(weight).__name__}")
        return weight.to_int()

    def correction(self, layer: str) -> Correction | None:
        """What is added to a packed layer."""
        if self._adapter is None or layer not in self._adapter.lines:
            return None
        shape = self.weight(layer).shape
        return self._adapter.of(layer, (shape[0], shape[1]))

    def names(self) -> list[str]:
        """Parameters and buffers, packed ones as well."""
        return list(self.files.names())

    def read(self, name: str) -> Tensor:
        """A packed parameter decoded to float32, without what is added to it; another tensor as it is stored."""
        return self.files.read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of `read(name)` without reading a dense tensor."""
        return tuple(self.read(name).shape) if name in self.packed else self.files.entries[name].shape


def zero_points(weight: IntWeight) -> Tensor:
    """uint8 [out, groups], also where a symmetric weight does not store them."""
    if weight.zero_point is not None:
        return weight.zero_point
    return torch.full(weight.scale.shape, 2 ** (weight.bits - 1), dtype=torch.uint8)


def _held_by(weight: PackedWeight | Tensor) -> frozenset[torch.dtype]:
    """The half floats in which the scales of a weight lose nothing."""
    if not isinstance(weight, IntWeight | Sparse24IntWeight):
        return frozenset()
    scale = weight.scale.double()
    return frozenset(dtype for dtype in HALF if torch.equal(scale.to(dtype).double(), scale))
