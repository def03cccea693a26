"""What the machine code of a kernel says about it: resources, the instructions of its main loop, and what they may be.

A kernel that waits for memory stays that fast only while its instructions fit between the loads: with B bytes a second
from memory and b bits a weight, a GPU of S multiprocessors at f Hz has S * 128 * f * b / (8 B) instructions a weight.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from compress.kernels.testing.aot import Compiled
from compress.kernels.testing.ptx_program import Program

LANES = 128  # instructions that one multiprocessor issues a cycle, a thread each
INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)")
CONVERSIONS = ("I2F", "I2FP", "I2HP", "F2F")  # of integers to floats, by slow units or more instructions than need be
MATRIX = r"\w*MMA\b"  # HMMA, IMMA, HGMMA, UTCHMMA
PTX_MATRIX = ("mma", "wgmma", "tcgen05")


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it."""

    name: str
    multiprocessors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes a second
    shared_bytes: int  # that one CTA may have

    def budget(self, bits: float) -> float:
        """Instructions of a thread that fit into the time in which a weight of `bits` bits arrives."""
        return self.multiprocessors * LANES * self.clock * bits / 8 / self.bandwidth


GPUS = {
    80: Gpu("A100 80 GB", 108, 1.41e9, 2.039e12, 163 * 1024),
    86: Gpu("RTX 3090", 82, 1.695e9, 0.936e12, 99 * 1024),
    89: Gpu("RTX 4090", 128, 2.52e9, 1.008e12, 99 * 1024),
    90: Gpu("H100 SXM", 132, 1.83e9, 3.35e12, 227 * 1024),
    100: Gpu("B200", 148, 1.85e9, 8.0e12, 227 * 1024),
    120: Gpu("RTX 5090", 170, 2.407e9, 1.792e12, 99 * 1024),
}


@dataclass(frozen=True)
class Code:
    """Counts of a compiled kernel."""

    registers: int  # of a thread
    spills: int  # loads and stores of local memory, and its bytes
    shared_bytes: int
    total: Counter[str]  # instructions by name with modifiers, such as "LDG.E.128"
    loop: Counter[str]  # those of the main loop
    unrolled: int  # turns of the kernel's own loop in one of the machine code's
    threads: int

    @property
    def matrix(self) -> str:
        """Matrix instructions of the main loop, by name."""
        return "/".join(sorted(name for name in self.loop if re.match(MATRIX, name)))

    @property
    def conversions(self) -> int:
        """Conversions of integers to floats in the main loop."""
        return sum(n for name, n in self.loop.items() if name.split(".")[0] in CONVERSIONS)

    def wide_loads(self) -> bool:
        """Whether global memory is read 16 bytes a thread, or in bulk, anywhere."""
        names = [name for name in self.total if name.startswith(("LDG.", "LDGSTS."))]
        return any(".128" in name for name in names) or any(n.startswith(("UTMALDG", "UBLKCP")) for n in self.total)

    def per_weight(self, weights: int) -> float:
        """Instructions of a thread for each weight, with `weights` in one turn of the kernel's loop, by the CTA."""
        return sum(self.loop.values()) * self.threads / (weights * self.unrolled)


def read_code(compiled: Compiled) -> Code:
    """Count the instructions of a kernel for an NVIDIA GPU."""
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", compiled.usage)
    if usage is None:
        raise ValueError(f"{compiled.name}: no resources in what cuobjdump says")
    lines = compiled.sass.splitlines()
    total, loop = _counted(lines), _counted(_main_loop(lines))
    spilled = sum(n for name, n in total.items() if name.split(".")[0] in ("STL", "LDL"))
    return Code(
        registers=int(usage[1]),
        spills=spilled + int(usage[2]) + int(usage[3]),
        shared_bytes=compiled.shared_bytes,
        total=total,
        loop=loop,
        unrolled=_unrolled(compiled.text, loop),
        threads=32 * compiled.num_warps,
    )


def _counted(lines: Sequence[str]) -> Counter[str]:
    matches = (INSTRUCTION.match(line) for line in lines if not line.lstrip().startswith((".", "//")))
    return Counter(match[1] for match in matches if match)


def _main_loop(lines: Sequence[str]) -> Sequence[str]:
    """The longest stretch that a branch back repeats, one with matrix instructions if there is any; else everything."""
    labels = {match[1]: at for at, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\w+):", line))}
    loops = []
    for at, line in enumerate(lines):
        branch = re.search(r"\bBRA\S*\s.*?`\((\.L_x_\w+)\)", line)
        if branch and labels.get(branch[1], at) < at:
            body = lines[labels[branch[1]] : at + 1]
            loops.append((any(re.search(MATRIX, each) for each in body), len(body), body))
    return max(loops, key=lambda each: each[:2])[2] if loops else lines


def _unrolled(ptx: str, loop: Counter[str]) -> int:
    """How many turns of the PTX's loop the machine code's has, by their matrix instructions; 1 if there are none."""
    program = Program.parse(ptx)
    bodies = [
        program.instructions[program.labels[i.register(0)] : at]
        for at, i in enumerate(program.instructions)
        if i.opcode == "bra" and program.labels[i.register(0)] < at
    ]
    counts = [sum(i.opcode in PTX_MATRIX and "commit" not in i.text for i in body) for body in bodies]
    ours = max(counts, default=0)
    theirs = sum(n for name, n in loop.items() if re.match(MATRIX, name))
    return max(1, theirs // ours) if ours else 1
