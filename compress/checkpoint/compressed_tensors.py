"""compressed-tensors, formats pack-quantized and int-quantized: what vLLM and transformers load.

Written dense, as version 0.19 and later. A layer NAME is NAME.weight_packed, .weight_scale, .weight_shape and, if
asymmetric, .weight_zero_point, which is packed along the outputs; int-quantized, for symmetric codes of 8 bits by channel
whose inputs are quantized as well, has NAME.weight int8 and .weight_scale. Inputs have a scale found for each token, so
no tensor says anything of them. The library speaks of signed codes but stores them shifted by 2**(bits - 1), so our unsigned codes
and zero points go in as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.config_groups import Kind, kind_of, read_targets
from compress.checkpoint.dense_view import INTEGERS, PackedFiles
from compress.checkpoint.stored import StoredLayer, codebooks, exact, group_sizes, integers, refuse, with_zeros
from compress.errors import InputError, RunError
from compress.kernels.inputs import InputQuantizer
from compress.kernels.packing import pack, unpack, words_for
from compress.kernels.weights import IntWeight

QUANT_METHOD = "compressed-tensors"
VERSION = "0.20.0"  # of the library whose layout this is: 0.17 packed 3-bit codes otherwise
FORMAT = "pack-quantized"
WHOLE_CODES = "int-quantized"  # a byte a code, for layers whose inputs have a byte as well
BITS = (2, 3, 4, 8)

REFUSALS = (
    (
        lambda layer: layer.inputs is not None and layer.inputs.static,
        "compressed-tensors cannot hold {name}, whose norm emits integer codes, which its readers would scale: native can",
    ),
    (
        lambda layer: layer.inputs is not None and layer.inputs.bits != 8,
        "compressed-tensors is read with inputs of 8 bits or of 16, and those of {name} have neither: native can",
    ),
    (codebooks, "compressed-tensors cannot hold {name}, which has codebooks: native can"),
    (
        lambda layer: layer.index is not None,
        "compressed-tensors cannot hold {name}, a slice of one parameter for all experts: native can",
    ),
    (
        lambda layer: layer.transposed,
        "compressed-tensors cannot hold {name}, a Conv1D layer, which its loaders do not know: native can",
    ),
    (
        lambda layer: layer.embedding,
        "compressed-tensors cannot hold {name}, an embedding: transformers fails to run one it loaded packed; native can",
    ),
    (
        lambda layer: integers(layer).bits not in BITS,
        "compressed-tensors is written with 2, 3, 4 or 8 bits, which {name} does not have: native can hold it",
    ),
)


def refusal(layers: Sequence[StoredLayer]) -> str | None:
    """One sentence on why this format cannot hold the layers, and which can; None if it does."""
    return refuse(layers, REFUSALS)


def unread(layers: Sequence[StoredLayer]) -> str | None:
    """One sentence on why transformers could not load what this format holds; None if it can.

    Its plain path makes no room for packed zero points, and its dequantizing one takes all layers for the first kind's
    (transformers 5.23, compressed-tensors 0.20).
    """
    if len(kinds := _kinds(layers)) > 1 and not all(symmetric for *_, symmetric in kinds):
        return (
            "compressed-tensors holds these layers, but transformers cannot load asymmetric ones among others of another "
            "kind (--symmetric mends that)"
        )
    return None


def held(layer: StoredLayer) -> StoredLayer:
    """A layer as this format stores it: with a code for every weight, pruned ones as well."""
    return with_zeros(layer)


def layer_tensors(layer: StoredLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer by full name: codes int32, scales in the model's `dtype`, shape int64 [2].

    The library decodes in the dtype of the scales, so a float32 model needs them in float32 to decode exactly.
    Raises RunError if the scales do not fit `dtype`.
    """
    weight = integers(layer).to_int()
    if _format(layer) == WHOLE_CODES:
        signed = (weight.codes().to(torch.int16) - 128).to(torch.int8)
        return {f"{layer.name}.weight": signed, f"{layer.name}.weight_scale": exact(weight.scale, dtype, layer.name)}
    tensors = {
        "weight_packed": weight.packed,
        "weight_scale": exact(weight.scale, dtype, layer.name),
        "weight_shape": torch.tensor([weight.out_features, weight.in_features], dtype=torch.int64),
    }
    if weight.zero_point is not None:
        tensors["weight_zero_point"] = pack(weight.zero_point.T, weight.bits).T.contiguous()
    return {f"{layer.name}.{part}": tensor for part, tensor in tensors.items()}


