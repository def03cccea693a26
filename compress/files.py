"""Files that are whole or not there: written aside, synced to disk, then renamed."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from compress.errors import NO_ROOM, RunError
from compress.report import size

PARTIAL = ".partial"
UNWRITABLE = (
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EFBIG,
    errno.EIO,
    errno.ELOOP,
)


@contextlib.contextmanager
def disk_errors(path: Path, wanted: int | None = None) -> Iterator[None]:
    """Turn "no space left" and its kin into one line that says what to do. `wanted`: bytes that `path` takes, if known."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            takes = "" if wanted is None else f", which takes {size(wanted)}"
            raise RunError(
                f"no space left in {path.parent} ({_free(path.parent)} free) to write {path.name}{takes}: everything finished "
                "is kept; free some space and run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise RunError(f"may not write {path}: choose another --out, or mend its permissions") from error
        if error.errno in UNWRITABLE:
            raise RunError(f"cannot write {error.filename or path} ({error.strerror}): choose another --out") from error
        raise


def _free(folder: Path) -> str:
    """What room there is, for people."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    return size(shutil.disk_usage(there).free)


def replace_file(path: Path, write: Callable[[Path], object], wanted: int | None = None) -> None:
    """Let `write` make a file aside, sync it, and rename it to `path`: a reader sees the old one or the whole new one.

    `wanted`: its bytes, if they are known, for the error where there is no room.
    """
    aside = path.with_name(path.name + PARTIAL)
    with disk_errors(path, wanted):
        try:
            write(aside)
            sync(aside)
            aside.replace(path)
            sync(path.parent)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a text file."""
    replace_file(path, lambda aside: aside.write_text(text, encoding="utf-8"), len(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replace a safetensors file.

    `metadata`: one entry at most, since safetensors writes several in any order; none says that torch wrote the file.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def write(aside: Path) -> None:
        aside.touch()
        readable_by = aside.stat().st_mode  # what the umask says; safetensors lets nobody but the owner read
        try:
            save_file(contiguous, aside, metadata=metadata or {"format": "pt"})
            aside.chmod(readable_by)
        except Exception as error:  # safetensors wraps the operating system's error in its own
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise

    replace_file(path, write, sum(tensor.nbytes for tensor in tensors.values()))


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
