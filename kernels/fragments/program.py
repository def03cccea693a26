"""The inner loop's body as PTX: codes to floats, products on tensor cores, scales on their float32 sums.

Fields are put into the mantissa of a number whose unit is 1, 1024 in float16 and 128 in bfloat16; the same number with
the zero point in the field is subtracted, which is exact. An output whose fields start at bit o of the mantissa gets
2**o times its sum, and a scale divided by that. Sums start anew in each group of inputs, so what is rounded is float32.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from compress.kernels.fragments.layout import ROWS, block_inputs, field_bits

HALVES = 2  # of the 16-bit pair in a register
TILES = 2  # of 16 outputs, in one warp
MOST_COLUMNS = 4
BOTH = 0x10001  # times a 16-bit number: the pair of it
WIDE = 0x4B000000  # 2**23 in float32, whose unit is 1


@dataclass(frozen=True)
class Program:
    """A block of inputs times a tile of outputs, for `columns` times 8 tokens."""

    bits: int
    group: int  # inputs; a block or more: one for the whole block
    columns: int
    sparse: bool
    symmetric: bool
    bfloat16: bool
    bfloat16_scale: bool

    @property
    def block(self) -> int:
        """Inputs: half a block of the layout where a whole one's would not fit the registers."""
        whole = block_inputs(self.bits, self.sparse)
        return min(whole, 64) if self.columns == MOST_COLUMNS and not self.sparse else whole

    @property
    def steps(self) -> int:
        """Instructions `mma` for 16 outputs and 8 tokens."""
        return self.block // (32 if self.sparse else 16)

    @property
    def words(self) -> int:
        """Registers of codes that a lane loads."""
        return self.steps * self.field // 2

    @property
    def field(self) -> int:
        """Bits of a code in them."""
        return field_bits(self.bits)

    @property
    def beside(self) -> int:
        """Registers that a lane loads beside them: places of 2:4 weights, or third bits."""
        return TILES * self.steps // 2 if self.sparse else self.steps // 2 if self.bits > self.field else 0

    @property
    def groups(self) -> int:
        """Groups of inputs."""
        return max(1, self.block // self.group)

    @property
    def inputs(self) -> int:
        """Registers of x that an instruction takes."""
        return 4 if self.sparse else 2

    def text(self) -> str:
        """PTX with operands $0, $1, ...: new sums, words, what is beside them, x, scales, zero points, sums.

        Sums of column n: of tile 0, then 1, each of output g and of 8 + g, each of tokens 2 t and 2 t + 1.
        """
        operands, first = {}, 0
        for name, count in self._operands().items():
            operands[name] = [f"${first + i}" for i in range(count)]
            first += count
        return "\n".join(["{", *_declared(self), *self._body(operands), "}"])

    def constraints(self) -> str:
        """What LLVM has to know of the operands: new sums are written before all inputs are read."""
        kinds = {"y": "=&f", "sums": "f"}
        return ",".join(kinds.get(name, "r") for name, count in self._operands().items() for _ in range(count))

    def _operands(self) -> dict[str, int]:
        """Registers of each, in their order."""
        return {
            "y": 8 * self.columns,
            "words": self.words,
            "beside": self.beside,
            "x": self.steps * self.inputs * self.columns,
            "scale": 2 * self.groups,
            "zero": 0 if self.symmetric else self.groups,
            "sums": 8 * self.columns,
        }

    def _body(self, of: dict[str, list[str]]) -> Iterator[str]:
        yield from _constants(self)
        per_group = self.steps // self.groups
        for group in range(self.groups):
            yield from _scales(self, of["scale"][2 * group : 2 * group + 2])
            if not self.symmetric:
                yield from _offsets(self, of["zero"][group])
            for step in range(group * per_group, (group + 1) * per_group):
                words = of["words"][step * self.field // 2 : (step + 1) * self.field // 2]
                third = of["beside"][step // 2] if self.bits > self.field else ""
                yield from _decoded(self, words, third, step % 2)
                yield from self._products(of, step, step % per_group == 0)
            sums = of["y"] if group else of["sums"]
            for place in range(8 * self.columns):
                yield f"fma.rn.f32 {of['y'][place]}, p{place}, s{place % 8 // 2}, {sums[place]};"

    def _products(self, of: dict[str, list[str]], step: int, new: bool) -> Iterator[str]:
        kind = "bf16" if self.bfloat16 else "f16"
        name = "mma.sp::ordered_metadata.sync.aligned.m16n8k32" if self.sparse else "mma.sync.aligned.m16n8k16"
        for column in range(self.columns):
            at = (column * self.steps + step) * self.inputs
            x = ", ".join(of["x"][at : at + self.inputs])
            for tile in range(TILES):
                sums = ", ".join(f"p{8 * column + 4 * tile + i}" for i in range(4))
                left = ", ".join(f"a{4 * tile + i}" for i in range(4))
                start = "none, none, none, none" if new else sums
                which = f", {of['beside'][tile * self.steps // 2 + step // 2]}, {step % 2}" if self.sparse else ""
                yield f"{name}.row.col.f32.{kind}.{kind}.f32 {{{sums}}}, {{{left}}}, {{{x}}}, {{{start}}}{which};"

    @property
    def mantissa(self) -> int:
        """Bits below the number that fields are put into."""
        return 7 if self.bfloat16 else 10

    @property
    def magic(self) -> int:
        """The bits of that number."""
        return 0x4300 if self.bfloat16 else 0x6400

    @property
    def wide(self) -> bool:
        """Whether codes fill more than the mantissa: they become float32 first."""
        return self.bits > self.mantissa

    @property
    def addend(self) -> int:
        """The same to be added: there is no subtraction of bfloat16 pairs on sm_80, so its sign is set."""
        return self.magic | (0x8000 if self.bfloat16 else 0)

    def offset(self, row: int) -> int:
        """Where the field of a lane's output `row` starts in the mantissa."""
        at = row * self.field % 8
        return at if at + self.bits <= self.mantissa else 0


def _declared(program: Program) -> Iterator[str]:
    sums = ", ".join(f"p{i}" for i in range(8 * program.columns))
    yield ".reg .b32 a0, a1, a2, a3, a4, a5, a6, a7, c0, c1, c2, c3, t, u, one, high;"
    yield f".reg .f32 s0, s1, s2, s3, f0, f1, f2, f3, low, upper, none, {sums};"
    yield ".reg .b16 h0, h1;"


def _constants(program: Program) -> Iterator[str]:
    """Registers that hold the same for all blocks."""
    yield "mov.f32 none, 0f00000000;"
    if program.bfloat16:
        yield "mov.b32 one, 0x3f803f80;"
    yield f"mov.b32 high, {WIDE if program.wide else program.addend >> 8:#x};"
    if program.symmetric:
        middle = 1 << (program.bits - 1)
        for row in range(ROWS):
            half = program.addend | middle << program.offset(row)
            yield f"mov.b32 c{row}, {WIDE | middle if program.wide else half * BOTH:#x};"
        yield from _as_floats(program)


def _scales(program: Program, pairs: list[str]) -> Iterator[str]:
    """s0 .. s3 of two words, each of two scales."""
    for row in range(ROWS):
        pair, upper = pairs[row // 2], row % 2
        if program.bfloat16_scale:
            yield f"and.b32 t, {pair}, 0xffff0000;" if upper else f"shl.b32 t, {pair}, 16;"
            yield f"mov.b32 s{row}, t;"
        else:
            if not upper:
                yield f"mov.b32 {{h0, h1}}, {pair};"
            yield f"cvt.f32.f16 s{row}, h{upper};"
        if program.offset(row):
            yield f"mul.rn.f32 s{row}, s{row}, 0f{0x3F800000 - (program.offset(row) << 23):08X};"


def _offsets(program: Program, zero: str) -> Iterator[str]:
    """c0 .. c3 of a word of four zero points: what is subtracted."""
    for row in range(ROWS):
        if program.wide:
            yield f"prmt.b32 c{row}, {zero}, high, {0x7540 | row:#x};"
            continue
        shifted, offset = zero, program.offset(row)
        if offset + program.bits > 8:  # beyond the byte that a permutation takes
            yield f"bfe.u32 t, {zero}, {8 * row}, 8;"
            yield f"mad.lo.u32 c{row}, t, {BOTH << offset:#x}, {program.addend * BOTH:#x};"
            continue
        if offset:
            yield f"shl.b32 t, {zero}, {offset};"
            shifted = "t"
        yield f"prmt.b32 c{row}, {shifted}, high, {0x4040 | row << 8 | row:#x};"
    yield from _as_floats(program)


def _as_floats(program: Program) -> Iterator[str]:
    if program.wide:
        yield from (f"mov.b32 f{row}, c{row};" for row in range(ROWS))


def _decoded(program: Program, words: list[str], third: str, odd: int) -> Iterator[str]:
    """a0 .. a7: pairs of row g, of row 8 + g, and of both in the other half of the inputs; for two tiles."""
    held: dict[str, tuple[str, int]] = {}  # the word in a register, and by how much it is shifted
    for half in range(HALVES):
        for row in range(ROWS):
            word, at = words[row * program.field // 8], row * program.field % 8
            target = f"a{4 * (row // 2) + 2 * half + row % 2}"
            if program.bits == 8:
                yield from _byte(program, target, word, (half, row))
                continue
            offset = program.offset(row)
            low = yield from _shifted("t", word, 8 * half + at - offset, held)
            mask = (2**program.field - 1 << offset) * BOTH
            yield f"lop3.b32 {target}, {low}, {mask:#x}, {program.magic * BOTH:#x}, 0xea;"
            if third:
                high = yield from _shifted("u", third, 8 * half + 2 * row + odd - offset - 2, held)
                yield f"lop3.b32 {target}, {high}, {(4 << offset) * BOTH:#x}, {target}, 0xea;"
            yield _centred(program, target, row)


def _shifted(register: str, word: str, right: int, held: dict[str, tuple[str, int]]) -> Generator[str, None, str]:
    """The word shifted to the right, or to the left, and where it then is."""
    if not right:
        return word
    if held.get(register) != (word, right):
        held[register] = word, right
        yield f"{'shr.u32' if right > 0 else 'shl.b32'} {register}, {word}, {abs(right)};"
    return register


def _byte(program: Program, target: str, word: str, place: tuple[int, int]) -> Iterator[str]:
    """A pair of 8-bit codes, bytes `half` and 2 + `half` of a word."""
    half, row = place
    if not program.wide:
        yield f"prmt.b32 {target}, {word}, {program.magic >> 8:#x}, {0x4240 + 0x101 * half:#x};"
        yield _centred(program, target, row)
        return
    for name, byte in (("low", half), ("upper", 2 + half)):
        yield f"prmt.b32 t, {word}, high, {0x7540 | byte:#x};"
        yield f"mov.b32 {name}, t;"
        yield f"sub.rn.f32 {name}, {name}, f{row};"
    yield f"cvt.rn.bf16x2.f32 {target}, upper, low;"


def _centred(program: Program, target: str, row: int) -> str:
    if program.bfloat16:
        return f"fma.rn.bf16x2 {target}, {target}, one, c{row};"
    return f"sub.f16x2 {target}, {target}, c{row};"
