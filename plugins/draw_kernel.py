"""The next token of each row of logits, drawn where the logits are: `lynx_trt.runtime.sampling.draw` in two launches.

A row's logits are cut into blocks. `draw_blocks_kernel` reads them once: of each block its best token, the sum of
exp((logit - best) / temperature), and, for top-k and top-p, its LEADING best tokens. `draw_kernel`, a program a row,
needs of the logits only the block that the draw falls into. What goes to the host is a token a row, where the logits
of a row are 0.6 MB at 152,000 tokens, and drawing from them takes a core a millisecond.

A nucleus (what top-k and top-p leave) is looked for among the NUCLEUS best of all blocks' leading tokens, as far down
as no block has more that could come before; where it is larger, the token is BEYOND and the host draws. exp is float32,
sums are float64, in a fixed order.

A token and its logit are one int64, its key: the order of the float32 in the upper half, and below it the token
counted down, so that the largest key is the best token, of equals the lower. A NaN is above all.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, SIM102 -- sizes are named as in the glossary: T, V; constants want an `if` of their own

import triton
import triton.language as tl

from lynx_trt.plugins.select_kernel import LARGEST, is_finite, sort_order

# As lynx_trt.runtime.backend.NOT_FINITE; and a token that is to be drawn on the host.
NOT_FINITE = tl.constexpr(-2)
BEYOND = tl.constexpr(-3)

# Below every key.
NO_KEY = tl.constexpr(-(2**63))
LOW = tl.constexpr(2**32 - 1)


@triton.jit
def key_of(value, token):
    """A token's key, from its logit."""
    order = tl.where(value != value, LARGEST, sort_order(value)).to(tl.int64)
    return (order << 32) - token.to(tl.int64) + LOW


@triton.jit
def token_of(key):
    """The token of a key, int32."""
    return (-(key & LOW) + LOW).to(tl.int32)


@triton.jit
def value_of(key):
    """The logit of a key; a NaN where it was one or there is no key."""
    order = (key >> 32).to(tl.int32)
    bits = tl.where(order >= 0, order, order ^ LARGEST)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def weight_of(value, best, scale):
    """exp((value - best) / temperature), float64, and 0 for -inf and NaN."""
    power = tl.exp((value - best) * scale).to(tl.float64)
    return tl.where(value > -float("inf"), power, 0.0)


@triton.jit
def where_reached(weights, place, target):
    """The first place at which the weights, summed up to there, are above target; never one of weight 0."""
    beyond = tl.sum((tl.cumsum(weights, axis=0) <= target).to(tl.int32), axis=0)
    last = tl.max(tl.where(weights > 0, place, 0), axis=0)
    return tl.minimum(beyond, last)


@triton.jit
def is_restricted(row, scale, top_p, top_k, V: tl.constexpr):
    """Whether a row is drawn from a part of its tokens."""
    k = tl.load(top_k + row)
    return (tl.load(scale + row) != 0) & ((tl.load(top_p + row) < 1) | ((k > 0) & (k < V)))


@triton.jit(do_not_specialize=["T"])
def draw_blocks_kernel(
    logits,  # [T,V] float32
    scale,  # [T] float32: 1 / temperature; 0: greedy
    top_p,  # [T] float64; not read if LEADING is 0, and so the next
    top_k,  # [T] int32
    best,  # [T,BLOCKS] int64, out: the key of a block's best token
    mass,  # [T,BLOCKS] float64, out: the sum of exp((logit - best) * scale)
    leading,  # [T,BLOCKS,LEADING] int64, out: the keys of a block's best tokens, falling; of restricted rows alone
    T,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    LEADING: tl.constexpr,
):
    """Grid: (T * BLOCKS,)."""
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    token = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * V + token, mask=token < V, other=-float("inf"))
    key = tl.where(token < V, key_of(value, token), NO_KEY)
    top = tl.max(key, axis=0)
    tl.store(best + row * BLOCKS + block, top)
    weights = weight_of(value, value_of(top), tl.load(scale + row))
    tl.store(mass + row * BLOCKS + block, tl.sum(weights, axis=0))
    if LEADING > 0:
        # Six times the work of all that is above.
        if is_restricted(row, scale, top_p, top_k, V):
            place = (row * BLOCKS + block) * LEADING + tl.arange(0, LEADING)
            tl.store(leading + place, tl.topk(key, LEADING))


