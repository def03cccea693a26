"""Servers of others: vLLM and llama.cpp, run in the place of this program with a checkpoint of ours."""

import importlib.util
import ipaddress
import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

from compress.checkpoint.dense_view import quantization_settings, read_config
from compress.checkpoint.native import QUANT_METHOD
from compress.errors import InputError

ENGINES = ("transformers", "vllm", "llama.cpp")
PLUGIN = "compress-vllm"  # kernels/vllm: what makes vLLM read the native layout
NEEDS = ("fastapi", "uvicorn", "openai")  # of transformers' server: the extra `serve`


def check_serve_extra() -> None:
    """Raise InputError unless what transformers' server needs is installed."""
    if lacking := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise InputError(f"serving needs {', '.join(lacking)}: pip install 'compress-llm[serve]'")


def check_listening(host: str, api_key: str | None) -> None:
    """Raise InputError for an address that others reach without a key."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not api_key:
        raise InputError(f"--host {host} lets other machines in: give --api-key too, or leave --host out")


def command(
    engine: str, path: Path, host: str, port: int, max_model_len: int | None = None, name: str | None = None
) -> list[str]:
    """The command line of another engine, which clients are to call `name`. Raises InputError if it cannot read `path`."""
    if engine == "vllm" and not path.is_dir():
        raise InputError(f"vllm serves a folder, which {path} is not: use --engine llama.cpp for a GGUF file")
    if engine == "llama.cpp" and path.suffix != ".gguf":
        raise InputError(f"llama.cpp serves a GGUF file, which {path} is not: use --engine transformers")
    program, called, length = {
        "vllm": (["vllm", "serve", str(path)], "--served-model-name", "--max-model-len"),
        "llama.cpp": (["llama-server", "-m", str(path)], "--alias", "--ctx-size"),
    }[engine]
    limit = [] if max_model_len is None else [length, str(max_model_len)]
    return [
        *program,
        "--host",
        host,
        "--port",
        str(port),
        called,
        name or path.resolve().name.removesuffix(".gguf"),
        *limit,
    ]


def needs_plugin(path: Path) -> bool:
    """Whether vLLM reads a checkpoint only with compress-vllm. Raises InputError where its config.json is not read."""
    return quantization_settings(read_config(path)).get("quant_method") == QUANT_METHOD


def become(arguments: list[str], api_key: str | None, binary: str | None = None, plugin: bool = False) -> NoReturn:
    """Go on as another program, or `binary` in its place, the key in its environment.

    Raises InputError if it is not there, or if it has to have compress-vllm and has not.
    """
    program = shutil.which(binary or arguments[0])
    if program is None:
        raise InputError(
            f"{binary or arguments[0]} is not installed: install it, name the program with --engine-binary, or use "
            "--engine transformers"
        )
    if plugin and not has_plugin(Path(program)):
        raise InputError(
            f"{program} does not know compress's own layout: in its environment, pip install --no-deps compress-llm, then "
            "pip install compress-vllm; or write the checkpoint with --format compressed-tensors"
        )
    if api_key is not None:
        os.environ["VLLM_API_KEY"] = os.environ["LLAMA_API_KEY"] = api_key
    os.execv(program, [program, *arguments[1:]])


def has_plugin(program: Path) -> bool:
    """Whether compress-vllm is installed where a script such as bin/vllm is."""
    python = program.parent / "python"
    if not python.exists():
        return False
    asked = f"import importlib.metadata as m; m.distribution({PLUGIN!r})"
    return subprocess.run([str(python), "-c", asked], capture_output=True, check=False).returncode == 0
