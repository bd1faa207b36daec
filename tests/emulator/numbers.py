"""Bits as numbers and back, by PTX type. Floats of 16 bits become float64, in which what they do is exact."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # of any dtype: lanes first

INTEGERS = {
    f"{sign}{bits}": np.dtype(f"{kind}{bits // 8}")
    for sign, kind in (("u", "u"), ("b", "u"), ("s", "i"))
    for bits in (8, 16, 32, 64)
}
FLOATS = {"f32": np.dtype(np.float32), "f64": np.dtype(np.float64)}
SMALL = {"f16", "bf16"}
PAIRS = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32", "s16x2": "s16", "u16x2": "u16"}
TYPES = {*INTEGERS, *FLOATS, *SMALL, *PAIRS, "pred", "tf32"}


def bits_of(kind: str) -> int:
    """Bits of a type; of tf32 those it is kept in."""
    if kind in PAIRS:
        return 2 * bits_of(PAIRS[kind])
    if kind == "pred":
        return 1
    return 32 if kind == "tf32" else int(kind.lstrip("bfsu"))


def decode(bits: Array, kind: str) -> Array:
    """Unsigned integers of the type's width as its numbers; of pairs [..., 2]."""
    if kind == "pred":
        return bits
    if kind in PAIRS:
        half = PAIRS[kind]
        whole = np.ascontiguousarray(bits)
        return decode(whole[..., None].view(np.dtype(f"u{bits_of(half) // 8}")), half)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    return bits.view(INTEGERS.get(kind) or FLOATS["f32" if kind == "tf32" else kind])


def encode(values: Array, kind: str) -> Array:
    """Numbers as unsigned integers of the type's width, rounded to the nearest."""
    if kind == "pred":
        return values
    if kind in PAIRS:
        halves = np.ascontiguousarray(encode(values, PAIRS[kind]))
        return halves.view(np.dtype(f"u{bits_of(kind) // 8}"))[..., 0]
    if kind == "bf16":
        return to_bfloat16(values)
    if kind == "f16":
        return np.asarray(values).astype(np.float16).view(np.uint16)
    if kind in INTEGERS:
        return np.asarray(values).astype(INTEGERS[kind], copy=False).view(np.dtype(f"u{bits_of(kind) // 8}"))
    return np.asarray(values).astype(FLOATS[kind], copy=False).view(np.dtype(f"u{bits_of(kind) // 8}"))


def to_bfloat16(values: Array) -> Array:
    """float64 to the bits of bfloat16, to the nearest, of two the even one."""
    narrow = np.asarray(values).astype(np.float32)
    bits = narrow.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(narrow), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_tf32(bits: Array) -> Array:
    """Bits of float32 to those of tf32, to the nearest, of two the one away from zero."""
    finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(finite, rounded, bits)
