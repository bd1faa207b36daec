"""Instructions that read and write memory: loads, stores, atomics, and copies that go on by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from emulator.faults import UnsupportedError
from emulator.memory import Indices, Mask
from emulator.numbers import bits_of, decode, encode
from emulator.program import Address, Immediate, Instruction, Operand, Symbol, Vector
from emulator.state import WARP, Execute, State, reader, writer

Array = Any


def build(instruction: Instruction) -> Execute | None:
    """How to execute an instruction of this kind; None: it is of another."""
    name = instruction.parts[0]
    if name == "ld":
        return _parameter(instruction) if instruction.parts[1] == "param" else _load(instruction)
    if name == "st":
        return _store(instruction)
    if name in ("atom", "red"):
        return _atomic(instruction)
    if instruction.opcode.startswith("cp.async.bulk"):
        return None
    if name == "cp":
        return {"commit_group": _commit, "wait_group": _wait, "wait_all": _wait}.get(instruction.parts[2], _begin_copy)(
            instruction
        )
    return None


def space(instruction: Instruction) -> bool:
    """Whether it is shared memory. Raises UnsupportedError: it is neither that nor global memory."""
    words = set(instruction.parts)
    if words & {"shared", "shared::cta"}:
        return True
    if "global" not in words:
        raise UnsupportedError(instruction.opcode)
    return False


def address(operand: Operand | None, *, shared: bool) -> Any:
    """How to compute an address, [lanes] integers of 32 or 64 bits."""
    assert isinstance(operand, Address)
    base, offset = operand.base, operand.offset
    read = reader(base, _word(base, shared=shared))

    def compute(state: State) -> Array:
        found = read(state)
        return np.broadcast_to(found.astype(np.uint64) + np.uint64(offset & 0xFFFFFFFFFFFFFFFF), (state.lanes,))

    return compute


def global_places(
    state: State, instruction: Instruction, addresses: Array, size: int, mask: Mask | None, *, write: bool = False
) -> Indices:
    """Where addresses lie in the GPU's memory. Raises FaultError: in no allocation, or not a multiple of the size."""
    places = state.memory.places(addresses, size, mask, _noun(instruction))
    if state.counters is not None:
        where = instruction.where, instruction.opcode
        state.counters.count_global(where, places, size, state.warp, mask, write=write)
    return places


def shared_places(state: State, instruction: Instruction, addresses: Array, size: int, mask: Mask | None) -> Indices:
    """Where addresses lie in programs' shared memory. Raises FaultError: outside of it, or not a multiple."""
    places = state.shared.places(state.local, addresses, size, mask, _noun(instruction))
    if state.counters is not None:
        where = instruction.where, instruction.opcode
        state.counters.count_shared(where, places, size, state.warp, state.thread % WARP, mask)
    return places


def _noun(instruction: Instruction) -> str:
    return _NOUNS[instruction.parts[0]]


_NOUNS = {
    "ld": "a load",
    "st": "a store",
    "atom": "an atomic",
    "red": "an atomic",
    "cp": "a copy",
    "ldmatrix": "a load of matrices",
    "stmatrix": "a store of matrices",
}


def _word(base: Operand, *, shared: bool) -> str:
    bits = getattr(base, "bits", 0)
    return f"u{bits}" if bits else "u32" if shared else "u64"


def _items(operand: Operand | None) -> tuple[Operand | None, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _parameter(instruction: Instruction) -> Execute:
    target, source = instruction.operands
    assert isinstance(source, Address)
    assert isinstance(source.base, Symbol)
    kind = instruction.parts[-1]
    write, name, offset = writer(target, kind), source.base.name, source.offset
    bits = bits_of(kind)
    dtype = np.dtype(f"u{bits // 8}")

    def execute(state: State, mask: Mask | None) -> None:
        word = state.words[state.program.parameters[name]] >> (8 * offset)
        write(state, decode(np.full(state.lanes, word & (2**bits - 1), dtype), kind), mask)

    return execute


def _load(instruction: Instruction) -> Execute:
    shared, kind = space(instruction), instruction.parts[-1]
    targets = _items(instruction.operands[0])
    writes = [writer(each, kind) for each in targets]
    where = address(instruction.operands[1], shared=shared)
    each = bits_of(kind) // 8
    size = each * len(targets)

    def execute(state: State, mask: Mask | None) -> None:
        addresses = where(state)
        if shared:
            places = shared_places(state, instruction, addresses, size, mask)
            state.shared.reading(places, size, state.warp, state.epochs, mask, "a load")
            memory: Any = state.shared
        else:
            places = global_places(state, instruction, addresses, size, mask)
            memory = state.memory
        for number, write in enumerate(writes):
            write(state, decode(memory.load(places + number * each, each), kind), mask)

    return execute


def _store(instruction: Instruction) -> Execute:
    shared, kind = space(instruction), instruction.parts[-1]
    sources = _items(instruction.operands[1])
    reads = [reader(each, kind) for each in sources]
    where = address(instruction.operands[0], shared=shared)
    each = bits_of(kind) // 8
    size = each * len(sources)

    def execute(state: State, mask: Mask | None) -> None:
        addresses = where(state)
        values = [np.ascontiguousarray(np.broadcast_to(encode(read(state), kind), (state.lanes,))) for read in reads]
        if shared:
            store_shared(state, instruction, addresses, values, size, mask)
            return
        places = global_places(state, instruction, addresses, size, mask, write=True)
        for number, value in enumerate(values):
            state.memory.store(places + number * each, value, mask)

    return execute


def store_shared(
    state: State, instruction: Instruction, addresses: Array, values: list[Array], size: int, mask: Mask | None
) -> None:
    """Elements of each lane, one after another at its address."""
    places = shared_places(state, instruction, addresses, size, mask)
    raw = np.stack(values, axis=1).view(np.uint8).reshape(state.lanes, size)
    state.shared.writing(places, size, state.warp, state.epochs, mask, _noun(instruction), raw)
    each = size // len(values)
    for number, value in enumerate(values):
        state.shared.store(places + number * each, value, mask)


_ATOMIC: dict[str, Any] = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
}


