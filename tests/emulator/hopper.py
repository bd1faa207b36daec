"""Instructions of SM 90 and later: barriers in memory, copies of tensors by a descriptor, matrices of a warp group."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from emulator.access import address
from emulator.counters import SECTOR
from emulator.faults import FaultError, UnsupportedError
from emulator.memory import GROUP_OF_WARPS, SHARED_BASE, Indices, Mask
from emulator.numbers import decode
from emulator.program import Address, Immediate, Instruction, Vector
from emulator.state import WARP, Barrier, Execute, State, reader, whole_warps, writer
from emulator.warps import GROUP, PAIR, left_rows

Array = Any

# Our own layout of a tensor's descriptor, 128 bytes: what each field of `tensormap.replace` is.
DESCRIPTOR = np.dtype(
    [
        ("global_address", np.uint64),
        ("global_stride", np.uint64, 4),
        ("box_dim", np.uint32, 5),
        ("global_dim", np.uint32, 5),
        ("element_stride", np.uint8, 5),
        ("rank", np.uint8),
        ("elemtype", np.uint8),
        ("interleave_layout", np.uint8),
        ("swizzle_mode", np.uint8),
        ("fill_mode", np.uint8),
        ("unused", np.uint8, 38),
    ]
)
assert DESCRIPTOR.itemsize == 128
_ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2}
_DESCRIBED_SIZE = 128
# Address bits that a swizzle mixes: which come from how many places above; by the bytes of its rows.
_SWIZZLES = {16: 0, 32: 1, 64: 3, 128: 7}


def build(instruction: Instruction) -> Execute | None:
    """How to execute an instruction of this kind; None: it is of another."""
    name = instruction.parts[0]
    if name == "mbarrier":
        return _barrier(instruction)
    if name == "tensormap":
        return _descriptor(instruction) if instruction.parts[1] == "replace" else _publish(instruction)
    if name == "wgmma":
        return _multiply(instruction) if instruction.parts[1] == "mma_async" else nothing
    if instruction.opcode.startswith("cp.async.bulk.tensor"):
        return _copy_tensor(instruction)
    if instruction.opcode.startswith("cp.async.bulk.prefetch.L2"):
        return _prefetch(instruction)
    if instruction.opcode.startswith("cp.async.bulk"):
        return nothing  # copies of descriptors and tensors are done at once
    return None


def nothing(state: State, mask: Mask | None) -> None:
    """What has to do with things that are done at once here."""


def _prefetch(instruction: Instruction) -> Execute:
    """Of so many bytes, both they and where they begin multiples of 16. Changes nothing but what is counted."""
    where, size = address(instruction.operands[0], shared=False), instruction.operands[1]
    assert isinstance(size, Immediate)
    if size.value % 16:
        raise FaultError(f"{instruction.opcode} of {size.value} bytes, which are not a multiple of 16")

    def execute(state: State, mask: Mask | None) -> None:
        for part in range(0, size.value, 16):
            places = state.memory.places(where(state) + np.uint64(part), 16, mask, "a prefetch")
            if state.counters is not None and part % SECTOR == 0:
                state.counters.count_prefetch(places, mask)

    return execute


def swizzled(offsets: Array, row: int) -> Array:
    """Addresses in shared memory of which the bits from 4 on are mixed with those from 7 on, rows of `row` bytes."""
    return offsets ^ ((offsets >> 7 & _SWIZZLES[row]) << 4)


def lanes_of(state: State, mask: Mask | None) -> Indices:
    return np.arange(state.lanes) if mask is None else np.flatnonzero(mask)


def _barrier(instruction: Instruction) -> Execute:
    what = instruction.parts[1]
    operands = list(instruction.operands)
    place = next(number for number, each in enumerate(operands) if isinstance(each, Address))
    where = address(operands[place], shared=True)
    rest = [reader(each, "u32") for each in operands[place + 1 :]]
    write = writer(operands[0], "pred") if what in ("try_wait", "test_wait") else None
    if what not in ("init", "inval", "arrive", "try_wait", "test_wait"):
        raise UnsupportedError(instruction.opcode)
    if what == "arrive" and "expect_tx" not in instruction.parts:
        raise UnsupportedError(instruction.opcode)

    def execute(state: State, mask: Mask | None) -> None:
        at = where(state).astype(np.int64)
        state.shared.places(state.local, at, 8, mask, "a barrier")
        values = [np.broadcast_to(read(state), (state.lanes,)) for read in rest]
        found = np.zeros(state.lanes, np.bool_)
        for lane in lanes_of(state, mask):
            key = int(state.local[lane]), int(at[lane])
            if what == "init":
                state.barriers[key] = Barrier(int(values[0][lane]), int(values[0][lane]))
                continue
            barrier = known(state, key)
            if what == "inval":
                del state.barriers[key]
            elif what == "arrive":
                barrier.bytes += int(values[0][lane])
                barrier.lacking -= 1
                barrier.arrived()
            else:  # whether the phase of that parity is over
                found[lane] = barrier.phase & 1 != int(values[0][lane]) & 1
        if write is not None:
            state.spinning = ~found if mask is None else ~found & mask
            write(state, found, mask)

    return execute


def known(state: State, key: tuple[int, int]) -> Barrier:
    """The barrier of a program at an address."""
    if key not in state.barriers:
        raise FaultError(f"there is no barrier at {key[1] - SHARED_BASE} in shared memory")
    return state.barriers[key]


def _one_value(operand: Any) -> int:
    if not isinstance(operand, Immediate):
        raise UnsupportedError("a field of a descriptor by register")
    return int(operand.value)


def _descriptor(instruction: Instruction) -> Execute:
    """tensormap.replace: a field of a descriptor in shared memory."""
    field = instruction.parts[3]
    where = address(instruction.operands[0], shared=True)
    value = reader(instruction.operands[-1], instruction.parts[-1].replace("b", "u"))
    item = _one_value(instruction.operands[1]) if len(instruction.operands) == 3 else None

    def execute(state: State, mask: Mask | None) -> None:
        values = np.broadcast_to(value(state), (state.lanes,))
        places = state.shared.places(state.local, where(state), 16, mask, "a descriptor")
        for lane in lanes_of(state, mask):
            held = state.shared.bytes[places[lane] : places[lane] + _DESCRIBED_SIZE].view(DESCRIPTOR)
            if item is None:
                held[field][0] = values[lane]
            else:
                held[field][0, item] = values[lane]

    return execute


def _publish(instruction: Instruction) -> Execute:
    """tensormap.cp_fenceproxy: a descriptor from shared to global memory, by a whole warp."""
    if instruction.parts[1] != "cp_fenceproxy":
        raise UnsupportedError(instruction.opcode)
    target, source = instruction.operands[:2]
    into, out_of = address(target, shared=False), address(source, shared=True)

    def execute(state: State, mask: Mask | None) -> None:
        whole_warps(state, mask, instruction)
        places = state.shared.places(state.local, out_of(state), 16, mask, "a descriptor")
        targets = into(state)
        for lane in lanes_of(state, mask)[::WARP]:
            held = state.shared.bytes[places[lane] : places[lane] + _DESCRIBED_SIZE]
            state.memory.view(int(targets[lane]), _DESCRIBED_SIZE)[:] = held

    return execute


def _copy_tensor(instruction: Instruction) -> Execute:
    """A box of a tensor to shared memory, zeros outside of it; it arrives at a barrier, at once."""
    words = set(instruction.parts)
    if "mbarrier::complete_tx::bytes" not in words or "global" not in words or len(instruction.operands) != 3:
        raise UnsupportedError(instruction.opcode)
    target, source, barrier = instruction.operands
    assert isinstance(source, Address)
    into, at_barrier = address(target, shared=True), address(barrier, shared=True)
    descriptor = address(Address(source.base, source.offset), shared=False)
    coordinates = [reader(each, "s32") for each in source.coordinates]

    def execute(state: State, mask: Mask | None) -> None:
        targets, barriers, descriptors = into(state), at_barrier(state), descriptor(state)
        starts = [np.broadcast_to(read(state), (state.lanes,)) for read in coordinates]
        for lane in lanes_of(state, mask):
            held = state.memory.view(int(descriptors[lane]), _DESCRIBED_SIZE).copy().view(DESCRIPTOR)[0]
            box = _box(state, instruction, held, [int(each[lane]) for each in starts])
            _put_box(state, lane, int(targets[lane]), held, box)
            one = known(state, (int(state.local[lane]), int(barriers[lane])))
            one.bytes -= box.nbytes
            one.arrived()

    return execute


def _box(state: State, instruction: Instruction, held: Any, start: list[int]) -> Array:
    """The elements of a box as bytes, [..., inner, bytes of an element], outermost dimension first."""
    rank = int(held["rank"]) + 1
    if rank != len(start) or held["interleave_layout"] or held["fill_mode"]:
        raise UnsupportedError("such a descriptor")
    if (held["element_stride"][:rank] != 1).any():
        raise UnsupportedError("a descriptor with strides of elements")
    each = _ELEMENT_BYTES[int(held["elemtype"])]
    strides = [each, *(int(stride) for stride in held["global_stride"][: rank - 1])]
    if any(stride % 16 for stride in strides[1:]) or int(held["global_address"]) % 16:
        raise FaultError("a descriptor wants addresses and strides that are multiples of 16")
    offset, inside = np.zeros((), np.int64), np.ones((), np.bool_)
    for number in reversed(range(rank)):
        index = start[number] + np.arange(int(held["box_dim"][number]))
        inside = inside[..., None] & (index >= 0) & (index < int(held["global_dim"][number]))
        offset = offset[..., None] + index * strides[number]
    wanted = np.where(inside, offset, 0)
    addresses = (np.uint64(held["global_address"]) + wanted.astype(np.uint64)).reshape(-1)
    places = state.memory.places(addresses, each, inside.reshape(-1), "a copy of a tensor")
    if state.counters is not None:
        where, one = (instruction.where, instruction.opcode), np.zeros(len(places), np.int64)
        state.counters.count_global(where, places, each, one, inside.reshape(-1), write=False)
    values = state.memory.bytes[places[:, None] + np.arange(each)]
    return np.where(inside.reshape(-1, 1), values, np.uint8(0)).reshape(*inside.shape, each)


def _put_box(state: State, lane: int, target: int, held: Any, box: Array) -> None:
    row = {0: 16, 1: 32, 2: 64, 3: 128}[int(held["swizzle_mode"])]
    inner = box.shape[-2] * box.shape[-1]
    if row > 16 and inner > row:
        raise FaultError(f"a box with rows of {inner} bytes, of which the swizzle takes {row}")
    if target % 128:
        raise FaultError("a copy of a tensor to an address that is not a multiple of 128")
    raw = box.reshape(-1)
    offsets = swizzled(target + np.arange(raw.size), row)
    program = np.full(raw.size, state.local[lane])
    places = state.shared.places(program, offsets, 1, None, "a copy of a tensor")
    warp, epoch = np.full(raw.size, state.warp[lane]), np.full(raw.size, state.epoch[state.local[lane]])
    state.shared.writing(places, 1, warp, epoch, None, "a copy of a tensor")
    state.shared.bytes[places] = raw
    state.shared.forget(places)


def tile(first: Array, leading: Array, stride: Array, row: int, rows: int, transposed: bool) -> Array:
    """Addresses of the elements of matrices in shared memory, [matrices, rows, 16], of 16 bits.

    In bytes: where each begins, its two strides, and the rows of its swizzle (16: none).
    """
    n, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    first, leading, stride = (each.astype(np.int64)[:, None, None] for each in (first, leading, stride))
    each = row // 2
    if not transposed:  # elements of a row lie side by side, eight rows are a group
        across = k // each * leading + k % each * 2 if row == 16 else 2 * k
        offset = n // 8 * stride + n % 8 * row + across
    elif row == 16:  # elements of a column lie side by side, as many as the swizzle takes
        offset = n // each * stride + n % each * 2 + k // 8 * leading + k % 8 * row
    else:
        offset = n // each * leading + n % each * 2 + k // 8 * stride + k % 8 * row
    return swizzled(first + offset, row)


def _tile(descriptors: Array, rows: int, transposed: bool) -> Array:
    """Addresses of matrices, by the descriptors of warp groups."""
    first, leading, stride = ((descriptors >> np.uint64(shift) & np.uint64(0x3FFF)) * 16 for shift in (0, 16, 32))
    modes = np.unique(descriptors >> np.uint64(62))
    if len(modes) != 1 or (descriptors >> np.uint64(49) & np.uint64(7)).any():
        raise UnsupportedError("descriptors of several layouts")
    return tile(first, leading, stride, {0: 16, 1: 128, 2: 64, 3: 32}[int(modes[0])], rows, transposed)


def shared_tile(state: State, where: Array, lanes: Indices, what: str) -> Array:
    """Elements at addresses [groups, ...] of the programs of some lanes, as 16 bits; they count as read by those."""
    shape = where.shape
    each = int(np.prod(shape[1:]))
    program = np.repeat(state.local[lanes], each)
    places = state.shared.places(program, where.reshape(-1), 2, None, what)
    # All four warps read all of it: none of them may have written it since the last barrier, or may before the next.
    epoch = np.repeat(state.epochs[lanes], each)
    state.shared.reading(places, 2, np.full(len(epoch), GROUP_OF_WARPS), epoch, None, what)
    return state.shared.load(places, 2).reshape(shape)


def _multiply(instruction: Instruction) -> Execute:
    """wgmma.mma_async: a warp group's 64 rows, from shared memory or registers, times a matrix in shared memory."""
    shape = re.fullmatch(r"m64n(\d+)k16", instruction.parts[4])
    result, kind, other = instruction.parts[5:8]
    if shape is None or result != "f32" or kind != other or kind not in ("f16", "bf16"):
        raise UnsupportedError(instruction.opcode)
    columns = int(shape[1])
    d, a, b, scaled, *immediates = instruction.operands
    assert isinstance(d, Vector)
    signs, turned = [_one_value(each) for each in immediates[:2]], [_one_value(each) for each in immediates[2:]]
    if signs != [1, 1]:
        raise UnsupportedError(f"{instruction.opcode} with signs {signs}")
    from_registers = isinstance(a, Vector)
    turned_a, turned_b = (0, turned[0]) if from_registers else turned
    read_d, write_d = [reader(each, "f32") for each in d.items], [writer(each, "f32") for each in d.items]
    read_a = [reader(each, "b32") for each in a.items] if isinstance(a, Vector) else [reader(a, "u64")]
    read_b, read_scaled = reader(b, "u64"), reader(scaled, "pred")

    def execute(state: State, mask: Mask | None) -> None:
        whole_warps(state, mask, instruction)
        groups = np.arange(0, state.lanes, 4 * WARP)
        chosen = groups if mask is None else groups[mask[groups]]
        here = np.isin(groups, chosen)

        def matrix(read: Any, rows: int, transposed: int) -> Array:
            descriptors = np.broadcast_to(read(state), (state.lanes,)).reshape(-1, 4 * WARP)
            if (descriptors[here] != descriptors[here][:, :1]).any():
                raise FaultError("lanes of a warp group have different descriptors")
            where = _tile(descriptors[here][:, 0], rows, bool(transposed))
            found = np.zeros((len(groups), rows, 16), np.float32)
            found[here] = decode(shared_tile(state, where, chosen, instruction.opcode), kind)
            return found

        if from_registers:
            left = left_rows(state, read_a, kind).reshape(len(groups), 64, 16)
        else:
            left = matrix(read_a[0], 64, turned_a)
        product = left @ matrix(read_b, columns, turned_b).swapaxes(1, 2)  # [groups, 64, columns]
        keep = np.broadcast_to(read_scaled(state), (state.lanes,))
        by_warp = product.reshape(-1, 16, columns)
        for number, (read, write) in enumerate(zip(read_d, write_d, strict=True)):
            rows = GROUP + 8 * (number // 2 % 2)
            found = by_warp[:, rows, 8 * (number // 4) + 2 * PAIR + number % 2].reshape(-1)
            write(state, found + np.where(keep, read(state), np.float32(0)), mask)

    return execute
