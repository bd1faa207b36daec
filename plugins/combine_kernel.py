"""The last step of LynxExperts, decode and prefill alike: the sum of each token's experts."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806 -- sizes are named as in the glossary: T, E, K, H

import triton
import triton.language as tl

from lynx_trt.plugins.dependent_launch import let_next_start, wait_for_earlier


@triton.jit
def combine_kernel(
    partial,  # [TK,SPLIT,H] float32 or float: each slot's output in SPLIT summands, times its weight
    index,  # [T,K] int64; rows of `partial` whose index is not in 0..E-1 were never written
    output,  # [T,H] float, out
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (T * ceil(H / BLOCK_H),). Slots are added in their order, so the same inputs give the same bits."""
    N_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // N_TILES).to(tl.int64)
    column = tl.program_id(0) % N_TILES * BLOCK_H + tl.arange(0, BLOCK_H)
    # Which slots count is of before the launch that is waited for.
    used = tl.full([], 0, tl.int64)  # a bit a slot: K is at most 64
    for k in tl.static_range(K):
        expert = tl.load(index + token * K + k)
        used |= ((expert >= 0) & (expert < E)).to(tl.int64) << k
    wait_for_earlier(PROGRAMMATIC)
    let_next_start(PROGRAMMATIC)
    total = tl.zeros([BLOCK_H], tl.float32)
    for k in tl.static_range(K):
        width = tl.where((used >> k) & 1 != 0, H, 0)
        for part in tl.static_range(SPLIT):
            at = partial + ((token * K + k) * SPLIT + part) * H
            total += tl.load(at + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(output + token * H + column, total.to(output.dtype.element_ty), mask=column < H)