@triton.jit
def draw_from_nucleus(
    leading,
    row,
    best,
    scale,
    top_p,
    top_k,
    uniform,
    total,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    LEADING: tl.constexpr,
    SLOTS: tl.constexpr,
    NUCLEUS: tl.constexpr,
):
    """A row's token under top-k and top-p, int32; BEYOND where the nucleus may be more than what is known in order."""
    slot = tl.arange(0, SLOTS)
    begin = leading + row * BLOCKS * LEADING
    key = tl.topk(tl.load(begin + slot, mask=slot < BLOCKS * LEADING, other=NO_KEY), NUCLEUS)
    # A block with more tokens than those that are here has none of the others above its last.
    block = tl.arange(0, BLOCK_B)
    cut = (block < BLOCKS) & (V - block * BLOCK > LEADING)
    last = tl.load(begin + block * LEADING + LEADING - 1, mask=cut, other=NO_KEY)
    known = (key > NO_KEY) & (key >= tl.max(last, axis=0))
    count = tl.sum(known.to(tl.int32), axis=0)
    limited = (top_k > 0) & (top_k < V)
    there = known & ((tl.arange(0, NUCLEUS) < top_k) | (limited == 0))
    weights = tl.where(there, weight_of(value_of(key), best, scale), 0.0)
    ends = tl.cumsum(weights, axis=0)
    here = tl.sum(weights, axis=0)
    wanted = top_p * tl.where(limited, here, total)
    kept = there & (ends - weights < wanted)
    weights = tl.where(kept, weights, 0.0)
    # The draw goes from the likeliest on.
    place = where_reached(weights, tl.arange(0, NUCLEUS), uniform * tl.sum(weights, axis=0))
    drawn = tl.sum(tl.where(tl.arange(0, NUCLEUS) == place, token_of(key), 0), axis=0)
    whole = tl.where(limited, top_k <= count, here >= wanted) | (count >= V)
    return tl.where(whole, drawn, BEYOND)


@triton.jit(do_not_specialize=["T"])
def draw_kernel(
    logits,  # [T,V] float32
    scale,  # [T] float32: 1 / temperature; 0: greedy
    top_p,  # [T] float64; 1: no limit
    top_k,  # [T] int32; 0: no limit
    uniform,  # [T] float64, 0 to below 1
    best,  # [T,BLOCKS] int64
    mass,  # [T,BLOCKS] float64
    leading,  # [T,BLOCKS,LEADING] int64; not read if LEADING is 0
    token,  # [T] int32, out
    T,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    LEADING: tl.constexpr,
    SLOTS: tl.constexpr,
    NUCLEUS: tl.constexpr,
):
    """Grid: (T,). A row with a top-k or top-p needs LEADING above 0."""
    row = tl.program_id(0).to(tl.int64)
    by, chance = tl.load(scale + row), tl.load(uniform + row)
    block = tl.arange(0, BLOCK_B)
    keys = tl.load(best + row * BLOCKS + block, mask=block < BLOCKS, other=NO_KEY)
    sums = tl.load(mass + row * BLOCKS + block, mask=block < BLOCKS, other=0.0)
    top = tl.max(keys, axis=0)
    largest = value_of(top)
    weights = tl.where(block < BLOCKS, sums * weight_of(value_of(keys), largest, by), 0.0)
    total = tl.sum(weights, axis=0)
    target = chance * total
    chosen = where_reached(weights, block, target)
    before = tl.sum(tl.where(block < chosen, weights, 0.0), axis=0)
    within = tl.arange(0, BLOCK)
    at = chosen * BLOCK + within
    value = tl.load(logits + row * V + at, mask=at < V, other=-float("inf"))
    drawn = chosen * BLOCK + where_reached(weight_of(value, largest, by), within, target - before)
    if LEADING > 0:
        if is_restricted(row, scale, top_p, top_k, V):
            drawn = draw_from_nucleus(
                leading,
                row,
                largest,
                by,
                tl.load(top_p + row),
                tl.load(top_k + row),
                chance,
                total,
                V,
                BLOCK,
                BLOCKS,
                BLOCK_B,
                LEADING,
                SLOTS,
                NUCLEUS,
            )
    drawn = tl.where(by == 0, token_of(top), drawn)
    tl.store(token + row, tl.where(is_finite(largest), drawn, NOT_FINITE))