def _atomic(instruction: Instruction) -> Execute:
    shared, kind = space(instruction), instruction.parts[-1]
    operands = instruction.operands if instruction.parts[0] == "atom" else (None, *instruction.operands)
    how = next((each for each in instruction.parts if each in (*_ATOMIC, "cas")), None)
    if how is None:
        raise UnsupportedError(instruction.opcode)
    write, where = writer(operands[0], kind), address(operands[1], shared=shared)
    reads = [reader(each, kind) for each in operands[2:]]
    size = bits_of(kind) // 8

    def execute(state: State, mask: Mask | None) -> None:
        addresses = where(state)
        memory: Any = state.shared if shared else state.memory
        if shared:
            places = shared_places(state, instruction, addresses, size, mask)
        else:
            places = global_places(state, instruction, addresses, size, mask, write=True)
        values = [np.broadcast_to(read(state), (state.lanes,)) for read in reads]
        before = decode(memory.load(places, size), kind).copy()
        for lane in range(state.lanes) if mask is None else np.flatnonzero(mask):
            one = places[lane : lane + 1]
            old = decode(memory.load(one, size), kind)[0]
            before[lane] = old
            if how == "cas":
                new = values[1][lane] if old == values[0][lane] else old
            else:
                new = _ATOMIC[how](old, values[0][lane])
            memory.store(one, encode(np.array([new], before.dtype), kind), None)
        write(state, before, mask)

    return execute


def _begin_copy(instruction: Instruction) -> Execute:
    """cp.async: what it reads, it reads at once; it arrives when it is waited for."""
    target, source, count, *rest = instruction.operands
    assert isinstance(count, Immediate)
    size = int(count.value)
    into, out_of = address(target, shared=True), address(source, shared=False)
    read = reader(rest[0], "u32") if rest else None

    def execute(state: State, mask: Mask | None) -> None:
        wanted = np.broadcast_to(read(state) if read else np.uint32(size), (state.lanes,))
        full, none = wanted == size, wanted == 0
        if not (full | none).all() and (mask is None or not (full | none)[mask].all()):
            raise UnsupportedError("a copy of a part of its size")
        reads = full if mask is None else full & mask
        places = global_places(state, instruction, out_of(state), size, reads)
        values = state.memory.bytes[places[:, None] + np.arange(size)]
        raw = np.where(full[:, None], values, np.uint8(0))
        target_places = shared_places(state, instruction, into(state), size, mask)
        state.shared.writing(target_places, size, state.warp, state.epochs, mask, "a copy")
        state.shared.copying(target_places, size, mask, True)
        waits = np.ones(state.lanes, np.bool_) if mask is None else mask.copy()
        state.copies.entries.append([target_places, raw, waits, state.copies.committed.copy()])

    return execute


def _commit(instruction: Instruction) -> Execute:
    def execute(state: State, mask: Mask | None) -> None:
        state.copies.committed = state.copies.committed + (1 if mask is None else mask.astype(np.int32))

    return execute


def _wait(instruction: Instruction) -> Execute:
    count = instruction.operands[0] if instruction.operands else None
    left = int(count.value) if isinstance(count, Immediate) else 0
    everything = instruction.parts[2] == "wait_all"

    def execute(state: State, mask: Mask | None) -> None:
        first = state.copies.committed - left  # groups before it are waited for
        kept = []
        for entry in state.copies.entries:
            places, raw, waits, group = entry
            done = waits & (everything | (group < first))
            if mask is not None:
                done &= mask
            if done.any():
                arrive(state, places[done], raw[done], done)
                entry[2] = waits & ~done
            if entry[2].any():
                kept.append(entry)
        state.copies.entries = kept

    return execute


def arrive(state: State, places: Indices, raw: Array, lanes: Mask) -> None:
    """A copy of these lanes has ended: its bytes are written, by their warps."""
    size = raw.shape[1]
    state.shared.copying(places, size, None, False)
    state.shared.bytes[places[:, None] + np.arange(size)] = raw
    epochs = state.epochs[lanes]
    state.shared.writing(places, size, state.warp[lanes], epochs, None, "a copy", raw)
