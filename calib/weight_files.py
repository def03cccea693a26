"""The tensors of a model folder, read one at a time."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.calib.model_files import MEND, check_file, read_object
from compress.errors import InputError, RunError
from compress.kernels.inputs import InputQuantizer

INDEX = "model.safetensors.index.json"
LARGEST = 2**48  # product of a tensor's sides that are not 0; one without elements could say anything
SUB_BYTE = ("F4", "F6")  # which torch has no tensors of
BITS = re.compile(r"[A-Z]+(\d+)")  # an element's, from the dtype's name: F8_E4M3 has 8


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies, from a shard's header."""

    file: Path
    dtype: str  # as safetensors spells it: "BF16"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        found = BITS.match(self.dtype)
        return math.prod(self.shape) * (8 if found is None else int(found[1])) // 8  # BOOL has a byte


class WeightFiles:
    """All tensors of a folder of safetensors shards. Nothing is read before it is asked for, and nothing is kept.

    A checkpoint format that stores layers otherwise is a subclass that presents them as dense tensors again.
    Raises InputError if the folder holds no safetensors weights or a shard is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries = {name: entry for file in _shards(folder) for name, entry in _header(file).items()}

    def names(self) -> Iterable[str]:
        """Names of the (dense) tensors."""
        return self.entries

    def read(self, name: str) -> Tensor:
        """One (dense) tensor, in memory of its own."""
        return self.stored(name)

    def input_quantizer(self, name: str) -> InputQuantizer | None:
        """How the layer whose weight is the (dense) tensor `name` rounds what enters it; None: not at all."""
        return None

    def stored(self, name: str) -> Tensor:
        """One tensor as it lies in the file. Read, not mapped: mapped pages would count as memory in use."""
        file, dtype = self.entries[name].file, self.entries[name].dtype
        if dtype.startswith(SUB_BYTE):
            raise InputError(f"{file} holds {name} as {dtype}, which is not read: take another quantization")
        try:
            with safe_open(file, framework="pt", backend="pread") as shard:
                return shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RunError(f"cannot read {name} from {file}: {error}; restore or download this file again") from error

    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(entry.nbytes for entry in self.entries.values())


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order."""
    index = folder / INDEX
    if check_file(index).is_file():
        return _listed(folder, index)
    if files := sorted(folder.glob("*.safetensors")):
        return [check_file(file) for file in files]
    if pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        raise InputError(
            f"{folder} holds pickled weights only ({pickled[0].name}), which can run code when loaded: "
            "convert them with transformers' save_pretrained, or find a safetensors copy"
        )
    raise InputError(f"{folder} holds no model.safetensors: {MEND}")


def _listed(folder: Path, index: Path) -> list[Path]:
    """The shards that an index names, in order. Raises InputError for one outside the folder."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} has no weight_map from tensors to files: {MEND}")
    named = sorted(set(weight_map.values()))
    if outside := [name for name in named if Path(name).name != name or name == ".."]:
        raise InputError(f"{index} points outside its folder: {outside[0]}")
    if pickled := [name for name in named if not name.endswith(".safetensors")]:
        raise InputError(f"{index} names {pickled[0]}, which is no safetensors file: find a safetensors copy")
    files = [check_file(folder / name) for name in named]
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(f"{folder} lacks {missing[0]} ({len(missing)} of {len(files)} shards): download it again")
    if not files:
        raise InputError(f"{index} names no file: {MEND}")
    return files


def _header(file: Path) -> dict[str, Entry]:
    """Tensor names, dtypes and shapes of one shard."""
    try:
        with safe_open(file, framework="pt", backend="pread") as shard:
            return _entries(file, shard)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file ({error}): download it again") from error


def _entries(file: Path, shard: Any) -> dict[str, Entry]:
    """What an open shard holds. Raises SafetensorError for shapes that torch cannot count."""
    slices = {name: shard.get_slice(name) for name in shard.keys()}
    entries = {n: Entry(file, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    for name, entry in entries.items():
        if math.prod(n or 1 for n in entry.shape) > LARGEST:
            raise SafetensorError(f"{name} is said to be {list(entry.shape)}, which holds nothing")
    return entries


def read_all(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of one safetensors file, and its metadata. Raises SafetensorError or OSError if it is damaged."""
    with safe_open(file, framework="pt", backend="pread") as shard:
        _entries(file, shard)
        tensors: dict[str, torch.Tensor] = {name: shard.get_tensor(name) for name in shard.keys()}
        return tensors, shard.metadata() or {}
