"""LynxSelect in one launch, for a small decode batch: `lynx_trt.selection.select` and its dispatch metadata.

One program does it all: every step needs the whole batch (votes, then the kept set, then each token's choice), and a
second launch costs more than the work on a few tokens. Larger batches take the same functions in several launches:
`select_blocks_kernel.py`.

Exactness, as in the reference: whatever depends on the order of a sum is float64, rounded to float32 before it is
compared; a tie goes to the lower index. A row that does not count has a `counts` of False, and nothing of it is used.

Work is laid out for latency. Everything of a token is spread over its row of E at once, E / 32 values a thread, so
that sums and maxima of a row stay inside a warp; only sums over tokens go through shared memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 -- sizes are named as in the glossary: T, E, K

import triton
import triton.language as tl

from lynx_trt.plugins.dispatch_kernel import count_slots, place_slots, write_header

# Below the order of every finite float32.
LOWEST = tl.constexpr(-(2**31))
LARGEST = tl.constexpr(2**31 - 1)
# As in lynx_trt.selection: below any sum of positive float32, above 0.
TINY = tl.constexpr(1e-300)


@triton.jit
def sort_order(value):
    """An int32 that orders as the float32 does; 0.0 and -0.0 are the same."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    return tl.where(bits >= 0, bits, bits ^ LARGEST)


@triton.jit
def is_finite(value):
    """Whether it is neither NaN nor infinite."""
    return tl.abs(value) < float("inf")


