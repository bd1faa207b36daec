"""Weights in int4 (lynx_trt/int4.py), made into numbers of the activations' type on their way to the dot.

As those of MXFP4 (experts_fp4.py): the first and the second value of each byte are two blocks, for two products. A
value is put into the last bits of a 16-bit float that is so large that they count ones; what is between it and the zero
point is exact then, and is rounded once, times its scale.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 -- the compiler wants `if` for constants, and sizes are named as in the glossary

import triton
import triton.language as tl

from lynx_trt.plugins.experts_packed import over_bytes, take_apart


def _instructions(large: str) -> str:
    """Four bytes in $4; out come the lower halves' values in $0 and $1 and the upper halves' in $2 and $3, two in each.

    They are added to the 16-bit float whose bits `large` has twice.
    """
    return f"""
    {{
        .reg .b32 first, second, upper;
        prmt.b32 first, $4, 0, 0x4140;
        prmt.b32 second, $4, 0, 0x4342;
        lop3.b32 $0, first, 0x000f000f, {large}, 0xea;
        lop3.b32 $1, second, 0x000f000f, {large}, 0xea;
        shr.u32 upper, first, 4;
        lop3.b32 $2, upper, 0x000f000f, {large}, 0xea;
        shr.u32 upper, second, 4;
        lop3.b32 $3, upper, 0x000f000f, {large}, 0xea;
    }}
    """


_TO_BFLOAT16 = tl.constexpr(_instructions("0x43004300"))
_TO_FLOAT16 = tl.constexpr(_instructions("0x64006400"))
# What those floats are.
LARGE_BFLOAT16, LARGE_FLOAT16 = tl.constexpr(128), tl.constexpr(1024)
# int4.ZERO
ZERO = tl.constexpr(8)


@triton.jit
def dequantize_int4(
    packed, scale, zero, DTYPE: tl.constexpr, ZEROS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Bytes [ROWS, BLOCK_D / 2] to the values of the lower halves, and of the upper.

    Scales and zero points are [ROWS, blocks] or [ROWS], of type DTYPE; without ZEROS the latter are not read.
    """
    large: tl.constexpr = LARGE_BFLOAT16 if DTYPE.is_bf16() else LARGE_FLOAT16
    low, high = take_apart(packed, DTYPE, _TO_BFLOAT16, _TO_FLOAT16)
    if ZEROS:
        large_zero = over_bytes(zero + tl.full([], large, tl.float32).to(DTYPE), ROWS, BLOCK_D)
    else:
        large_zero = tl.full([], large + ZERO, tl.float32).to(DTYPE)
    factor = over_bytes(scale, ROWS, BLOCK_D)
    return (low - large_zero) * factor, (high - large_zero) * factor
