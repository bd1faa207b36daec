"""LynxLinearAttention, token after token: gated linear attention, and the gated delta rule.

A program has a head's state for some of its values, and reads and writes it once: everything else is of one token. It
reads its part before it writes it, for `present_state` may lie where `past_state` does.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806 -- sizes are named as in export/ops.py: T tokens, B sequences, S = T / B, N and G heads of
# states and keys, D keys by M values

import triton
import triton.language as tl


@triton.jit
def load_block(pointer, mask):
    """A block as float32, 0 where the mask has none."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def normalized(x, EPSILON: tl.constexpr):
    """A query or key [BLOCK_D] divided by its norm, unless EPSILON is 0."""
    return x / tl.sqrt(tl.sum(x * x, axis=0) + EPSILON) if EPSILON > 0 else x


@triton.jit(do_not_specialize=["T", "B"])
def linear_attention_kernel(
    query,  # [T,G D] float
    key,  # [T,G D] float
    value,  # [T,N M] float
    decay,  # [T,N] float32; with PER_KEY [T,N D]
    beta,  # [T,N] float32
    past_state,  # [B,N,D,M] float32
    lengths,  # [B] int64
    output,  # [T,N M] float, out
    present_state,  # [B,N,D,M] float32, out
    T,
    B,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    PER_KEY: tl.constexpr,
    DELTA: tl.constexpr,
    SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Grid: (B * N * ceil(M / BLOCK_M),). BLOCK_D is D at least."""
    N_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    DECAYS: tl.constexpr = D if PER_KEY else 1
    part = tl.program_id(0) // N_TILES
    head = part % N
    sequence = (part // N).to(tl.int64)
    row = tl.arange(0, BLOCK_D)
    column = tl.program_id(0) % N_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    keys, values = row < D, column < M
    S = T // B
    length = tl.minimum(tl.maximum(tl.load(lengths + sequence), 0), S)
    within = (sequence * N + head) * (D * M) + row[:, None] * M + column[None, :]
    state = tl.load(past_state + within, mask=keys[:, None] & values[None, :], other=0.0)

    # Of the sequence's first token; the next one's are loaded while this one's are used.
    begin = sequence * S
    at_key = (begin * G + head // (N // G)) * D + row
    at_value = (begin * N + head) * M + column
    at_decay = (begin * N + head) * DECAYS + (row if PER_KEY else 0)
    at_beta = begin * N + head
    there = length > 0
    q = load_block(query + at_key, keys & there)
    k = load_block(key + at_key, keys & there)
    v = load_block(value + at_value, values & there)
    g = load_block(decay + at_decay, keys & there if PER_KEY else there)
    b = load_block(beta + at_beta, there)
    for token in range(0, length):
        more = token + 1 < length
        at_key += G * D
        at_decay += N * DECAYS
        at_beta += N
        next_q = load_block(query + at_key, keys & more)
        next_k = load_block(key + at_key, keys & more)
        next_v = load_block(value + at_value + N * M, values & more)
        next_g = load_block(decay + at_decay, keys & more if PER_KEY else more)
        next_b = load_block(beta + at_beta, more)
        k = normalized(k, EPSILON)
        state *= tl.exp(g)[:, None] if PER_KEY else tl.exp(g)
        if DELTA:
            v -= tl.sum(state * k[:, None], axis=0)
        state += k[:, None] * (b * v)[None, :]
        result = tl.sum(state * normalized(q, EPSILON)[:, None], axis=0) * SCALE
        tl.store(output + at_value, result.to(output.dtype.element_ty), mask=values)
        at_value += N * M
        q, k, v, g, b = next_q, next_k, next_v, next_g, next_b
    for _ in range(length, S):
        tl.store(output + at_value, tl.zeros([BLOCK_M], output.dtype.element_ty), mask=values)
        at_value += N * M

    # No thread may write what another has not read yet.
    tl.debug_barrier()
    tl.store(present_state + within, state, mask=keys[:, None] & values[None, :])