def quantization_config(layers: Sequence[StoredLayer], ignore: Sequence[str]) -> dict[str, Any]:
    """What config.json says. `ignore`: names of all nn.Linear modules that are not quantized, such as "lm_head".

    Layers that are alike are one group with the target "Linear"; otherwise each kind is a group that names its layers.
    """
    kinds = _kinds(layers)
    formats = {kind[0] for kind in kinds}
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "format": layout,
            "input_activations": _arguments(8, True, "token", dynamic=True) if quantized_inputs else None,
            "output_activations": None,
            "weights": _arguments(bits, symmetric, *(("channel",) if size == -1 else ("group", size))),
        }
        for i, ((layout, quantized_inputs, bits, size, symmetric), names) in enumerate(kinds.items())
    }
    return {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _kinds(layers: Sequence[StoredLayer]) -> dict[tuple[str, bool, int, int, bool], list[str]]:
    """The names of layers that are alike: by format, whether inputs are quantized, bits, group size, symmetric."""
    sizes = group_sizes(layers)
    kinds: dict[tuple[str, bool, int, int, bool], list[str]] = {}
    for layer in layers:
        grid = (integers(layer).bits, sizes[layer.name], integers(layer).symmetric)
        kinds.setdefault((_format(layer), layer.inputs is not None, *grid), []).append(layer.name)
    return kinds


def _format(layer: StoredLayer) -> str:
    """How the codes of a layer lie: a byte each where a product of bytes is meant to read them, else packed."""
    weight = integers(layer)
    whole = weight.bits == 8 and weight.symmetric and weight.group_size == weight.in_features
    return WHOLE_CODES if whole and layer.inputs is not None else FORMAT


def _arguments(
    bits: int, symmetric: bool, strategy: str, group_size: int | None = None, dynamic: bool = False
) -> dict[str, Any]:
    """What the library calls QuantizationArgs, of integers."""
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "zp_dtype": None if symmetric else "torch.int8",
    }


def side_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """JSON files that stand beside a checkpoint's config.json, by name: none."""
    return {}


class CompressedTensorsFiles(PackedFiles):
    """The dense view of integer weights in compressed-tensors files, ours and other tools'.

    Raises InputError for a format, type or strategy that is not integers by group, row or tensor, and for inputs that
    are quantized otherwise than with a scale for each token.
    """

    PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight")

    def find_packed(self) -> dict[str, tuple[str, ...]]:
        """Every layer with packed codes, or with 8-bit codes and scales."""
        if self.settings.get("sparsity_config"):
            raise InputError(f"{self.folder} has a sparsity_config, which nothing reads any more: export it densely")
        self.targets = read_targets(self.settings, str(self.folder))
        if ordered := self.layers_with("weight_g_idx"):
            raise InputError(f"{ordered[0]} in {self.folder} permutes its inputs (actorder group), which is not read")
        whole = [name for name in self.layers_with("weight_scale") if self._is_int8(f"{name}.weight")]
        return {f"{layer}.weight": (layer,) for layer in [*self.layers_with("weight_packed"), *whole]}

    def _is_int8(self, name: str) -> bool:
        return name in self.entries and self.entries[name].dtype == "I8"

    def layer(self, name: str) -> IntWeight:
        """One layer's codes. Raises RunError if its tensors do not fit its description."""
        kind = kind_of(name, self.targets)
        if f"{name}.weight_packed" in self.entries:
            packed, (out, length) = self.part(name, "weight_packed", 2, ("I32",)), self._shape(name)
        else:
            signed = self.part(name, "weight", 2)
            packed, (out, length) = pack(signed.to(torch.int16) + 128, 8), signed.shape
        scale = self._rows(name, "weight_scale", len(packed), kind)
        zero_point = None if kind.symmetric else self._zero_point(name, len(packed), kind)
        groups, size = scale.shape[1], kind.group_size if kind.by == "group" else length
        if length < 1 or tuple(packed.shape) != (out, words_for(length, kind.bits)) or groups * size != length:
            raise RunError(
                f"{name} has codes {list(packed.shape)} and {groups} scales a row, which is not {kind.bits} bits for "
                f"[{out}, {length}] in groups of {size}: damaged, or packed before compressed-tensors 0.19; export it again"
            )
        if zero_point is not None and zero_point.shape != scale.shape:
            raise RunError(f"{name} has {zero_point.shape[1]} zero points for {groups} scales a row: export it again")
        return IntWeight(packed, scale, zero_point, kind.bits, size, length)

    def _shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a packed layer."""
        shape = self.part(name, "weight_shape", 1, INTEGERS).tolist()
        if len(shape) != 2:
            raise RunError(f"{name}.weight_shape has {len(shape)} numbers, not 2: damaged; export it again")
        return shape[0], shape[1]

    def _zero_point(self, name: str, out: int, kind: Kind) -> Tensor:
        """uint8 [out, groups]."""
        if f"{name}.weight_packed" in self.entries and kind.by != "tensor":
            packed = self.part(name, "weight_zero_point", 2, ("I32",))
            if packed.shape[0] != words_for(out, kind.bits):
                raise RunError(f"{name}.weight_zero_point does not hold {out} rows: damaged; export it again")
            return unpack(packed.T, kind.bits, out).T.contiguous()
        signed = self._rows(name, "weight_zero_point", out, kind)
        return (signed.to(torch.int16) + 2 ** (kind.bits - 1)).to(torch.uint8)

    def _rows(self, name: str, part: str, out: int, kind: Kind) -> Tensor:
        """A tensor of one value a group as [out, groups], whichever of its dimensions the file leaves out."""
        tensor = self.part(name, part)
        if kind.by == "tensor" and tensor.numel() == 1:
            return tensor.reshape(1, 1).expand(out, 1).contiguous()
        if not out or not tensor.numel() or tensor.numel() % out:
            raise RunError(f"{name}.{part} is {list(tensor.shape)} for {out} rows: damaged; export it again")
        return tensor.reshape(out, -1)

    def input_quantizer(self, name: str) -> InputQuantizer | None:
        """How the layer whose weight is the tensor `name` rounds what enters it."""
        return kind_of(self.packed[name][0], self.targets).inputs if name in self.packed else None

    def unpacked(self, layer: str) -> IntWeight:
        """One layer's codes."""
        return self.layer(layer)


READER = CompressedTensorsFiles
