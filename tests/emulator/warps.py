"""Instructions of a whole warp: exchanges, votes, and matrices of 16 bits and tf32."""

from __future__ import annotations

from typing import Any

import numpy as np

from emulator.access import address, shared_places, store_shared
from emulator.faults import UnsupportedError
from emulator.memory import Mask
from emulator.numbers import decode
from emulator.program import Immediate, Instruction, Vector
from emulator.state import WARP, Execute, State, reader, whole_warps, writer

Array = Any
LANE = np.arange(WARP)
# Of a fragment: the row of eight and the pair of columns that a lane has.
GROUP, PAIR = LANE // 4, LANE % 4


def build(instruction: Instruction) -> Execute | None:
    """How to execute an instruction of this kind; None: it is of another."""
    made = {
        "shfl": _exchange,
        "vote": _vote,
        "redux": _reduce,
        "elect": _elect,
        "ldmatrix": _load_matrix,
        "stmatrix": _store_matrix,
        "mma": _multiply,
    }.get(instruction.parts[0])
    return made(instruction) if made else None


def by_warp(values: Array, state: State) -> Array:
    """[warps, 32] of [lanes]."""
    return np.broadcast_to(values, (state.lanes,)).reshape(-1, WARP)


def _all_lanes(instruction: Instruction, number: int) -> None:
    lanes = instruction.operands[number]
    if not (isinstance(lanes, Immediate) and int(lanes.value) & 0xFFFFFFFF == 0xFFFFFFFF):
        raise UnsupportedError(f"{instruction.opcode} of some lanes")


def _exchange(instruction: Instruction) -> Execute:
    how = instruction.parts[2]
    targets = instruction.operands[0]
    first, second = targets.items if isinstance(targets, Vector) else (targets, None)
    write, write_other = writer(first, "b32"), writer(second, "pred")
    read, read_by, read_bounds = (reader(each, "u32") for each in instruction.operands[1:4])
    _all_lanes(instruction, 4)

    def execute(state: State, mask: Mask | None) -> None:
        whole_warps(state, mask, instruction)
        values = by_warp(read(state), state)
        by = by_warp(read_by(state), state).astype(np.int64)
        bounds = by_warp(read_bounds(state), state).astype(np.int64)
        segment, clamp = bounds >> 8 & 31, bounds & 31
        low = LANE & segment
        high = low | clamp & ~segment & 31
        source = {
            "up": LANE - by,
            "down": LANE + by,
            "bfly": LANE ^ by,
            "idx": low | by & ~segment & 31,
        }[how]
        inside = source >= high if how == "up" else source <= high
        source = np.where(inside, source, LANE)
        write(state, np.take_along_axis(values, source, axis=1).reshape(-1), mask)
        write_other(state, inside.reshape(-1), mask)

    return execute


def _vote(instruction: Instruction) -> Execute:
    how, kind = instruction.parts[2], instruction.parts[-1]
    if how not in ("ballot", "any", "all"):
        raise UnsupportedError(instruction.opcode)
    write, read = writer(instruction.operands[0], kind), reader(instruction.operands[1], "pred")
    _all_lanes(instruction, 2)

    def execute(state: State, mask: Mask | None) -> None:
        whole_warps(state, mask, instruction)
        votes = by_warp(read(state), state)
        if how == "ballot":
            found = (votes.astype(np.uint64) << LANE.astype(np.uint64)).sum(axis=1).astype(np.uint32)
        else:
            found = getattr(votes, how)(axis=1)
        write(state, np.repeat(found, WARP), mask)

    return execute


