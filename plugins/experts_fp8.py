"""Weights in FP8 (lynx_trt/fp8.py), made into numbers of the activations' type on their way to the dot.

By instructions that every SM has, four bytes at a time: those that convert FP8 are there from SM 89 on, and make
float16 alone. All values are exact in both 16-bit types; a block's scale is for its product with the activations.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 -- sizes are named as in the glossary

import triton
import triton.language as tl


def _instructions(shift: int, rest: str) -> str:
    """Four bytes in $2; out come their values in $0 and $1, two in each.

    A byte becomes the upper one of a half: its sign is in place, and the others go where a 16-bit float has the last
    four bits of its exponent and the first three of its mantissa, `rest`: the value, but for a power of two (BIAS),
    whether it is normal or not.
    """
    return f"""
    {{
        .reg .b32 first, second, rest;
        prmt.b32 first, $2, 0, 0x1404;
        prmt.b32 second, $2, 0, 0x3424;
        shr.u32 rest, first, {shift};
        and.b32 rest, rest, {rest};
        lop3.b32 $0, first, 0x80008000, rest, 0xea;
        shr.u32 rest, second, {shift};
        and.b32 rest, rest, {rest};
        lop3.b32 $1, second, 0x80008000, rest, 0xea;
    }}
    """


_TO_BFLOAT16 = tl.constexpr(_instructions(4, "0x07f007f0"))
_TO_FLOAT16 = tl.constexpr(_instructions(1, "0x3f803f80"))
# What the bits above lack, as a power of two.
BIAS_BFLOAT16, BIAS_FLOAT16 = tl.constexpr(120), tl.constexpr(8)


@triton.jit
def widen_fp8(packed, DTYPE: tl.constexpr):
    """Bytes to their values in bfloat16 or float16, exactly."""
    bias: tl.constexpr = BIAS_BFLOAT16 if DTYPE.is_bf16() else BIAS_FLOAT16
    if DTYPE.is_bf16():
        values = tl.inline_asm_elementwise(_TO_BFLOAT16, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        tl.static_assert(DTYPE.is_fp16())
        values = tl.inline_asm_elementwise(_TO_FLOAT16, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)
    # The bits of a power of two in float32.
    return values * tl.full([], 2.0**bias, tl.float32).to(DTYPE)


@triton.jit
def load_fp8_scales(scales, rows, valid, start, D: tl.constexpr):
    """The scales of some rows at `start`, [ROWS]."""
    return tl.load(scales + rows * (D // 128) + start // 128, mask=valid & (start < D), other=0.0)
