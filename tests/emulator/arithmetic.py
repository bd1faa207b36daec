"""Instructions that compute each lane's numbers from its own: what they are in NumPy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from emulator.faults import UnsupportedError
from emulator.numbers import INTEGERS, PAIRS, SMALL, TYPES, bits_of, to_tf32
from emulator.program import Immediate, Instruction, Vector
from emulator.state import Execute, Mask, State, reader, writer

Array = Any
Function = Callable[..., Array]

COMPARE: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
LOGIC: dict[str, Function] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
# To whole numbers.
WHOLE: dict[str, Function] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
TINY = np.float32(2.0**-126)


def build(instruction: Instruction) -> Execute | None:
    """How to execute an instruction of this kind; None: it is of another."""
    name = instruction.parts[0]
    if name == "mov":
        return _move(instruction)
    if name == "cvt":
        return _convert(instruction)
    if name == "cvta":
        return _apply(instruction, ["u64"], "u64", lambda value: value)
    if name == "setp":
        return _compare(instruction)
    if name == "selp":
        kind = instruction.parts[-1].replace("f", "b")
        return _apply(instruction, [kind, kind, "pred"], kind, lambda a, b, chosen: np.where(chosen, a, b))
    kinds = [each for each in instruction.parts if each in TYPES]
    if not kinds:
        return None
    kind = kinds[-1]
    if name in ("mul", "mad") and "wide" in instruction.parts:
        return _wide(instruction, kind)
    if len(kinds) == 2:
        return _mixed(instruction, kinds[0], kind)
    if kind in INTEGERS and name in _INTEGER:
        sources, result, function = _INTEGER[name](instruction, kind)
        return _apply(instruction, sources, result, function)
    if kind == "pred" and (name in LOGIC or name == "not"):
        function = LOGIC.get(name, np.logical_not)
        return _apply(instruction, ["pred"] * (len(instruction.operands) - 1), "pred", function)
    if kind not in INTEGERS and (function := _float(instruction, kind)) is not None:
        return _apply(instruction, [kind] * (len(instruction.operands) - 1), kind, function)
    return None


def _apply(instruction: Instruction, sources: list[str], result: str, function: Function) -> Execute:
    reads = [reader(operand, kind) for operand, kind in zip(instruction.operands[1:], sources, strict=True)]
    write = writer(instruction.operands[0], result)

    def execute(state: State, mask: Mask | None) -> None:
        write(state, function(*(read(state) for read in reads)), mask)

    return execute


def _move(instruction: Instruction) -> Execute:
    target, source = instruction.operands
    kind = instruction.parts[-1]
    if isinstance(target, Vector):
        return _unpack(target, source, kind)
    if isinstance(source, Vector):
        return _pack(target, source, kind)
    return _apply(instruction, [kind], kind, lambda value: value)


def _pack(target: Any, source: Vector, kind: str) -> Execute:
    each = f"b{bits_of(kind) // len(source.items)}"
    reads, write = [reader(item, each) for item in source.items], writer(target, kind)

    def execute(state: State, mask: Mask | None) -> None:
        parts = np.broadcast_arrays(*(read(state) for read in reads))
        write(state, np.stack(parts, axis=-1).view(INTEGERS[kind])[..., 0], mask)

    return execute


def _unpack(target: Vector, source: Any, kind: str) -> Execute:
    read = reader(source, kind)
    each = f"b{bits_of(kind) // len(target.items)}"
    writes = [writer(item, each) for item in target.items]

    def execute(state: State, mask: Mask | None) -> None:
        whole = np.ascontiguousarray(np.broadcast_to(read(state), (state.lanes,)))
        parts = whole[:, None].view(INTEGERS[each])
        for number, write in enumerate(writes):
            write(state, parts[:, number].copy(), mask)

    return execute


def _convert(instruction: Instruction) -> Execute:
    target, source = instruction.parts[-2:]
    how = instruction.parts[1:-2]
    if target == "tf32":
        return _apply(instruction, ["b32"], "b32", to_tf32)
    if target in PAIRS:  # the first source is the upper half
        return _apply(
            instruction, [source] * 2, target, lambda high, low: np.stack(np.broadcast_arrays(low, high), axis=-1)
        )
    if target in INTEGERS and source in INTEGERS:
        return _apply(instruction, [source], target, lambda value: value)
    if target in INTEGERS:
        rounding = WHOLE[how[0]]
        limits = np.iinfo(INTEGERS[target])

        def to_integer(value: Array) -> Array:
            whole = np.nan_to_num(rounding(value.astype(np.longdouble)), nan=0.0, posinf=np.inf, neginf=-np.inf)
            return np.clip(whole, limits.min, limits.max).astype(INTEGERS[target])

        return _apply(instruction, [source], target, to_integer)
    if set(how) & WHOLE.keys():
        rounding = WHOLE[how[0]]
        return _apply(instruction, [source], target, rounding)
    if set(how) - {"rn"}:
        raise UnsupportedError(instruction.opcode)
    wide = np.longdouble if source in INTEGERS else None  # exact, and rounded once
    return _apply(instruction, [source], target, lambda value: value.astype(wide) if wide else value)


def _compare(instruction: Instruction) -> Execute:
    _, how, *rest = instruction.parts
    kind = instruction.parts[-1]
    logic = LOGIC.get(rest[0])
    function = _comparison(how, kind)
    sources = [reader(each, kind) for each in instruction.operands[1:3]]
    other = reader(instruction.operands[3], "pred") if logic else None
    targets = instruction.operands[0]
    first, second = targets.items if isinstance(targets, Vector) else (targets, None)
    write, write_other = writer(first, "pred"), writer(second, "pred")

    def execute(state: State, mask: Mask | None) -> None:
        found = function(*(read(state) for read in sources))
        results = found, np.logical_not(found)
        if logic and other:
            results = tuple(logic(each, other(state)) for each in results)  # type: ignore[assignment]
        write(state, results[0], mask)
        write_other(state, results[1], mask)

    return execute


def _comparison(how: str, kind: str) -> Function:
    if kind in INTEGERS:
        return COMPARE[how]
    if how in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (how == "nan")
    if how in ("eq", "lt", "le", "gt", "ge"):
        return COMPARE[how]
    if how == "ne":  # of numbers alone
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    function = COMPARE[how.removesuffix("u")]
    return lambda a, b: function(a, b) | np.isnan(a) | np.isnan(b)


def _wide(instruction: Instruction, kind: str) -> Execute:
    result = f"{kind[0]}{2 * bits_of(kind)}"
    wide = INTEGERS[result]
    if instruction.parts[0] == "mul":
        return _apply(instruction, [kind, kind], result, lambda a, b: a.astype(wide) * b.astype(wide))
    return _apply(instruction, [kind, kind, result], result, lambda a, b, c: a.astype(wide) * b.astype(wide) + c)


def _mixed(instruction: Instruction, result: str, small: str) -> Execute:
    """Of a float and smaller ones: fma of two smaller ones, a sum or difference of one smaller one."""
    name = instruction.parts[0]
    if result != "f32" or small not in SMALL:
        raise UnsupportedError(instruction.opcode)
    if name == "fma":
        return _apply(instruction, [small, small, result], result, lambda a, b, c: a * b + c.astype(np.float64))
    if name in ("add", "sub"):
        sign = 1 if name == "add" else -1
        return _apply(instruction, [small, result], result, lambda a, b: a + sign * b.astype(np.float64))
    raise UnsupportedError(instruction.opcode)


def _float(instruction: Instruction, kind: str) -> Function | None:
    """The function of an instruction on floats."""
    name, parts = instruction.parts[0], instruction.parts
    if set(parts) & {"rz", "rm", "rp", "sat", "relu"}:
        raise UnsupportedError(instruction.opcode)
    function = _fused(kind) if name == "fma" else _FLOAT.get(name)
    if name in ("min", "max"):  # of two or of three
        of_two = ({"min": np.minimum, "max": np.maximum} if "NaN" in parts else {"min": np.fmin, "max": np.fmax})[name]
        function = _of_all(of_two)
    elif function is not None and len(instruction.operands) - 1 != _OPERANDS.get(name, 1):
        raise UnsupportedError(f"{instruction.opcode} of {len(instruction.operands) - 1} operands")
    if function is None or "ftz" not in parts:
        return function
    exact = function

    def flushed(*values: Array) -> Array:
        found = exact(*(np.where(np.abs(each) < TINY, np.float32(0) * each, each) for each in values))
        return np.where(np.abs(found) < TINY, np.float32(0) * found, found)

    return flushed


def _fused(kind: str) -> Function:
    """a * b + c, rounded once; in the next wider type, where the product is exact."""
    wide = np.longdouble if kind == "f64" else np.float64
    return lambda a, b, c: a.astype(wide) * b.astype(wide) + c.astype(wide)


def _exact(function: Function) -> Function:
    """In float64, then rounded."""
    return lambda value: function(value.astype(np.float64))


_FLOAT: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "abs": np.abs,
    "neg": np.negative,
    "ex2": _exact(np.exp2),
    "lg2": _exact(np.log2),
    "rcp": _exact(np.reciprocal),
    "sqrt": _exact(np.sqrt),
    "rsqrt": _exact(lambda value: 1 / np.sqrt(value)),
    "tanh": _exact(np.tanh),
    "sin": _exact(np.sin),
    "cos": _exact(np.cos),
}

_OPERANDS = {"add": 2, "sub": 2, "mul": 2, "div": 2, "fma": 3}


def _of_all(function: Function) -> Function:
    return lambda *values: functools.reduce(function, values)


def _same(function: Function, count: int = 2) -> Function:
    return lambda instruction, kind: ([kind] * count, kind, function)


def _multiply(instruction: Instruction, kind: str) -> tuple[list[str], str, Function]:
    if "hi" not in instruction.parts:
        return [kind, kind], kind, np.multiply
    bits = bits_of(kind)
    if bits == 64:
        return [kind, kind], kind, lambda a, b: ((a.astype(object) * b.astype(object)) >> 64).astype(INTEGERS[kind])
    wide = INTEGERS[f"{kind[0]}{2 * bits}"]
    return [kind, kind], kind, lambda a, b: (a.astype(wide) * b.astype(wide)) >> wide.type(bits)


def _multiply_add(instruction: Instruction, kind: str) -> tuple[list[str], str, Function]:
    if "hi" in instruction.parts:
        raise UnsupportedError(instruction.opcode)
    return [kind] * 3, kind, lambda a, b, c: a * b + c


def _quotient(a: Array, b: Array) -> Array:
    """Rounded towards zero."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    whole = a // safe
    return (whole + ((whole * safe != a) & ((a < 0) != (safe < 0)))).astype(a.dtype)


