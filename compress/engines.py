"""Servers of others: the command lines of vLLM and llama.cpp for a checkpoint of ours."""

import importlib.util
import ipaddress
import os
import shutil
from pathlib import Path
from typing import NoReturn

from compress.checkpoint.dense_view import quantization_settings, read_config
from compress.checkpoint.native import QUANT_METHOD
from compress.errors import InputError

ENGINES = ("transformers", "vllm", "llama.cpp")
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


def command(engine: str, path: Path, host: str, port: int, max_model_len: int | None) -> list[str]:
    """The command line of another engine. Raises InputError if it cannot read `path`."""
    length = [] if max_model_len is None else [str(max_model_len)]
    if engine == "vllm":
        if not path.is_dir():
            raise InputError(f"vllm serves a folder, which {path} is not: use --engine llama.cpp for a GGUF file")
        if quantization_settings(read_config(path)).get("quant_method") == QUANT_METHOD:
            raise InputError(
                f"{path} is in compress's own layout, which vllm does not read: use --engine transformers, or write it "
                "with --format compressed-tensors"
            )
        listening = ["--host", host, "--port", str(port)]
        return ["vllm", "serve", str(path), *listening, *(["--max-model-len", *length] if length else [])]
    if path.suffix != ".gguf":
        raise InputError(f"llama.cpp serves a GGUF file, which {path} is not: use --engine transformers")
    listening = ["--host", host, "--port", str(port)]
    return ["llama-server", "-m", str(path), *listening, *(["-c", *length] if length else [])]


def become(arguments: list[str], api_key: str | None) -> NoReturn:
    """Go on as another program, the key in its environment. Raises InputError if it is not installed."""
    program = shutil.which(arguments[0])
    if program is None:
        raise InputError(f"{arguments[0]} is not installed: install it, or use --engine transformers")
    if api_key is not None:
        os.environ["VLLM_API_KEY"] = os.environ["LLAMA_API_KEY"] = api_key
    os.execv(program, arguments)
