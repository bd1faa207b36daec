"""PTX text to instructions: one kernel, its registers numbered, its labels resolved."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from emulator.faults import UnsupportedError

WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "u16": 16, "u32": 32, "u64": 64, "f32": 32, "f64": 64}
# Bits of a register as an array holds them.
STORED = {1: np.bool_, 8: np.uint16, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass(frozen=True)
class Register:
    """One by number, and its width in bits; 1 for a predicate."""

    number: int
    bits: int


@dataclass(frozen=True)
class Immediate:
    """A number: of an int its value, of a float its value and how many bits it was written with."""

    value: int | float
    bits: int = 0


@dataclass(frozen=True)
class Special:
    """A register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A name: a parameter, shared memory, a label."""

    name: str


@dataclass(frozen=True)
class Vector:
    """Several operands in braces, or a pair a|b; None is one that is thrown away."""

    items: tuple[Operand | None, ...]


@dataclass(frozen=True)
class Address:
    """[base + offset], of a tensor with coordinates."""

    base: Operand
    offset: int = 0
    coordinates: tuple[Operand | None, ...] = ()


Operand = Register | Immediate | Special | Symbol | Vector | Address


@dataclass(frozen=True)
class Instruction:
    """One instruction: `parts` are the words of its opcode; guard is a predicate, negated or not; where: its line."""

    parts: tuple[str, ...]
    operands: tuple[Operand | None, ...]
    guard: Register | None
    negated: bool
    where: str

    @property
    def opcode(self) -> str:
        return ".".join(self.parts)


@dataclass
class Program:
    """A kernel: instructions, at which of them blocks begin, parameters by name, threads of a program."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    registers: list[int] = field(default_factory=list)
    threads: int = 0


_STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")


def parse(text: str) -> Program:
    """The one kernel of a PTX file. Raises UnsupportedError: something that is not known here."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    lines = [line.split("//")[0] if '"' not in line else line for line in text.splitlines()]
    files = {int(number): name.split("/")[-1] for number, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    clean = "\n".join(re.sub(r"^\s*(\.loc\s.*)$", r"\1;", line) for line in lines)
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", clean, re.DOTALL)
    if entry is None:
        raise UnsupportedError("there is no kernel in this PTX")
    program = Program(entry[1])
    for number, parameter in enumerate(re.findall(r"(\w+)\s*(?:,|$)", entry[2].strip())):
        program.parameters[parameter] = number
    if threads := re.search(r"\.reqntid\s+(\d+)", entry[3]):
        program.threads = int(threads[1])
    _Parser(program, files).body(clean[entry.end() :])
    return program


class _Parser:
    def __init__(self, program: Program, files: dict[int, str]) -> None:
        self._program, self._files = program, files
        # Names of registers and labels, innermost scope last.
        self._scopes: list[dict[str, Register]] = [{}]
        self._inner: list[int] = [0]
        self._count = 0
        self._where = ""

    def body(self, text: str) -> None:
        at = 0
        while at < len(text):
            if text[at].isspace():
                at += 1
            elif text[at] == "{":
                self._count += 1
                self._scopes.append({})
                self._inner.append(self._count)
                at += 1
            elif text[at] == "}":
                if len(self._scopes) == 1:
                    break
                self._scopes.pop()
                self._inner.pop()
                at += 1
            elif label := re.compile(r"([A-Za-z_$][\w$]*):").match(text, at):
                self._program.labels[self._label(label[1])] = len(self._program.instructions)
                at = label.end()
            else:
                end = text.index(";", at)
                self._statement(text[at:end].strip())
                at = end + 1

    def _label(self, name: str) -> str:
        return name if name.startswith("$") else f"{name}@{self._inner[-1]}"

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            for name in names.replace(" ", "").split(","):
                self._declare(name, WIDTHS[kind[1:]])
        elif text.split()[0] == ".loc":
            _, number, line, *_ = text.split()
            self._where = f"{self._files.get(int(number), '?')}:{line}"
        elif not text.startswith("."):
            found = _STATEMENT.match(text)
            if found is None:
                raise UnsupportedError(text)
            negated, guard, opcode, rest = found.groups()
            parts = tuple(opcode.split("."))
            operands = tuple(self._operand(each, parts) for each in _split(rest))
            register = self._named(guard) if guard else None
            assert register is None or isinstance(register, Register)
            self._program.instructions.append(Instruction(parts, operands, register, bool(negated), self._where))

    def _declare(self, name: str, bits: int) -> None:
        if many := re.match(r"(.*)<(\d+)>", name):
            for number in range(int(many[2])):
                self._declare(f"{many[1]}{number}", bits)
            return
        self._scopes[-1][name] = Register(len(self._program.registers), bits)
        self._program.registers.append(bits)

    def _named(self, name: str) -> Operand:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        return Special(name) if name.startswith("%") else Symbol(name)

    def _operand(self, text: str, parts: tuple[str, ...]) -> Operand | None:
        if text == "_":
            return None
        if text.startswith("{"):
            return Vector(tuple(self._operand(each, parts) for each in _split(text[1:-1])))
        if text.startswith("["):
            first, *rest = _split(text[1:-1])
            coordinates = self._operand(rest[0], parts) if rest else None
            found = re.match(r"(.+?)\s*(?:\+\s*(-?\w+))?$", first)
            assert found is not None
            base = self._operand(found[1], parts)
            assert base is not None
            return Address(base, int(found[2] or "0", 0), coordinates.items if isinstance(coordinates, Vector) else ())
        if "|" in text:
            return Vector(tuple(self._operand(each, parts) for each in text.split("|")))
        if text.startswith("0f"):
            return Immediate(float(np.uint32(int(text[2:], 16)).view(np.float32)), 32)
        if text.startswith("0d"):
            return Immediate(float(np.uint64(int(text[2:], 16)).view(np.float64)), 64)
        if _NUMBER.match(text):
            return Immediate(int(text.rstrip("U"), 0))
        if parts[0] == "bra":
            return Symbol(self._label(text))
        return self._named(text)


def _split(text: str) -> list[str]:
    """Operands, at the commas outside of brackets."""
    found, depth, last = [], 0, 0
    for at, sign in enumerate(text):
        depth += (sign in "{[") - (sign in "}]")
        if sign == "," and depth == 0:
            found.append(text[last:at].strip())
            last = at + 1
    rest = text[last:].strip()
    return [*found, rest] if rest else found
