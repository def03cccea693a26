"""The layers of a checkpoint that vLLM keeps as one: collected as they are loaded, checked, and put together.

Each may have bits, groups or a layout of its own, as a budget gives them, or be dense. What shares one description
becomes one product; the outputs of others are set side by side.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.checkpoint.manifest import LayerEntry
from compress.errors import InputError, RunError
from compress.kernels.correction import Correction
from compress.kernels.dispatch import Preferences
from compress.kernels.inference import CompressedLinear, LayerParts
from compress.kernels.joint import joinable, joined
from compress.kernels.weights import PackedWeight

WEIGHT = "weight"  # of a dense layer; of a packed one the file has an empty tensor of that name
QKV = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the shards of a fused attention input; of others, numbers

Corrections = Callable[[str, tuple[int, int]], Correction | None]  # layer, (out, in) -> what is added to it


def shard_names(prefix: str, fused: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The layers that vLLM's `prefix` stands for: "a.qkv_proj" -> "a.q_proj", "a.k_proj", "a.v_proj".

    `fused`: vLLM's `packed_modules_mapping` of the model.
    """
    parent, dot, leaf = prefix.rpartition(".")
    return tuple(f"{parent}{dot}{name}" for name in fused.get(leaf, (leaf,)))


class Shards:
    """The tensors of such layers. `entries`: their lines of the manifest by name, in the order of outputs; None: dense."""

    def __init__(self, entries: Mapping[str, LayerEntry | None]):
        self.entries = entries
        self.tensors: list[dict[str, Tensor]] = [{} for _ in entries]

    @property
    def parts(self) -> dict[str, tuple[torch.dtype, ...]]:
        """Tensors that a shard may have beside `WEIGHT`, each with the dtypes it may have."""
        found: dict[str, tuple[torch.dtype, ...]] = {}
        for entry in filter(None, self.entries.values()):
            known = entry.WEIGHT.expected(0, entry.facts)
            found |= {part: known[part][1] if part in known else (torch.float32,) for part in entry.parts}
        return found

    @property
    def of_rows(self) -> set[str]:
        """Those with a row an output: models that reorder outputs as they load reorder these alike."""
        entries = list(filter(None, self.entries.values()))
        return {part for entry in entries for part in entry.WEIGHT.expected(0, entry.facts)} - {
            part for entry in entries for part in entry.WEIGHT.WHOLE
        }

    def load(self, part: str, tensor: Tensor, shard: str | int | None) -> None:
        """Keep a tensor of one shard; None: the only one. Raises InputError for a layer that the file has in other pieces."""
        index = QKV.get(shard, shard) if isinstance(shard, str) else shard or 0
        if not isinstance(index, int) or (shard is None and len(self.entries) > 1):
            raise InputError(
                f"vLLM's model takes {', '.join(self.entries)} in other pieces than the file has: use --engine transformers"
            )
        self.tensors[index][part] = tensor.clone()

    def stored(self, corrections: Corrections) -> list[LayerParts | Tensor]:
        """Each shard checked against its line; a dense one as its weight [out, in].

        Raises RunError where a tensor is missing or does not fit.
        """
        return [
            self._stored(name, tensors, corrections) for name, tensors in zip(self.entries, self.tensors, strict=True)
        ]

    def _stored(self, name: str, tensors: Mapping[str, Tensor], corrections: Corrections) -> LayerParts | Tensor:
        entry = self.entries[name]
        if lacking := [part for part in ((WEIGHT,) if entry is None else entry.parts) if part not in tensors]:
            raise RunError(f"the checkpoint lacks the tensor {name}.{lacking[0]}: restore or download it again")
        if entry is None:
            return tensors[WEIGHT]
        layer = entry.build(name, tensors)
        return LayerParts(layer.packed, None, corrections(name, layer.packed.shape), layer.inputs)


def together(stored: Sequence[LayerParts | Tensor]) -> Sequence[LayerParts | Tensor]:
    """One of all, where all are packed and can become one; else as they are."""
    parts = [each for each in stored if isinstance(each, LayerParts)]
    kinds = {joinable(each) for each in parts}
    return stored if len(parts) < len(stored) or len(kinds) > 1 or None in kinds else [joined(parts)]


class ServedLinear(nn.Module):
    """The product with shards side by side, [..., in] to [..., out], in the dtype of the input; no bias."""

    def __init__(
        self, stored: Sequence[LayerParts | Tensor], dtype: torch.dtype, device: torch.device, preferences: Preferences
    ):
        """Raises InputError if a forced implementation cannot serve one."""
        super().__init__()
        layers = [
            CompressedLinear(each, dtype, device, preferences)
            if isinstance(each, LayerParts)
            else _dense(each.to(device, dtype))
            for each in together(stored)
        ]
        self.out_features = sum(layer.out_features for layer in layers)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        outputs = [layer(x) for layer in self.layers]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _dense(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def shape_of(stored: Sequence[LayerParts | Tensor]) -> tuple[int, int]:
    """(out, in) of shards side by side. Raises RunError where their inputs differ."""
    shapes = [tuple((each.weight if isinstance(each, LayerParts) else each).shape) for each in stored]
    if len({length for _, length in shapes}) > 1:
        raise RunError(f"layers of one input have rows of {shapes}: the file is damaged, restore it")
    return sum(rows for rows, _ in shapes), shapes[0][1]


def packed_table(stored: Sequence[LayerParts | Tensor]) -> PackedWeight:
    """The weight of an embedding. Raises InputError for one with something added, which is not looked up."""
    (parts,) = stored
    if not isinstance(parts, LayerParts) or parts.correction is not None:
        raise InputError("an embedding with a correction is not looked up in vLLM: use --engine transformers")
    return parts.weight
