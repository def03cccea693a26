"""Quantization method "compress" of vLLM: which layer of a model is which of a native checkpoint's manifest."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from compress.checkpoint.adapter import KEY, AdapterFiles
from compress.checkpoint.manifest import LayerEntry, Manifest
from compress.errors import InputError
from compress.kernels.correction import Correction
from compress_vllm.method import CompressMethod
from compress_vllm.shards import Shards, shard_names

QUANT_METHOD = "compress"
SM_80 = 80  # what the Triton kernels are compiled for, and later
REORDERED = "query_key_value"  # fused inputs of attention whose outputs vLLM puts in another order


@register_quantization_config(QUANT_METHOD)
class CompressConfig(QuantizationConfig):
    """`quantization_config` of a native checkpoint. It travels to vLLM's processes, so it is of module level and plain."""

    def __init__(self, layers: Mapping[str, LayerEntry]):
        super().__init__()
        self.layers = dict(layers)  # by the names that vLLM gives
        self.stored_as = {name: name for name in layers}  # by those of the files
        self.tied, self.folder, self.adapter_file = False, "", None

    def get_name(self) -> str:
        """As config.json has it."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that vLLM computes in."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of an NVIDIA GPU."""
        return SM_80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CompressConfig":
        """From `quantization_config`. Raises InputError for slices of one tensor, RunError for a damaged manifest."""
        described = {key: value for key, value in config.items() if key != "quant_method"}
        layers = Manifest.parse(described, "config.json").layers
        if sliced := [name for name, entry in layers.items() if entry.index is not None]:
            raise InputError(f"{sliced[0]} is an expert's slice, which vLLM is not given: use --engine transformers")
        return cls(layers)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Learn where the checkpoint is, whether its head is tied, and whether an adapter belongs to it."""
        self.folder = model_name
        self.tied = bool(getattr(hf_config.get_text_config(), "tie_word_embeddings", False))
        self.adapter_file = getattr(hf_config, KEY, None)
        if self.adapter_file is None:
            return
        if not Path(model_name).is_dir():
            raise InputError(f"{model_name} has an adapter, which is read from a folder: download it first")
        if odd := [name for name in self.adapter.lines if name.endswith(REORDERED)]:
            raise InputError(f"vLLM reorders {odd[0]}, whose correction does not follow: use --engine transformers")

    @cached_property
    def adapter(self) -> AdapterFiles:
        """What is added to packed layers. Raises RunError where its files are damaged."""
        return AdapterFiles(Path(self.folder), {} if self.adapter_file is None else {KEY: self.adapter_file})

    def __getstate__(self) -> dict[str, Any]:
        """Without what each process opens for itself."""
        return {key: value for key, value in self.__dict__.items() if key != "adapter"}

    def correction(self, name: str, shape: tuple[int, int]) -> Correction | None:
        """What is added to the layer that vLLM calls `name`, of `shape` (out, in)."""
        return self.adapter.of(self.stored_as[name], shape)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take the names that a model of vLLM has for its modules."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        self.stored_as = hf_to_vllm_mapper.apply_dict(self.stored_as)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer; None: it is not quantized. Raises InputError for a packed one that is not served."""
        names = self._names(layer, prefix)
        packed = {name: self.layers.get(name) for name in names}
        if isinstance(layer, LinearBase | VocabParallelEmbedding) and any(packed.values()):
            return CompressMethod(self, Shards(packed))
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        inside = [name for name in self.layers if isinstance(layer, RoutedExperts) and name.startswith(f"{prefix}.")]
        if inside:
            raise InputError(f"{inside[0]} is an expert's, which vLLM is not given: use --engine transformers")
        return None

    def _names(self, layer: nn.Module, prefix: str) -> tuple[str, ...]:
        """The checkpoint's layers in a layer of vLLM. Models name no embedding, and a tied head is the embedding."""
        head = isinstance(layer, ParallelLMHead)
        if isinstance(layer, VocabParallelEmbedding) and prefix not in self.layers and (self.tied or not head):
            return tuple(name for name, entry in self.layers.items() if entry.embedding)
        return shard_names(prefix, self.packed_modules_mapping)
