"""Dispatch metadata: which experts a batch uses and which (token, slot) pairs each of them serves.

One int32 buffer of `2 E + 2 + T K` entries, made from `index[T,K]` and read by the experts' kernels:

    entry            name     what
    0                active   A, the number of distinct experts in use
    1 .. E+1         offsets  [E+1]: the pairs of the a-th expert in use are pairs[offsets[a] : offsets[a+1]]
    E+2 .. 2E+1      experts  [E]: the experts in use, ascending
    2E+2 ..          pairs    [T K]: token * K + slot, by expert, then ascending

What lies past A in `offsets` and `experts`, and past offsets[A] in `pairs`, is not written. An example, T = 3, K = 2,
E = 4: index [[2, 0], [2, -1], [0, 2]] gives active 2; experts 0, 2; offsets 0, 2, 5; pairs 1, 4, 0, 2, 5.

A slot whose index is not in 0..E-1 is empty. A few tokens take one launch of one program. More of them are split into
blocks of SLOTS slots: count, scan and place, with a table of E counts for each block (launch.py chooses SLOTS so that
the table is no larger than 4 (T K + E)). Where there are few blocks, place does the scan itself.

No atomics anywhere: the same index gives the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 -- sizes are named as in the glossary: T, E, K

import triton
import triton.language as tl

from lynx_trt.plugins.dependent_launch import let_next_start, wait_for_earlier

# Slots whose places are found by comparing each with each: 128 x 128 fits the registers of 8 warps.
CHUNK = tl.constexpr(128)


@triton.jit
def count_slots(index, first, last, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the slots first..last-1 each expert serves, [BLOCK_E]; the lanes past E count nothing."""
    counts = tl.zeros([BLOCK_E], tl.int32)
    for start in range(first, last, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        expert = tl.load(index + slot, mask=slot < last, other=-1).to(tl.int32)
        counts += tl.histogram(expert, BLOCK_E, mask=(expert >= 0) & (expert < E))
    return counts


@triton.jit
def write_header(dispatch, active, counts, block, E: tl.constexpr, BLOCK_E: tl.constexpr, SHORT: tl.constexpr):
    """Write all but the pairs, in block 0; returns where each expert's pairs begin. `counts` and what is returned are
    [rows, BLOCK_E], all rows alike: one, or as many as what follows wants. SHORT: fewer than 2**16 pairs.
    """
    expert = tl.arange(0, BLOCK_E)[None, :]
    once = tl.arange(0, counts.shape[0])[:, None] + block == 0
    used = counts > 0
    # One running sum of both: the pairs so far in the lower half, the experts in use so far in the upper one.
    if SHORT:
        both = tl.cumsum(counts | (used.to(tl.int32) << 16), axis=1)
        ends = both & 0xFFFF
        number = both >> 16
    else:
        both = tl.cumsum(counts.to(tl.int64) | (used.to(tl.int64) << 32), axis=1)
        ends = both.to(tl.int32)
        number = (both >> 32).to(tl.int32)
    nothing = number * 0
    tl.store(active + nothing, number, mask=once & (expert == BLOCK_E - 1))
    tl.store(dispatch + nothing, number, mask=once & (expert == BLOCK_E - 1))
    tl.store(dispatch + 1 + nothing, nothing, mask=once & (expert == 0))
    tl.store(dispatch + 1 + number, ends, mask=once & used)
    tl.store(dispatch + 1 + E + number, tl.broadcast_to(expert, number.shape), mask=once & used)
    return ends - counts


@triton.jit
def place_slots(index, dispatch, first, last, begins, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Write the pairs of the slots first..last-1; `begins` [BLOCK_E] is where each expert's next pair goes."""
    lane = tl.arange(0, CHUNK)
    for start in range(first, last, CHUNK):
        slot = start + lane
        expert = tl.load(index + slot, mask=slot < last, other=-1).to(tl.int32)
        used = (expert >= 0) & (expert < E)
        expert = tl.where(used, expert, -1)
        earlier = (expert[:, None] == expert[None, :]) & (lane[:, None] < lane[None, :])
        rank = tl.sum(earlier.to(tl.int32), axis=0)  # down a column, most of which one thread holds
        place = tl.gather(begins, tl.where(used, expert, 0), axis=0) + rank
        tl.store(dispatch + 2 * E + 2 + place, slot, mask=used)
        begins += tl.histogram(expert, BLOCK_E, mask=used)


@triton.jit(do_not_specialize=["T"])
def dispatch_kernel(
    index,  # [T,K] int64
    dispatch,  # [2E+2+TK] int32, out
    active,  # [] int32, out: the number of experts in use once more, for whoever wants only that
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
    SHORT: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (1,). The whole metadata of a decode batch: one program, since its work is a few thousand compares."""
    wait_for_earlier(PROGRAMMATIC)
    let_next_start(PROGRAMMATIC)
    counts = count_slots(index, 0, T * K, E, BLOCK_E, BLOCK)
    begins = tl.reshape(write_header(dispatch, active, counts[None, :], 0, E, BLOCK_E, SHORT), [BLOCK_E])
    place_slots(index, dispatch, 0, T * K, begins, E, BLOCK_E)


@triton.jit(do_not_specialize=["T"])
def dispatch_count_kernel(
    index,  # [T,K] int64
    table,  # [ceil(TK / SLOTS), E] int32, out: how many slots of each block an expert serves
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (ceil(TK / SLOTS),). A histogram a block of slots."""
    wait_for_earlier(PROGRAMMATIC)
    let_next_start(PROGRAMMATIC)
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    counts = count_slots(index, block * SLOTS, tl.minimum(block * SLOTS + SLOTS, T * K), E, BLOCK_E, BLOCK)
    tl.store(table + block * E + expert, counts, mask=expert < E)


@triton.jit(do_not_specialize=["T"])
def dispatch_scan_kernel(
    table,  # [ceil(TK / SLOTS), E] int32, counts
    begins,  # the same, out: where a block's first pair of that expert goes
    dispatch,  # [2E+2+TK] int32, out: all but the pairs
    active,  # [] int32, out
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    SHORT: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (1,). Totals, then running sums down the blocks, ROWS of them at a time.

    One program: the table is at most T K + E entries, and some tens of kB in practice.
    """
    wait_for_earlier(PROGRAMMATIC)
    let_next_start(PROGRAMMATIC)
    blocks = tl.cdiv(T * K, SLOTS)
    expert = tl.arange(0, BLOCK_E)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    counts = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, blocks, ROWS):
        here = (start + row < blocks) & (expert < E)
        counts += tl.sum(tl.load(table + (start + row) * E + expert, mask=here, other=0), axis=0)
    places = tl.reshape(write_header(dispatch, active, counts[None, :], 0, E, BLOCK_E, SHORT), [BLOCK_E])
    for start in range(0, blocks, ROWS):
        here = (start + row < blocks) & (expert < E)
        at = (start + row) * E + expert
        rows = tl.load(table + at, mask=here, other=0)
        tl.store(begins + at, places[None, :] + tl.cumsum(rows, axis=0) - rows, mask=here)
        places += tl.sum(rows, axis=0)


@triton.jit(do_not_specialize=["T"])
def dispatch_place_kernel(
    index,  # [T,K] int64
    table,  # [ceil(TK / SLOTS), E] int32: the `begins` of the scan, or (SCAN_HERE) the counts
    dispatch,  # [2E+2+TK] int32, out: the pairs; all if SCAN_HERE
    active,  # [] int32, out if SCAN_HERE
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SLOTS: tl.constexpr,
    SCAN_HERE: tl.constexpr,
    ROWS: tl.constexpr,
    SHORT: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Grid: (ceil(TK / SLOTS),). Each block writes its pairs where the scan says."""
    wait_for_earlier(PROGRAMMATIC)
    let_next_start(PROGRAMMATIC)
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    if SCAN_HERE:
        blocks = tl.cdiv(T * K, SLOTS)
        row = tl.arange(0, ROWS)[:, None]
        totals = tl.zeros([BLOCK_E], tl.int32)
        before = tl.zeros([BLOCK_E], tl.int32)
        for start in range(0, blocks, ROWS):
            here = (start + row < blocks) & (expert < E)[None, :]
            counts = tl.load(table + (start + row) * E + expert[None, :], mask=here, other=0)
            totals += tl.sum(counts, axis=0)
            before += tl.sum(tl.where(start + row < block, counts, 0), axis=0)
        begins = write_header(dispatch, active, totals[None, :], block, E, BLOCK_E, SHORT)
        begins = tl.reshape(begins, [BLOCK_E]) + before
    else:
        begins = tl.load(table + block * E + expert, mask=expert < E, other=0)
    place_slots(index, dispatch, block * SLOTS, tl.minimum(block * SLOTS + SLOTS, T * K), begins, E, BLOCK_E)
