"""Quantized weights of which a byte has two: what is beside their blocks, for the bytes of a tile."""

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
    """Scales and zero points of some rows' blocks from `start` on, [ROWS, blocks]; without ZEROS the scales twice."""
    EACH: tl.constexpr = D // BLOCK
    block = start // BLOCK + tl.arange(0, (BLOCK_D + BLOCK - 1) // BLOCK)
    mask = valid[:, None] & (block < EACH)[None, :]
    at = scales + rows[:, None] * (2 * EACH if ZEROS else EACH) + block[None, :]
    scale = tl.load(at, mask=mask, other=0)
    zero = scale
    if ZEROS:
        zero = tl.load(at + EACH, mask=mask, other=0)
    return scale, zero


@triton.jit
def over_bytes(each, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A number for each block of a row, [ROWS, blocks], as one for each byte, [ROWS, BLOCK_D / 2]."""
    blocks: tl.constexpr = each.shape[1]
    if blocks == 1:
        wide = tl.broadcast_to(each, [ROWS, BLOCK_D // 2])
    else:
        wide = tl.broadcast_to(each[:, :, None], [ROWS, blocks, BLOCK_D // 2 // blocks])
        wide = tl.reshape(wide, [ROWS, BLOCK_D // 2])
    return wide
