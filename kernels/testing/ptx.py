"""Run compiled kernels without a GPU: the PTX that a compiler has written, in numpy, one CTA after another in lock step.

    y = torch.zeros(m, n)
    report = launch(ptx, (n // 64, 1, 1), {"x": x, "w": w, "y": y, "M": m}, shared_bytes=16384, outputs={"y"})

`y` then holds what a GPU would have written, to the rounding of sums in matrix instructions, and the report says what
the accesses to each tensor cost. What a GPU would only sometimes forgive raises `Trap`: accesses outside of a tensor,
races in shared memory, two CTAs that store to the same place. What the emulator does not know raises `UnsupportedPtx`.
"""

import struct
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from compress.kernels.testing import ptx_access, ptx_arithmetic, ptx_bits, ptx_tensor_cores
from compress.kernels.testing.ptx_block import Block
from compress.kernels.testing.ptx_memory import SECTOR, GlobalMemory, Traffic
from compress.kernels.testing.ptx_program import Instruction, Program, Trap, UnsupportedPtx
from compress.kernels.testing.ptx_shared import Banks

OPCODES: dict[str, Callable[[Block, Instruction], None]] = {
    **ptx_arithmetic.OPCODES,
    **ptx_bits.OPCODES,
    **ptx_access.OPCODES,
    **ptx_tensor_cores.OPCODES,
}
SCRATCH = 2  # parameters that Triton adds behind a kernel's own: pointers it may leave null


@dataclass(frozen=True)
class Report:
    """What a launch has done."""

    instructions: Counter[str]  # how often each opcode ran, by all threads of a CTA at once
    traffic: dict[tuple[str, str], Traffic]  # of (tensor, opcode): ld, cp.async, st, red, atom
    banks: dict[str, Banks]  # of ld, st, cp.async, ldmatrix, stmatrix
    stored_bytes: dict[str, int]  # of each tensor

    def fetched_bits(self, tensor: str) -> int:
        """Bits that reads of a tensor have fetched, whole sectors, caches not counted."""
        sectors = (
            t.sectors for (name, kind), t in self.traffic.items() if name == tensor and kind in ("ld", "cp.async")
        )
        return 8 * SECTOR * sum(sectors)

    def efficiency(self, tensor: str) -> float:
        """The part of the bytes that reads of a tensor fetched which was wanted, at most 1."""
        reads = [t for (name, kind), t in self.traffic.items() if name == tensor and kind in ("ld", "cp.async")]
        return sum(t.wanted for t in reads) / (SECTOR * sum(t.sectors for t in reads)) if reads else 1.0

    def bank_conflicts(self) -> float:
        """Rounds of shared memory that were taken over those needed; 1 without conflicts."""
        ideal = sum(b.ideal for b in self.banks.values())
        return sum(b.taken for b in self.banks.values()) / ideal if ideal else 1.0


def launch(
    kernel: str | Program,
    grid: tuple[int, int, int],
    arguments: Mapping[str, Tensor | int | float],
    *,
    shared_bytes: int,
    outputs: Collection[str] | None = None,
    most_steps: int = 1_000_000,
) -> Report:
    """Run every CTA of a grid.

    `arguments`: in the order of the kernel's parameters; CPU tensors for pointers, strided ones as they lie. Those named
    in `outputs` may be written, and are; None: any. `shared_bytes`: of dynamic shared memory. Raises Trap, also after
    `most_steps` instructions of one CTA, and UnsupportedPtx.
    """
    program = kernel if isinstance(kernel, Program) else Program.parse(kernel)
    memory = GlobalMemory()
    parameters = _parameters(program, arguments, memory, outputs)
    counts: Counter[str] = Counter()
    banks: dict[str, Banks] = {}
    sizes = dict(zip(("%nctaid.x", "%nctaid.y", "%nctaid.z"), grid, strict=True))
    for number in range(grid[0] * grid[1] * grid[2]):
        x, rest = number % grid[0], number // grid[0]
        place = {"%ctaid.x": x, "%ctaid.y": rest % grid[1], "%ctaid.z": rest // grid[1], **sizes}
        memory.block = number
        block = Block(program, memory, shared_bytes, parameters, place)
        block.shared.banks = banks
        _run(block, most_steps)
        counts.update(program.instructions[at].opcode for at in block.trace)
    memory.copy_back()
    return Report(counts, memory.traffic, banks, {region.name: region.end - region.start for region in memory.regions})


def _parameters(
    program: Program,
    arguments: Mapping[str, Tensor | int | float],
    memory: GlobalMemory,
    outputs: Collection[str] | None,
) -> dict[str, int]:
    """The bits of each parameter; tensors are copied into `memory`."""
    extra = len(program.parameters) - len(arguments)
    if not 0 <= extra <= SCRATCH:
        raise ValueError(
            f"{program.name} has {len(program.parameters)} parameters, {len(arguments)} arguments are given"
        )
    bits = []
    for (_, type_), (name, value) in zip(program.parameters, arguments.items(), strict=False):
        if isinstance(value, Tensor):
            if type_ not in ("u64", "b64"):
                raise ValueError(f"{name} is a tensor, and its parameter no pointer but {type_}")
            bits.append(memory.add(name, value, outputs is None or name in outputs))
        elif type_ == "f32":
            bits.append(struct.unpack("<I", struct.pack("<f", value))[0])
        else:
            bits.append(int(value))
    return {name: value for (name, _), value in zip(program.parameters, bits + [0] * extra, strict=True)}


def _run(block: Block, most_steps: int) -> None:
    at, instructions = 0, block.program.instructions
    while True:
        if len(block.trace) >= most_steps:
            raise Trap(f"still running after {most_steps} instructions")
        instruction = instructions[at]
        block.trace.append(at)
        at += 1
        try:
            block.active = block.guarded(instruction)
            if instruction.opcode in ("ret", "exit"):
                if ptx_arithmetic.branch_target(block, instruction):
                    return
            elif instruction.opcode == "bra":
                if ptx_arithmetic.branch_target(block, instruction):
                    at = block.program.labels[instruction.register(0)]
            elif instruction.opcode in OPCODES:
                OPCODES[instruction.opcode](block, instruction)
            else:
                raise UnsupportedPtx("unknown opcode")
        except (Trap, UnsupportedPtx) as error:
            raise type(error)(f"{error}\n  in `{instruction.text}`, step {len(block.trace)}") from None