def _reduce(instruction: Instruction) -> Execute:
    how, kind = instruction.parts[2], instruction.parts[-1]
    function: Any = {
        "add": np.add,
        "min": np.fmin if kind == "f32" else np.minimum,
        "max": np.fmax if kind == "f32" else np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[how]
    if "NaN" in instruction.parts:
        function = {"min": np.minimum, "max": np.maximum}[how]
    write, read = writer(instruction.operands[0], kind), reader(instruction.operands[1], kind)

    def execute(state: State, mask: Mask | None) -> None:
        whole_warps(state, mask, instruction)
        values = by_warp(read(state), state)
        write(state, np.repeat(function.reduce(values, axis=1, dtype=values.dtype), WARP), mask)

    return execute


def _elect(instruction: Instruction) -> Execute:
    targets = instruction.operands[0]
    assert isinstance(targets, Vector)
    write, write_chosen = writer(targets.items[0], "b32"), writer(targets.items[1], "pred")

    def execute(state: State, mask: Mask | None) -> None:
        whole_warps(state, mask, instruction)
        write(state, np.zeros(state.lanes, np.uint32), mask)
        write_chosen(state, state.thread % WARP == 0, mask)

    return execute


def _matrices(instruction: Instruction) -> tuple[int, bool]:
    """How many matrices of 8 x 8 elements of 16 bits, and whether transposed."""
    if "m8n8" not in instruction.parts or instruction.parts[-1] != "b16":
        raise UnsupportedError(instruction.opcode)
    count = next(int(each[1:]) for each in instruction.parts if each in ("x1", "x2", "x4"))
    return count, "trans" in instruction.parts


def _rows(state: State, addresses: Array, count: int) -> Array:
    """[warps, count, 8]: the addresses of the rows, which lanes have in turn."""
    return by_warp(addresses, state)[:, : 8 * count].reshape(-1, count, 8)


def _has_a_row(count: int) -> Array:
    """[32]: whether a lane has the address of a row."""
    return np.less(LANE, 8 * count)


def _load_matrix(instruction: Instruction) -> Execute:
    count, transposed = _matrices(instruction)
    target = instruction.operands[0]
    items = target.items if isinstance(target, Vector) else (target,)
    writes, where = [writer(each, "b32") for each in items], address(instruction.operands[1], shared=True)

    def execute(state: State, mask: Mask | None) -> None:
        whole_warps(state, mask, instruction)
        addresses = where(state)
        used = np.tile(_has_a_row(count), state.lanes // WARP)
        if mask is not None:
            used &= mask
        places = shared_places(state, instruction, addresses, 16, used)
        state.shared.reading(places, 16, state.warp, state.epochs, used, "a load of matrices")
        rows = state.shared.bytes[_rows(state, places, count)[..., None] + np.arange(16)]
        elements = np.ascontiguousarray(rows).view(np.uint16)  # [warps, count, 8, 8]
        if transposed:
            elements = elements.swapaxes(2, 3)
        pairs = np.ascontiguousarray(elements).view(np.uint32).reshape(-1, count, WARP)
        for number, write in enumerate(writes):
            write(state, pairs[:, number].reshape(-1), mask)

    return execute


def _store_matrix(instruction: Instruction) -> Execute:
    count, transposed = _matrices(instruction)
    source = instruction.operands[1]
    items = source.items if isinstance(source, Vector) else (source,)
    reads, where = [reader(each, "b32") for each in items], address(instruction.operands[0], shared=True)

    def execute(state: State, mask: Mask | None) -> None:
        whole_warps(state, mask, instruction)
        pairs = np.stack([by_warp(read(state), state) for read in reads], axis=1)  # [warps, count, 32]
        elements = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            elements = elements.swapaxes(2, 3)
        rows = np.zeros((len(elements), WARP, 8), np.uint16)
        rows[:, : 8 * count] = elements.reshape(-1, 8 * count, 8)
        words = np.ascontiguousarray(rows).view(np.uint32).reshape(state.lanes, 4)
        used = np.tile(_has_a_row(count), state.lanes // WARP)
        if mask is not None:
            used &= mask
        values = [np.ascontiguousarray(words[:, number]) for number in range(4)]
        store_shared(state, instruction, where(state), values, 16, used)

    return execute


def fragment(state: State, reads: Any, kind: str) -> Array:
    """[warps, registers, 32, elements] float32: what lanes have of a matrix; two elements a register of 16 bits."""
    bits = np.stack([by_warp(read(state), state) for read in reads], axis=1)
    if kind == "tf32":  # the lower bits are not looked at
        return decode(bits & np.uint32(0xFFFFE000), "f32")[..., None]
    return decode(bits, f"{kind}x2").astype(np.float32)


def left_rows(state: State, reads: Any, kind: str) -> Array:
    """The left operand of four registers, [warps, 16, K]."""
    parts = fragment(state, reads, kind)
    each = parts.shape[-1]
    matrix = np.zeros((len(parts), 16, 8 * each), np.float32)
    for number in range(4):
        rows = GROUP + 8 * (number % 2)
        columns = PAIR[:, None] * each + np.arange(each) + 4 * each * (number // 2)
        matrix[:, rows[:, None], columns] = parts[:, number]
    return matrix


def _multiply(instruction: Instruction) -> Execute:
    shape, (left, right) = instruction.parts[3], instruction.parts[-3:-1]
    if (shape, left) not in {("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")} or left != right:
        raise UnsupportedError(instruction.opcode)
    if (instruction.parts[6], instruction.parts[-1]) != ("f32", "f32"):
        raise UnsupportedError(instruction.opcode)
    d, a, b, c = (each.items if isinstance(each, Vector) else (each,) for each in instruction.operands)
    writes = [writer(each, "f32") for each in d]
    read_a, read_b = ([reader(each, "b32") for each in which] for which in (a, b))
    read_c = [reader(each, "f32") for each in c]

    def execute(state: State, mask: Mask | None) -> None:
        whole_warps(state, mask, instruction)
        rows = left_rows(state, read_a, left)
        parts = fragment(state, read_b, left)
        each = parts.shape[-1]
        columns = np.zeros((len(parts), 8 * each, 8), np.float32)
        for number in range(2):
            k = PAIR[:, None] * each + np.arange(each) + 4 * each * number
            columns[:, k, GROUP[:, None]] = parts[:, number]
        product = rows @ columns
        for number, (read, write) in enumerate(zip(read_c, writes, strict=True)):
            found = product[:, GROUP + 8 * (number // 2), 2 * PAIR + number % 2]
            write(state, found.reshape(-1) + read(state), mask)

    return execute
