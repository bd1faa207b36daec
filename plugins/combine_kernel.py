"""The last step of LynxExperts, decode and prefill alike: the weighted sum of each token's experts."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806 -- sizes are named as in the glossary: T, E, K, H

import triton
import triton.language as tl

from lynx_trt.plugins.dependent_launch import let_next_start, wait_for_earlier


@triton.jit
def combine_kernel(
    partial,  # [TK,SPLIT,H] float32 or float: each pair's output in SPLIT summands, in the order of the dispatch
    where,  # [T,K] int32: which pair a slot is; not written for those whose index is not in 0..E-1
    index,  # [T,K] int64
    weight,  # [T,K] float32
    output,  # [T,H] float, out
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (T * ceil(H / BLOCK_H),). Slots are added in one order, so the same inputs give the same bits."""
    N_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // N_TILES).to(tl.int64)
    column = tl.program_id(0) % N_TILES * BLOCK_H + tl.arange(0, BLOCK_H)
    # Which slots count, for how much and where they are is of before the launch that is waited for.
    slot = tl.arange(0, BLOCK_K)
    expert = tl.load(index + token * K + slot, mask=slot < K, other=-1)
    used = (expert >= 0) & (expert < E)
    pair = tl.load(where + token * K + slot, mask=used, other=0).to(tl.int64)
    scale = tl.load(weight + token * K + slot, mask=used, other=0.0)
    wait_for_earlier(PROGRAMMATIC)
    let_next_start(PROGRAMMATIC)
    here = used[:, None] & (column < H)[None, :]
    outputs = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    for part in tl.static_range(SPLIT):
        at = partial + (pair * SPLIT + part)[:, None] * H + column[None, :]
        outputs += tl.load(at, mask=here, other=0.0).to(tl.float32)
    total = tl.sum(outputs * scale[:, None], axis=0)
    tl.store(output + token * H + column, total.to(output.dtype.element_ty), mask=column < H)
