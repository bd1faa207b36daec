"""LynxCausalConv: a short convolution along each sequence, a channel at a time, that keeps its last inputs as a state.

A program has all of a sequence's tokens for its channels, and so all of its part of the state: it reads that before it
writes it, for `present_state` may lie where `past_state` does.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code=assignment
# ruff: noqa: N803, N806 -- sizes are named as in export/ops.py: T tokens, B sequences, S = T / B, C channels, W weights

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of a block of float32."""
    return x * tl.sigmoid(x) if ACTIVATION == "silu" else x


@triton.jit(do_not_specialize=["T", "B"])
def causal_conv_kernel(
    values,  # [T,C] float
    weight,  # [C,W] float
    past_state,  # [B,W-1,C] float
    lengths,  # [B] int64
    bias,  # [C] float; not read without HAS_BIAS
    output,  # [T,C] float, out
    present_state,  # [B,W-1,C] float, out
    T,
    B,
    C: tl.constexpr,
    W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: (B * ceil(C / BLOCK_C),). ROWS is a power of two, W - 1 at least."""
    N_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    KEPT: tl.constexpr = W - 1
    sequence = (tl.program_id(0) // N_TILES).to(tl.int64)
    channel = tl.program_id(0) % N_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    S = T // B
    length = tl.minimum(tl.maximum(tl.load(lengths + sequence), 0), S)
    # Row r of what a sequence has is its past state's up to KEPT, and a token's beyond.
    past = past_state + sequence * KEPT * C + channel
    tokens = values + (sequence * S - KEPT) * C + channel
    results = output + sequence * S * C + channel
    first = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else 0.0

    kept = tl.arange(0, ROWS)
    at = length + kept
    wanted = (kept < KEPT)[:, None] & inside[None, :]
    old = tl.load(past[None, :] + at[:, None] * C, mask=wanted & (at < KEPT)[:, None], other=0.0)
    new = tl.load(tokens[None, :] + at[:, None] * C, mask=wanted & (at >= KEPT)[:, None], other=0.0)
    state = tl.where((at < KEPT)[:, None], old, new)

    factors = ()
    for tap in tl.static_range(W):
        factor = tl.load(weight + channel * W + tap, mask=inside, other=0.0).to(tl.float32)
        factors = factors + (factor,)  # noqa: RUF005
    if S == 1:
        total = tl.zeros([BLOCK_C], tl.float32) + first
        for tap in tl.static_range(W):
            rows = past + tap * C if tap < KEPT else tokens + KEPT * C
            total += tl.load(rows, mask=inside, other=0.0).to(tl.float32) * factors[tap]
        tl.store(results, activate(total, ACTIVATION).to(output.dtype.element_ty), mask=inside)
    else:
        for start in range(0, S, BLOCK_S):
            token = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
            there = (token < S)[:, None] & inside[None, :]
            sums = tl.zeros([BLOCK_S, BLOCK_C], tl.float32) + first
            for tap in tl.static_range(W):
                row = token + tap
                x = tl.load(tokens[None, :] + row[:, None] * C, mask=there & (row >= KEPT)[:, None], other=0.0)
                sums += x.to(tl.float32) * factors[tap][None, :]
            if start < KEPT:
                for tap in tl.static_range(KEPT):
                    row = token + tap
                    x = tl.load(past[None, :] + row[:, None] * C, mask=there & (row < KEPT)[:, None], other=0.0)
                    sums += x.to(tl.float32) * factors[tap][None, :]
            at_results = results[None, :] + token[:, None] * C
            tl.store(at_results, activate(sums, ACTIVATION).to(output.dtype.element_ty), mask=there)

    # No thread may write what another has not read yet.
    tl.debug_barrier()
    at_present = present_state + (sequence * KEPT + kept)[:, None] * C + channel[None, :]
    tl.store(at_present, state, mask=wanted)
