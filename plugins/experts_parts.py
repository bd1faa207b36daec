"""What the experts' kernels share beside the inner loop (experts_product.py): a program's work, the activation."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: E741, N803 -- the compiler wants `if` for constants, and sizes are named as in the glossary: T, E, K, H, I

import triton
import triton.language as tl

NAN = tl.constexpr(tl.PropagateNan.ALL)  # clamps pass NaN on, as NumPy's and PyTorch's do


# In a sum over experts, what each of them adds beside its number of tiles.
EXPERT = tl.constexpr(1 << 21)


@triton.jit
def expert_items(dispatch, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, N_TILES: tl.constexpr):
    """For each active expert, how many tiles of pairs it has and where its items end, [BLOCK_E] each.

    An expert has ceil(pairs / BLOCK_T) x N_TILES items; past the active experts there are none.
    """
    number = tl.arange(0, BLOCK_E)
    active = tl.load(dispatch)
    # Not masked by `active`, so that nothing waits for it.
    first = tl.load(dispatch + 1 + number, mask=number < E, other=0)
    last = tl.load(dispatch + 2 + number, mask=number < E, other=0)
    tiles = tl.where(number < active, (last - first + BLOCK_T - 1) // BLOCK_T, 0)
    return tiles, tl.cumsum(tiles * N_TILES, axis=0)


@triton.jit
def find_item(
    dispatch,
    tiles,
    ends,
    item,
    exists,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    N_TILES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """An item as (expert, tile of its rows, first pair, pair past the last of the expert); anything if none `exists`.

    Up to GROUP tiles of pairs of one tile of rows come one after another, so that programs which run at the same time
    read the same weights, from HBM once and then from L2; then the next tile of rows, for which those pairs are in L2.
    """
    # One sum, of the experts before in the upper bits and of their tiles in the lower ones: each is an exchange.
    before = tl.sum(tl.where(ends <= item, tiles + EXPERT, 0), axis=0)
    slot = before // EXPERT
    begin = tl.load(dispatch + 1 + slot, mask=exists, other=0)
    end = tl.load(dispatch + 2 + slot, mask=exists, other=0)
    expert = tl.load(dispatch + 2 + E + slot, mask=exists, other=0)
    local = item - before % EXPERT * N_TILES
    first = local // (GROUP * N_TILES) * GROUP
    size = tl.maximum(tl.minimum((end - begin + BLOCK_T - 1) // BLOCK_T - first, GROUP), 1)
    local = local % (GROUP * N_TILES)
    return expert, local // size, begin + (first + local % size) * BLOCK_T, end


@triton.jit
def write_places(dispatch, where, first, last, E: tl.constexpr, BLOCK_T: tl.constexpr):
    """Write for the slots of the pairs first..last-1, at most BLOCK_T, which pair each of them is."""
    pair = first + tl.arange(0, BLOCK_T)
    here = pair < last
    # Read once more: held since they told which tokens to read, they would take registers from the product.
    slot = tl.load(dispatch + 2 * E + 2 + pair, mask=here, other=0)
    tl.store(where + slot, pair, mask=here)


@triton.jit
def gate_up_rows(first, I: tl.constexpr, BLOCK_I: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The rows of gate_up that make the inner values first .. first + BLOCK_I - 1, and which of them there are.

    Gated: 2 BLOCK_I rows, in the order in which `split_gate_up` takes them apart.
    """
    if not GATED:
        rows = first + tl.arange(0, BLOCK_I)
        valid = rows < I
    elif INTERLEAVED:
        rows = 2 * first + tl.arange(0, 2 * BLOCK_I)
        valid = rows < 2 * I
    else:
        lane = tl.arange(0, 2 * BLOCK_I)
        inner = first + lane % BLOCK_I
        rows = inner + lane // BLOCK_I * I
        valid = inner < I
    return rows, valid


@triton.jit
def split_gate_up(product, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(gate, up), [BLOCK_T, BLOCK_I] each, of [BLOCK_T, 2 BLOCK_I]."""
    if INTERLEAVED:
        pairs = tl.reshape(product, [BLOCK_T, BLOCK_I, 2])
    else:
        pairs = tl.permute(tl.reshape(product, [BLOCK_T, 2, BLOCK_I]), [0, 2, 1])
    return tl.split(pairs)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """The activation of float32 values; `alpha` is silu's."""
    if ACTIVATION == "silu":
        result = z / (1.0 + tl.exp(-ALPHA * z))  # exp overflows to inf, and z / inf is 0
    elif ACTIVATION == "gelu":
        result = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(y)) is sigmoid(2 y).
        result = z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    elif ACTIVATION == "relu":
        result = tl.maximum(z, 0.0, propagate_nan=NAN)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.maximum(z, 0.0, propagate_nan=NAN)
        result = positive * positive
    return result


@triton.jit
def activate_halves(
    gate,
    up,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
):
    """act(gate) * (up + offset), both clamped by LIMIT before if it is not 0 (gate from above only)."""
    if LIMIT > 0:
        gate = tl.minimum(gate, LIMIT, propagate_nan=NAN)
        up = tl.maximum(tl.minimum(up, LIMIT, propagate_nan=NAN), -LIMIT, propagate_nan=NAN)
    return activate(gate, ACTIVATION, ALPHA) * (up + UP_OFFSET)


@triton.jit
def activate_gate_up(
    product,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
):
    """From the rows of `gate_up_rows` to inner values: `activate_halves`, or act(up) of ungated experts."""
    if GATED:
        gate, up = split_gate_up(product, BLOCK_T, BLOCK_I, INTERLEAVED)
        result = activate_halves(gate, up, ACTIVATION, ALPHA, LIMIT, UP_OFFSET)
    else:
        if LIMIT > 0:
            product = tl.maximum(tl.minimum(product, LIMIT, propagate_nan=NAN), -LIMIT, propagate_nan=NAN)
        result = activate(product, ACTIVATION, ALPHA)
    return result
