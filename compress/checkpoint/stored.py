"""One packed layer as a checkpoint keeps it: its codes, and where they belong in the model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.errors import RunError
from compress.kernels.codebook_weight import CodebookWeight
from compress.kernels.correction import Correction
from compress.kernels.inputs import InputQuantizer
from compress.kernels.sparse24_weight import Sparse24IntWeight
from compress.kernels.weights import IntWeight, PackedWeight


@dataclass(frozen=True)
class StoredLayer:
    """A quantized linear layer and the parameter it is, or is one slice of."""

    name: str  # "model.layers.0.mlp.down_proj", or "model.layers.0.mlp.experts.gate_up_proj.3" for slice 3
    param: str  # "model.layers.0.mlp.down_proj.weight", or "model.layers.0.mlp.experts.gate_up_proj"
    index: int | None  # which slice of a parameter [slices, out, in]; None: the parameter is the layer
    transposed: bool  # the parameter is [in, out], as in transformers' Conv1D
    packed: PackedWeight  # [out, in] whatever the parameter's orientation
    embedding: bool = False  # its rows are looked up by token: an input embedding, or a head tied to one
    inputs: InputQuantizer | None = None  # how what enters the layer is rounded; None: not at all
    correction: Correction | None = None  # what is added to `packed`; a checkpoint keeps it in a file of its own

    def dequantize(self) -> Tensor:
        """The weight that the layer stands for, float32 [out, in]."""
        weight = self.packed.dequantize()
        return weight if self.correction is None else weight.add_(self.correction.delta())


def integers(layer: StoredLayer) -> IntWeight | Sparse24IntWeight:
    """A layer's weight where it has to be one of integers. Raises TypeError for another, which `refusal` keeps out."""
    if not isinstance(layer.packed, IntWeight | Sparse24IntWeight):
        raise TypeError(f"{layer.name} is a {type(layer.packed).__name__}")
    return layer.packed


def codebooks(layer: StoredLayer) -> bool:
    """Whether a layer's codes are numbers of vectors, which formats of integers cannot hold."""
    return isinstance(layer.packed, CodebookWeight)


def with_zeros(layer: StoredLayer) -> StoredLayer:
    """A layer as formats store it that have a code for every weight, zeros as well."""
    return replace(layer, packed=integers(layer).to_int())


def group_sizes(layers: Sequence[StoredLayer]) -> dict[str, int]:
    """What each layer's `group_size` is called in a file's description, by name: -1 for one scale a row.

    A group as long as the row says the same whether it is called a group or a row. It is called a group only where
    layers with longer rows have that group size too, so that the most layers share one description.
    """
    weights = {layer.name: integers(layer) for layer in layers}
    split = {weight.group_size for weight in weights.values() if weight.group_size < weight.in_features}
    return {name: weight.group_size if weight.group_size in split else -1 for name, weight in weights.items()}


def refuse(layers: Iterable[StoredLayer], reasons: Iterable[tuple[Callable[[StoredLayer], bool], str]]) -> str | None:
    """The first reason that applies to some layer, with "{name}" in it filled in; None: no reason does."""
    layers = list(layers)
    for applies, reason in reasons:
        for layer in layers:
            if applies(layer):
                return reason.format(name=layer.name)
    return None


def exact(scale: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`scale` in another dtype. Raises RunError, naming the layer, where that would change a value."""
    stored = scale.to(dtype)
    if not scale.is_meta and not torch.equal(stored.double(), scale.double()):
        raise RunError(
            f"the scales of {name} are {scale.dtype} and do not fit {dtype}: "
            "quantize again with scales in the model's dtype, or write --format native"
        )
    return stored
