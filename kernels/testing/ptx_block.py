"""One CTA: its registers, each an array with an element a thread, and how instructions read and write them."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.kernels.testing.ptx_memory import GlobalMemory
from compress.kernels.testing.ptx_program import Instruction, Operand, Program, Trap, UnsupportedPtx
from compress.kernels.testing.ptx_shared import SharedMemory

Array = npt.NDArray[Any]

DTYPES = {
    **{f"{kind}{8 * size}": np.dtype(f"u{size}") for kind in "ub" for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    "bf16": np.dtype("u2"),  # its bits
    "f16x2": np.dtype("u4"),
    "bf16x2": np.dtype("u4"),
    "f32x2": np.dtype("u8"),
    "pred": np.dtype(bool),
}
BITS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


class Block:
    """A CTA in lock step: every thread has run all instructions before the next one starts."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        shared_bytes: int,
        parameters: Mapping[str, int],
        place: Mapping[str, int],
    ):
        """`place`: special registers that all threads share, such as %ctaid.x."""
        self.program, self.memory, self.parameters = program, memory, parameters
        self.threads = np.arange(program.threads)
        self.trace: list[int] = []  # the instruction of each step so far
        self.shared = SharedMemory(shared_bytes, program, self.trace)
        self.active = self.everyone = np.ones(program.threads, bool)
        self._registers: dict[str, Array] = {}
        self._constants: dict[tuple[str, str], Array] = {}
        lanes = {"%tid.x": self.threads, "%laneid": self.threads % 32, "%warpid": self.threads // 32}
        uniform = {"%tid.y": 0, "%tid.z": 0, "%ntid.x": program.threads, "%ntid.y": 1, "%ntid.z": 1, **place}
        self._special = {**lanes, **{name: np.full(program.threads, value) for name, value in uniform.items()}}

    def guarded(self, instruction: Instruction) -> Array:
        """Which threads run an instruction; bool [threads]."""
        if instruction.guard is None:
            return self.everyone
        values = self.read(instruction.guard, "pred")
        values = ~values if instruction.negated else values
        return self.everyone if values.all() else values

    def read(self, operand: Operand, type_: str) -> Array:
        """The values of an operand, [threads] of the type's dtype (bfloat16 and pairs: their bits)."""
        if not isinstance(operand, str):
            raise UnsupportedPtx(f"a vector {operand} where one register is expected")
        if operand in self._registers:
            return self._seen(self._registers[operand], type_, operand)
        if operand in self.program.registers:
            return self._seen(self._undefined(operand), type_, operand)
        if operand in self._special:
            return self._special[operand].astype(DTYPES[type_])
        if (operand, type_) not in self._constants:
            constant = np.full(self.program.threads, _constant(operand, type_))
            constant.flags.writeable = False
            self._constants[operand, type_] = constant
        return self._constants[operand, type_]

    def write(self, operand: str, values: Array) -> None:
        """Give a register its values in the active threads; narrower ones are extended by zeros or their sign."""
        if operand == "_":
            return
        declared = self.program.registers.get(operand)
        if declared is None:
            raise UnsupportedPtx(f"{operand} is not declared")
        wide = DTYPES[declared]
        if values.dtype.itemsize > wide.itemsize:
            raise UnsupportedPtx(f"{values.dtype} into {operand}, which is {declared}")
        if wide.kind != "b":
            if values.dtype.kind == "f":
                values = values.view(BITS[values.dtype.itemsize])
            bits = BITS[wide.itemsize]
            values = values.view(bits) if values.dtype.itemsize == wide.itemsize else values.astype(bits)
        if self.active is not self.everyone:
            before = self._registers.get(operand)
            values = np.where(self.active, values, self._undefined(operand) if before is None else before)
        self._registers[operand] = values

    def address(self, operand: Operand) -> Array:
        """int64 [threads] of an address in brackets, `[register + offset]`."""
        found = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand) if isinstance(operand, str) else None
        if found is None:
            raise UnsupportedPtx(f"address {operand}")
        base, offset = found.groups()
        width = DTYPES[self.program.registers[base]] if base in self.program.registers else DTYPES["u64"]
        values = self.read(base, f"u{8 * width.itemsize}").astype(np.int64)
        return values + int(offset, 0) if offset else values

    def uniform(self, operand: Operand) -> int:
        """A number that is the same in all threads."""
        values = self.read(operand, "s32")
        if (values != values[0]).any():
            raise Trap(f"{operand} differs between threads")
        return int(values[0])

    def _seen(self, values: Array, type_: str, operand: str) -> Array:
        wanted = DTYPES[type_]
        if "b" in (values.dtype.kind, wanted.kind):
            if values.dtype != wanted:
                raise UnsupportedPtx(f"{operand} as {type_}")
            return values
        if values.dtype.itemsize < wanted.itemsize:
            raise UnsupportedPtx(f"{operand} is narrower than {type_}")
        if values.dtype.itemsize > wanted.itemsize:
            values = values.astype(BITS[wanted.itemsize])
        return values.view(wanted)

    def _undefined(self, operand: str) -> Array:
        """A register before its first write: not a number, in any float format."""
        dtype = DTYPES[self.program.registers[operand]]
        if dtype.kind == "b":
            raise Trap(f"predicate {operand} is read before it is written")
        return np.full(self.program.threads, np.iinfo(BITS[dtype.itemsize]).max, BITS[dtype.itemsize])


def _constant(text: str, type_: str) -> Any:
    """A literal, or the symbol of dynamic shared memory, which starts at 0."""
    if text == "global_smem":
        return DTYPES[type_].type(0)
    if type_ == "pred" and text in ("true", "false"):
        return np.bool_(text == "true")
    for prefix, size in (("0f", 4), ("0d", 8)):
        if text.lower().startswith(prefix):
            bits = np.array([int(text[2:], 16)], BITS[size])
            return bits.view(f"f{size}").astype(DTYPES[type_])[0] if type_ == "f64" else bits.view(DTYPES[type_])[0]
    if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        raise UnsupportedPtx(f"operand {text}")
    size = DTYPES[type_].itemsize
    bits = np.array([int(text.rstrip("U"), 0) & (1 << 8 * size) - 1], dtype=BITS[size])
    return bits.view(DTYPES[type_])[0]