@triton.jit
def load_tile(
    choice,
    combine,
    topk_index,
    topk_weight,
    token_mask,
    token,
    inside,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Some tokens: (choice, combine, topk weight, slot) [BLOCK_T, BLOCK_E] and counts [BLOCK_T].

    The slot of an expert that is not among the token's own is -1. A token counts if it is no padding and all its
    values are finite. An index out of range is the caller's mistake: it is nobody's expert.
    """
    expert = tl.arange(0, BLOCK_E)[None, :]
    here = inside[:, None] & (expert < E)
    scores = tl.load(choice + token[:, None] * E + expert, mask=here, other=0.0)
    weighing = tl.load(combine + token[:, None] * E + expert, mask=here, other=0.0)
    counts = inside & (tl.load(token_mask + token, mask=inside, other=0) != 0)
    own_weight = tl.zeros(scores.shape, tl.float32)
    own_slot = tl.full(scores.shape, -1, tl.int32)
    for k in tl.static_range(K):
        own = tl.load(topk_index + token * K + k, mask=inside, other=-1).to(tl.int32)
        value = tl.load(topk_weight + token * K + k, mask=inside, other=0.0)
        own_weight = tl.where(expert == own[:, None], value[:, None], own_weight)
        own_slot = tl.where(expert == own[:, None], k, own_slot)
        counts &= is_finite(value)
    counts &= tl.min((is_finite(scores) & is_finite(weighing)).to(tl.int32), axis=1) > 0
    return scores, weighing, own_weight, own_slot, counts


@triton.jit
def row_shares(values, valid):
    """Each valid value over the sum of its row, float64; a negative one is 0, and a row of zeros gives zeros."""
    positive = tl.maximum(tl.where(valid, values, 0.0).to(tl.float64), 0.0)
    return positive * (1.0 / tl.maximum(tl.sum(positive, axis=1), TINY))[:, None]


@triton.jit
def affinities(values, own, voting, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """The vote voting ** bin, with bin in -BETA..0 by how far a value is below the token's best; float64."""
    value = tl.maximum(tl.where(own, values, 0.0).to(tl.float64), 0.0)
    best = tl.max(value, axis=1)[:, None]
    # No weight at all is no preference: ratio 1. A weight of 0 beside others is the lowest bin.
    ratio = tl.where(best > 0, value / tl.where(best > 0, best, 1.0), 1.0)
    logarithm = tl.where(ratio > 0, tl.log(tl.where(ratio > 0, ratio, 1.0)), -float("inf"))
    # Rounded to float32 before floor, as in the reference. Past 2048 steps any power is 0 (or 1, of a lone voter).
    lowest: tl.constexpr = BETA if BETA < 2048 else 2048
    steps = tl.minimum(tl.maximum(-tl.floor((logarithm * ALPHA).to(tl.float32)), 0.0), lowest).to(tl.int32)
    # By squaring: exact where `voting` is a power of 2, the only case whose sums can lie halfway between two float32.
    factor = 1.0 / tl.maximum(voting, 1).to(tl.float64)
    power = tl.zeros(value.shape, tl.float64) + 1.0
    for bit in tl.static_range(12):
        if lowest >> bit > 0:
            power = tl.where((steps >> bit) & 1 != 0, power * factor, power)
            factor = factor * factor
    return power


@triton.jit
def forced_experts(
    scores,
    own_weight,
    own,
    K: tl.constexpr,
    GUARANTEE: tl.constexpr,
    SENSITIVITY: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Which of a token's own experts are kept whatever the budget: its best GUARANTEE ones, all if it is sensitive."""
    expert = tl.arange(0, BLOCK_E)[None, :]
    if GUARANTEE >= K:
        forced = own
    else:
        forced = own & False
        order = tl.where(own, sort_order(scores), LOWEST)
        for _ in range(GUARANTEE):
            best = tl.max(order, axis=1)[:, None]
            first = tl.min(tl.where(own & (order == best), expert, BLOCK_E), axis=1)[:, None]
            forced |= expert == first
            order = tl.where(expert == first, LOWEST, order)
        forced &= own
        if SENSITIVITY > 0 and K > 1:
            confidence = (tl.max(row_shares(own_weight, own), axis=1) * K - 1.0) / (K - 1)
            forced |= own & (confidence.to(tl.float32) < SENSITIVITY)[:, None]
    return forced


@triton.jit
def tile_votes(
    scores,
    weighing,
    own_weight,
    own_slot,
    counts,
    voting,
    K: tl.constexpr,
    VOTE: tl.constexpr,
    GUARANTEE: tl.constexpr,
    SENSITIVITY: tl.constexpr,
    POWER: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """What some tokens say of each expert: the sum of their votes (float64) and whether one forces it, [BLOCK_E].

    `voting` is the number of tokens that vote in the whole batch; only `affinity` asks for it here.
    """
    own = counts[:, None] & (own_slot >= 0)
    if VOTE == "score":
        votes = tl.sum(row_shares(weighing, counts[:, None]), axis=0)
    elif VOTE == "count":
        votes = tl.sum(own.to(tl.int32), axis=0).to(tl.float64)
    elif VOTE == "affinity":
        votes = tl.sum(tl.where(own, affinities(weighing, own, voting, ALPHA, BETA), 0.0), axis=0)
    else:
        share = row_shares(own_weight, own)
        if POWER == 2.0:
            share = share * share
        elif POWER != 1.0:
            share = tl.where(share > 0, tl.exp(tl.log(tl.where(share > 0, share, 1.0)) * POWER), 0.0)
        votes = tl.sum(share, axis=0)
    forced = tl.zeros([BLOCK_E], tl.int32)
    if GUARANTEE > 0 or SENSITIVITY > 0:
        kept = forced_experts(scores, own_weight, own, K, GUARANTEE, SENSITIVITY, BLOCK_E)
        forced = tl.max(kept.to(tl.int32), axis=0)
    return votes, forced


@triton.jit
def is_restricted(budget, floor, E: tl.constexpr):
    """Whether anything can be lost under this budget and this floor."""
    return (budget < E) | (floor > 0)


@triton.jit
def kept_set(votes, forced, budget, floor, voting, BLOCK_E: tl.constexpr):
    """1 for each expert that is kept, int32 [BLOCK_E]: the forced ones, then by falling vote up to the budget, as long
    as the vote is above `floor` (float32) for each of the `voting` tokens.
    """
    expert = tl.arange(0, BLOCK_E)
    ballots = votes.to(tl.float32)
    # Votes are not negative, so the bits of the float32 order as it does.
    bits = ballots.to(tl.int32, bitcast=True).to(tl.int64)
    key = ((forced.to(tl.int64) << 31) | bits) * BLOCK_E + (BLOCK_E - 1 - expert)
    # Ranked by counting the higher keys, some at a time: all of E = 512 at once does not fit registers.
    width: tl.constexpr = BLOCK_E if BLOCK_E < 32 else 32
    rank = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, BLOCK_E, width):
        others = tl.gather(key, start + tl.arange(0, width), axis=0)
        rank += tl.sum((others[:, None] > key[None, :]).to(tl.int32), axis=0)
    # Both factors are exact in float32, and the product is rounded once, as in the reference.
    enough = ballots > floor * voting.to(tl.float32)
    return tl.maximum(forced, ((rank < budget) & enough).to(tl.int32))


@triton.jit
def tile_choice(
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
    inside,
    kept,
    restricted,
    E: tl.constexpr,
    K: tl.constexpr,
    REMAP: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the choice and the weights of some tokens, given the kept set [BLOCK_E] (not `restricted`: all are kept).

    Returns the slot that each expert went to, [BLOCK_T, BLOCK_E], -1 for none.
    """
    expert = tl.arange(0, BLOCK_E)[None, :]
    own = counts[:, None] & (own_slot >= 0)
    placed = tl.where(own, own_slot, -1)
    lost = counts & False
    filled = tl.zeros(token.shape, tl.int32)
    if restricted:
        lost = tl.max(tl.where(own & (kept == 0)[None, :], 1, 0), axis=1) > 0
        if tl.max(lost.to(tl.int32), axis=0) > 0:
            allowed = lost[:, None] & (kept > 0)[None, :] & (expert < E)
            if not REMAP:
                allowed &= own
            # Taken one by one: `place` is the slot that an expert goes to, -1 for none.
            order = tl.where(allowed, sort_order(scores), LOWEST)
            place = tl.full(scores.shape, -1, tl.int32)
            for k in range(K):
                best = tl.max(order, axis=1)[:, None]
                # The lowest index of the best; where nothing is left, no expert.
                first = tl.min(tl.where((order == best) & (order != LOWEST), expert, BLOCK_E), axis=1)[:, None]
                place = tl.where(expert == first, k, place)
                order = tl.where(expert == first, LOWEST, order)
            chosen = place >= 0
            raw = tl.where(chosen, weighing, 0.0).to(tl.float64)
            factor = tl.zeros(token.shape, tl.float64) + SCALE
            if RENORMALIZE:
                total = tl.sum(raw, axis=1)
                factor = tl.where(total != 0, factor / tl.where(total != 0, total, 1.0), 0.0)
            at = token[:, None] * K + place
            tl.store(index + at, tl.broadcast_to(expert, place.shape).to(tl.int64), mask=chosen)
            tl.store(weight + at, (raw * factor[:, None]).to(tl.float32), mask=chosen)
            filled = tl.sum(chosen.to(tl.int32), axis=1)
            placed = tl.where(lost[:, None], place, placed)
    # The others keep what they had, bit for bit; slots that nothing went to are empty.
    slot = tl.arange(0, BLOCK_K)[None, :]
    at = token[:, None] * K + slot
    unchanged = (counts & ~lost)[:, None]
    own_slots = tl.load(topk_index + at, mask=unchanged & (slot < K), other=-1)
    own_weights = tl.load(topk_weight + at, mask=unchanged & (slot < K), other=0.0)
    here = inside[:, None] & (slot < K) & (slot >= filled[:, None])
    tl.store(index + at, own_slots, mask=here)
    tl.store(weight + at, own_weights, mask=here)
    return placed


@triton.jit(do_not_specialize=["T"])
def select_kernel(
    choice,  # [T,E] float32
    combine,  # [T,E] float32
    topk_index,  # [T,K] int64
    topk_weight,  # [T,K] float32
    budget,  # [] int32
    floor,  # [] float32
    token_mask,  # [T] uint8, 0 for padding
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
    BLOCK_SLOTS: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Grid: (1,). Votes over all tokens, the kept set, each token's choice, the metadata.

    ONE_TILE: T is at most BLOCK_T, and the tokens' rows stay in registers from step to step.
    """
    rows = tl.arange(0, BLOCK_T)
    limit, least = tl.load(budget), tl.load(floor)
    restricted = is_restricted(limit, least, E)
    kept = tl.full([BLOCK_E], 1, tl.int32)
    voting = 0
    if ONE_TILE:
        scores, weighing, own_weight, own_slot, counts = load_tile(
            choice, combine, topk_index, topk_weight, token_mask, rows, rows < T, E, K, BLOCK_E
        )
        if restricted:
            voting = tl.sum(counts.to(tl.int32), axis=0)
            votes, forced = tile_votes(
                scores,
                weighing,
                own_weight,
                own_slot,
                counts,
                voting,
                K,
                VOTE,
                GUARANTEE,
                SENSITIVITY,
                POWER,
                ALPHA,
                BETA,
                BLOCK_E,
            )
            kept = kept_set(votes, forced, limit, least, voting, BLOCK_E)
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
            rows,
            rows < T,
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
        used = (placed >= 0).to(tl.int32)
        begins = write_header(dispatch, active, tl.sum(used, axis=0), E, BLOCK_E)
        at = 2 * E + 2 + begins[None, :] + tl.cumsum(used, axis=0) - used
        tl.store(dispatch + at, rows[:, None] * K + placed, mask=used > 0)
    else:
        if restricted:
            voters = tl.zeros([BLOCK_T], tl.int32)
            if VOTE == "affinity":
                for start in range(0, T, BLOCK_T):
                    token = start + rows
                    _, _, _, _, counts = load_tile(
                        choice, combine, topk_index, topk_weight, token_mask, token, token < T, E, K, BLOCK_E
                    )
                    voters += counts.to(tl.int32)
                voting = tl.sum(voters, axis=0)
            votes = tl.zeros([BLOCK_E], tl.float64)
            forced = tl.zeros([BLOCK_E], tl.int32)
            for start in range(0, T, BLOCK_T):
                token = start + rows
                scores, weighing, own_weight, own_slot, counts = load_tile(
                    choice, combine, topk_index, topk_weight, token_mask, token, token < T, E, K, BLOCK_E
                )
                some_votes, some_forced = tile_votes(
                    scores,
                    weighing,
                    own_weight,
                    own_slot,
                    counts,
                    voting,
                    K,
                    VOTE,
                    GUARANTEE,
                    SENSITIVITY,
                    POWER,
                    ALPHA,
                    BETA,
                    BLOCK_E,
                )
                votes += some_votes
                forced = tl.maximum(forced, some_forced)
                if VOTE != "affinity":
                    voters += counts.to(tl.int32)
            kept = kept_set(votes, forced, limit, least, tl.sum(voters, axis=0), BLOCK_E)
        for start in range(0, T, BLOCK_T):
            token = start + rows
            scores, weighing, own_weight, own_slot, counts = load_tile(
                choice, combine, topk_index, topk_weight, token_mask, token, token < T, E, K, BLOCK_E
            )
            tile_choice(
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
        # The program reads back what its own threads have written.
        tl.debug_barrier()
        counts = count_slots(index, 0, T * K, E, BLOCK_E, BLOCK_SLOTS)
        begins = write_header(dispatch, active, counts, E, BLOCK_E)
        place_slots(index, dispatch, 0, T * K, begins, E, BLOCK_E)