def _shift(instruction: Instruction, kind: str) -> tuple[list[str], str, Function]:
    bits, left = bits_of(kind), instruction.parts[0] == "shl"
    last = INTEGERS[kind].type(bits - 1)

    def shift(value: Array, by: Array) -> Array:
        short = np.minimum(by, np.uint32(bits - 1)).astype(value.dtype)
        shifted = value << short if left else value >> short
        beyond = value >> last if kind[0] == "s" and not left else value.dtype.type(0)
        return np.where(by >= bits, beyond, shifted)

    return [kind, "u32"], kind, shift


def _extract(instruction: Instruction, kind: str) -> tuple[list[str], str, Function]:
    bits = bits_of(kind)

    def extract(value: Array, first: Array, count: Array) -> Array:
        first, count = (first & np.uint32(255)).astype(np.int64), (count & np.uint32(255)).astype(np.int64)
        unsigned = value.view(INTEGERS[f"u{bits}"]).astype(object)
        found = np.asarray((unsigned >> first) & ((1 << count.astype(object)) - 1), dtype=object)
        if kind[0] == "s":
            sign = (unsigned >> np.minimum(first + count - 1, bits - 1)) & 1
            found = np.where((count > 0) & (sign == 1), found - (1 << count.astype(object)), found)
        return found.astype(INTEGERS[kind])

    def quick(value: Array, first: Array, count: Array) -> Array:
        if np.ndim(first) or np.ndim(count) or bits != 32 or not 0 < int(count) <= 32 - int(first):
            return extract(value, first, count)
        shift = value.dtype.type(32 - int(first) - int(count))
        return (value << shift) >> value.dtype.type(32 - int(count))

    return [kind, "u32", "u32"], kind, quick


