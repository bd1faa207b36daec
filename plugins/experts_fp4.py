"""Weights in MXFP4 and NVFP4, made into numbers of the activations' type on their way to the dot.

A byte has two values that lie next to each other in the sum. They are not put side by side again, which would be an
exchange for each weight: there is a product of the first of each byte with the activations at even places, and one of
the second with those at odd places.

On an H200 memory brings nine MXFP4 weights in the time in which a multiprocessor's schedulers issue some three
instructions a weight, so instructions count: bytes become pairs of values four at a time, and one multiplication gives
them their scale and their exponent at once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 -- the compiler wants `if` for constants, and sizes are named as in the glossary

import triton
import triton.language as tl

from lynx_trt.plugins.experts_packed import over_bytes, take_apart

# Four bytes in $4; out come the lower halves' values in $0 and $1 and the upper halves' in $2 and $3, two in each. The
# four bits of a value go where a 16-bit float has its sign, the last two bits of its exponent and the first one of its
# mantissa: its value, but for a power of two (BIAS), whether it is normal or not.
#
# bfloat16: sign at 15, the others at 8 to 6. The product is the value's bits twice, and what is between them goes.
_TO_BFLOAT16 = tl.constexpr(
    """
    {
        .reg .b32 low, high, first, second;
        and.b32 low, $4, 0x0f0f0f0f;
        and.b32 high, $4, 0xf0f0f0f0;
        prmt.b32 first, low, 0, 0x4140;
        prmt.b32 second, low, 0, 0x4342;
        mul.lo.u32 first, first, 0x1040;
        mul.lo.u32 second, second, 0x1040;
        and.b32 $0, first, 0x81c081c0;
        and.b32 $1, second, 0x81c081c0;
        prmt.b32 first, high, 0, 0x4140;
        prmt.b32 second, high, 0, 0x4342;
        mul.lo.u32 first, first, 0x0104;
        mul.lo.u32 second, second, 0x0104;
        and.b32 $2, first, 0x81c081c0;
        and.b32 $3, second, 0x81c081c0;
    }
    """
)
# float16: sign at 15, the others at 11 to 9, so close that the two copies would run into each other.
_TO_FLOAT16 = tl.constexpr(
    """
    {
        .reg .b32 first, second, sign, rest;
        prmt.b32 first, $4, 0, 0x4140;
        prmt.b32 second, $4, 0, 0x4342;
        shl.b32 sign, first, 12;
        shl.b32 rest, first, 9;
        and.b32 rest, rest, 0x0e000e00;
        lop3.b32 $0, sign, 0x80008000, rest, 0xea;
        shl.b32 sign, second, 12;
        shl.b32 rest, second, 9;
        and.b32 rest, rest, 0x0e000e00;
        lop3.b32 $1, sign, 0x80008000, rest, 0xea;
        shl.b32 sign, first, 8;
        shl.b32 rest, first, 5;
        and.b32 rest, rest, 0x0e000e00;
        lop3.b32 $2, sign, 0x80008000, rest, 0xea;
        shl.b32 sign, second, 8;
        shl.b32 rest, second, 5;
        and.b32 rest, rest, 0x0e000e00;
        lop3.b32 $3, sign, 0x80008000, rest, 0xea;
    }
    """
)
# What the bits above lack, as a power of two.
BIAS_BFLOAT16, BIAS_FLOAT16 = tl.constexpr(126), tl.constexpr(14)


@triton.jit
def dequantize_fp4(packed, scale, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Bytes [ROWS, BLOCK_D / 2] to the values of the lower halves, and of the upper.

    Scales are [ROWS, blocks] or [ROWS], of MXFP4 int8 and of NVFP4 of type DTYPE; up to both formats' LARGEST_SCALE, so
    that what they become is a number of DTYPE. In float16, values too small for it are rounded as a cast would.
    """
    bias: tl.constexpr = BIAS_BFLOAT16 if DTYPE.is_bf16() else BIAS_FLOAT16
    low, high = take_apart(packed, DTYPE, _TO_BFLOAT16, _TO_FLOAT16)
    if scale.dtype == tl.int8:
        # A byte of scale is the exponent of a float32.
        factor = (((scale.to(tl.int32) & 255) + bias) << 23).to(tl.float32, bitcast=True).to(DTYPE)
    else:
        factor = scale * tl.full([], 2.0**bias, tl.float32).to(DTYPE)
    factor = over_bytes(factor, ROWS, BLOCK_D)
    return low * factor, high * factor
