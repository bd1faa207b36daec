"""LynxExperts for a decode batch: bound by reading the active experts' weights, which happens once.

Three launches: gate_up (with the activation) into a workspace, down (with the bias) into another, each with a row a
pair, and combine, which adds a token's slots in their order, times their weights: no atomics, so the same bits every
time. gate_up also writes where each slot's row is, for combine.

A program has one active expert and some of its rows; a program past the last active expert ends at once, so nothing
of an inactive expert is read and the host need not know how many there are. It takes all pairs of its expert against
each tile of weights (ONE_TILE), or, where an expert can have more than BLOCK_T of them, programs next to each other
share the weights through L2.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: E741, N803, N806, SIM102 -- sizes are named as in the glossary: T, E, K, H, I; constants have an `if` apart

import triton
import triton.language as tl

from lynx_trt.plugins.dependent_launch import let_next_start, prefetch_lines, wait_for_earlier
from lynx_trt.plugins.experts_parts import (
    activate_gate_up,
    expert_items,
    find_item,
    gate_up_rows,
    write_places,
)
from lynx_trt.plugins.experts_product import tile_product

# Tiles of pairs that share a tile of weights before the next one: a decode batch has few.
GROUP = tl.constexpr(8)


@triton.jit
def program_work(
    dispatch,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    N_TILES: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """A program's (expert, tile of its rows, first pair, pair past the last, whether there is such work)."""
    item = tl.program_id(0)
    if ONE_TILE:
        # There are no more items than tiles of E experts, so these loads are inside and need not wait for `active`.
        # Asking all of them whether there is work keeps the compiler from putting off some until it is known.
        slot = item // N_TILES
        tile = item % N_TILES
        first = tl.load(dispatch + 1 + slot)
        last = tl.load(dispatch + 2 + slot)
        expert = tl.load(dispatch + 2 + E + slot)
        exists = (slot < tl.load(dispatch)) & (first < last) & (expert >= 0)
    else:
        tiles, ends = expert_items(dispatch, E, BLOCK_E, BLOCK_T, N_TILES)
        exists = item < tl.max(ends, axis=0)
        expert, tile, first, last = find_item(dispatch, tiles, ends, item, exists, E, BLOCK_T, N_TILES, GROUP)
        last = tl.minimum(last, first + BLOCK_T)
    return expert.to(tl.int64), tile, first, last, exists


