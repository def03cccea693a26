"""Arithmetic, comparisons and conversions on registers; bits are in ptx_bits.py.

Floats are computed in float64 and rounded once, to nearest even: exact for one addition, product, quotient or root of
float32 and narrower. A fused multiply-add may differ in the last bit where its terms are more than 2**29 apart.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from compress.kernels.testing.ptx_block import BITS, DTYPES, Array, Block
from compress.kernels.testing.ptx_program import Instruction, Trap, UnsupportedPtx

SMALLEST_NORMAL = 2.0**-126  # of float32; .ftz makes less zero
FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f32x2", "f64")
HARMLESS = {"rn", "approx", "full", "ftz", "sync", "NaN"}  # modifiers of float instructions beside the type


def pairs(block: Block, operand: str, type_: str) -> Array:
    """float64 [threads, 1], or [threads, 2] of packed types, low half first."""
    bits = np.ascontiguousarray(block.read(operand, type_))
    single = type_.removesuffix("x2")
    if single == "bf16":
        parts = bits.view(np.uint16).reshape(len(bits), -1).astype(np.uint32) << 16
        return parts.view(np.float32).astype(np.float64)
    return bits.view(DTYPES[single]).reshape(len(bits), -1).astype(np.float64)


def rounded(values: Array, type_: str) -> Array:
    """The inverse of `pairs`: [threads] of the type's bits, rounded to nearest even."""
    single = type_.removesuffix("x2")
    with np.errstate(over="ignore", invalid="ignore"):
        if single == "bf16":
            bits = values.astype(np.float64).view(np.uint64)
            nearest = (bits + np.uint64((1 << 44) - 1) + (bits >> np.uint64(45) & np.uint64(1))) & ~np.uint64(
                (1 << 45) - 1
            )
            kept = np.where(np.isfinite(values), nearest, bits).view(np.float64).astype(np.float32)
            narrow = (kept.view(np.uint32) >> 16).astype(np.uint16)
        else:
            narrow = values.astype(DTYPES[single])
    narrow = np.ascontiguousarray(narrow)
    return narrow.view(BITS[narrow.dtype.itemsize * narrow.shape[1]])[:, 0]


def _flushed(values: Array) -> Array:
    return np.where(np.abs(values) < SMALLEST_NORMAL, 0.0 * values, values)


FLOAT_RULES: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": lambda a, b, c: a * b + c,
    "mad": lambda a, b, c: a * b + c,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.abs,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
}


def _float(block: Block, i: Instruction) -> None:
    strange = set(i.modifiers[:-1]) - HARMLESS
    if strange:
        raise UnsupportedPtx(f"{i.text}: {sorted(strange)}")
    values = [pairs(block, operand, i.type) for operand in i.operands[1:]]  # type: ignore[arg-type]
    rule = FLOAT_RULES.get(i.opcode)
    if i.opcode in ("min", "max"):
        nan = "NaN" in i.modifiers
        rule = {"min": np.minimum if nan else np.fmin, "max": np.maximum if nan else np.fmax}[i.opcode]
    if rule is None:
        raise UnsupportedPtx(i.text)
    if "ftz" in i.modifiers:
        values = [_flushed(v) for v in values]
    with np.errstate(all="ignore"):
        result = rule(*values)
    block.write(i.register(0), rounded(_flushed(result) if "ftz" in i.modifiers else result, i.type))


def _divided(a: Array, b: Array) -> Array:
    """Towards zero, as C has it."""
    quotient = np.abs(a) // np.abs(np.where(b == 0, 1, b))
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


INTEGER_RULES: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "div": _divided,
    "rem": lambda a, b: a - _divided(a, b) * b,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
}


def arithmetic(block: Block, i: Instruction) -> None:
    """add, sub, mul, mad, fma, div, min, max, logic and the like, of integers, floats and predicates."""
    if i.type in FLOATS:
        _float(block, i)
    elif i.opcode in ("mul", "mad"):
        _product(block, i)
    elif i.opcode in INTEGER_RULES and not {"sat", "cc"} & set(i.modifiers):
        values = [block.read(operand, i.type) for operand in i.operands[1:]]
        with np.errstate(all="ignore"):
            block.write(i.register(0), INTEGER_RULES[i.opcode](*values))
    else:
        raise UnsupportedPtx(i.text)


def _product(block: Block, i: Instruction) -> None:
    a, b = (block.read(o, i.type) for o in i.operands[1:3])
    dtype, half = a.dtype, i.modifiers[0]
    with np.errstate(over="ignore"):
        if half == "lo":
            result = a * b
        elif half in ("wide", "hi") and dtype.itemsize < 8:
            wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
            result = a.astype(wide) * b.astype(wide)
            if half == "hi":
                result = (result >> wide.type(8 * dtype.itemsize)).astype(dtype)
        else:
            raise UnsupportedPtx(i.text)
        if i.opcode == "mad":
            result = result + block.read(i.operands[3], f"{i.type[0]}{8 * result.itemsize}")
    block.write(i.register(0), result)


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    **{
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    },
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}


