"""The text of a PTX module as a list of instructions.

The syntax is that of the PTX ISA (NVIDIA, version 9.0, chapters 4 and 5), as far as compilers emit it: one entry,
registers declared where they are used, scopes in braces (inline assembly has its own).
"""

import re
from dataclasses import dataclass

Operand = str | tuple[str, ...]  # a register, a number, an address in brackets; or several in braces


class Trap(Exception):
    """The kernel did what a GPU would not do, or would do differently from run to run."""


class UnsupportedPtx(NotImplementedError):
    """The text uses something that the emulator does not know."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, `@guard opcode.modifiers operands`."""

    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str | None
    negated: bool  # whether threads run it where the guard is false

    @property
    def type(self) -> str:
        """The last modifier, which for most opcodes says what the operands are."""
        return self.modifiers[-1]

    def register(self, place: int) -> str:
        """An operand that is no vector."""
        operand = self.operands[place]
        if not isinstance(operand, str):
            raise UnsupportedPtx(f"a vector where one register is expected: {self.text}")
        return operand

    def vector(self, place: int) -> tuple[str, ...]:
        """An operand in braces, or one alone."""
        operand = self.operands[place]
        return (operand,) if isinstance(operand, str) else operand


@dataclass(frozen=True)
class Program:
    """The entry function of a PTX module."""

    name: str
    parameters: tuple[tuple[str, str], ...]  # (name, type), in order
    threads: int  # of a CTA
    registers: dict[str, str]  # name to type
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # of the instruction that follows

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Read a module that has one entry. Raises UnsupportedPtx if it has another number, or no `.reqntid`."""
        text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        text = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.M)
        entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, flags=re.S))
        if len(entries) != 1:
            raise UnsupportedPtx(f"a module with {len(entries)} entries")
        name, parameters, directives = entries[0].groups()
        threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*1)*", directives)
        if threads is None:
            raise UnsupportedPtx(f"no .reqntid in {name}: the number of threads is not known")
        body = _Body(text[entries[0].end() :])
        return cls(
            name=name,
            parameters=tuple((p, t) for t, p in re.findall(r"\.param\s+\.(\w+)[^,]*?\s([\w$]+)\s*(?:,|$)", parameters)),
            threads=int(threads[1]),
            registers=body.registers,
            instructions=tuple(body.instructions),
            labels=body.labels,
        )


class _Body:
    """What stands between the braces of an entry; names of inner scopes get a suffix."""

    def __init__(self, text: str):
        self.registers: dict[str, str] = {}
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._scopes: list[dict[str, str]] = [{}]  # what each name of a scope is called outside of it
        self._opened = 0
        statement, braces = "", 0
        for token in re.findall(r"[;{}]|[^;{}]+", text):
            if token == ";":
                self._statement(statement)
                statement = ""
            elif token == "{" and not self._labelled(statement):
                statement = ""
                self._opened += 1
                self._scopes.append({})
            elif token == "}" and not braces:
                self._scopes.pop()
                if not self._scopes:
                    return
            else:
                braces += (token == "{") - (token == "}")
                statement += token
        raise UnsupportedPtx("the body of the entry has no end")

    def _labelled(self, statement: str) -> str:
        """The statement without labels before it, which are noted."""
        statement = statement.strip()
        while found := re.match(r"([\w$]+):\s*", statement):
            self.labels[found[1]] = len(self.instructions)
            statement = statement[found.end() :]
        return statement

    def _statement(self, statement: str) -> None:
        text = " ".join(self._labelled(statement).split())
        if text.startswith(".reg"):
            self._declare(text)
        elif text.startswith(".pragma") or not text:
            return
        elif text.startswith("."):
            raise UnsupportedPtx(text)
        else:
            self.instructions.append(self._instruction(text))

    def _declare(self, text: str) -> None:
        type_, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()  # type: ignore[union-attr]
        for name in names.split(","):
            several = re.fullmatch(r"\s*(.*)<(\d+)>\s*", name)
            for each in [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name.strip()]:
                unique = each if len(self._scopes) == 1 else f"{each}@{self._opened}"
                self._scopes[-1][each] = unique
                self.registers[unique] = type_

    def _instruction(self, text: str) -> Instruction:
        guard, negated, rest = None, False, text
        if found := re.match(r"@(!?)\s*([%\w$]+)\s+", text):
            guard, negated, rest = self._named(found[2]), found[1] == "!", text[found.end() :]
        code, _, operands = rest.partition(" ")
        opcode, *modifiers = code.split(".")
        return Instruction(text, opcode, tuple(modifiers), self._operands(operands), guard, negated)

    def _operands(self, text: str) -> tuple[Operand, ...]:
        found: list[Operand] = []
        for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text):
            if part.startswith("{"):
                found.append(tuple(self._named(each.strip()) for each in part[1:-1].split(",")))
            else:
                found.append(re.sub(r"[%$\w.]+", lambda name: self._named(name[0]), part.strip()))
        return tuple(found)

    def _named(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), name)
