"""What some programs of a launch have while they run, and how instructions read and write their registers.

A lane is a thread: arrays have one element a lane, programs one after another, warps of 32 in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from emulator.counters import Counters
from emulator.faults import FaultError, UnsupportedError
from emulator.memory import SHARED_BASE, GlobalMemory, Mask, SharedMemory
from emulator.numbers import FLOATS, INTEGERS, bits_of, decode, encode
from emulator.program import STORED, Immediate, Instruction, Operand, Program, Register, Special, Symbol

Array = Any
Execute = Callable[["State", Mask | None], None]

WARP = 32


@dataclass
class Copies:
    """Copies into shared memory that were begun: places, bytes, which lanes still wait, and each lane's group."""

    entries: list[list[Any]] = field(default_factory=list)
    committed: Array = None


@dataclass
class Barrier:
    """An mbarrier: arrivals it wants and still lacks in this phase, bytes on their way, how many phases are over."""

    count: int
    lacking: int
    bytes: int = 0
    phase: int = 0

    def arrived(self) -> None:
        if self.lacking == 0 and self.bytes == 0:
            self.phase += 1
            self.lacking = self.count


class State:
    """Some programs of a launch: `first` is the number of the first, of `grid` in all."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        words: Sequence[int],
        first: int,
        programs: int,
        grid: int,
        threads: int,
        shared: int,
        counters: Counters | None = None,
    ) -> None:
        self.counters = counters
        self.waited = False  # for earlier launches
        self.spinning: Array = None  # lanes that have just asked a barrier in vain
        self.program, self.memory, self.words, self.grid = program, memory, words, grid
        self.threads = threads
        self.thread = np.tile(np.arange(threads, dtype=np.uint32), programs)
        self.local = np.repeat(np.arange(programs), threads)
        self.block = (self.local + first).astype(np.uint32)
        self.warp = (self.local * threads + self.thread) // WARP
        self.shared = SharedMemory(programs, shared)
        self.epoch = np.zeros(programs, np.int32)
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.copies = Copies(committed=np.zeros(self.lanes, np.int32))
        self.tensor_memory: dict[int, Array] = {}
        self.registers: list[Array] = [self._undefined(bits) for bits in program.registers]

    @property
    def lanes(self) -> int:
        return len(self.local)

    def _undefined(self, bits: int) -> Array:
        return np.broadcast_to(STORED[bits](0xDEADBEEFDEADBEEF & (2**bits - 1)), (self.lanes,))

    @property
    def epochs(self) -> Array:
        """Of each lane."""
        return self.epoch[self.local]

    def keep(self, lanes: Mask) -> None:
        """Forget all other lanes, whole programs that have ended."""
        self.thread, self.local, self.block, self.warp = (
            each[lanes] for each in (self.thread, self.local, self.block, self.warp)
        )
        self.copies.committed = self.copies.committed[lanes]
        for entry in self.copies.entries:
            entry[:] = [each[lanes] for each in entry]
        self.registers = [each[lanes] for each in self.registers]

    def special(self, name: str) -> Array:
        if name == "%tid.x":
            return self.thread
        if name == "%ctaid.x":
            return self.block
        if name == "%nctaid.x":
            return np.uint32(self.grid)
        if name == "%ntid.x":
            return np.uint32(self.threads)
        if name == "%laneid":
            return self.thread % np.uint32(WARP)
        if name in ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"):
            return np.uint32(0)
        if name in ("%nctaid.y", "%nctaid.z", "%ntid.y", "%ntid.z"):
            return np.uint32(1)
        raise UnsupportedError(name)


def reader(operand: Operand | None, kind: str) -> Callable[[State], Array]:
    """How to read an operand as numbers of a type: [lanes], or one number for all of them."""
    bits = bits_of(kind)
    if isinstance(operand, Register):
        number = operand.number
        if operand.bits == bits or (operand.bits == 16 and bits == 16):
            return lambda state: decode(state.registers[number], kind)
        if operand.bits < bits:
            raise UnsupportedError(f"a register of {operand.bits} bits read as {kind}")
        narrow = np.dtype(f"u{bits // 8}")
        return lambda state: decode(state.registers[number].astype(narrow), kind)
    if isinstance(operand, Immediate):
        constant = decode(_immediate(operand, kind), kind)
        return lambda state: constant
    if isinstance(operand, Special):
        name = operand.name
        return lambda state: decode(np.asarray(state.special(name)).astype(np.dtype(f"u{bits // 8}")), kind)
    if isinstance(operand, Symbol) and operand.name == "global_smem":
        where = INTEGERS[kind].type(SHARED_BASE)
        return lambda state: where
    raise UnsupportedError(f"{operand} as {kind}")


def _immediate(operand: Immediate, kind: str) -> Array:
    """Its bits."""
    bits = bits_of(kind)
    if kind == "pred":
        return np.bool_(operand.value)
    if operand.bits:
        held = np.array(operand.value, FLOATS[f"f{operand.bits}"])
        return held.view(np.dtype(f"u{operand.bits // 8}")) if operand.bits == bits else encode(held, kind)
    return np.array(int(operand.value) & (2**bits - 1), np.dtype(f"u{bits // 8}"))


def writer(operand: Operand | None, kind: str) -> Callable[[State, Array, Mask | None], None]:
    """How to write numbers of a type into a register, of the lanes of a mask."""
    if operand is None:
        return lambda state, values, mask: None
    if not isinstance(operand, Register):
        raise UnsupportedError(f"{operand} is written")
    number, stored = operand.number, np.dtype(STORED[operand.bits])
    wider = operand.bits > bits_of(kind) and kind != "pred"
    signed = np.dtype(f"i{operand.bits // 8}") if kind.startswith("s") else stored
    if operand.bits < bits_of(kind):
        raise UnsupportedError(f"{kind} into a register of {operand.bits} bits")

    def write(state: State, values: Array, mask: Mask | None) -> None:
        bits = encode(values, kind)
        if wider:
            bits = bits.view(INTEGERS[kind]).astype(signed).view(stored)
        before = state.registers[number]
        if mask is not None:
            state.registers[number] = np.where(mask, bits, before)
        else:
            state.registers[number] = bits if np.shape(bits) == before.shape else np.broadcast_to(bits, before.shape)

    return write


def whole_warps(state: State, mask: Mask | None, instruction: Instruction) -> None:
    """Raises FaultError: of some warp only a part of the lanes is here."""
    if mask is not None:
        here = mask.reshape(-1, WARP).sum(axis=1)
        if ((here != 0) & (here != WARP)).any():
            raise FaultError(f"{instruction.opcode} wants all lanes of a warp, and some are elsewhere")
