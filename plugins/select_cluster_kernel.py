"""LynxSelect in one launch of a cluster of programs, for a decode batch: the functions of `select_kernel.py` in blocks.

PROGRAMS programs of BLOCK_T tokens each, which run at the same time on neighbouring multiprocessors and meet at a
barrier of the hardware: after the votes, so that each of them can add up all the tables of votes and make the kept set,
and after the choice, so that each knows where its pairs go. What a token has stays in registers from the first step to
the last. Needs SM 90 or later; `select_blocks_kernel.py` does the same in a launch a step.

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
    PROGRAMS: tl.constexpr,
    SHORT: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (PROGRAMS,), one cluster. At most PROGRAMS * BLOCK_T tokens; a program may have none."""
    wait_for_earlier(PROGRAMMATIC)
    let_next_start(PROGRAMMATIC)
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    program = tl.arange(0, PROGRAMS)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    limit, least = tl.load(budget), tl.load(floor)
    restricted = is_restricted(limit, least, E)
    scores, weighing, own_weight, own, counts, total = load_tile(
        choice, combine, topk_index, topk_weight, token_mask, token, token < T, E, K, BLOCK_E
    )
    kept = tl.full([BLOCK_E], 1, tl.int32)
    if restricted:
        all_voting = 0
        if VOTE == "affinity":
            tl.store(voting + block, tl.sum(counts.to(tl.int32), axis=0))
            meet()
            all_voting = tl.sum(tl.load(voting + program, cache_modifier=".cg"), axis=0)
        said = tile_votes(
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
        voters = tl.broadcast_to(counts.to(tl.int32)[:, None], said.shape)
        said, voters = tl.reduce((said, voters), 0, add_both)
        tl.store(votes + block * E + expert, said, mask=expert < E)
        tl.store(voting + block + expert * 0, voters, mask=expert == 0)
        meet()
        at = program[:, None] * E + expert[None, :]
        tables = tl.load(votes + at, mask=(expert < E)[None, :], other=0.0, cache_modifier=".cg")
        voters = tl.load(voting + program[:, None] + expert[None, :] * 0, cache_modifier=".cg")
        tables, voters = tl.reduce((tables, voters), 0, add_both)
        kept = kept_set(tables, voters, limit, least, E, BLOCK_E)
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
    number, which = count_used(used, BLOCK_T)
    tl.store(table + block * E + expert, number, mask=expert < E)
    meet()
    at = program[:, None] * E + expert[None, :]
    numbers = tl.load(table + at, mask=(expert < E)[None, :], other=0, cache_modifier=".cg")
    totals, earlier = tl.reduce((numbers, tl.where(program[:, None] < block, numbers, 0)), 0, add_both)
    begins = write_header(dispatch, active, totals[None, :], block, E, BLOCK_E, SHORT)
    begins = tl.reshape(begins, [BLOCK_E]) + earlier
    write_pairs(dispatch, experts, begins, which, block * BLOCK_T, E, K, BLOCK_T, BLOCK_K)
