"""Cases of Triton kernels to compile ahead of time and to check without a GPU: plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KernelConfig:
    """A kernel, what it is compiled for, and what its code is expected to have."""

    name: str
    function: Any  # what @triton.jit returns
    signature: Mapping[str, str]  # type of each argument that is passed: "*fp16", "i32"
    constexprs: Mapping[str, Any]  # the rest; None for a tensor that is not there
    num_warps: int
    num_stages: int
    weights_per_loop: int  # weights that one program decodes in one turn of its main loop; 0: it has no such loop
    mma: str | None = None  # instruction of the main loop in the code for sm_80
    max_registers: int | None = None  # of a thread, for the assembler; None: it decides
    nvidia_only: bool = False  # not launched on AMD's GPUs
    aligned: tuple[str, ...] = field(default=())  # arguments that are multiples of 16, beside all pointers

    def divisible_by_16(self) -> tuple[str, ...]:
        """Arguments that the compiler may take for multiples of 16."""
        return tuple(name for name, kind in self.signature.items() if kind.startswith("*") or name in self.aligned)


SIZES = dict.fromkeys(("M", "N", "K", "stride_xm", "rank", "blocks_per_split"), "i32")  # of every product
