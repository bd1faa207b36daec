"""LynxSelect in one launch of a cluster of programs, for a decode batch: the functions of `select_kernel.py` in blocks.

PROGRAMS programs of TOKENS tokens each, which run at the same time on neighbouring multiprocessors and meet at a
barrier of the hardware: after the votes, so that each of them can add up all the tables of votes and make the kept set,
and after the choice, so that each knows where its pairs go. Where registers hold all tokens of a program (TOKENS is
BLOCK_T), what a token has stays there from the first step to the last; otherwise the program reads its tiles of BLOCK_T
tokens in each step again. Needs SM 90 or later; `select_blocks_kernel.py` does the same in a launch a step.

Sums run in a fixed order, so that the same batch gives the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 -- sizes are named as in the glossary: T, E, K

import triton
import triton.language as tl

from lynx_trt.plugins.cluster import meet
from lynx_trt.plugins.dependent_launch import let_next_start, wait_for_earlier
from lynx_trt.plugins.dispatch_kernel import write_header
from lynx_trt.plugins.select_kernel import (
    add_both,
    bits_set,
    count_used,
    is_restricted,
    kept_set,
    load_tile,
    tile_choice,
    tile_votes,
    write_pairs,
)


@triton.jit(do_not_specialize=["T"])
def select_cluster_kernel(
    choice,  # [T,E] float32
    combine,  # [T,E] float32
    topk_index,  # [T,K] int64
    topk_weight,  # [T,K] float32
    budget,  # [] int32
    floor,  # [] float32
    token_mask,  # [T] uint8, 0 for padding
    voting,  # [PROGRAMS] int32, out: how many of a program's tokens vote
    votes,  # [PROGRAMS, E] float64, out; FORCED if one of the tokens forces the expert
    table,  # [PROGRAMS, E] int32, out: how many of a program's tokens an expert serves
    tiles,  # [PROGRAMS * TOKENS / BLOCK_T, E] int32, out: which of a tile's tokens, a bit each; not of a single tile
    index,  # [T,K] int64, out
    weight,  # [T,K] float32, out
    active,  # [] int32, out
    dispatch,  # [2E+2+TK] int32, out (see dispatch_kernel.py)
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    VOTE: tl.constexpr,
    GUARANTEE: tl.constexpr,
    SENSITIVITY: tl.constexpr,
    REMAP: tl.constexpr,
    POWER: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOKENS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SHORT: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (PROGRAMS,), one cluster. At most PROGRAMS * TOKENS tokens; a program may have none."""
    wait_for_earlier(PROGRAMMATIC)
    let_next_start(PROGRAMMATIC)
    # Which of a tile's tokens use an expert is an int32 in memory.
    tl.static_assert(BLOCK_T <= 32 or TOKENS == BLOCK_T)
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    program = tl.arange(0, PROGRAMS)
    first = block * TOKENS
    # Of a single tile known to the compiler, which then makes no loops.
    end = TOKENS if TOKENS == BLOCK_T else tl.minimum(TOKENS, T - first)
    token = first + tl.arange(0, BLOCK_T)
    limit, least = tl.load(budget), tl.load(floor)
    restricted = is_restricted(limit, least, E)
    scores, weighing, own_weight, own, counts, total = load_tile(
        choice, combine, topk_index, topk_weight, token_mask, token, token < T, E, K, BLOCK_E
    )
    kept = tl.full([BLOCK_E], 1, tl.int32)
    if restricted:
        all_voting = 0
        if VOTE == "affinity":
            voters = counts.to(tl.int32)
            for start in range(BLOCK_T, end, BLOCK_T):
                other = first + start + tl.arange(0, BLOCK_T)
                _, _, _, _, others, _ = load_tile(
                    choice, combine, topk_index, topk_weight, token_mask, other, other < T, E, K, BLOCK_E
                )
                voters += others.to(tl.int32)
            tl.store(voting + block, tl.sum(voters, axis=0))
            meet()
            all_voting = tl.sum(tl.load(voting + program, cache_modifier=".cg"), axis=0)
        sums = tl.zeros([BLOCK_T, BLOCK_E], tl.float64)
        voters = tl.zeros([BLOCK_T], tl.int32)
        for start in range(0, end, BLOCK_T):
            sums += tile_votes(
                scores,
                weighing,
                own_weight,
                own,
                counts,
                total,
                all_voting,
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
            if TOKENS > BLOCK_T:  # the next tile, and after the last one the first again, while the programs meet
                token = first + tl.where(start + BLOCK_T < end, start + BLOCK_T, 0) + tl.arange(0, BLOCK_T)
                scores, weighing, own_weight, own, counts, total = load_tile(
                    choice, combine, topk_index, topk_weight, token_mask, token, token < T, E, K, BLOCK_E
                )
        said, voters = tl.reduce((sums, tl.broadcast_to(voters[:, None], sums.shape)), 0, add_both)
        tl.store(votes + block * E + expert, said, mask=expert < E)
        tl.store(voting + block + expert * 0, voters, mask=expert == 0)
        meet()
        at = program[:, None] * E + expert[None, :]
        tables = tl.load(votes + at, mask=(expert < E)[None, :], other=0.0, cache_modifier=".cg")
        voters = tl.load(voting + program[:, None] + expert[None, :] * 0, cache_modifier=".cg")
        tables, voters = tl.reduce((tables, voters), 0, add_both)
        kept = kept_set(tables, voters, limit, least, E, BLOCK_E)
    number = tl.zeros([BLOCK_E], tl.int32)
    which = number if BLOCK_T <= 32 else number.to(tl.int64)
    experts = tl.full([BLOCK_T, BLOCK_K], -1, tl.int64)
    for start in range(0, end, BLOCK_T):
        experts, used = tile_choice(
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
            kept,
            restricted,
            E,
            K,
            REMAP,
            RENORMALIZE,
            SCALE,
            BLOCK_E,
            BLOCK_K,
        )
        here, which = count_used(used, BLOCK_T)
        number += here
        if TOKENS > BLOCK_T:
            tl.store(tiles + (first + start) // BLOCK_T * E + expert, which, mask=expert < E)
            token += BLOCK_T
            inside = token < first + end  # nothing after the last one
            scores, weighing, own_weight, own, counts, total = load_tile(
                choice, combine, topk_index, topk_weight, token_mask, token, inside, E, K, BLOCK_E
            )
    tl.store(table + block * E + expert, number, mask=expert < E)
    meet()
    at = program[:, None] * E + expert[None, :]
    numbers = tl.load(table + at, mask=(expert < E)[None, :], other=0, cache_modifier=".cg")
    totals, earlier = tl.reduce((numbers, tl.where(program[:, None] < block, numbers, 0)), 0, add_both)
    begins = write_header(dispatch, active, totals[None, :], block, E, BLOCK_E, SHORT)
    begins = tl.reshape(begins, [BLOCK_E]) + earlier
    slot = tl.arange(0, BLOCK_K)[None, :]
    for start in range(0, end, BLOCK_T):
        if TOKENS > BLOCK_T:  # what the program's own threads wrote before they met
            token = first + start + tl.arange(0, BLOCK_T)
            experts = tl.load(index + token[:, None] * K + slot, mask=(token < T)[:, None] & (slot < K), other=-1)
            which = tl.load(tiles + (first + start) // BLOCK_T * E + expert, mask=expert < E, other=0)
        write_pairs(dispatch, experts, begins, which, first + start, E, K, BLOCK_T, BLOCK_K)
        begins += bits_set(which)
