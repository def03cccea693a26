"""The files that runtimes run: exported once, by the environment of each, and used again while the checkpoint is the same."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from compress import __version__
from compress.bench.peers.environments import environ_of
from compress.bench.runtimes.rows import Runtime
from compress.errors import InputError, RunError
from compress.files import write_json
from compress.progress import Reporter
from compress.run_dir import read_json

WEIGHTS = (".safetensors", ".gguf", ".onnx", ".data", ".xml", ".bin", ".pte")  # not tokenizers, settings and runs


def exported(runtime: Runtime, checkpoint: Path, python: Path, out: Path, reporter: Reporter) -> list[Path]:
    """What the runtime reads, the model first; of ours, the checkpoint.

    Raises InputError for what the runtime does not take, RunError for an export that cannot go on, both with its line.
    """
    if runtime.target is None:
        return [checkpoint]
    where = out / runtime.exported
    mark, model = where / "export.json", where / runtime.file
    asked = {"checkpoint": _fingerprint(checkpoint), "version": __version__, "python": str(python)}
    if mark.exists() and (kept := read_json(mark))["asked"] == asked:
        return [Path(file) for file in kept["files"]]
    reporter.say(f"exporting to {runtime.exported}")
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    command = [str(python), "-m", "compress", "export", str(checkpoint), "--to", runtime.target, "-o", str(model)]
    environ = environ_of(runtime.peer) | {"PYTHONSAFEPATH": "1"}  # nor what is in the folder it is started in
    done = subprocess.run(
        [*command, "--json", *(["--lossy"] if runtime.lossy else [])],
        env=environ,
        cwd=where,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise (InputError if done.returncode == InputError.exit_code else RunError)(_reason(done.stderr))
    files = list(json.loads(done.stdout)["files"])
    write_json(mark, {"asked": asked, "files": files})
    return [Path(file) for file in files]


def weight_bytes(files: list[Path]) -> int:
    """Of the model, in files and folders: corrections count, tokenizers beside it do not."""
    return sum(file.stat().st_size for each in files for file in _weights(each))


def _weights(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    within = [*path.iterdir(), *(path / "adapter").glob("*")]
    return [file for file in within if file.is_file() and file.suffix in WEIGHTS]


def _fingerprint(checkpoint: Path) -> dict[str, Any]:
    """What tells a checkpoint from the one that was there before."""
    facts = {file: file.stat() for file in [checkpoint / "config.json", *_weights(checkpoint)]}
    return {str(file): [stat.st_size, stat.st_mtime_ns] for file, stat in sorted(facts.items())}


def _reason(errors: str) -> str:
    """Why `compress export` stopped: its last line."""
    lines = errors.strip().splitlines() or ["it says nothing"]
    return lines[-1].removeprefix("error: ")
