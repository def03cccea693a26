"""The files of a model's folder, which somebody else may have written: what is read of them, and what is not.

A link may lead to another file of its folder, or to the blobs of the hub's cache that the folder is a snapshot of. One
that leaves is refused: what lies there would be read, and the tokenizer's files copied into checkpoints.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

from compress.errors import CompressError, InputError, RunError

MEND = "restore or download it again"
MOST_BYTES = 1 << 28  # of a file of text; a tokenizer of 262,144 words has 2**25
TEXT = (".json", ".jinja", ".model", ".txt")  # configuration and tokenizer
CODE = "auto_map"  # in configurations: classes of the folder's own, or of another repository's, which are never run
SNAPSHOTS, BLOBS = "snapshots", "blobs"  # of one repository in the hub's cache


def check_file(file: Path, folder: Path | None = None, error: type[CompressError] = InputError) -> Path:
    """`file` itself, which may be missing. Raises `error` if it is there and no ordinary file, or a link that leaves.

    `folder`: the model's, by default the one that `file` is in.
    """
    folder = file.parent if folder is None else folder
    try:
        real, home = file.resolve(), folder.resolve()
        there, ordinary = real.exists(), real.is_file()
    except (OSError, RuntimeError, ValueError) as reason:  # a name too long, links in a circle, a name with a zero byte
        raise error(f"cannot read {file} ({first_line(reason)}): {MEND}") from reason
    cache = [home.parents[1] / BLOBS] if home.parent.name == SNAPSHOTS and len(home.parents) > 1 else []
    if not any(real.is_relative_to(inside) for inside in (home, *cache)):
        raise error(f"{file} is a link out of its folder, which is not followed: put a copy of the file in its place")
    if there and not ordinary:
        raise error(f"{file} is no ordinary file: {MEND}")
    return file


def check_text_files(folder: Path) -> None:
    """Raise InputError unless all files of text in `folder` are ordinary ones of bearable length."""
    for file in sorted(folder.iterdir()):
        if file.suffix in TEXT and check_file(file).is_file():
            _check_length(file, InputError)


def check_folder(folder: Path) -> None:
    """Raise RunError unless all that lies in `folder`, a run's, is ordinary files and folders of its own."""
    for place, folders, files in os.walk(folder):  # which takes it that files come and go meanwhile
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in sorted([*links, *files]):
            check_file(Path(place, name), folder, RunError)


def read_text(file: Path, error: type[CompressError] = InputError) -> str:
    """A file of text that the user names. Raises `error` if it is far too long.

    OSError, as of what is no ordinary file, and UnicodeDecodeError are the caller's to explain.
    """
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "it is no ordinary file", str(file))  # a pipe would be waited for
    _check_length(file, error)
    return file.read_text(encoding="utf-8")


def read_object(file: Path, error: type[CompressError] = InputError) -> dict[str, Any]:
    """A JSON object from a file of a model's folder. Raises `error` if it is none, or no file of that folder."""
    check_file(file, error=error)
    try:
        found = json.loads(read_text(file, error))
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"cannot read {file} ({first_line(reason)}): {MEND}") from reason
    if not isinstance(found, dict):
        raise error(f"{file} is no JSON object: {MEND}")
    return found


def _check_length(file: Path, error: type[CompressError]) -> None:
    if (length := file.stat().st_size) > MOST_BYTES:
        raise error(f"{file} has {length} bytes, more than any such file: {MEND}")


def first_line(error: BaseException) -> str:
    """What an exception says, short enough for a line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
