"""GPTQ, as AutoGPTQ began it and GPTQModel, transformers and vLLM read it. Written as version 1, symmetric, in order.

A layer NAME is NAME.qweight int32 [in * bits / 32, out], a bit stream down each column; NAME.qzeros int32
[groups, out * bits / 32], a stream along the outputs that holds each zero point minus one (version 2: itself);
NAME.scales float16 [groups, out]; NAME.g_idx int32 [in], the group of each input. A bias stays beside them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.dense_view import FLOATS, INTEGERS, PackedFiles
from compress.checkpoint.stored import StoredLayer, codebooks, exact, group_sizes, integers, refuse, with_zeros
from compress.errors import InputError, RunError
from compress.kernels.packing import WORD, pack, unpack
from compress.kernels.weights import HALF, IntWeight

QUANT_METHOD = "gptq"
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # format -> what its zero points lack
BITS = (2, 3, 4, 8)

REFUSALS = (
    (
        lambda layer: layer.inputs is not None,
        "gptq cannot say that what enters {name} is rounded: compressed-tensors can, at 8 bits a token, or native",
    ),
    (codebooks, "gptq cannot hold {name}, which has codebooks: native can"),
    (
        lambda layer: layer.index is not None,
        "gptq cannot hold {name}, a slice of one parameter for all experts: native can",
    ),
    (lambda layer: layer.transposed, "gptq cannot hold {name}, a Conv1D layer: native can"),
    (lambda layer: layer.embedding, "gptq cannot hold {name}, an embedding: native can"),
    (
        lambda layer: integers(layer).bits not in (4, 8),
        "gptq is written with 4 or 8 bits, since vLLM loads no others, and {name} has neither: compressed-tensors can hold it",
    ),
    (
        lambda layer: not integers(layer).symmetric,
        "gptq is written symmetric, since vLLM loads nothing else, and {name} is not: compressed-tensors can hold it",
    ),
    (
        lambda layer: bool(layer.packed.shape[1] % WORD or layer.packed.shape[0] % WORD),
        "gptq needs inputs and outputs in multiples of 32, which {name} does not have: compressed-tensors can hold it",
    ),
)


def refusal(layers: Sequence[StoredLayer]) -> str | None:
    """One sentence on why this format cannot hold the layers, and which can; None if it does."""
    if reason := refuse(layers, REFUSALS):
        return reason
    if (
        len({(integers(layer).bits, size) for layer, size in zip(layers, group_sizes(layers).values(), strict=True)})
        > 1
    ):
        return "gptq has one number of bits and one group size for all layers, and these differ: compressed-tensors can"
    return None


def held(layer: StoredLayer) -> StoredLayer:
    """A layer as this format stores it: with a code for every weight, pruned ones as well."""
    return with_zeros(layer)


def layer_tensors(layer: StoredLayer, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of one layer by full name, for layers that `refusal` lets pass; scales are float16 for any `dtype`.

    Raises RunError if the scales do not fit float16.
    """
    weight = integers(layer).to_int()
    stored_zero = 2 ** (weight.bits - 1) - ZERO_OFFSETS["gptq"]
    scales = exact(weight.scale, torch.float16, layer.name).T.contiguous()
    tensors = {
        "qweight": weight.packed.T.contiguous(),
        "qzeros": pack(torch.full(scales.shape, stored_zero, dtype=torch.uint8), weight.bits),
        "scales": scales,
        "g_idx": torch.arange(weight.in_features, dtype=torch.int32) // weight.group_size,
    }
    return {f"{layer.name}.{part}": tensor for part, tensor in tensors.items()}


