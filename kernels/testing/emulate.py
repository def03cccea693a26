"""Launch Triton kernels on CPU tensors: what they are compiled to for a GPU runs in the emulator of ptx.py.

    with emulated(80) as launches:
        y = matmul(x, weight)          # whatever launches kernels, on CPU tensors
    launches[0].report.efficiency("low_ptr")

Triton asks its driver for the target and for a launcher; this is such a driver. Unlike TRITON_INTERPRET it covers
bfloat16, inline assembly and Gluon, and it runs what the compiler made of the kernel, not its source.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.kernels.gemm.launch import EMULATED
from compress.kernels.testing.ptx import Report, launch

ENVIRONMENT = {EMULATED: "1", "TRITON_DEFAULT_FP_FUSION": "1"}  # the latter as launches on a GPU have it
LARGEST_SHARED = 227 * 1024  # what launches are refused beyond; each architecture has its gate


@dataclass(frozen=True)
class Launched:
    """One launch of a kernel."""

    kernel: str
    grid: tuple[int, int, int]
    ptx: str
    report: Report


@contextmanager
def emulated(arch: int) -> Iterator[list[Launched]]:
    """Inside, Triton compiles for compute capability `arch` / 10 and launches in the emulator; yields what was launched."""
    from triton.runtime import driver

    launches: list[Launched] = []
    before, variables = driver._active, {name: os.environ.get(name) for name in ENVIRONMENT}
    driver.set_active(_Driver(arch, launches))
    os.environ.update(ENVIRONMENT)
    try:
        yield launches
    finally:
        driver._active = before
        for name, value in variables.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Driver:
    """What Triton's JITFunction asks a driver for."""

    def __init__(self, arch: int, launches: list[Launched]):
        self.arch, self.launches = arch, launches
        self.utils = self
        self.launcher_cls = _Launcher

    def get_current_device(self) -> str:
        return f"emulated sm_{self.arch}"  # the key of Triton's caches

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": LARGEST_SHARED}

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024  # module, function, registers, spills, most threads of a CTA


class _Launcher:
    """Runs one compiled kernel."""

    def __init__(self, source: Any, metadata: Any):
        from triton.runtime.cache import get_cache_manager

        self.signature, self.metadata = source.signature, metadata
        files = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json")
        if files is None or f"{metadata.name}.ptx" not in files:
            raise RuntimeError(f"{metadata.name}: its PTX is not in Triton's cache")
        self.ptx = Path(files[f"{metadata.name}.ptx"]).read_text()

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        from triton.runtime import driver

        values = rest[6:]  # stream, function, packed metadata, launch metadata and two hooks stand before
        named = zip(self.signature.items(), values, strict=True)
        arguments = {name: value for (name, type_), value in named if type_ != "constexpr"}
        report = launch(self.ptx, (x, y, z), arguments, shared_bytes=self.metadata.shared)
        driver.active.launches.append(Launched(self.metadata.name, (x, y, z), self.ptx, report))