@triton.jit
def prefetch_down(
    down,
    expert,  # int64
    row,  # the first row
    begin,  # the first of the summed dimension
    H: tl.constexpr,
    I: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Have the first PREFETCH values of each of BLOCK_H rows brought to L2; lines past a matrix' end become its last.

    PACKED: two values a byte.
    """
    BYTES: tl.constexpr = down.dtype.element_ty.primitive_bitwidth // 8
    OUTER: tl.constexpr = I if TRANSPOSED else H  # of the matrix as it lies in memory
    ROW: tl.constexpr = H * BYTES if TRANSPOSED else I * BYTES // (2 if PACKED else 1)  # bytes
    WIDE: tl.constexpr = BLOCK_H * BYTES if TRANSPOSED else PREFETCH * BYTES // (2 if PACKED else 1)
    first, offset = (begin, row) if TRANSPOSED else (row, begin)
    outer = tl.minimum(first + tl.arange(0, PREFETCH if TRANSPOSED else BLOCK_H), OUTER - 1)
    inside = offset * BYTES // (2 if PACKED else 1) + tl.arange(0, max(WIDE // 128, 1)) * 128
    inside = tl.minimum(inside, ROW - 128)
    at = down.to(tl.pointer_type(tl.int8)) + expert * (OUTER * ROW)
    prefetch_lines(at + outer.to(tl.int64)[:, None] * ROW + inside[None, :])


@triton.jit
def gate_up_decode_kernel(
    hidden,  # [T,H] float
    gate_up,  # [E,R,H] float, transposed [E,H,R]; R is 2 I, ungated I; quantized int8 [E,R,H] or [E,R,H/2]
    gate_up_scale,  # of quantized weights: float32 [E,R,H/128], or int8 [E,R,H/32]
    gate_up_bias,  # [E,R] float; not read without HAS_BIAS
    dispatch,  # [2E+2+TK] int32 (see dispatch_kernel.py)
    inner,  # [TK,I] float, out: a row a pair, in the order of the dispatch
    where,  # [T,K] int32, out: which pair a slot is; those of empty slots are not written
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SWAP: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (items,), items = ceil(I / BLOCK_I) x active experts (ONE_TILE), or x tiles of their pairs."""
    N_TILES: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    R: tl.constexpr = 2 * I if GATED else I
    wait_for_earlier(PROGRAMMATIC)
    let_next_start(PROGRAMMATIC)
    expert, tile, first, last, exists = program_work(dispatch, E, BLOCK_E, BLOCK_T, N_TILES, ONE_TILE)
    if not exists:
        return
    rows, valid = gate_up_rows(tile * BLOCK_I, I, BLOCK_I, GATED, INTERLEAVED)
    column = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    if HAS_BIAS:
        bias = tl.load(gate_up_bias + expert * R + rows, mask=valid, other=0.0).to(tl.float32)
    # One round, unless an expert has more pairs than the launch was chosen for (a token that names one twice).
    for start in range(first, last, BLOCK_T):
        pair = start + tl.arange(0, BLOCK_T)
        here = pair < last
        token = (tl.load(dispatch + 2 * E + 2 + pair, mask=here, other=0) // K).to(tl.int64)
        product = tile_product(
            hidden + token * H,
            here,
            gate_up,
            gate_up_scale,
            expert,
            rows,
            valid,
            0,
            H,
            R,
            H,
            TRANSPOSED,
            WEIGHTS,
            BLOCK_T,
            2 * BLOCK_I if GATED else BLOCK_I,
            BLOCK_H,
            I % BLOCK_I == 0,
            SWAP,
            PRECISION,
        )
        if HAS_BIAS:
            product += bias[None, :]
        value = activate_gate_up(product, BLOCK_T, BLOCK_I, ACTIVATION, GATED, INTERLEAVED, ALPHA, LIMIT, UP_OFFSET)
        at = inner + pair.to(tl.int64)[:, None] * I + column[None, :]
        tl.store(at, value.to(inner.dtype.element_ty), mask=here[:, None] & (column < I)[None, :])
        if tile == 0:
            write_places(dispatch, where, start, last, E, BLOCK_T)


@triton.jit
def down_decode_kernel(
    inner,  # [TK,I] float
    down,  # [E,H,I] float, transposed [E,I,H]; quantized int8 [E,H,I] or [E,H,I/2]
    down_scale,  # of quantized weights: float32 [E,H,I/128], or int8 [E,H,I/32]
    down_bias,  # [E,H] float; not read without HAS_BIAS
    dispatch,  # [2E+2+TK] int32
    partial,  # [TK,SPLIT,H] float32, out: a row a pair
    E: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SWAP: tl.constexpr,
    SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (items,), items = SPLIT x ceil(H / BLOCK_H) x active experts (ONE_TILE), or x tiles of their pairs.

    Each of SPLIT programs has a part of the sum over I, so that a few experts too occupy the whole GPU. While gate_up
    still runs, a program may ask for the weights that it begins with (PREFETCH of the sum).
    """
    N_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    PIECE: tl.constexpr = ((I + BLOCK_I - 1) // BLOCK_I + SPLIT - 1) // SPLIT * BLOCK_I
    # The metadata is from before gate_up, which began only when it was there.
    expert, item, first, last, exists = program_work(dispatch, E, BLOCK_E, BLOCK_T, N_TILES * SPLIT, ONE_TILE)
    begin = item % SPLIT * PIECE
    rows = item // SPLIT * BLOCK_H + tl.arange(0, BLOCK_H)
    if HAS_BIAS:
        biased = rows < tl.where(exists & (begin == 0), H, 0)  # the first summand alone
        bias = tl.load(down_bias + expert * H + rows, mask=biased, other=0.0).to(tl.float32)
    if PREFETCH > 0:
        if exists:
            PACKED: tl.constexpr = WEIGHTS != "float" and WEIGHTS != "fp8"
            row = item // SPLIT * BLOCK_H
            prefetch_down(down, expert, row, begin, H, I, TRANSPOSED, PACKED, BLOCK_H, PREFETCH)
    wait_for_earlier(PROGRAMMATIC)
    let_next_start(PROGRAMMATIC)
    if not exists:
        return
    for start in range(first, last, BLOCK_T):
        pair = start + tl.arange(0, BLOCK_T)
        here = pair < last
        product = tile_product(
            inner + pair.to(tl.int64) * I,
            here,
            down,
            down_scale,
            expert,
            rows,
            rows < H,
            begin,
            min(begin + PIECE, I) if SPLIT > 1 else I,
            H,
            I,
            TRANSPOSED,
            WEIGHTS,
            BLOCK_T,
            BLOCK_H,
            BLOCK_I,
            H % BLOCK_H == 0,
            SWAP,
            PRECISION,
        )
        if HAS_BIAS:
            product += bias[None, :]
        at = partial + (pair.to(tl.int64) * SPLIT + item % SPLIT)[:, None] * H + rows[None, :]
        tl.store(at, product.to(partial.dtype.element_ty), mask=here[:, None] & (rows < H)[None, :])
