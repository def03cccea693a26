"""The weights of a GGUF file, written as one safetensors file a tensor at a time.

Which name each tensor gets and what undoes llama.cpp's changes to it is transformers' knowledge; the values are unpacked
and rounded a few rows at a time, so peak memory is one tensor of the result, never the model and never float32.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from compress.calib.model_files import first_line
from compress.errors import InputError
from compress.gguf_file import GgufFile, GgufTensor

SAFETENSORS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INTEGERS = {2: torch.int16, 4: torch.int32}
# Bytes that can be moved but not computed with: numpy raises TypeError on arithmetic.
OPAQUE = {2: np.dtype("V2"), 4: np.dtype("V4")}
SLACK = 1 << 20  # weights that a file may lack before it is said how many, and not which
READ_INTO_CONFIG = {"rope_freqs.weight"}  # tensors that are no weights

Progress = Callable[[int, int], None]  # tensors done, tensors in all


def write_weights(file: GgufFile, model: PreTrainedModel, path: Path, progress: Progress | None = None) -> None:
    """Write every tensor of `model` (a skeleton on the meta device) from `file` to `path`, in the file's dtype.

    Raises InputError if the file holds a tensor the model has no place for, or lacks one it needs: transformers would
    leave the first out and make the second up.
    """
    wanted = _stored_tensors(model)
    conversion = _Conversion(file, model, file.dtype())
    _check_sizes(file, conversion.values, wanted)
    missing = set(wanted)
    with path.open("wb") as out:
        places = _write_header(out, wanted, file.dtype())
        for done, tensor in enumerate(file.tensors, start=1):
            for name, value in conversion.tensors(tensor):
                if name not in wanted:  # a head that the model ties to its embedding
                    continue
                if value.shape != wanted[name].shape:
                    raise InputError(
                        f"{file.path} holds {tensor.name} as {list(value.shape)}, not {list(wanted[name].shape)}"
                    )
                out.seek(places[name])
                out.write(value.contiguous().view(torch.uint8).reshape(-1).numpy().data)
                missing.discard(name)
            if progress:
                progress(done, len(file.tensors))
    if missing:
        raise InputError(
            f"{file.path} lacks {min(missing)} ({len(missing)} of {len(wanted)} tensors): download it again"
        )


def _check_sizes(file: GgufFile, held: Counter[str | None], wanted: dict[str, Tensor]) -> None:
    """Refuse settings that make another model than the file's tensors: the result is laid out by the settings."""
    for name, tensor in wanted.items():
        if name in held and held[name] != tensor.numel():
            raise InputError(
                f"{file.path} holds {held[name]} values for {name}, and its settings say {list(tensor.shape)}: download it again"
            )
    described = sum(tensor.numel() for tensor in wanted.values())
    if described > 2 * held.total() + SLACK:
        raise InputError(f"{file.path} describes {described} weights and holds {held.total()}: download it again")


def read_weights(
    file: GgufFile, model: PreTrainedModel, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `file` by its name in `model` (a skeleton on the meta device), in `dtype`, one at a time.

    Raises InputError if the file holds a tensor the model has no place for.
    """
    conversion = _Conversion(file, model, dtype or file.dtype())
    for tensor in file.tensors:
        yield from conversion.tensors(tensor)


def _stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (a tied one once) and persistent buffers: what a checkpoint of this model holds."""
    every = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in every}
    return dict(model.named_parameters()) | buffers


def _write_header(out: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, int]:
    """Write a safetensors header for these shapes in one dtype; where in the file each tensor goes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned to 8 bytes
    out.write(struct.pack("<Q", len(text)) + text)
    data = 8 + len(text)
    return {name: data + header[name]["data_offsets"][0] for name in tensors}


class _Conversion:
    """From tensors as llama.cpp stores them to tensors as the model names and shapes them."""

    def __init__(self, file: GgufFile, model: PreTrainedModel, dtype: torch.dtype):
        self.dtype, self.path = dtype, file.path
        self.processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())
        self.names: dict[str, str] = get_gguf_hf_weights_map(model, self.processor)
        stored = [tensor.name for tensor in file.tensors if tensor.name not in READ_INTO_CONFIG]
        if unknown := [name for name in stored if self._target(name) is None]:
            raise InputError(
                f"{file.path} holds {unknown[0]}, which transformers {transformers_version} has no place for in a "
                f"{model.config.model_type} model: pass the model's safetensors folder instead"
            )
        self.values = Counter[str | None]()  # of each of the model's tensors, how many the file holds
        for tensor in file.tensors:
            self.values[self._target(tensor.name)] += math.prod(tensor.shape)
        self.parts = Counter(self._target(name) for name in stored)  # experts' gate and up are one tensor in the model
        self.merged: dict[str, Tensor] = {}

    def tensors(self, tensor: GgufTensor) -> Iterator[tuple[str, Tensor]]:
        """What one tensor of the file yields: nothing, or (name, value) in the result's dtype.

        Most changes only move values, so they are made on rounded ones seen as opaque bytes; those that compute (Gemma's
        norms are stored plus one) get float32, as in transformers.
        """
        if tensor.name in READ_INTO_CONFIG:
            return
        try:
            name, value = self._moved(tensor)
        except TypeError:
            name, value = self._computed(tensor)
        if name is not None:
            yield self.names[name], value
            return
        target = self._target(tensor.name)
        assert target is not None  # __init__ refuses a file with such a tensor
        self.parts[target] -= 1
        if not self.parts[target]:
            yield target, self.merged.pop(target).to(self.dtype)

    def _moved(self, tensor: GgufTensor) -> tuple[str | None, Tensor]:
        integers = INTEGERS[self.dtype.itemsize]
        opaque = tensor.rounded(self.dtype).view(integers).numpy().view(OPAQUE[self.dtype.itemsize])
        name, values = self._process(opaque, tensor.name)
        return name, torch.from_numpy(np.ascontiguousarray(values).view(f"i{self.dtype.itemsize}")).view(self.dtype)

    def _computed(self, tensor: GgufTensor) -> tuple[str | None, Tensor]:
        name, values = self._process(tensor.dequantized(), tensor.name)
        return name, torch.from_numpy(np.ascontiguousarray(values)).to(self.dtype)

    def _process(self, values: np.ndarray, name: str) -> tuple[str | None, np.ndarray]:
        """Undo llama.cpp's change. The name is None if the values went to `merged`."""
        context = {"tensor_key_mapping": self.names, "parsed_parameters": {"tensors": self.merged}}
        try:
            result = self.processor.process(weights=values, name=name, **context)
        except (ValueError, IndexError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
            reason = f"{name} {list(values.shape)} does not fit its settings ({first_line(error)})"
            raise InputError(f"{self.path}: {reason}: download it again") from error
        return result.name, result.weights

    def _target(self, name: str) -> str | None:
        """The model's tensor that this one becomes, or becomes a part of."""
        return self.names.get(name) or self.names.get(name.removesuffix(".weight"))
