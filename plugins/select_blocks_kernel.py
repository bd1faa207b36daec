"""LynxSelect in several launches, for batches too big for one program: the functions of `select_kernel.py` in blocks.

In order: voting (for `affinity` votes only), votes, keep (not if `KEEP_HERE`), choice, and place, or where there are
many blocks the last steps of `dispatch_kernel.py`. A block is TOKENS tokens and a program of its own, except that keep
and scan are one program each. Where there are few blocks, BLOCKS at most, every program of the next launch adds up the
few tables itself, which is faster than one more launch. The floor is for each voting token of the batch, which votes
counts.

Where there are few, the table has a bit a token for `place` of what a block uses of each expert, so that a token's rank
is a count of bits.

Sums run in a fixed order, so that the same batch gives the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 -- sizes are named as in the glossary: T, E, K

import triton
import triton.language as tl

from lynx_trt.plugins.dependent_launch import let_next_start, wait_for_earlier
from lynx_trt.plugins.dispatch_kernel import write_header
from lynx_trt.plugins.select_kernel import (
    add_both,
    bits_set,
    is_restricted,
    kept_set,
    load_tile,
    tile_choice,
    tile_votes,
    write_pairs,
)


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
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (ceil(T / TOKENS),)."""
    wait_for_earlier(PROGRAMMATIC)
    let_next_start(PROGRAMMATIC)
    if not is_restricted(tl.load(budget), tl.load(floor), E):
        return
    block = tl.program_id(0)
    voters = tl.zeros([BLOCK_T], tl.int32)
    for start in range(block * TOKENS, tl.minimum(block * TOKENS + TOKENS, T), BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        _, _, _, _, counts, _ = load_tile(
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
    voting,  # [ceil(T / TOKENS)] int32, out: how many of a block's tokens vote; for `affinity` it is there
    votes,  # [ceil(T / TOKENS), E] float64, out; FORCED if one of the tokens forces the expert
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
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (ceil(T / TOKENS),). What a block's tokens say of each expert; nothing where all are kept."""
    wait_for_earlier(PROGRAMMATIC)
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    limit, least = tl.load(budget), tl.load(floor)
    # Before it is known whether anything is restricted: one wait for memory instead of several.
    token = block * TOKENS + tl.arange(0, BLOCK_T)
    scores, weighing, own_weight, own, counts, total = load_tile(
        choice, combine, topk_index, topk_weight, token_mask, token, token < T, E, K, BLOCK_E
    )
    let_next_start(PROGRAMMATIC)
    if not is_restricted(limit, least, E):
        return
    number = 0
    if VOTE == "affinity":
        for start in range(0, tl.cdiv(T, TOKENS), BLOCK_E):
            here = start + expert < tl.cdiv(T, TOKENS)
            number += tl.sum(tl.load(voting + start + expert, mask=here, other=0), axis=0)
    sums = tl.zeros([BLOCK_T, BLOCK_E], tl.float64)
    voters = tl.zeros([BLOCK_T], tl.int32)
    for start in range(0, TOKENS, BLOCK_T):
        if TOKENS > BLOCK_T:
            token = block * TOKENS + start + tl.arange(0, BLOCK_T)
            scores, weighing, own_weight, own, counts, total = load_tile(
                choice, combine, topk_index, topk_weight, token_mask, token, token < T, E, K, BLOCK_E
            )
        sums += tile_votes(
            scores,
            weighing,
            own_weight,
            own,
            counts,
            total,
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
        voters += counts.to(tl.int32)
    tl.store(votes + block * E + expert, tl.sum(sums, axis=0), mask=expert < E)
    if VOTE != "affinity":
        tl.store(voting + block, tl.sum(voters, axis=0))


@triton.jit
def add_blocks(votes, voting, blocks, most, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr):
    """The tables of the blocks, `most` at most, as sums of every ROWS-th: votes float64 [ROWS, BLOCK_E], voting int32
    [ROWS].
    """
    expert = tl.arange(0, BLOCK_E)[None, :]
    row = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BLOCK_E], tl.float64)
    voters = tl.zeros([ROWS], tl.int32)
    for start in range(0, most, ROWS):
        here = start + row < blocks
        at = (start + row)[:, None] * E + expert
        sums += tl.load(votes + at, mask=here[:, None] & (expert < E), other=0.0)
        voters += tl.load(voting + start + row, mask=here, other=0)
    return sums, voters


@triton.jit(do_not_specialize=["T"])
def select_keep_kernel(
    budget,  # [] int32
    floor,  # [] float32
    votes,  # [ceil(T / TOKENS), E] float64
    voting,  # [ceil(T / TOKENS)] int32
    kept,  # [E] int32, out
    T,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (1,). The kept set from all blocks' votes."""
    wait_for_earlier(PROGRAMMATIC)
    let_next_start(PROGRAMMATIC)
    limit, least = tl.load(budget), tl.load(floor)
    if not is_restricted(limit, least, E):
        return
    expert = tl.arange(0, BLOCK_E)
    blocks = tl.cdiv(T, TOKENS)
    sums, voters = add_blocks(votes, voting, blocks, blocks, E, BLOCK_E, ROWS)
    result = kept_set(tl.sum(sums, axis=0), tl.sum(voters, axis=0), limit, least, E, BLOCK_E)
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
    votes,  # [ceil(T / TOKENS), E] float64
    voting,  # [ceil(T / TOKENS)] int32
    kept,  # [E] int32; not read if KEEP_HERE
    index,  # [T,K] int64, out
    weight,  # [T,K] float32, out
    table,  # [ceil(T / TOKENS), E] int32, out: the tokens that an expert serves, a bit each; not KEEP_HERE: how many
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
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (ceil(T / TOKENS),). Each token's choice and weights, and a table a block for the dispatch."""
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    limit, least = tl.load(budget), tl.load(floor)
    restricted = is_restricted(limit, least, E)
    token = block * TOKENS + tl.arange(0, BLOCK_T)
    if TOKENS == BLOCK_T:  # the op's inputs are of before the votes, which this launch waits for
        scores, _, _, own, counts, _ = load_tile(
            choice, combine, topk_index, topk_weight, token_mask, token, token < T, E, K, BLOCK_E
        )
    wait_for_earlier(PROGRAMMATIC)
    if KEEP_HERE:  # at once, before anything that has to do with the tile
        blocks = tl.where(restricted, tl.cdiv(T, TOKENS), 0)
        sums, voters = add_blocks(votes, voting, blocks, BLOCKS, E, BLOCK_E, ROWS)
    let_next_start(PROGRAMMATIC)
    kept_here = tl.full([BLOCK_E], 1, tl.int32)
    if restricted:
        if KEEP_HERE:
            kept_here = kept_set(tl.sum(sums, axis=0), tl.sum(voters, axis=0), limit, least, E, BLOCK_E)
        else:
            kept_here = tl.load(kept + expert, mask=expert < E, other=0)
    number = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for start in range(0, tl.minimum(TOKENS, T - block * TOKENS), BLOCK_T):
        if TOKENS > BLOCK_T:
            token = block * TOKENS + start + tl.arange(0, BLOCK_T)
            scores, _, _, own, counts, _ = load_tile(
                choice, combine, topk_index, topk_weight, token_mask, token, token < T, E, K, BLOCK_E
            )
        _picked, used = tile_choice(
            scores,
            own,
            counts,
            combine,
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
        number += used << (token - block * TOKENS)[:, None] if KEEP_HERE else used
    tl.store(table + block * E + expert, tl.sum(number, axis=0), mask=expert < E)


@triton.jit(do_not_specialize=["T"])
def select_place_kernel(
    index,  # [T,K] int64
    table,  # [ceil(T / TOKENS), E] int32, a bit a token
    dispatch,  # [2E+2+TK] int32, out (see dispatch_kernel.py); without PAIRS no pairs
    active,  # [] int32, out
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    SHORT: tl.constexpr,
    PAIRS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (ceil(T / TOKENS),), without PAIRS (1,). Each block adds up all tables and writes its pairs."""
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    line = tl.arange(0, ROWS)[:, None]
    wait_for_earlier(PROGRAMMATIC)
    blocks = tl.cdiv(T, TOKENS)
    if PAIRS:
        token = block * TOKENS + tl.arange(0, TOKENS)[:, None]
        slot = tl.arange(0, BLOCK_K)[None, :]
        mine = tl.load(index + token * K + slot, mask=(token < T) & (slot < K), other=-1)
        which = tl.load(table + block * E + expert, mask=expert < E, other=0)
    totals = tl.zeros([ROWS, BLOCK_E], tl.int32)
    before = tl.zeros([ROWS, BLOCK_E], tl.int32)
    for start in range(0, BLOCKS, ROWS):
        here = (start + line < blocks) & (expert < E)[None, :]
        numbers = bits_set(tl.load(table + (start + line) * E + expert[None, :], mask=here, other=0))
        totals += numbers
        before += tl.where(start + line < block, numbers, 0)
    let_next_start(PROGRAMMATIC)
    all_totals, all_before = tl.reduce((totals, before), 0, add_both)
    begins = write_header(dispatch, active, all_totals[None, :], block, E, BLOCK_E, SHORT)
    begins = tl.reshape(begins, [BLOCK_E]) + all_before
    if PAIRS:
        write_pairs(dispatch, mine, begins, which, block * TOKENS, E, K, TOKENS, BLOCK_K)
