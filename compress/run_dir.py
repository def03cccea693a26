"""A run on disk: enough to go on after a kill, to repeat it, and to report on it.

    recipe.toml          what was asked, every default written out
    run.json             versions and a fingerprint of the model's files
    tokens.safetensors   the calibration tokens
    measured.safetensors, plan.json   what an allocation measured; the plan it gave each layer
    log.jsonl            the journal, one line per layer and step, then one per block
    gradients/0000-0017_grad_sq/0007.safetensors   gradients of a block's weights, from one pass over blocks 0 to 17
    teacher/             the dense model's last hidden states on the text that recovery learns from
    blocks/0007.safetensors, 0007.json   a finished block; its checksum and figures, written after it
    blocks/0007-1.safetensors, 0007-1.json   the same after the first method of recovery that trains
                                             (a sweep's shared folder has blocks/ of runs that only train differently)
    result.json          the figures of the finished run

A block counts as finished when its checksum file is there and holds. The block files are removed once the checkpoint
made of them is on disk.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from compress.calib.model_files import check_folder, read_text
from compress.calib.ranks import ALONE, Ranks
from compress.calib.weight_files import read_all
from compress.errors import InputError, RunError
from compress.files import disk_errors, replace_file, sha256, write_json, write_tensors, write_text
from compress.recipe import Recipe, read_recipe
from compress.run_lines import check_line

MEND = "take another --out, or remove it to start over"
OF_THE_DENSE_MODEL = ("tokens", "gradients", "teacher")  # what runs of one model on the same text have in common


@dataclass(frozen=True)
class Shared:
    """Where runs of one sweep keep what they have in common."""

    folder: Path
    blocks: str | None = None  # name of the blocks that this run has in common with others before anything trains


class RunDir:
    """One run's folder, locked against a second process while it is open.

    `shared`: a folder in which runs keep what they have in common, under a name made of the model, its dtype, the
    calibration and the bits of its head; held while the run is open as well. Of several `ranks` the first claims the
    folder, before the others open it, and keeps the journal. Raises RunError if another process holds either folder,
    InputError if it belongs to another recipe or model.
    """

    def __init__(
        self,
        path: Path,
        recipe: Recipe,
        fingerprint: dict[str, Any],
        shared: Shared | None = None,
        ranks: Ranks = ALONE,
    ):
        self.path, self.ranks = path, ranks
        self.blocks = path / "blocks"
        self._shared = None if shared is None else shared.folder / _common_name(recipe, fingerprint)
        named = None if shared is None else shared.blocks
        self._common_blocks = None if self._shared is None or named is None else self._shared / "blocks" / named
        with contextlib.ExitStack() as stack, ranks.first_goes_first():
            if ranks.first:
                stack.enter_context(held(path))
                check_folder(path)
                if self._shared is not None:
                    stack.enter_context(held(self._shared))
                with disk_errors(path):
                    self.blocks.mkdir(exist_ok=True)
                self._claim(recipe, fingerprint)
            self._locks = stack.pop_all()
        self.journal = Journal(path / "log.jsonl", silent=not ranks.first)

    def _claim(self, recipe: Recipe, fingerprint: dict[str, Any]) -> None:
        check_claim(self.path, recipe, fingerprint["model"])
        file = self.path / "recipe.toml"
        if not file.exists():
            if any(self.blocks.iterdir()):
                raise InputError(f"{self.path} holds blocks of a run whose recipe.toml is gone: {MEND}")
            write_text(file, recipe.toml())
        write_json(self.path / "run.json", fingerprint)

    def close(self) -> None:
        """Let others have the folder."""
        self._locks.close()

    def folder_of(self, key: str) -> Path:
        """Where what `key` names is kept: what runs have in common in the shared folder, if there is one.

        That is the calibration tokens, and gradients and last hidden states of the dense model. All else is in the run's own, such as gradients
        taken anew after blocks were pruned.
        """
        return self.path if self._shared is None or key not in OF_THE_DENSE_MODEL else self._shared

    def once(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors made by `make` the first time, and read back ever after; `folder_of` says where they lie."""
        file = self.folder_of(key) / f"{key}.safetensors"
        if not file.exists():
            write_tensors(file, make())
        try:
            return read_all(file)[0]
        except (SafetensorError, OSError) as error:
            raise RunError(f"{file} is damaged ({error}): remove it, and the same command makes it again") from error

    def _block(self, key: str) -> tuple[Path, Path]:
        return self.blocks / f"{key}.safetensors", self.blocks / f"{key}.json"

    def has(self, key: str) -> bool:
        """Whether a block is finished and whole. A damaged one is reported in the journal and counts as missing."""
        data, mark = self._block(key)
        try:
            said = json.loads(mark.read_text())
            wanted, _ = said["sha256"], said["figures"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False
        if data.is_file() and sha256(data) == wanted:
            return True
        self.journal.write(event="damaged", file=data.name, note="checksum does not match; this block is done again")
        mark.unlink()
        return False

    def save(self, key: str, tensors: dict[str, Tensor], manifest: dict[str, Any], figures: dict[str, Any]) -> None:
        """Put a finished block on disk; it counts once the file with its checksum and figures is renamed into place."""
        data, mark = self._block(key)
        write_tensors(data, tensors, {"manifest": json.dumps(manifest)})
        write_json(mark, {"sha256": sha256(data), "figures": figures})

    def restore(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the manifest that `save` was given."""
        file = self._block(key)[0]
        try:
            tensors, metadata = read_all(file)
            return tensors, json.loads(metadata["manifest"])
        except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
            raise RunError(f"{file} is damaged ({error}): remove it, and the same command makes it again") from error

    def figures(self, key: str) -> dict[str, Any]:
        """The figures that `save` was given."""
        return json.loads(self._block(key)[1].read_text())["figures"]

    def borrow_blocks(self) -> None:
        """Take over what blocks another run has lent to those that share them."""
        if self._common_blocks is not None:
            _link_files(self._common_blocks, self.blocks)

    def lend_blocks(self) -> None:
        """Let others have the finished blocks as they are before anything trains."""
        if self._common_blocks is not None:
            _link_files(self.blocks, self._common_blocks)

    def drop_blocks(self) -> None:
        """Remove the block files and this run's own gradients and teacher, after the checkpoint made of them is on disk."""
        for file in self.blocks.iterdir():
            if file.is_file():
                file.unlink()
        for folder in ("gradients", "teacher"):
            shutil.rmtree(self.path / folder, ignore_errors=True)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Make a folder and keep other processes from it meanwhile. Raises RunError if one has it already."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / "lock")
    try:
        with disk_errors(path):
            lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"{path} is in use by another process: wait for it, or take another --out") from error
    try:
        yield
    finally:
        lock.release()


def check_claim(path: Path, recipe: Recipe, model: dict[str, Any]) -> None:
    """Raise InputError if the run in `path`, should there be one, has another recipe or weights.

    `model`: the fingerprint of the model's files.
    """
    file, about = path / "recipe.toml", path / "run.json"
    if file.exists():
        try:
            before = read_recipe(file, {})
        except InputError as error:
            raise InputError(f"{file} is damaged ({error}): remove {path} to start over") from error
        if changed := recipe.differences(before):
            raise InputError(f"{path} holds a run with another {', '.join(changed)}: {MEND}")
    if about.exists() and read_json(about).get("model") != model:
        raise InputError(f"{path} holds a run of other weights under the same name {recipe.model}: {MEND}")


def _common_name(recipe: Recipe, fingerprint: dict[str, Any]) -> str:
    """What the tokens, and gradients of the dense model, depend on, as the name of a folder."""
    target = recipe.target
    rounded = None if target.head_bits == 16 else (target.head_bits, target.group_size)  # the blocks see that head
    calib = recipe.calib.model_dump(exclude={"refresh_gradients"})
    facts = [fingerprint["model"], recipe.model, recipe.revision, recipe.dtype, calib, rounded]
    return digest(facts)


def digest(facts: Any) -> str:
    """A name of 16 letters and digits for what JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _link_files(source: Path, target: Path) -> None:
    """Give `target` the blocks before any training that it lacks, without room of their own where the file system can."""
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        for file in source.glob("*.*"):
            own = target / file.name
            if own.exists() or "-" in file.stem:
                continue
            try:
                own.hardlink_to(file)
            except OSError:  # a file system without links
                replace_file(own, partial(shutil.copyfile, file))


class Finished:
    """result.json: the figures of a finished run."""

    def __init__(self, path: Path):
        self.file = path / "result.json"

    def read(self) -> dict[str, Any] | None:
        """The figures, or None while the run is not finished."""
        return read_json(self.file) if self.file.exists() else None

    def update(self, result: dict[str, Any]) -> None:
        """Put figures on disk."""
        write_json(self.file, result)


class Journal:
    """log.jsonl: one JSON object a line, flushed at once. A line cut short by a kill is removed on opening.

    `silent`: another rank writes, and this one leaves the file alone.
    """

    def __init__(self, path: Path, silent: bool = False):
        self.path, self.silent = path, silent
        if path.exists() and not silent:
            with disk_errors(path):
                text = path.read_bytes()
                if text and not text.endswith(b"\n"):
                    os.truncate(path, text.rfind(b"\n") + 1)  # in place: a kill while all is written anew would lose it
        self._opened_at = path.stat().st_size if path.exists() else 0

    def write(self, **values: Any) -> None:
        """Append one line; seconds since the epoch are added."""
        if self.silent:
            return
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return self._lines(0)

    def this_sitting(self) -> list[dict[str, Any]]:
        """The lines since this process opened the run."""
        return self._lines(self._opened_at)

    def _lines(self, start: int) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [_journal_line(line) for line in self.path.read_bytes()[start:].splitlines()]


def _journal_line(line: bytes) -> dict[str, Any]:
    """One line; of a damaged one only that it is, since figures are not worth a finished run."""
    with contextlib.suppress(ValueError, RecursionError):
        values: dict[str, Any] = json.loads(line)
        check_line(values)
        return values
    return {"event": "damaged", "file": "log.jsonl", "note": "a line of the journal is damaged and left out"}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises RunError if it is none."""
    try:
        values = json.loads(read_text(file, RunError))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} is damaged ({error}): remove it and run the same command again") from error
    if not isinstance(values, dict):
        raise RunError(f"{file} is damaged (no JSON object): remove it and run the same command again")
    return values