def _permute(instruction: Instruction, kind: str) -> tuple[list[str], str, Function]:
    if len(instruction.parts) > 2:
        raise UnsupportedError(instruction.opcode)

    def permute(a: Array, b: Array, how: Array) -> Array:
        a, b, how = np.broadcast_arrays(a, b, how)
        whole = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        found = np.zeros(whole.shape, np.uint32)
        for byte in range(4):
            chosen = (how >> np.uint32(4 * byte)).astype(np.uint64)
            value = (whole >> (chosen & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            signs = np.where(value >> np.uint64(7), np.uint64(255), np.uint64(0))
            value = np.where(chosen & np.uint64(8), signs, value)
            found |= value.astype(np.uint32) << np.uint32(8 * byte)
        return found

    return ["b32"] * 3, "b32", permute


def _lookup(instruction: Instruction, kind: str) -> tuple[list[str], str, Function]:
    table = instruction.operands[4]
    assert isinstance(table, Immediate)
    rows = [number for number in range(8) if int(table.value) >> number & 1]

    def lookup(a: Array, b: Array, c: Array, _table: Array) -> Array:
        found = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), a.dtype)
        for row in rows:
            found |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return found

    return [kind] * 4, kind, lookup


def _count_bits(instruction: Instruction, kind: str) -> tuple[list[str], str, Function]:
    return [kind], "b32", lambda value: np.bitwise_count(value).astype(np.uint32)


