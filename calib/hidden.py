"""Hidden states of all calibration sequences between two blocks."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import RunError

MEMORY_LIMIT = 4 * 2**30  # bytes; larger stores go to a memory-mapped file


class HiddenStates:
    """One [1, seqlen, hidden_size] tensor a sequence, overwritten as the blocks go by.

    Kept in memory up to `limit` bytes, beyond that in a memory-mapped file in `folder` that goes with the process.
    Raises RunError if there is no room for it.
    """

    def __init__(self, first: Tensor, nsamples: int, folder: Path | None = None, limit: int = MEMORY_LIMIT):
        shape = (nsamples, *first.shape[1:])
        size = nsamples * first.numel()
        self.file: Path | None = None
        if folder is not None and size * first.element_size() > limit:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = folder / "hidden_states.bin"
            try:
                reserve(self.file, size * first.element_size())
                flat = torch.from_file(str(self.file), shared=True, size=size, dtype=first.dtype)
            finally:
                self.file.unlink(missing_ok=True)  # the mapping keeps it; whatever ends the process frees the space
            self._store = flat.view(shape)
        else:
            self._store = torch.empty(shape, dtype=first.dtype)
        self._device = first.device

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> Tensor:
        return self._store[index : index + 1].to(self._device)

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        self._store[index] = hidden[0].to(self._store.device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        """Drop the states and their file."""
        del self._store


@dataclass(frozen=True)
class Sequences:
    """The hidden states of all calibration sequences between two blocks, [1, seqlen, hidden_size] each."""

    hidden: HiddenStates | list[Tensor]  # in the model as compressed so far
    dense: HiddenStates | None = None  # in the model as it came; None: no layer makes up for the difference

    def close(self) -> None:
        """Drop them and their files."""
        for each in (self.hidden, self.dense):
            if isinstance(each, HiddenStates):
                each.close()


def reserve(file: Path, size: int) -> None:
    """Make a file of `size` bytes that the disk has: a full disk would end the process where a mapping is written.

    Raises RunError if there is no room.
    """
    try:
        with file.open("wb") as opened:
            os.posix_fallocate(opened.fileno(), 0, size)
    except OSError as error:
        file.unlink(missing_ok=True)
        free = shutil.disk_usage(file.parent).free
        raise RunError(
            f"{file} takes {size / 2**20:.1f} MiB for hidden states, and {free / 2**20:.1f} MiB are free ({error.strerror}): "
            "free some space, or use fewer --nsamples; everything finished is kept"
        ) from error