def compare(block: Block, i: Instruction) -> None:
    """setp, also combined with another predicate and with its own opposite."""
    name, *more = i.modifiers[:-1]
    if i.type in FLOATS:
        a, b = (pairs(block, o, i.type)[:, 0] for o in i.operands[1:3])  # type: ignore[arg-type]
    else:
        a, b = (block.read(o, i.type) for o in i.operands[1:3])
    either = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(len(a), bool)
    if name in ("nan", "num"):
        result = either if name == "nan" else ~either
    else:
        unordered = name.endswith("u") and name[:-1] in COMPARISONS
        result = COMPARISONS[name[:-1] if unordered else name](a, b)
        result = result | either if unordered else result & ~either
    combine = [m for m in more if m in ("and", "or", "xor")]
    target, *opposite = i.register(0).split("|")
    other = ~result
    if combine:
        with_, rule = block.read(i.operands[3], "pred"), INTEGER_RULES[combine[0]]
        result, other = rule(result, with_), rule(other, with_)
    block.write(target.strip(), result)
    if opposite:
        block.write(opposite[0].strip(), other)


def select(block: Block, i: Instruction) -> None:
    """selp: one of two values, by a predicate."""
    a, b = (block.read(o, i.type) for o in i.operands[1:3])
    block.write(i.register(0), np.where(block.read(i.operands[3], "pred"), a, b))


def move(block: Block, i: Instruction) -> None:
    """mov and cvta, also between one register and the parts of a vector."""
    if len(i.vector(0)) > 1:
        whole, parts = block.read(i.operands[1], i.type), i.vector(0)
        size = whole.itemsize // len(parts)
        split = np.ascontiguousarray(whole).view(BITS[size]).reshape(len(whole), -1)
        for place, part in enumerate(parts):
            block.write(part, split[:, place])
    elif len(i.vector(1)) > 1:
        size = DTYPES[i.type].itemsize // len(i.vector(1))
        joined = np.stack([block.read(part, f"b{8 * size}") for part in i.vector(1)], 1)
        block.write(i.register(0), joined.view(DTYPES[i.type])[:, 0])
    else:
        block.write(i.register(0), block.read(i.operands[1], i.type))


def convert(block: Block, i: Instruction) -> None:
    """cvt between integers and floats, also of two floats into a pair of halves."""
    to, from_ = i.modifiers[-2:]
    strange = set(i.modifiers[:-2]) - {"rn", "rni", "rzi", "rmi", "rpi", "ftz", "sat"}
    if strange:
        raise UnsupportedPtx(i.text)
    if to.endswith("x2") and len(i.operands) == 3:
        high, low = (pairs(block, o, from_) for o in i.operands[1:3])  # type: ignore[arg-type]
        block.write(i.register(0), rounded(np.concatenate([low, high], 1), to))
        return
    if from_ in FLOATS:
        values: Array = pairs(block, i.register(1), from_)
    else:
        values = block.read(i.operands[1], from_)[:, None]
    block.write(i.register(0), _converted(values, to, set(i.modifiers[:-2])))


def _converted(values: Array, to: str, how: set[str]) -> Array:
    """[threads, 1] of float64 or whole numbers to [threads] of type `to`."""
    rules: dict[str, Any] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    if values.dtype.kind == "f":
        for name in how & set(rules):
            values = rules[name](values)
    if to in FLOATS:
        if "sat" in how:
            values = np.clip(np.nan_to_num(values), 0, 1)
        return rounded(values.astype(np.float64), to)
    dtype = DTYPES[to]
    limits = np.iinfo(dtype)
    if values.dtype.kind == "f":  # they saturate, and what is not a number becomes 0
        inside = np.where(np.isnan(values), 0, values)
        if dtype.itemsize == 8:
            raise UnsupportedPtx(f"a conversion of floats to {to}")
        return np.clip(inside, float(limits.min), float(limits.max)).astype(np.int64).astype(dtype)[:, 0]
    if "sat" in how:
        values = np.array([min(max(int(v), limits.min), limits.max) for v in values[:, 0]], object)[:, None]
    return values.astype(dtype)[:, 0]


def branch_target(block: Block, i: Instruction) -> bool:
    """Whether a branch is taken; it has to be by all threads or by none."""
    if block.active.all():
        return True
    if block.active.any():
        raise Trap("a branch that only some of the threads take")
    return False


OPCODES = {
    **dict.fromkeys([*FLOAT_RULES, *INTEGER_RULES], arithmetic),
    "setp": compare,
    "selp": select,
    "mov": move,
    "cvta": move,
    "cvt": convert,
}
