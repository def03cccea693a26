"""How vLLM makes, loads and runs a packed layer: kernels of compress behind one operator that its compiler leaves alone."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op, set_default_torch_dtype

from compress.errors import InputError, RunError
from compress.kernels.dispatch import Preferences
from compress.kernels.inference import LayerParts, PackedEmbedding
from compress_vllm.shards import WEIGHT, ServedLinear, Shards, packed_table, shape_of

if TYPE_CHECKING:
    from compress_vllm.config import CompressConfig

Served = TypeVar("Served", bound=nn.Module)
PRODUCTS: WeakValueDictionary[str, ServedLinear] = WeakValueDictionary()  # what the operators run, by name
TABLES: WeakValueDictionary[str, nn.Embedding] = WeakValueDictionary()


def _product(x: Tensor, name: str) -> Tensor:
    y: Tensor = PRODUCTS[name](x)
    return y


def _product_shape(x: Tensor, name: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], PRODUCTS[name].out_features))


def _rows(ids: Tensor, name: str) -> Tensor:
    rows: Tensor = TABLES[name](ids)
    return rows


def _rows_shape(ids: Tensor, name: str) -> Tensor:
    table = TABLES[name]
    return ids.new_empty((*ids.shape, table.embedding_dim), dtype=table.weight.dtype)


direct_register_custom_op("compress_product", _product, fake_impl=_product_shape)
direct_register_custom_op("compress_rows", _rows, fake_impl=_rows_shape)


class CompressMethod(LinearMethodBase):
    """The method of one layer of vLLM, which stands for one or more layers of the checkpoint."""

    def __init__(self, config: "CompressConfig", shards: Shards):
        self.config, self.shards = config, shards

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Name the tensors that are loaded; they are kept as they come, and sizes are the manifest's.

        Raises InputError where the layer is to be divided among devices.
        """
        if get_tensor_model_parallel_world_size() > 1:
            raise InputError("packed layers are not divided among GPUs: use --tensor-parallel-size 1")
        self.dtype, self.shape = params_dtype, (sum(output_partition_sizes), input_size)
        for part, dtypes in {WEIGHT: (params_dtype,), **self.shards.parts}.items():
            dtype = params_dtype if params_dtype in dtypes else dtypes[0]
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": partial(self._load, part)})
            if part in self.shards.of_rows:
                set_weight_attrs(parameter, {"output_dim": 0})
            layer.register_parameter(part, parameter)

    def _load(self, part: str, parameter: Tensor, loaded: Tensor, shard: str | int | None = None) -> None:
        self.shards.load(part, loaded, getattr(loaded, "shard_id", shard))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make what multiplies. Raises RunError where a tensor is missing, or does not fit the model or the manifest."""
        stored = self.shards.stored(self.config.correction)
        self.shards.tensors.clear()
        with set_default_torch_dtype(torch.float32):  # vLLM makes the model's the default, which kernels do not expect
            self._make(layer, stored, next(layer.parameters()).device)

    def _make(self, layer: nn.Module, stored: Sequence[LayerParts | Tensor], device: torch.device) -> None:
        rows, length = shape_of(stored)
        vocabulary = isinstance(layer, VocabParallelEmbedding)
        if length != self.shape[1] or rows != (layer.org_vocab_size if vocabulary else self.shape[0]):
            raise RunError(f"{', '.join(self.shards.entries)}: {rows} x {length} does not fit a layer of {self.shape}")
        preferences, name = Preferences.from_environment(), "+".join(self.shards.entries)
        if vocabulary:  # a head is asked for one token, whatever the prompt
            preferences = replace(preferences, prompts="packed")
        if vocabulary and not isinstance(layer, ParallelLMHead):
            weight = packed_table(stored)
            layer.compress_table = table = nn.Embedding(*weight.shape, device="meta")
            PackedEmbedding.take_over(table, weight, self.dtype, device)
            self.table = _serve(TABLES, name, table)
        if not vocabulary or isinstance(layer, ParallelLMHead) or self.config.tied:
            layer.compress_product = product = ServedLinear(stored, self.dtype, device, preferences)
            self.product = _serve(PRODUCTS, name, product)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        y: Tensor = torch.ops.vllm.compress_product(x, self.product)
        return y if bias is None else y + bias

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Token ids [tokens] to rows [tokens, embedding_dim]."""
        rows: Tensor = torch.ops.vllm.compress_rows(input_, self.table)
        return rows

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """The embedding itself is the head."""
        return embed_tokens


def _serve(served: WeakValueDictionary[str, Served], name: str, module: Served) -> str:
    """Let an operator find `module`; of a second model in one process the names get a number."""
    named = (f"{name} {number}" if number else name for number in count())
    free = next(each for each in named if each not in served)
    served[free] = module
    return free