def _leading(instruction: Instruction, kind: str) -> tuple[list[str], str, Function]:
    bits = bits_of(kind)

    def leading(value: Array) -> Array:
        found = np.full(np.shape(value), bits, np.uint32)
        for bit in range(bits):
            found = np.where(value >> value.dtype.type(bit) & value.dtype.type(1), np.uint32(bits - 1 - bit), found)
        return found

    return [kind], "b32", leading


def _funnel(instruction: Instruction, kind: str) -> tuple[list[str], str, Function]:
    _, way, how, _ = instruction.parts

    def shift(low: Array, high: Array, by: Array) -> Array:
        by = (by & np.uint32(31) if how == "wrap" else np.minimum(by, np.uint32(32))).astype(np.uint64)
        whole = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        return (whole << by >> np.uint64(32) if way == "l" else whole >> by).astype(np.uint32)

    return ["b32"] * 3, "b32", shift


_INTEGER: dict[str, Function] = {
    "add": _same(np.add),
    "sub": _same(np.subtract),
    "mul": _multiply,
    "mad": _multiply_add,
    "div": _same(_quotient),
    "rem": _same(lambda a, b: (a - _quotient(a, b) * b).astype(a.dtype)),
    "min": _same(np.minimum),
    "max": _same(np.maximum),
    "and": _same(np.bitwise_and),
    "or": _same(np.bitwise_or),
    "xor": _same(np.bitwise_xor),
    "not": _same(np.invert, 1),
    "neg": _same(np.negative, 1),
    "abs": _same(np.abs, 1),
    "shl": _shift,
    "shr": _shift,
    "bfe": _extract,
    "prmt": _permute,
    "lop3": _lookup,
    "popc": _count_bits,
    "clz": _leading,
    "shf": _funnel,
}
