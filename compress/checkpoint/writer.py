"""The weight files of a checkpoint, written as the tensors come."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from compress.checkpoint.adapter import FOLDER, FOR_DENSE, remove_adapter
from compress.files import disk_errors, sync, write_json, write_tensors

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
SHARD_BYTES = 500_000_000  # what is held in memory until it is written; small, as memory is what we save
ASIDE = "model-{:05d}.new"  # no reader takes a file of this name for weights


def most_bytes(tensors: Mapping[str, Tensor]) -> int:
    """At most what tensors take in weight files: their own bytes, and their lines in the header."""
    lines = (
        {name: {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [10**11, 10**11]}}
        for name, t in tensors.items()
    )
    return sum(t.nbytes for t in tensors.values()) + sum(len(json.dumps(line, separators=(",", ":"))) for line in lines)


def overhead_bytes(nbytes: int) -> int:
    """At most what weight files of so many bytes have beside what `most_bytes` counts: of each, a beginning and an end."""
    return 64 * (1 + 2 * nbytes // SHARD_BYTES)  # two shards in a row are larger than one may be


class ShardWriter:
    """Tensors in, safetensors shards out; only the shard being filled is in memory.

    Shards have names that no reader looks for until `finish` puts them in place, so a killed writer leaves the folder
    as it was. A folder counts as a checkpoint by its config.json, which the caller writes after `finish`.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = SHARD_BYTES):
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for left in [*folder.glob("model-*.new"), *folder.glob("model-*.new.partial")]:
            left.unlink()  # of a killed writer
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._written: list[list[str]] = []  # tensor names of each finished shard
        self._names: set[str] = set()
        self._tensor_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor, of any device; do not change it afterwards.

        Raises ValueError if the name was there already, RunError if there is no space left.
        """
        if name in self._names:
            raise ValueError(f"{name} was added twice")
        self._names.add(name)
        if self._shard and self._shard_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()  # a view would keep all that it looks into in memory
        self._shard[name] = tensor
        self._shard_bytes += tensor.nbytes
        self._tensor_bytes += tensor.nbytes

    def finish(self) -> int:
        """Put the shards and their index in place, then remove weight files of an earlier run; bytes of all shards.

        Takes away an earlier config.json first, so that a kill in between leaves nothing that looks whole.
        Raises ValueError if nothing was added.
        """
        if self._shard:
            self._flush()
        count = len(self._written)
        if not count:
            raise ValueError("a checkpoint without tensors")
        names = [WHOLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        with disk_errors(self.folder):
            (self.folder / "config.json").unlink(missing_ok=True)
            sync(self.folder)
            for i, name in enumerate(names):
                self._aside(i).replace(self.folder / name)
            sync(self.folder)
        if count > 1:
            shards = zip(names, self._written, strict=True)
            where = {tensor: shard for shard, tensors in shards for tensor in tensors}
            write_json(self.folder / INDEX, {"metadata": {"total_size": self._tensor_bytes}, "weight_map": where})
            names.append(INDEX)
        for file in self.folder.iterdir():
            if OURS.fullmatch(file.name) and file.name not in names:
                file.unlink()
        return sum((self.folder / name).stat().st_size for name in names if name != INDEX)

    def _flush(self) -> None:
        write_tensors(self._aside(len(self._written)), self._shard)
        self._written.append(list(self._shard))
        self._shard, self._shard_bytes = {}, 0

    def _aside(self, shard: int) -> Path:
        return self.folder / ASIDE.format(shard + 1)


def remove_checkpoint(folder: Path) -> None:
    """Take away all of a checkpoint but its recipe; config.json first, so that a kill leaves nothing that looks whole.

    Folders in it, such as its run, stay, but for its adapters.
    """
    with disk_errors(folder):
        (folder / "config.json").unlink(missing_ok=True)
        sync(folder)
        for file in folder.iterdir():
            if file.is_file() and file.name != "recipe.toml":
                file.unlink()
    for adapter in (FOLDER, FOR_DENSE):
        remove_adapter(folder, adapter)
