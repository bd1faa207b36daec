"""Instructions of SM 100: matrices in tensor memory. Done at once; what is committed arrives at its barrier at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from emulator.access import address
from emulator.faults import FaultError, UnsupportedError
from emulator.hopper import known, lanes_of, nothing, shared_tile, tile
from emulator.memory import Mask
from emulator.numbers import decode
from emulator.program import Address, Immediate, Instruction, Vector
from emulator.state import WARP, Execute, State, reader, whole_warps, writer

Array = Any

ROWS, COLUMNS = 128, 512  # of a program's tensor memory, each 32 bits
# Bits 61 to 63 of a matrix' descriptor: the bytes of a swizzled row.
_LAYOUTS = {0: 16, 2: 128, 4: 64, 6: 32}


def build(instruction: Instruction) -> Execute | None:
    """How to execute an instruction of this kind; None: it is of another."""
    if instruction.parts[0] != "tcgen05":
        return None
    what = instruction.parts[1]
    if what in ("dealloc", "relinquish_alloc_permit", "wait::ld", "wait::st", "fence::before_thread_sync"):
        return nothing
    made = {"alloc": _allocate, "commit": _commit, "ld": _load, "st": _store, "mma": _multiply}.get(what)
    return made(instruction) if made else None


def memory_of(state: State, program: int) -> Array:
    """A program's tensor memory, [rows, columns] of 32 bits."""
    if program not in state.tensor_memory:
        raise FaultError("tensor memory that was not allocated")
    return state.tensor_memory[program]


def _allocate(instruction: Instruction) -> Execute:
    target, count = instruction.operands
    where, read = address(target, shared=True), reader(count, "u32")

    def execute(state: State, mask: Mask | None) -> None:
        whole_warps(state, mask, instruction)
        places = state.shared.places(state.local, where(state), 4, mask, "an address of tensor memory")
        columns = int(np.max(read(state)))
        for lane in lanes_of(state, mask)[::WARP]:
            program = int(state.local[lane])
            if program in state.tensor_memory:
                raise UnsupportedError("tensor memory allocated twice")
            state.tensor_memory[program] = np.full((ROWS, columns), 0x7FC00000, np.uint32)
            state.shared.bytes[places[lane] : places[lane] + 4] = 0
            state.shared.forget(places[lane] + np.arange(4))

    return execute


def _commit(instruction: Instruction) -> Execute:
    where = address(instruction.operands[0], shared=True)

    def execute(state: State, mask: Mask | None) -> None:
        at = where(state).astype(np.int64)
        for lane in lanes_of(state, mask):
            barrier = known(state, (int(state.local[lane]), int(at[lane])))
            barrier.lacking -= 1
            barrier.arrived()

    return execute


