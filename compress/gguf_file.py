"""The header of a GGUF file: metadata and where each tensor lies. No tensor is read here.

Layout (little-endian): magic, version, tensor count, key count; then keys; then one entry a tensor; then padding and data.
gguf-py's own reader keeps an array object for each of the 262,144 tokens of a Gemma vocabulary: 9 s and 650 MB, this 0.2 s.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from compress.errors import InputError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 1 << 22  # elements dequantized at a time: 16 MiB in float32


@dataclass(frozen=True)
class Skipped:
    """An array of strings (a vocabulary, its merges) that was counted, not kept."""

    length: int


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies. Its bytes are read, not mapped: mapped pages would count as memory in use."""

    name: str
    shape: tuple[int, ...]  # as torch counts: outermost first
    kind: gguf.GGMLQuantizationType
    file: Path
    start: int  # offset in the file
    row_bytes: int  # bytes of one row, i.e. of shape[-1] elements

    def dequantized(self) -> np.ndarray:
        """The values, float32 [*shape]."""
        return self._rows(0, math.prod(self.shape[:-1])).reshape(self.shape)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """The values in `dtype` [*shape], made a few rows at a time: only `dtype` is ever held whole."""
        rows = math.prod(self.shape[:-1])
        out = torch.empty(rows, self.shape[-1], dtype=dtype)
        step = max(1, CHUNK // self.shape[-1])
        for first in range(0, rows, step):
            values = self._rows(first, min(step, rows - first))
            out[first : first + len(values)] = torch.from_numpy(values)
        return out.reshape(self.shape)

    def _rows(self, first: int, count: int) -> np.ndarray:
        """Some rows, float32 [count, shape[-1]], in memory of their own."""
        place = self.start + first * self.row_bytes
        stored = np.fromfile(self.file, np.uint8, count * self.row_bytes, offset=place).reshape(count, self.row_bytes)
        try:
            return np.asarray(gguf.dequantize(stored, self.kind), np.float32)
        except NotImplementedError as error:
            raise InputError(
                f"{self.file} stores {self.name} as {self.kind.name}, which gguf-py cannot unpack: take another quantization"
            ) from error


@dataclass(frozen=True)
class GgufFile:
    """A parsed header. `metadata` holds plain values, lists of numbers, and `Skipped` for arrays of strings."""

    path: Path
    metadata: dict[str, Any]
    tensors: list[GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the kind of model: "llama", "gemma3"."""
        return self.metadata["general.architecture"]

    def dtype(self) -> torch.dtype:
        """The matrices' float type when they all have the same, bfloat16 when any is quantized."""
        kinds = {t.kind.name for t in self.tensors if len(t.shape) > 1}
        half = kinds - {"F32"}
        if not half:
            return torch.float32
        return PLAIN.get(half.pop(), torch.bfloat16) if len(half) == 1 else torch.bfloat16


def read_gguf(path: Path) -> GgufFile:
    """Parse a file's header. Raises InputError if it is no GGUF file, damaged, truncated, or one part of a split file."""
    try:
        if not path.is_file():
            raise OSError("it is no ordinary file")
        bytes_ = np.memmap(path, mode="r", dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if bytes(bytes_[:4]) != b"GGUF":
        raise InputError(f"{path} is not a GGUF file: its first bytes are not GGUF")
    try:
        file = _parse(path, bytes_)
        parts = _number(file.metadata, "split.count", 1)
    except (struct.error, ValueError, KeyError, IndexError, OverflowError) as error:
        raise InputError(f"{path} is damaged or truncated ({error}): download it again") from error
    if parts > 1:
        raise InputError(f"{path} is one part of a split model: join the parts with `llama-gguf-split --merge` first")
    return file


def _parse(path: Path, data: np.ndarray) -> GgufFile:
    """Walk the header once."""
    cursor = _Cursor(data.data)
    cursor.at = 4
    version, tensors, keys = cursor.take("IQQ")
    if version not in (2, 3):
        raise ValueError(f"version {version}; versions 2 and 3 are known")
    metadata = {}
    for _ in range(keys):
        name = cursor.string()
        metadata[name] = cursor.value(*cursor.take("I"))
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError("general.architecture is missing")
    entries = [_entry(cursor) for _ in range(tensors)]
    if len({name for name, *_ in entries}) < len(entries):
        raise ValueError("two tensors share a name")
    alignment = _number(metadata, "general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    return GgufFile(path, metadata, [_tensor(path, start, len(data), *entry) for entry in entries])


def _number(metadata: dict[str, Any], key: str, default: int) -> int:
    """A number of at least one. Raises ValueError for anything else."""
    value = metadata.get(key, default)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} is {value!r}")
    return value


def _entry(cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
    """One line of the tensor table: name, shape (torch's order), type, offset into the data."""
    name = cursor.string()
    (dims,) = cursor.take("I")
    shape = tuple(reversed(cursor.take(f"{dims}Q")))
    kind, offset = cursor.take("IQ")
    return name, shape, kind, offset


def _tensor(path: Path, start: int, file_bytes: int, name: str, shape: tuple[int, ...], *entry: int) -> GgufTensor:
    """One tensor, its place checked against the file's size."""
    kind_number, offset = entry
    kind = gguf.GGMLQuantizationType(kind_number)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if not shape or 0 in shape or shape[-1] % block:
        raise ValueError(f"{name} [{shape}] is not made of whole {kind.name} blocks")
    row_bytes = shape[-1] // block * size
    if start + offset + math.prod(shape[:-1]) * row_bytes > file_bytes:
        raise ValueError(f"{name} ends after the file")
    return GgufTensor(name, shape, kind, path, start + offset, row_bytes)


class _Cursor:
    """A place in the header's bytes."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def take(self, format_: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{format_}", self.data, self.at)
        self.at += struct.calcsize(f"<{format_}")
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        text = bytes(self.data[self.at : self.at + length])
        if len(text) != length:
            raise ValueError("a string ends after the file")
        self.at += length
        return text.decode("utf-8")

    def value(self, kind: int) -> Any:
        """One metadata value of the given type number."""
        if kind in SCALARS:
            return self.take(SCALARS[kind])[0]
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"metadata type {kind} is unknown")
        element, length = self.take("IQ")
        if element in SCALARS:
            return list(self.take(f"{length}{SCALARS[element]}"))
        if element != STRING:
            raise ValueError(f"an array of metadata type {element} is unknown")
        for _ in range(length):
            (size,) = self.take("Q")
            self.at += size
        return Skipped(length)
