"""The tensors of a model folder, read one at a time."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.errors import InputError, RunError
from compress.kernels.inputs import InputQuantizer

DTYPES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4}
DTYPES |= {"F64": 8, "I64": 8, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}  # bytes an element


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies, from a shard's header."""

    file: Path
    dtype: str  # as safetensors spells it: "BF16"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        size = DTYPES[self.dtype]
        for length in self.shape:
            size *= length
        return size


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
        file = self.entries[name].file
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
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index} is damaged: download it again") from error
        files = [folder / name for name in named]
        if outside := [name for name in named if Path(name).name != name]:
            raise InputError(f"{index} points outside its folder: {outside[0]}")
        if missing := [file.name for file in files if not file.is_file()]:
            raise InputError(f"{folder} lacks {missing[0]} ({len(missing)} of {len(files)} shards): download it again")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        raise InputError(
            f"{folder} holds pickled weights only ({pickled[0].name}), which can run code when loaded: "
            "convert them with transformers' save_pretrained, or find a safetensors copy"
        )
    raise InputError(f"{folder} holds no model.safetensors: restore or download it again")


def _header(file: Path) -> dict[str, Entry]:
    """Tensor names, dtypes and shapes of one shard."""
    try:
        with safe_open(file, framework="pt", backend="pread") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}
            return {n: Entry(file, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file ({error}): download it again") from error


def read_all(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of one safetensors file, and its metadata."""
    with safe_open(file, framework="pt", backend="pread") as shard:
        tensors: dict[str, torch.Tensor] = {name: shard.get_tensor(name) for name in shard.keys()}
        return tensors, shard.metadata() or {}
