"""A checkpoint of packed layers, read as if it were an ordinary one."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.calib.model_files import check_file, read_object
from compress.calib.weight_files import Entry, WeightFiles
from compress.checkpoint.adapter import AdapterFiles
from compress.errors import InputError, RunError
from compress.kernels.correction import Correction
from compress.kernels.weights import PackedWeight

INTEGERS = ("I32", "I64")
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # as safetensors spells them
ROWS = 16384  # decoded at a time
NAMED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class PackedFiles(WeightFiles):
    """The dense view: `read` decodes packed layers to the model's dtype and hands other tensors over as they are.

    A subclass names the tensors of a layer in `PARTS`, finds the layers in `find_packed`, and unpacks one in `unpacked`.
    What an adapter adds to a layer (adapter.py) is added before it is rounded.
    Raises InputError if config.json is missing or not one this format writes, RunError for a damaged adapter.
    """

    PARTS: tuple[str, ...] = ()  # a layer's tensors are called NAME.PART

    def __init__(self, folder: Path):
        super().__init__(folder)
        config = read_config(folder)
        self.dtype = model_dtype(config, self.entries)
        self.settings: dict[str, Any] = quantization_settings(config)
        self.packed = self.find_packed()
        parts = {f"{layer}.{part}" for layers in self.packed.values() for layer in layers for part in self.PARTS}
        self.plain = [name for name in self.entries if name not in parts and name not in self.packed]
        self.adapter = AdapterFiles(folder, config)
        if odd := self.adapter.lines.keys() - {layer for layers in self.packed.values() for layer in layers}:
            raise RunError(f"the adapter of {folder} is for {min(odd)}, which is not packed there: restore both")
        self.entries |= self.adapter.entries

    def names(self) -> Iterable[str]:
        """Dense tensors of the file, then the parameters that packed layers decode to."""
        return [*self.plain, *self.packed]

    def read(self, name: str) -> Tensor:
        """One dense tensor; a packed one as the decoded float32 values rounded once to the model's dtype."""
        return self.decode(self.packed[name][0]) if name in self.packed else self.stored(name)

    def find_packed(self) -> dict[str, tuple[str, ...]]:
        """Which layers make up each packed parameter."""
        raise NotImplementedError

    def unpacked(self, layer: str) -> PackedWeight | Tensor:
        """One layer in a memory layout of ours, or float32 [out, in]. Raises RunError if its tensors do not fit together."""
        raise NotImplementedError

    def decode(self, layer: str) -> Tensor:
        """One layer in the model's dtype, [out, in], with what is added to it. Raises RunError as `unpacked` does."""
        weight = self.unpacked(layer)
        out_features, in_features = weight.shape
        return decoded(weight, self.dtype, self.adapter.of(layer, (out_features, in_features)))

    def part(self, layer: str, part: str, dims: int | None = None, dtypes: tuple[str, ...] = ()) -> Tensor:
        """The tensor NAME.PART. Raises RunError if the file lacks it, or holds one of other `dims` or `dtypes`."""
        name = f"{layer}.{part}"
        if name not in self.entries:
            raise RunError(f"{self.folder} lacks the tensor {name}: restore or download this checkpoint again")
        entry = self.entries[name]
        if (dims is not None and len(entry.shape) != dims) or (dtypes and entry.dtype not in dtypes):
            wanted = f"{' or '.join(dtypes)}{'' if dims is None else f' of {dims} dimensions'}"
            raise RunError(f"{name} is {entry.dtype} {list(entry.shape)}, not {wanted}: restore or download it again")
        return self.stored(name)

    def layers_with(self, part: str) -> list[str]:
        """Names of the layers that have the tensor NAME.PART."""
        return [name.removesuffix("." + part) for name in self.entries if name.endswith("." + part)]


def decoded(weight: PackedWeight | Tensor, dtype: torch.dtype, correction: Correction | None = None) -> Tensor:
    """[out, in] of a weight, and what is added to it, rounded once to `dtype`.

    In pieces, since an embedding in float32 can outweigh the model.
    """
    whole = torch.empty(weight.shape, dtype=dtype)
    delta = None if correction is None else correction.delta()
    for start in range(0, len(whole), ROWS):
        rows = slice(start, start + ROWS)
        values = weight[rows] if isinstance(weight, Tensor) else weight.rows(rows).dequantize()
        whole[rows] = values if delta is None else values + delta[rows]
    return whole


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises InputError if there is none, or it is no JSON object."""
    path = folder / "config.json"
    if not check_file(path).exists():
        raise InputError(f"{folder} has no config.json: it is no checkpoint, or one that was never finished")
    return read_object(path)


def quantization_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`quantization_config` of a config.json, looked for under `text_config` too; empty: not quantized."""
    nested = config.get("text_config")
    settings = config.get("quantization_config")
    if not settings and isinstance(nested, dict):
        settings = nested.get("quantization_config")
    if not isinstance(settings or {}, dict):
        raise InputError("quantization_config in config.json is no JSON object: restore or download it again")
    return settings or {}


def model_dtype(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> torch.dtype:
    """What the model computes in: config.json's "dtype" (once "torch_dtype"), or else the first dense tensor's."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and (name := part.get("dtype") or part.get("torch_dtype")):
            dtype = NAMED.get(str(name).removeprefix("torch."))
            if dtype is None:
                raise InputError(f'config.json names the dtype "{name}": only {", ".join(NAMED)} are read')
            return dtype
    stored = (FLOATS[e.dtype] for n, e in entries.items() if e.dtype in FLOATS and not n.endswith(("scale", "scales")))
    return next(stored, torch.float32)