def _places(
    state: State, chosen: Array, instruction: Instruction, base: Array, count: int, split: int
) -> tuple[Array, Array]:
    """[lanes] rows and [lanes, count] columns of what each lane has; of 16 rows the upper lanes have another half."""
    lane = state.thread.astype(np.int64) % WARP
    row, column = base >> 16 & 0xFFFF, base & 0xFFFF
    if "32x32b" in instruction.parts:
        rows, first = row + lane, column
    elif "16x32bx2" in instruction.parts:
        rows, first = row + lane % 16, column + split * (lane // 16)
    else:
        raise UnsupportedError(instruction.opcode)
    if (row // 32 != state.thread // WARP % 4)[chosen].any():
        raise FaultError("a warp reaches for another one's quarter of tensor memory")
    return rows, first[:, None] + np.arange(count)


def _by_program(state: State, chosen: Array) -> Iterator[tuple[Array, Array]]:
    """Each program's tensor memory, and its lanes among those."""
    for program in np.unique(state.local[chosen]):
        yield memory_of(state, int(program)), chosen[state.local[chosen] == program]


def _access(instruction: Instruction, where: Any, split: Any, count: int) -> Any:
    read = address(where, shared=True)
    half = int(split.value) if isinstance(split, Immediate) else 0

    def places(state: State, chosen: Array) -> tuple[Array, Array]:
        return _places(state, chosen, instruction, read(state).astype(np.int64), count, half)

    return places


def _load(instruction: Instruction) -> Execute:
    target, where, *rest = instruction.operands
    items = target.items if isinstance(target, Vector) else (target,)
    writes = [writer(each, "b32") for each in items]
    places = _access(instruction, where, rest[0] if rest else None, len(items))

    def execute(state: State, mask: Mask | None) -> None:
        whole_warps(state, mask, instruction)
        chosen = lanes_of(state, mask)
        rows, columns = places(state, chosen)
        found = np.zeros(columns.shape, np.uint32)
        for memory, mine in _by_program(state, chosen):
            found[mine] = memory[rows[mine, None], columns[mine]]
        for number, write in enumerate(writes):
            write(state, found[:, number].copy(), mask)

    return execute


def _store(instruction: Instruction) -> Execute:
    where, *rest, source = instruction.operands
    items = source.items if isinstance(source, Vector) else (source,)
    reads = [reader(each, "b32") for each in items]
    places = _access(instruction, where, rest[0] if rest else None, len(items))

    def execute(state: State, mask: Mask | None) -> None:
        whole_warps(state, mask, instruction)
        chosen = lanes_of(state, mask)
        rows, columns = places(state, chosen)
        values = np.stack([np.broadcast_to(read(state), (state.lanes,)) for read in reads], axis=1)
        for memory, mine in _by_program(state, chosen):
            memory[rows[mine, None], columns[mine]] = values[mine]

    return execute


def _rows_of(count: int) -> Array:
    """Where a product of so many rows lies: 64 take the first half of each warp's quarter."""
    if count == 128:
        return np.arange(128)
    if count == 64:
        return np.arange(64) // 16 * 32 + np.arange(64) % 16
    raise UnsupportedError(f"a product of {count} rows")


def _multiply(instruction: Instruction) -> Execute:
    """A product of 16-bit matrices, 16 deep: the left one from shared or tensor memory; sums in tensor memory."""
    if instruction.parts[2:] != ("cta_group::1", "kind::f16") or len(instruction.operands) != 5:
        raise UnsupportedError(instruction.opcode)
    into, left, right, form, added = instruction.operands
    target, in_memory = address(into, shared=True), isinstance(left, Address)
    read_left = address(left, shared=True) if in_memory else reader(left, "u64")
    read_right, read_form, read_added = reader(right, "u64"), reader(form, "u32"), reader(added, "pred")

    def execute(state: State, mask: Mask | None) -> None:
        def of(read: Any, lane: int) -> int:
            return int(np.broadcast_to(read(state), (state.lanes,))[lane])

        for lane in lanes_of(state, mask):
            bits, where = of(read_form, lane), of(target, lane)
            kinds = [{0: "f16", 1: "bf16"}[bits >> shift & 7] for shift in (7, 10)]
            rows, columns = (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8
            if bits >> 4 & 3 != 1 or bits & 0x600F:
                raise UnsupportedError(f"{instruction.opcode} of form {bits:#x}")
            memory, lines = memory_of(state, int(state.local[lane])), _rows_of(rows)
            here = lines[:, None] + (where >> 16), (where & 0xFFFF) + np.arange(columns)

            def matrix(descriptor: int, count: int, turned: int, kind: str, lane: int = lane) -> Array:
                places = _tile(descriptor, count, bool(turned))
                return decode(shared_tile(state, places, np.array([lane]), instruction.opcode), kind)[0]

            if in_memory:
                first = of(read_left, lane)
                packed = memory[lines[:, None] + (first >> 16), (first & 0xFFFF) + np.arange(8)]
                a = decode(packed.view(np.uint16), kinds[0])
            else:
                a = matrix(of(read_left, lane), rows, bits >> 15 & 1, kinds[0])
            b = matrix(of(read_right, lane), columns, bits >> 16 & 1, kinds[1])
            product = a.astype(np.float32) @ b.astype(np.float32).T
            sums = memory[here].view(np.float32)
            found = product + sums if of(read_added, lane) else product
            memory[here] = found.astype(np.float32).view(np.uint32)

    return execute


def _tile(descriptor: int, rows: int, transposed: bool) -> Array:
    layout = descriptor >> 61 & 7
    if layout not in _LAYOUTS or descriptor >> 49 & 7 or descriptor >> 52 & 1:
        raise UnsupportedError(f"a matrix of layout {layout}")
    first, leading, stride = (np.array([(descriptor >> shift & 0x3FFF) * 16]) for shift in (0, 16, 32))
    return tile(first, leading, stride, _LAYOUTS[layout], rows, transposed)
