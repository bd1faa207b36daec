"""LynxExperts for a prefill: a grouped matmul over the pairs of each active expert, bound by arithmetic.

The same three launches as in decode (gate_up, down, `combine_kernel.py`) with tiles made for the matrix units. As many
programs as fill the GPU take one item after another, an item being a tile of an expert's pairs against a tile of its
rows; how many there are is known on the GPU only. Nothing is padded: the last tile of an expert is masked, so the
workspace is a row of I and a row of H for each of the T K pairs, whatever E is.

With DESCRIPTORS (SM 90 and later) the weights come through the bulk tensor copy engine, which needs no registers for
addresses. A program makes its descriptors once; they lie in global scratch memory that the launcher provides.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: E741, N803, N806 -- the compiler wants `if` for constants, and sizes are named as in the glossary: T, E, K, H, I

import triton
import triton.language as tl

from lynx_trt.plugins.dependent_launch import let_next_start, wait_for_earlier
from lynx_trt.plugins.experts_parts import (
    activate_gate_up,
    activate_halves,
    expert_items,
    find_item,
    gate_up_rows,
    write_places,
)
from lynx_trt.plugins.experts_product import load_pairs, tile_product


@triton.jit
def matrix_descriptor(
    w,
    E: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The descriptor of the matrices [E,N,D], transposed [E,D,N], in blocks of ROWS x BLOCK_D of one expert."""
    if TRANSPOSED:
        descriptor = tl.make_tensor_descriptor(w, [E, D, N], [D * N, N, 1], [1, BLOCK_D, ROWS])
    else:
        descriptor = tl.make_tensor_descriptor(w, [E, N, D], [N * D, D, 1], [1, ROWS, BLOCK_D])
    return descriptor


