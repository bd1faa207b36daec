"""Quantized weights of which a byte has two: both of each byte, and what is beside their blocks, for a tile."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806 -- the compiler wants `if` for constants, and sizes are named as in the glossary

import triton
import triton.language as tl


@triton.jit
def load_scales(
    scales,
    rows,
    valid,
    start,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scales and zero points of some rows' blocks from `start` on, [ROWS, blocks]; without ZEROS the scales twice.

    Of one block they are [ROWS]: a dimension of 1 made the compiler send the tile through shared memory.
    """
    EACH: tl.constexpr = D // BLOCK
    first = scales + rows * (2 * EACH if ZEROS else EACH)
    if BLOCK_D <= BLOCK:
        block = start // BLOCK
        mask = valid & (block < EACH)
        at = first + block
    else:
        block = start // BLOCK + tl.arange(0, BLOCK_D // BLOCK)
        mask = valid[:, None] & (block < EACH)[None, :]
        at = first[:, None] + block[None, :]
    scale = tl.load(at, mask=mask, other=0)
    zero = scale
    if ZEROS:
        zero = tl.load(at + EACH, mask=mask, other=0)
    return scale, zero


@triton.jit
def take_apart(packed, DTYPE: tl.constexpr, TO_BFLOAT16: tl.constexpr, TO_FLOAT16: tl.constexpr):
    """The lower and the upper halves of bytes as two blocks of DTYPE, by instructions that take four bytes in $4 and
    give the lower halves in $0 and $1 and the upper ones in $2 and $3, two in each.
    """
    if DTYPE.is_bf16():
        low, high = tl.inline_asm_elementwise(
            TO_BFLOAT16, "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        tl.static_assert(DTYPE.is_fp16())
        low, high = tl.inline_asm_elementwise(
            TO_FLOAT16, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def over_bytes(each, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A number for each block of a row, [ROWS, blocks] or [ROWS], as one for each byte, [ROWS, BLOCK_D / 2]."""
    if len(each.shape) == 1:
        wide = tl.broadcast_to(each[:, None], [ROWS, BLOCK_D // 2])
    else:
        blocks: tl.constexpr = each.shape[1]
        wide = tl.broadcast_to(each[:, :, None], [ROWS, blocks, BLOCK_D // 2 // blocks])
        wide = tl.reshape(wide, [ROWS, BLOCK_D // 2])
    return wide
