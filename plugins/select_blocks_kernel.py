"""LynxSelect in several launches, for batches too big for one program: the functions of `select_kernel.py` in blocks.

In order: voting (for `affinity` votes only), votes, keep (not if `KEEP_HERE`), choice, and then the last steps of
`dispatch_kernel.py`: scan (not if `SCAN_HERE`) and place. A block is TOKENS tokens and a program of its own, except
that keep and scan are one program each. Where there are few blocks, every program of the next launch adds up the few
tables itself, which is faster than one more launch. The floor is for each voting token of the batch: a block's are
counted by voting, where that runs, and else by votes.

Sums run in a fixed order, so that the same batch gives the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 -- sizes are named as in the glossary: T, E, K

import triton
import triton.language as tl

from lynx_trt.plugins.select_kernel import is_restricted, kept_set, load_tile, tile_choice, tile_votes

# Rows of a table of votes that are added at a time.
ROWS = tl.constexpr(8)


@triton.jit(do_not_specialize=["T"])
def select_voting_kernel(
    choice,  # [T,E] float32
    combine,  # [T,E] float32
    topk_index,  # [T,K] int64
    topk_weight,  # [T,K] float32
    budget,  # [] int32
    floor,  # [] float32
    token_mask,  # [T] uint8, 0 for padding
    voting,  # [ceil(T / TOKENS)] int32, out: how many of a block's tokens vote
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid: (ceil(T / TOKENS),)."""
    if not is_restricted(tl.load(budget), tl.load(floor), E):
        return
    block = tl.program_id(0)
    voters = tl.zeros([BLOCK_T], tl.int32)
    for start in range(block * TOKENS, tl.minimum(block * TOKENS + TOKENS, T), BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        _, _, _, _, counts = load_tile(
            choice, combine, topk_index, topk_weight, token_mask, token, token < T, E, K, BLOCK_E
        )
        voters += counts.to(tl.int32)
    tl.store(voting + block, tl.sum(voters, axis=0))


@triton.jit(do_not_specialize=["T"])
def select_votes_kernel(
    choice,  # [T,E] float32
    combine,  # [T,E] float32
    topk_index,  # [T,K] int64
    topk_weight,  # [T,K] float32
    budget,  # [] int32
    floor,  # [] float32
    token_mask,  # [T] uint8, 0 for padding
    voting,  # [ceil(T / TOKENS)] int32: read for `affinity`, otherwise out
    votes,  # [ceil(T / TOKENS), E] float64, out
    forced,  # [ceil(T / TOKENS), E] int32, out
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    VOTE: tl.constexpr,
    GUARANTEE: tl.constexpr,
    SENSITIVITY: tl.constexpr,
    POWER: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid: (ceil(T / TOKENS),). What a block's tokens say of each expert; nothing where all are kept."""
    if not is_restricted(tl.load(budget), tl.load(floor), E):
        return
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    number = 0
    if VOTE == "affinity":
        for start in range(0, tl.cdiv(T, TOKENS), BLOCK_E):
            here = start + expert < tl.cdiv(T, TOKENS)
            number += tl.sum(tl.load(voting + start + expert, mask=here, other=0), axis=0)
    voters = tl.zeros([BLOCK_T], tl.int32)
    sums = tl.zeros([BLOCK_E], tl.float64)
    marks = tl.zeros([BLOCK_E], tl.int32)
    for start in range(block * TOKENS, tl.minimum(block * TOKENS + TOKENS, T), BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        scores, weighing, own_weight, own_slot, counts = load_tile(
            choice, combine, topk_index, topk_weight, token_mask, token, token < T, E, K, BLOCK_E
        )
        some_votes, some_forced = tile_votes(
            scores,
            weighing,
            own_weight,
            own_slot,
            counts,
            number,
            K,
            VOTE,
            GUARANTEE,
            SENSITIVITY,
            POWER,
            ALPHA,
            BETA,
            BLOCK_E,
        )
        sums += some_votes
        marks = tl.maximum(marks, some_forced)
        voters += counts.to(tl.int32)
    if VOTE != "affinity":
        tl.store(voting + block, tl.sum(voters, axis=0))
    tl.store(votes + block * E + expert, sums, mask=expert < E)
    tl.store(forced + block * E + expert, marks, mask=expert < E)


@triton.jit
def kept_from_blocks(voting, votes, forced, blocks, limit, floor, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Add up the blocks' tables; 1 for each expert that is kept, int32 [BLOCK_E]."""
    expert = tl.arange(0, BLOCK_E)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    voters = tl.zeros([ROWS], tl.int32)
    sums = tl.zeros([BLOCK_E], tl.float64)
    marks = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, blocks, ROWS):
        here = (start + row < blocks) & (expert < E)
        at = (start + row) * E + expert
        sums += tl.sum(tl.load(votes + at, mask=here, other=0.0), axis=0)
        marks = tl.maximum(marks, tl.max(tl.load(forced + at, mask=here, other=0), axis=0))
        block = start + tl.arange(0, ROWS)
        voters += tl.load(voting + block, mask=block < blocks, other=0)
    return kept_set(sums, marks, limit, floor, tl.sum(voters, axis=0), BLOCK_E)


@triton.jit(do_not_specialize=["T"])
def select_keep_kernel(
    budget,  # [] int32
    floor,  # [] float32
    voting,  # [ceil(T / TOKENS)] int32
    votes,  # [ceil(T / TOKENS), E] float64
    forced,  # [ceil(T / TOKENS), E] int32
    kept,  # [E] int32, out
    T,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid: (1,). The kept set from all blocks' votes."""
    limit, least = tl.load(budget), tl.load(floor)
    if not is_restricted(limit, least, E):
        return
    expert = tl.arange(0, BLOCK_E)
    result = kept_from_blocks(voting, votes, forced, tl.cdiv(T, TOKENS), limit, least, E, BLOCK_E)
    tl.store(kept + expert, result, mask=expert < E)


@triton.jit(do_not_specialize=["T"])
def select_choice_kernel(
    choice,  # [T,E] float32
    combine,  # [T,E] float32
    topk_index,  # [T,K] int64
    topk_weight,  # [T,K] float32
    budget,  # [] int32
    floor,  # [] float32
    token_mask,  # [T] uint8, 0 for padding
    voting,  # [ceil(T / TOKENS)] int32
    votes,  # [ceil(T / TOKENS), E] float64
    forced,  # [ceil(T / TOKENS), E] int32
    kept,  # [E] int32; not read if KEEP_HERE
    index,  # [T,K] int64, out
    weight,  # [T,K] float32, out
    table,  # [ceil(T / TOKENS), E] int32, out: how many of a block's slots an expert serves
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    REMAP: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOKENS: tl.constexpr,
    KEEP_HERE: tl.constexpr,
):
    """Grid: (ceil(T / TOKENS),). Each token's choice and weights, and a histogram a block for the dispatch."""
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    limit, least = tl.load(budget), tl.load(floor)
    restricted = is_restricted(limit, least, E)
    kept_here = tl.full([BLOCK_E], 1, tl.int32)
    if restricted:
        if KEEP_HERE:
            kept_here = kept_from_blocks(voting, votes, forced, tl.cdiv(T, TOKENS), limit, least, E, BLOCK_E)
        else:
            kept_here = tl.load(kept + expert, mask=expert < E, other=0)
    number = tl.zeros([BLOCK_E], tl.int32)
    for start in range(block * TOKENS, tl.minimum(block * TOKENS + TOKENS, T), BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        scores, weighing, own_weight, own_slot, counts = load_tile(
            choice, combine, topk_index, topk_weight, token_mask, token, token < T, E, K, BLOCK_E
        )
        placed = tile_choice(
            scores,
            weighing,
            own_weight,
            own_slot,
            counts,
            topk_index,
            topk_weight,
            index,
            weight,
            token,
            token < T,
            kept_here,
            restricted,
            E,
            K,
            REMAP,
            RENORMALIZE,
            SCALE,
            BLOCK_E,
            BLOCK_K,
        )
        number += tl.sum((placed >= 0).to(tl.int32), axis=0)
    tl.store(table + block * E + expert, number, mask=expert < E)
