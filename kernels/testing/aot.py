"""Kernels compiled ahead of time, for GPUs that are not there.

Triton needs a GPU only to run what it compiles: given a target, it brings the assemblers and disassemblers with it.
"""

import hashlib
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from compress.errors import InputError
from compress.kernels.gemm.configs import KernelConfig
from compress.kernels.gemm.launch import Launch, on_amd

BUILD = Path(".build") / "kernels"  # compiled code is kept here, under the current folder
DIVISIBLE = [["tt.divisibility", 16]]
WAVE32 = ("gfx10", "gfx11", "gfx12")  # AMD architectures with 32 threads in a wave; others have 64


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture."""

    name: str
    arch: int | str  # compute capability times ten, or "gfx942" and the like
    text: str  # PTX, or AMD's assembly
    binary: bytes  # cubin or hsaco
    shared_bytes: int  # dynamic shared memory of a CTA
    num_warps: int
    usage: str = ""  # what cuobjdump says of registers; empty for AMD
    sass: str = ""  # disassembled; empty for AMD


@contextmanager
def build_folder(folder: Path = BUILD) -> Iterator[Path]:
    """Keep what Triton compiles in `folder`, without the paths of source files in it."""
    try:
        from triton import knobs
    except ImportError:
        raise InputError("Triton is not installed: install the extra `gpu`") from None
    folder.mkdir(parents=True, exist_ok=True)
    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(folder.resolve())
        knobs.compilation.disable_line_info = True
        yield folder


def compile_kernel(config: KernelConfig, arch: int | str) -> Compiled:
    """Compile a Triton or Gluon kernel for compute capability `arch` / 10, or for an AMD architecture.

    Fused multiply-add is on, as in a launch. Raises what Triton raises where the kernel cannot be compiled.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = config.function.arg_names
    signature = {name: config.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): config.constexprs[name] for name in names if signature[name] == "constexpr"}
    aligned = {(names.index(name),): DIVISIBLE for name in config.divisible_by_16()}
    source = (GluonASTSource if config.function.is_gluon() else ASTSource)(
        config.function, signature, constants, aligned
    )
    launch = Launch(config.constexprs.get("BLOCK_M", 0), 0, config.num_warps, config.num_stages)
    if isinstance(arch, int):
        target = GPUTarget("cuda", arch, 32)
    else:
        target = GPUTarget("hip", arch, 32 if arch.startswith(WAVE32) else 64)
        launch = on_amd(launch, target.warp_size)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    if config.max_registers is not None and isinstance(arch, int):
        options["maxnreg"] = config.max_registers
    kernel = triton.compile(source, target=target, options=options)
    facts = config.name, arch
    if isinstance(arch, str):
        return Compiled(*facts, kernel.asm["amdgcn"], kernel.asm["hsaco"], kernel.metadata.shared, launch.num_warps)
    cubin = kernel.asm["cubin"]
    read = disassembled(cubin)
    return Compiled(*facts, kernel.asm["ptx"], cubin, kernel.metadata.shared, launch.num_warps, *read)


def disassembled(cubin: bytes) -> tuple[str, str]:
    """What cuobjdump says of a cubin's resources, and its instructions by nvdisasm; kept beside Triton's own cache."""
    from triton import knobs

    kept = Path(knobs.cache.dir) / "sass" / hashlib.sha256(cubin).hexdigest()
    if kept.exists():
        usage, _, sass = kept.read_text().partition("\n====\n")
        return usage, sass
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", str(file))
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", str(file))
        kept.parent.mkdir(exist_ok=True)
        written = Path(folder) / "kernel.txt"
        written.write_text(f"{usage}\n====\n{sass}")
        kept.write_bytes(written.read_bytes())
    return usage, sass


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def amd_resources(compiled: Compiled) -> dict[str, int]:
    """Vector registers of a thread and how many of them spill, from AMD's assembly."""
    keys = {"registers": "vgpr_count", "spills": "vgpr_spill_count"}
    found = {name: re.search(rf"\.{key}:\s+(\d+)", compiled.text) for name, key in keys.items()}
    return {name: int(match[1]) for name, match in found.items() if match}