def quantization_config(layers: Sequence[StoredLayer], ignore: Sequence[str]) -> dict[str, Any]:
    """What config.json and quantize_config.json say. `ignore`: names of all nn.Linear that are not quantized.

    Loaders take every nn.Linear of the blocks for quantized, so each ignored one is excepted by a pattern; the head
    they leave alone of themselves.
    """
    heads = [layer.name for layer in layers if layer.name.rpartition(".")[2] == "lm_head"]
    excepted = [name for name in ignore if name.rpartition(".")[2] != "lm_head"]
    config = {
        "quant_method": QUANT_METHOD,
        "bits": integers(layers[0]).bits,
        "group_size": group_sizes(layers)[layers[0].name],
        "desc_act": False,
        "sym": True,
        "lm_head": bool(heads),
        "checkpoint_format": "gptq",
        "format": "gptq",
        "method": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["compress"], "true_sequential": False, "static_groups": False},
    }
    return config | ({"dynamic": {f"-:^{re.escape(name)}$": {} for name in excepted}} if excepted else {})


def side_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """JSON files that stand beside a checkpoint's config.json, by name: older readers want quantize_config.json."""
    return {"quantize_config.json": config["quantization_config"]}


class GPTQFiles(PackedFiles):
    """The dense view of GPTQ checkpoints of both versions, with inputs in order or by activation.

    Bits are told from the shapes, so layers whose bits `dynamic` overrides are read too. Raises InputError for
    another layout of the same quantization method.
    """

    PARTS = ("qweight", "qzeros", "scales", "g_idx")

    def find_packed(self) -> dict[str, tuple[str, ...]]:
        """Every layer with a `qweight`."""
        layout = self.settings.get("checkpoint_format") or self.settings.get("format") or "gptq"
        if not isinstance(layout, str) or layout not in ZERO_OFFSETS:
            raise InputError(f'{self.folder} is in the gptq format "{layout}": only {", ".join(ZERO_OFFSETS)} are read')
        self.zero_offset = ZERO_OFFSETS[layout]
        return {f"{layer}.weight": (layer,) for layer in self.layers_with("qweight")}

    def unpacked(self, layer: str) -> IntWeight | Tensor:
        """One layer's codes, or float32 [out, in] where its groups are not in order. Raises RunError if its tensors do not fit together."""
        qweight, qzeros = (self.part(layer, part, 2, ("I32",)) for part in self.PARTS[:2])
        scales = self.part(layer, "scales", 2, tuple(FLOATS))
        groups, out = scales.shape
        bits, rest = divmod(qzeros.shape[1] * WORD, max(1, out))
        agree = qweight.shape[1] == out and qzeros.shape[0] == groups and qweight.numel() > 0 and groups > 0
        if rest or bits not in BITS or not agree:
            raise RunError(
                f"{layer} has qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales "
                f"{list(scales.shape)}, which do not fit: restore or download {self.folder} again"
            )
        length = qweight.shape[0] * WORD // bits
        group = self._groups(layer, length, groups)
        # a field that held 2**bits - 1 for a zero point of zero wraps back to it
        zeros = (unpack(qzeros, bits, out).to(torch.int16) + self.zero_offset).remainder_(2**bits).to(torch.uint8)
        size = -(-length // groups)
        if length == size * groups and scales.dtype in HALF and torch.equal(group, torch.arange(length) // size):
            symmetric = bool((zeros == 2 ** (bits - 1)).all())
            zero_point = None if symmetric else zeros.T.contiguous()
            return IntWeight(qweight.T.contiguous(), scales.T.contiguous(), zero_point, bits, size, length)
        codes = unpack(qweight.T, bits, length).float()  # [out, in]
        return codes.sub_(zeros.float()[group].T).mul_(scales.float()[group].T)

    def _groups(self, layer: str, length: int, groups: int) -> Tensor:
        """The group of each input, int64 [in]; counted off where the file does not say."""
        if f"{layer}.g_idx" not in self.entries:
            return torch.arange(length) // -(-length // groups)
        group = self.part(layer, "g_idx", 1, INTEGERS).long()
        if group.shape != (length,) or group.min() < 0 or group.max() >= groups:
            raise RunError(
                f"{layer}.g_idx does not name one of {groups} groups for each of {length} inputs: restore it"
            )
        return group


READER = GPTQFiles
