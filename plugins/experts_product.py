"""The experts' inner loop: the product of some of an expert's pairs with some rows of its matrix.

Both matmuls have one shape: for an expert and some of its pairs, y[i, n] = sum over d of x[i, d] * w[n, d], with n
an output row of the expert's matrix. `tile_product` is that, for some pairs and some rows, whatever the weights are in.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806, SIM108 -- the compiler wants `if` for constants, and sizes are named as in the glossary: T, E, K, H, I

import triton
import triton.language as tl

from lynx_trt.plugins.experts_fp4 import dequantize_fp4
from lynx_trt.plugins.experts_fp8 import load_fp8_scales, widen_fp8
from lynx_trt.plugins.experts_int4 import dequantize_int4
from lynx_trt.plugins.experts_packed import load_scales


@triton.jit
def load_pairs(x, here, start, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The values from `start` on of some pairs, [BLOCK_T, BLOCK_D]; 0 of those not `here` and past D. `x` are pointers
    to the first of each pair's values, [BLOCK_T].
    """
    d = start + tl.arange(0, BLOCK_D)
    # The mask of a dimension that is always inside is left out: it would split the wide loads.
    if D % BLOCK_D == 0:
        mask = here[:, None]
    else:
        mask = here[:, None] & (d < D)[None, :]
    return tl.load(x[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def load_matrix_tile(at, valid, inside, ALL_VALID: tl.constexpr, ALL_INSIDE: tl.constexpr):
    """What lies at some pointers, 0 of rows that are not `valid` and past the end of the sum, not `inside`.

    Both masks broadcast to the tile's shape; one that is always True is left out, since it would split the wide loads.
    """
    if ALL_VALID and ALL_INSIDE:
        tile = tl.load(at)
    elif ALL_VALID:
        tile = tl.load(at, mask=inside, other=0)
    elif ALL_INSIDE:
        tile = tl.load(at, mask=valid, other=0)
    else:
        tile = tl.load(at, mask=valid & inside, other=0)
    return tile


@triton.jit
def float_product(
    x,  # pointers to the first of the D values of each pair, [BLOCK_T]
    here,  # which pairs there are, [BLOCK_T]
    w,  # pointer to the expert's matrix [N,D], transposed [D,N]
    rows,  # the matrix' output rows, [ROWS]
    valid,  # which rows there are, [ROWS]
    begin,  # the first of the summed dimension, a multiple of BLOCK_D
    end,  # past the last of it
    N: tl.constexpr,
    D: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See `tile_product`."""
    d = tl.arange(0, BLOCK_D)
    product = tl.zeros([ROWS, BLOCK_T] if SWAP else [BLOCK_T, ROWS], tl.float32)
    for start in range(begin, end, BLOCK_D):
        inside = start + d < D
        # The weights first: where the pairs lie has to be read before they can be.
        if TRANSPOSED:
            at = w + (start + d)[:, None] * N + rows[None, :]
            w_tile = load_matrix_tile(at, valid[None, :], inside[:, None], ALL_ROWS, D % BLOCK_D == 0)
        else:
            at = w + rows[:, None] * D + (start + d)[None, :]
            w_tile = load_matrix_tile(at, valid[:, None], inside[None, :], ALL_ROWS, D % BLOCK_D == 0)
        x_tile = load_pairs(x, here, start, D, BLOCK_D)
        if SWAP:
            left = tl.trans(w_tile) if TRANSPOSED else w_tile
            product = tl.dot(left, tl.trans(x_tile), product, input_precision=PRECISION)
        else:
            right = w_tile if TRANSPOSED else tl.trans(w_tile)
            product = tl.dot(x_tile, right, product, input_precision=PRECISION)
    if SWAP:
        product = tl.trans(product)
    return product


@triton.jit
def packed_product(
    x,  # pointers to the first of the D values of each pair, [BLOCK_T]
    here,  # which pairs there are, [BLOCK_T]
    w,  # pointer to the expert's matrix [N, D / 2] int8
    scales,  # pointer to what is beside it, [N, D / BLOCK], with ZEROS [N, 2 D / BLOCK]
    rows,  # the matrix' output rows, [ROWS]
    valid,  # which rows there are, [ROWS]
    begin,  # the first of the summed dimension, a multiple of BLOCK_D
    end,  # past the last of it
    D: tl.constexpr,
    INT4: tl.constexpr,
    BLOCK: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    SWAP: tl.constexpr,
):
    """See `tile_product`; of int4, or else MXFP4 or NVFP4. One of BLOCK_D and BLOCK is a multiple of the other."""
    byte = tl.arange(0, BLOCK_D // 2)
    product = tl.zeros([ROWS, BLOCK_T] if SWAP else [BLOCK_T, ROWS], tl.float32)
    # A turn ahead: so few bytes a row are no copy to shared memory, and nothing else would have them come early.
    next_scale, next_zero = load_scales(scales, rows, valid, begin, D, BLOCK, ZEROS, BLOCK_D)
    for start in range(begin, end, BLOCK_D):
        at = w + rows[:, None] * (D // 2) + (start // 2 + byte)[None, :]
        inside = (start // 2 + byte < D // 2)[None, :]
        packed = load_matrix_tile(at, valid[:, None], inside, ALL_ROWS, D % BLOCK_D == 0)
        x_tile = load_pairs(x, here, start, D, BLOCK_D)
        scale, zero = next_scale, next_zero
        next_scale, next_zero = load_scales(scales, rows, valid, start + BLOCK_D, D, BLOCK, ZEROS, BLOCK_D)
        if INT4:
            low, high = dequantize_int4(packed, scale, zero, x_tile.dtype, ZEROS, ROWS, BLOCK_D)
        else:
            low, high = dequantize_fp4(packed, scale, x_tile.dtype, ROWS, BLOCK_D)
        even, odd = tl.split(tl.reshape(x_tile, [BLOCK_T, BLOCK_D // 2, 2]))
        if SWAP:
            product = tl.dot(low, tl.trans(even), product)
            product = tl.dot(high, tl.trans(odd), product)
        else:
            product = tl.dot(even, tl.trans(low), product)
            product = tl.dot(odd, tl.trans(high), product)
    if SWAP:
        product = tl.trans(product)
    return product


@triton.jit
def fp8_product(
    x,  # pointers to the first of the D values of each pair, [BLOCK_T]
    here,  # which pairs there are, [BLOCK_T]
    w,  # pointer to the expert's matrix [N,D] int8
    scales,  # pointer to its scales [N, D / 128] float32
    rows,  # the matrix' output rows, [ROWS]
    valid,  # which rows there are, [ROWS]
    begin,  # the first of the summed dimension, a multiple of BLOCK_D
    end,  # past the last of it
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    SWAP: tl.constexpr,
):
    """See `tile_product`; BLOCK_D divides 128."""
    tl.static_assert(128 % BLOCK_D == 0)
    d = tl.arange(0, BLOCK_D)
    product = tl.zeros([ROWS, BLOCK_T] if SWAP else [BLOCK_T, ROWS], tl.float32)
    # A turn ahead, as MXFP4's: a value a row is no copy to shared memory.
    coming = load_fp8_scales(scales, rows, valid, begin, D)
    for start in range(begin, end, BLOCK_D):
        at = w + rows[:, None] * D + (start + d)[None, :]
        packed = load_matrix_tile(at, valid[:, None], True, ALL_ROWS, True)
        x_tile = load_pairs(x, here, start, D, BLOCK_D)
        scale = coming
        coming = load_fp8_scales(scales, rows, valid, start + BLOCK_D, D)
        values = widen_fp8(packed, x_tile.dtype)
        if SWAP:
            product += tl.dot(values, tl.trans(x_tile)) * scale[:, None]
        else:
            product += tl.dot(x_tile, tl.trans(values)) * scale[None, :]
    if SWAP:
        product = tl.trans(product)
    return product


@triton.jit
def tile_product(
    x,  # pointers to the first of the D values of each pair, [BLOCK_T]
    here,  # which pairs there are, [BLOCK_T]
    weights,  # the experts' matrices [E,N,D], transposed [E,D,N]; in fp8 int8 [E,N,D], in others int8 [E,N,D/2]
    scales,  # of quantized weights: [E,N,scales of a row]
    expert,  # int64
    rows,  # the matrix' output rows, [ROWS]
    valid,  # which rows there are, [ROWS]
    begin,  # the first of the summed dimension, a multiple of BLOCK_D
    end,  # past the last of it
    N: tl.constexpr,
    D: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply x @ w.T for some pairs and rows, over begin..end-1 of D, float32 [BLOCK_T, ROWS].

    ALL_ROWS: `valid` is all True, known when compiling. SWAP: let the rows be the matmul's M, of which Hopper's
    matrix instructions want 64, and the pairs its N, which may be 16.
    """
    if WEIGHTS == "fp8":
        w, scales = weights + expert * (N * D), scales + expert * (N * (D // 128))
        product = fp8_product(x, here, w, scales, rows, valid, begin, end, D, BLOCK_T, ROWS, BLOCK_D, ALL_ROWS, SWAP)
    elif WEIGHTS == "float":
        w = weights + expert * (N * D)
        product = float_product(
            x,
            here,
            w,
            rows,
            valid,
            begin,
            end,
            N,
            D,
            TRANSPOSED,
            BLOCK_T,
            ROWS,
            BLOCK_D,
            ALL_ROWS,
            SWAP,
            PRECISION,
        )
    else:
        FP4: tl.constexpr = WEIGHTS == "mxfp4" or WEIGHTS == "nvfp4"
        ZEROS: tl.constexpr = WEIGHTS == "int4_g32_zeros" or WEIGHTS == "int4_g128_zeros"
        WIDE: tl.constexpr = WEIGHTS == "int4_g128" or WEIGHTS == "int4_g128_zeros"
        tl.static_assert(FP4 or ZEROS or WIDE or WEIGHTS == "int4_g32")
        BLOCK: tl.constexpr = 16 if WEIGHTS == "nvfp4" else 128 if WIDE else 32
        w, scales = weights + expert * (N * (D // 2)), scales + expert * (N * (D // BLOCK * (2 if ZEROS else 1)))
        product = packed_product(
            x,
            here,
            w,
            scales,
            rows,
            valid,
            begin,
            end,
            D,
            not FP4,
            BLOCK,
            ZEROS,
            BLOCK_T,
            ROWS,
            BLOCK_D,
            ALL_ROWS,
            SWAP,
        )
    return product
