"""LynxSelect in one launch, for a small decode batch: `lynx_trt.selection.select` and its dispatch metadata.

One program does it all: every step needs the whole batch (votes, then the kept set, then each token's choice), and a
second launch costs more than the work on a few tokens. Larger batches take the same functions in several launches:
`select_blocks_kernel.py`.

Exactness, as in the reference: whatever depends on the order of a sum is float64, rounded to float32 before it is
compared; a tie goes to the lower index. A row that does not count has a `counts` of False, and nothing of it is used.

Work is laid out for latency, which is that of instructions and of exchanges between warps, not of data. Everything of a
token is spread over its row of E at once, so that sums and maxima of a row stay inside a warp; only sums over tokens
go through shared memory, several in one exchange. What a token has K of is held as K values a row, and not as E.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 -- sizes are named as in the glossary: T, E, K

import triton
import triton.language as tl

from lynx_trt.plugins.dependent_launch import let_next_start, wait_for_earlier
from lynx_trt.plugins.dispatch_kernel import write_header

# Below the order of every finite float32.
LOWEST = tl.constexpr(-(2**31))
LARGEST = tl.constexpr(2**31 - 1)
# The vote for an expert that a token forces: more than all others', and whatever is added.
FORCED = tl.constexpr(float("inf"))
# Pairs of experts that are compared at a time.
MOST_PAIRS = tl.constexpr(128 * 128)
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
    """Some tokens: choice, combine, topk weight (0 if not own) and own, [BLOCK_T, BLOCK_E]; counts and the sum of the
    topk weights (float64, negative ones as 0), [BLOCK_T].

    A token counts if it is no padding and all its values are finite; of others no expert is their own. An index out of
    range is the caller's mistake: it is nobody's expert.
    """
    expert = tl.arange(0, BLOCK_E)[None, :]
    here = inside[:, None] & (expert < E)
    scores = tl.load(choice + token[:, None] * E + expert, mask=here, other=0.0)
    weighing = tl.load(combine + token[:, None] * E + expert, mask=here, other=0.0)
    counts = inside & (tl.load(token_mask + token, mask=inside, other=0) != 0)
    # NaN where no index of the token is the expert: a thread has too few predicates for those of all its experts.
    own_weight = tl.full(scores.shape, float("nan"), tl.float32)
    total = tl.zeros(token.shape, tl.float64)
    for k in tl.static_range(K):
        mine = tl.load(topk_index + token * K + k, mask=inside, other=-1).to(tl.int32)[:, None]
        value = tl.load(topk_weight + token * K + k, mask=inside, other=0.0)
        own_weight = tl.where(expert == mine, value[:, None], own_weight)
        counts &= is_finite(value)
        total += tl.maximum(value, 0.0).to(tl.float64)
    counts &= tl.min((is_finite(scores) & is_finite(weighing)).to(tl.int32), axis=1) > 0
    own = (own_weight == own_weight) & counts[:, None]
    return scores, weighing, own_weight, own, counts, tl.where(counts, total, 0.0)


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
    total,
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
            most = tl.maximum(tl.max(tl.where(own, own_weight, 0.0), axis=1), 0.0)
            confidence = (most.to(tl.float64) * (1.0 / tl.maximum(total, TINY)) * K - 1.0) / (K - 1)
            forced |= own & (confidence.to(tl.float32) < SENSITIVITY)[:, None]
    return forced


@triton.jit
def tile_votes(
    scores,
    weighing,
    own_weight,
    own,
    counts,
    total,
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
    """The votes of some tokens for each expert, float64 [BLOCK_T, BLOCK_E]: of those that a token forces, FORCED.

    `voting` is the number of tokens that vote in the whole batch; only `affinity` asks for it.
    """
    if VOTE == "score":
        votes = row_shares(weighing, counts[:, None])
    elif VOTE == "count":
        votes = own.to(tl.float64)
    elif VOTE == "affinity":
        votes = tl.where(own, affinities(weighing, own, voting, ALPHA, BETA), 0.0)
    else:
        votes = (
            tl.maximum(tl.where(own, own_weight, 0.0), 0.0).to(tl.float64) * (1.0 / tl.maximum(total, TINY))[:, None]
        )
        if POWER == 2.0:
            votes = votes * votes
        elif POWER != 1.0:
            votes = tl.where(votes > 0, tl.exp(tl.log(tl.where(votes > 0, votes, 1.0)) * POWER), 0.0)
    if GUARANTEE > 0 or SENSITIVITY > 0:
        forced = forced_experts(scores, own_weight, own, total, K, GUARANTEE, SENSITIVITY, BLOCK_E)
        votes = tl.where(forced, FORCED, votes)
    return votes


@triton.jit
def add_both(left, other_left, right, other_right):
    """Two sums, which `tl.reduce` takes in one exchange between warps."""
    return left + right, other_left + other_right


@triton.jit
def is_restricted(budget, floor, E: tl.constexpr):
    """Whether anything can be lost under this budget and this floor."""
    return (budget < E) | (floor > 0)


@triton.jit
def kept_set(votes, voting, budget, floor, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """1 for each expert that is kept, int32 [BLOCK_E]: the forced ones, then by falling vote up to the budget, as long
    as the vote is above `floor` (float32) for each of the `voting` tokens.
    """
    ballots = votes.to(tl.float32)
    rank = tl.zeros([BLOCK_E], tl.int32)
    if budget < E:
        # Votes are not negative, so the bits of the float32 order as it does, and can be subtracted. A thread has all
        # others of its own and adds up the signs of differences: a comparison is followed by a wait for its predicate.
        # Of equal votes the lower index is before: another 1 less. The compiler would make comparisons of differences
        # of indices that can't overflow; that the budget is not negative it does not know.
        key = (ballots + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
        width: tl.constexpr = min(MOST_PAIRS // BLOCK_E, BLOCK_E)  # more pairs do not fit registers
        for start in range(0, BLOCK_E, width):
            expert = start + tl.arange(0, width)
            others = key if width == BLOCK_E else tl.gather(key, expert, axis=0)
            lower = ((expert | (budget & LOWEST))[:, None] - tl.arange(0, BLOCK_E)[None, :]) >> 31
            rank -= tl.sum((key[None, :] - others[:, None] + lower) >> 31, axis=0)
    # Both factors are exact in float32, and the product is rounded once, as in the reference.
    enough = ballots > floor * voting.to(tl.float32)
    kept = (votes == FORCED) | ((rank < budget) & enough)
    # Gathering ends the influence of how votes lie in registers on how the tiles lie that `kept` is used with.
    return tl.gather(kept.to(tl.int32), tl.arange(0, BLOCK_E), axis=0)


@triton.jit
def tile_choice(
    scores,
    own,
    counts,
    combine,
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

    Returns the experts that were written, [BLOCK_T, BLOCK_K], and 1 for each that a token uses, [BLOCK_T, BLOCK_E].
    """
    expert = tl.arange(0, BLOCK_E)[None, :]
    slot = tl.arange(0, BLOCK_K)[None, :]
    at = token[:, None] * K + slot
    real = inside[:, None] & (slot < K)
    # A row that loses nothing keeps what it had, bit for bit.
    had = real & counts[:, None]
    experts = tl.load(topk_index + at, mask=had, other=-1)
    weights = tl.load(topk_weight + at, mask=had, other=0.0)
    used = own.to(tl.int32)
    if restricted:
        lost = tl.max((own & (kept == 0)[None, :]).to(tl.int32), axis=1)[:, None] > 0
        allowed = lost & (kept > 0)[None, :] & (expert < E)
        if not REMAP:
            allowed &= own
        # Taken one by one: the lowest index of the best; where nothing is left, no expert.
        order = tl.where(allowed, sort_order(scores), LOWEST)
        taken = tl.zeros(scores.shape, tl.int32)
        picks = tl.full(at.shape, -1, tl.int32)
        # Several in one number, since each number goes from one layout to another: to a row of K from one of E.
        width: tl.constexpr = 8 if BLOCK_E < 256 else 16
        for group in tl.static_range(0, K, 64 // width):
            several = tl.zeros(token.shape, tl.int64)
            for k in range(group, min(group + 64 // width, K)):
                best = tl.max(order, axis=1)
                first = tl.min(tl.where(order == best[:, None], expert, BLOCK_E), axis=1)
                first = tl.where(best == LOWEST, -1, first)
                several |= (first + 1).to(tl.int64) << ((k - group) * width)
                taken = tl.where(expert == first[:, None], 1, taken)
                order = tl.where(expert == first[:, None], LOWEST, order)
            here = (slot >= group) & (slot < group + 64 // width)
            one = (several[:, None] >> ((slot - group) * width)) & ((1 << width) - 1)
            picks = tl.where(here, one.to(tl.int32) - 1, picks)
        raw = tl.load(combine + token[:, None] * E + picks, mask=picks >= 0, other=0.0).to(tl.float64)
        factor = tl.zeros(token.shape, tl.float64) + SCALE
        if RENORMALIZE:
            total = tl.sum(raw, axis=1)
            factor = tl.where(total != 0, factor / tl.where(total != 0, total, 1.0), 0.0)
        experts = tl.where(lost, picks.to(tl.int64), experts)
        weights = tl.where(lost, (raw * factor[:, None]).to(tl.float32), weights)
        used = tl.where(lost, taken, used)
    tl.store(index + at, experts, mask=real)
    tl.store(weight + at, weights, mask=real)
    return experts, used


@triton.jit
def bits_set(mask):
    """How many bits of an int32 or an int64 are set."""
    number = _bits_of_word(mask.to(tl.int32))
    if mask.dtype == tl.int64:
        number += _bits_of_word((mask >> 32).to(tl.int32))
    return number


@triton.jit
def _bits_of_word(word):
    # The compiler knows this for one instruction.
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def count_used(used, BLOCK_T: tl.constexpr):
    """Of what `tile_choice` returns: how many tokens use an expert [BLOCK_E], and for `write_pairs` which: a bit a
    token [BLOCK_E], or of more than 64 tokens how many before each [BLOCK_T, BLOCK_E].
    """
    if BLOCK_T <= 64:
        row = tl.arange(0, BLOCK_T)[:, None]
        which = tl.sum(used << (row if BLOCK_T <= 32 else row.to(tl.int64)), axis=0)
        number = bits_set(which)
    else:
        which = tl.cumsum(used, axis=0) - used
        number = tl.sum(used, axis=0)
    return number, which


@triton.jit
def write_pairs(
    dispatch,
    experts,
    begins,
    which,
    first,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the pairs of the tokens from `first` on: `experts` [BLOCK_T, BLOCK_K]; `begins` [BLOCK_E], where their
    pairs of each expert begin; `which` of `count_used`.
    """
    row = tl.arange(0, BLOCK_T)[:, None]
    known = (experts >= 0) & (experts < E)
    expert = tl.where(known, experts, 0).to(tl.int32)
    flat = tl.reshape(expert, [BLOCK_T * BLOCK_K])
    place = tl.reshape(tl.gather(begins, flat, axis=0), [BLOCK_T, BLOCK_K])
    if BLOCK_T <= 64:
        # What lies before a token are the lower bits.
        tokens = tl.reshape(tl.gather(which, flat, axis=0), [BLOCK_T, BLOCK_K])
        place += bits_set(tokens & ((tl.full([1, 1], 1, which.dtype) << row) - 1))
    else:
        place += tl.gather(which, expert, axis=1)
    pair = (first + row) * K + tl.arange(0, BLOCK_K)[None, :]
    tl.store(dispatch + 2 * E + 2 + place, pair, mask=known)


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
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (1,). Votes over all tokens, of which there are at most BLOCK_T, the kept set, the choice, the metadata."""
    wait_for_earlier(PROGRAMMATIC)
    let_next_start(PROGRAMMATIC)
    token = tl.arange(0, BLOCK_T)
    limit, least = tl.load(budget), tl.load(floor)
    restricted = is_restricted(limit, least, E)
    scores, weighing, own_weight, own, counts, total = load_tile(
        choice, combine, topk_index, topk_weight, token_mask, token, token < T, E, K, BLOCK_E
    )
    kept = tl.full([BLOCK_E], 1, tl.int32)
    if restricted:
        voting = 0
        if VOTE == "affinity":
            voting = tl.sum(counts.to(tl.int32), axis=0)
        votes = tile_votes(
            scores,
            weighing,
            own_weight,
            own,
            counts,
            total,
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
        voters = tl.broadcast_to(counts.to(tl.int32)[:, None], votes.shape)
        votes, voters = tl.reduce((votes, voters), 0, add_both)
        kept = kept_set(votes, voters, limit, least, E, BLOCK_E)
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
    begins = write_header(dispatch, active, number[None, :], 0, E, BLOCK_E, BLOCK_T * K < 1 << 16)
    write_pairs(dispatch, experts, tl.reshape(begins, [BLOCK_E]), which, 0, E, K, BLOCK_T, BLOCK_K)