@triton.jit
def load_matrix(descriptor, expert, row, d, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A block of an expert's matrix as the right operand, [BLOCK_D, ROWS]; zeros outside the matrix."""
    if TRANSPOSED:
        block = tl.reshape(descriptor.load([expert, d, row]), [BLOCK_D, ROWS])
    else:
        block = tl.trans(tl.reshape(descriptor.load([expert, row, d]), [ROWS, BLOCK_D]))
    return block


@triton.jit
def descriptor_product(
    x,  # pointers to the first of the D values of each pair, [BLOCK_T]
    here,  # which pairs there are, [BLOCK_T]
    descriptor,  # of the experts' matrices
    expert,
    row,  # the first row
    D: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply x @ w.T for some pairs and ROWS rows from `row`, float32 [BLOCK_T, ROWS]."""
    product = tl.zeros([BLOCK_T, ROWS], tl.float32)
    for start in range(0, D, BLOCK_D):
        x_tile = load_pairs(x, here, start, D, BLOCK_D)
        w_tile = load_matrix(descriptor, expert, row, start, TRANSPOSED, ROWS, BLOCK_D)
        product = tl.dot(x_tile, w_tile, product, input_precision=PRECISION)
    return product


@triton.jit
def copied_product(
    pairs,  # descriptor of the values of all pairs, [pairs, D]
    first,  # the first pair; past an expert's last come those of the next, whose products nobody stores
    descriptor,  # of the experts' matrices
    expert,
    row,  # the first row
    D: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `descriptor_product`, of pairs that lie one after another and come through the copy engine too."""
    product = tl.zeros([BLOCK_T, ROWS], tl.float32)
    for start in range(0, D, BLOCK_D):
        x_tile = pairs.load([first, start])
        w_tile = load_matrix(descriptor, expert, row, start, TRANSPOSED, ROWS, BLOCK_D)
        product = tl.dot(x_tile, w_tile, product, input_precision=PRECISION)
    return product


@triton.jit
def descriptor_halves(
    x,  # as in `descriptor_product`
    here,
    descriptor,
    expert,
    row,  # the first row of gate; that of up is I further
    D: tl.constexpr,
    I: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gate and up of some pairs, which lie I rows apart, float32 [BLOCK_T, ROWS] each."""
    gate = tl.zeros([BLOCK_T, ROWS], tl.float32)
    up = tl.zeros([BLOCK_T, ROWS], tl.float32)
    for start in range(0, D, BLOCK_D):
        x_tile = load_pairs(x, here, start, D, BLOCK_D)
        gate_tile = load_matrix(descriptor, expert, row, start, TRANSPOSED, ROWS, BLOCK_D)
        gate = tl.dot(x_tile, gate_tile, gate, input_precision=PRECISION)
        up_tile = load_matrix(descriptor, expert, row + I, start, TRANSPOSED, ROWS, BLOCK_D)
        up = tl.dot(x_tile, up_tile, up, input_precision=PRECISION)
    return gate, up


@triton.jit
def gate_up_prefill_kernel(
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
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SWAP: tl.constexpr,
    FLATTEN: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (programs,), any number: each takes every programs-th item."""
    N_TILES: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    R: tl.constexpr = 2 * I if GATED else I
    HALVES: tl.constexpr = DESCRIPTORS and GATED and not INTERLEAVED
    ROWS: tl.constexpr = 2 * BLOCK_I if GATED and not HALVES else BLOCK_I
    wait_for_earlier(PROGRAMMATIC)
    let_next_start(PROGRAMMATIC)
    if DESCRIPTORS:  # in scratch memory, where those of the launch before were
        descriptor = matrix_descriptor(gate_up, E, R, H, TRANSPOSED, ROWS, BLOCK_H)
    tiles, ends = expert_items(dispatch, E, BLOCK_E, BLOCK_T, N_TILES)
    for item in tl.range(tl.program_id(0), tl.max(ends, axis=0), tl.num_programs(0), flatten=FLATTEN):
        expert, tile, first, last = find_item(dispatch, tiles, ends, item, True, E, BLOCK_T, N_TILES, GROUP)
        pair = first + tl.arange(0, BLOCK_T)
        here = pair < last
        token = (tl.load(dispatch + 2 * E + 2 + pair, mask=here, other=0) // K).to(tl.int64)
        x = hidden + token * H
        column = tile * BLOCK_I + tl.arange(0, BLOCK_I)
        if HALVES:
            if HAS_BIAS:
                bias = gate_up_bias + expert * R + column
                gate_bias = tl.load(bias, mask=column < I, other=0.0).to(tl.float32)
                up_bias = tl.load(bias + I, mask=column < I, other=0.0).to(tl.float32)
            gate, up = descriptor_halves(
                x, here, descriptor, expert, tile * BLOCK_I, H, I, TRANSPOSED, BLOCK_T, ROWS, BLOCK_H, PRECISION
            )
            if HAS_BIAS:
                gate += gate_bias[None, :]
                up += up_bias[None, :]
            value = activate_halves(gate, up, ACTIVATION, ALPHA, LIMIT, UP_OFFSET)
        else:
            rows, valid = gate_up_rows(tile * BLOCK_I, I, BLOCK_I, GATED, INTERLEAVED)
            if HAS_BIAS:
                bias = tl.load(gate_up_bias + expert * R + rows, mask=valid, other=0.0).to(tl.float32)
            if DESCRIPTORS:
                product = descriptor_product(
                    x, here, descriptor, expert, tile * ROWS, H, TRANSPOSED, BLOCK_T, ROWS, BLOCK_H, PRECISION
                )
            else:
                product = tile_product(
                    x,
                    here,
                    gate_up,
                    gate_up_scale,
                    expert.to(tl.int64),
                    rows,
                    valid,
                    0,
                    H,
                    R,
                    H,
                    TRANSPOSED,
                    WEIGHTS,
                    BLOCK_T,
                    ROWS,
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
        # No branch, which the compiler can't have in a loop that it flattens.
        write_places(dispatch, where, first, tl.where(tile == 0, last, first), E, BLOCK_T)


@triton.jit
def down_prefill_kernel(
    inner,  # [TK,I] float
    down,  # [E,H,I] float, transposed [E,I,H]; quantized int8 [E,H,I] or [E,H,I/2]
    down_scale,  # of quantized weights: float32 [E,H,I/128], or int8 [E,H,I/32]
    down_bias,  # [E,H] float; not read without HAS_BIAS
    dispatch,  # [2E+2+TK] int32
    partial,  # [TK,H] float, out: a row a pair
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
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SWAP: tl.constexpr,
    COPIED: tl.constexpr,
    FLATTEN: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (programs,), any number: each takes every programs-th item."""
    N_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    tiles, ends = expert_items(dispatch, E, BLOCK_E, BLOCK_T, N_TILES)
    wait_for_earlier(PROGRAMMATIC)
    let_next_start(PROGRAMMATIC)
    if DESCRIPTORS:  # in scratch memory, where those of the launch before were
        descriptor = matrix_descriptor(down, E, H, I, TRANSPOSED, BLOCK_H, BLOCK_I)
    if COPIED:
        number = tl.load(dispatch + 1 + tl.load(dispatch))
        pairs = tl.make_tensor_descriptor(inner, [number, I], [I, 1], [BLOCK_T, BLOCK_I])
    for item in tl.range(tl.program_id(0), tl.max(ends, axis=0), tl.num_programs(0), flatten=FLATTEN):
        expert, tile, first, last = find_item(dispatch, tiles, ends, item, True, E, BLOCK_T, N_TILES, GROUP)
        pair = first + tl.arange(0, BLOCK_T)
        here = pair < last
        x = inner + pair.to(tl.int64) * I
        rows = tile * BLOCK_H + tl.arange(0, BLOCK_H)
        if HAS_BIAS:  # before the product, so that nothing has to wait for it after it
            bias = tl.load(down_bias + expert * H + rows, mask=rows < H, other=0.0).to(tl.float32)
        if COPIED:
            product = copied_product(
                pairs, first, descriptor, expert, tile * BLOCK_H, I, TRANSPOSED, BLOCK_T, BLOCK_H, BLOCK_I, PRECISION
            )
        elif DESCRIPTORS:
            product = descriptor_product(
                x, here, descriptor, expert, tile * BLOCK_H, I, TRANSPOSED, BLOCK_T, BLOCK_H, BLOCK_I, PRECISION
            )
        else:
            product = tile_product(
                x,
                here,
                down,
                down_scale,
                expert.to(tl.int64),
                rows,
                rows < H,
                0,
                I,
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
        at = partial + pair.to(tl.int64)[:, None] * H + rows[None, :]
        tl.store(at, product.to(partial.dtype.element_ty), mask=here[:, None] & (rows < H)[None, :])
