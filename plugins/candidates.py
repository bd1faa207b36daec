"""Which launches a tuner tries, of the experts' matmuls and of the selection: pure functions of sizes and an SM.

Every combination that can run and might be good, in one list a matmul, so that all of them can be compiled before
anything is measured, where there need be no GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

from lynx_trt.plugins.launch import (
    BLOCKS_HERE,
    CLUSTER_PROGRAMS,
    CLUSTER_SM,
    CLUSTER_TOKENS,
    FEWEST_ROWS,
    MASK_BITS,
    PREFILL_BUCKET,
    ROW_VALUES,
    SHARED_MEMORY,
    TILE_VALUES,
    ExpertsLaunch,
    MatmulLaunch,
    SelectLaunch,
    experts_estimate,
    fewest_tokens,
    power_of_two,
    row_of,
    select_estimate,
    shared_bytes,
    tokens_bucket,
)
from lynx_trt.plugins.specs import ExpertsSpec

PARTS = ("gate_up", "down")

# Around the bucket from which on the prefill kernels are estimated to be better, both kinds are tried.
_BOTH = (PREFILL_BUCKET // 4, PREFILL_BUCKET)

# Accumulators of a thread, in float32: with more of them than half of its registers it spills.
_ACCUMULATORS = 128


def families(spec: ExpertsSpec, tokens: int) -> tuple[bool, ...]:
    """Whether the decode kernels (False), the prefill ones (True) or both are tried for a batch."""
    bucket = tokens_bucket(tokens, spec.experts, spec.experts_per_token)
    return tuple(each for each in (False, True) if (bucket >= _BOTH[0] if each else bucket <= _BOTH[1]))


def estimate(spec: ExpertsSpec, sm: int, tokens: int, *, prefill: bool) -> ExpertsLaunch:
    """The estimate for a batch, of the kind of kernels that is asked for."""
    bucket = tokens_bucket(tokens, spec.experts, spec.experts_per_token)
    bucket = max(bucket, PREFILL_BUCKET) if prefill else min(bucket, PREFILL_BUCKET // 2)
    return experts_estimate(bucket, spec.hidden, spec.inner, spec.dtype, sm, form=spec.form)


def candidates(spec: ExpertsSpec, sm: int, tokens: int, part: str, *, prefill: bool) -> list[MatmulLaunch]:
    """What is tried for a matmul, the estimate first."""
    first: MatmulLaunch = getattr(estimate(spec, sm, tokens, prefill=prefill), part)
    rows = rows_a_value(spec, part)
    summed = spec.hidden if part == "gate_up" else spec.inner
    if not prefill:
        made = _decode(spec, tokens, rows, summed, part)
    else:
        made = _quantized_prefill(rows) if spec.form.quantized else _prefill(first, rows, part)
    usable = (each for each in made if fits(each, spec, sm, rows_a_value=rows))
    return list(dict.fromkeys([first, *usable]))


def select_candidates(tokens: int, experts: int, experts_per_token: int, sm: int) -> list[SelectLaunch]:
    """What is tried for LynxSelect, the estimate first: one program, a cluster where there are any, and blocks of 4 to
    64 tokens, with few warps.
    """
    first = select_estimate(tokens, experts, experts_per_token)
    row = row_of(experts)
    fewest = fewest_tokens(experts, experts_per_token)
    made = []
    if tokens * row <= 2 * ROW_VALUES:
        block_t = max(tokens, FEWEST_ROWS)
        made += [SelectLaunch(1, block_t, warps, block_t, first.reason) for warps in (4, 8, 16)]
    if sm >= CLUSTER_SM:
        made += [replace(each, reason=first.reason) for each in _clusters(tokens, row)]
    for block in (4, 8, 16, 32, 64):
        if fewest <= block < tokens <= BLOCKS_HERE * block:
            block_t = min(block, max(TILE_VALUES // row, 1))
            ways = ((4, 2), (4, 4), (8, 2), (8, 4), (8, 8))
            made += [SelectLaunch(0, block_t, warps, block, first.reason, narrow=narrow) for warps, narrow in ways]
    return list(dict.fromkeys([first, *made]))


def _clusters(tokens: int, row: int) -> Iterator[SelectLaunch]:
    """Programs that hold all their tokens, or, where that would be the most programs, go through tiles of them."""
    for programs, warps in itertools.product((2, 4, CLUSTER_PROGRAMS), (4, 8, 16)):
        block = tokens // programs
        # With fewer values a thread a token's row is spread over several warps, with more they spill.
        if block <= CLUSTER_TOKENS and 4 <= block * row // (32 * warps) <= (16 if warps == 16 else 8):
            yield SelectLaunch(programs, block, warps, block, "")
        tile = 8 * 32 * warps // row
        if programs == CLUSTER_PROGRAMS and 1 <= tile <= min(block // 2, MASK_BITS):
            yield SelectLaunch(programs, tile, warps, block, "")


def with_part(launch: ExpertsLaunch, part: str, matmul: MatmulLaunch) -> ExpertsLaunch:
    """A launch with another one of its matmuls."""
    return replace(launch, gate_up=matmul) if part == "gate_up" else replace(launch, down=matmul)


def rows_a_value(spec: ExpertsSpec, part: str) -> int:
    """Rows of weights that make a value: gate and up are two."""
    return 2 if part == "gate_up" and spec.form.gated else 1


def fits(launch: MatmulLaunch, spec: ExpertsSpec, sm: int, *, rows_a_value: int) -> bool:
    """Whether a launch can run: tiles that the matrix units take, registers for their sums, an SM's shared memory."""
    programs = launch.per_multiprocessor or 2
    shared = shared_bytes(launch, spec.dtype, sm, rows_a_value=rows_a_value, weights=spec.form.weights)
    return (
        launch.block_n >= 16
        and launch.block_d >= 32
        # The copy engine's boxes have at most 256 rows.
        and rows_a_value * launch.block_n <= 256
        and launch.block_t * rows_a_value * launch.block_n <= _ACCUMULATORS * 32 * launch.warps
        and 32 * launch.warps * programs <= 2048
        and shared * programs <= SHARED_MEMORY[sm]
    )


def _decode(spec: ExpertsSpec, tokens: int, rows_a_value: int, summed: int, part: str) -> Iterator[MatmulLaunch]:
    """Tiles of 32 to 128 rows and of some of the sum; for larger batches with 16 to 64 pairs."""
    most = min(max(power_of_two(tokens), 16), 64)
    pairs: Iterable[int] = [each for each in (16, 32, 64) if each <= most]
    for block_t, rows, depth, stages in itertools.product(pairs, (32, 64, 128), _depths(spec, summed), (3, 4, 6)):
        one_tile = tokens <= block_t
        for warps, swap in ((2, False), (4, False), (8, False), (4, True)):
            if (warps == 8 and rows < 128) or (swap and rows < 64):
                continue
            # The fewer warps a tile has, the more rows each arranges the pairs for, which is much beside 4 or 8 bits.
            if warps == 2 and not (spec.form.quantized and rows == 64):
                continue
            # A thread holds its part of quantized weights as numbers, two a register.
            if rows * depth > 128 * 32 * warps if spec.form.quantized else swap and depth > 128:
                continue
            tile = MatmulLaunch(block_t, rows // rows_a_value, depth, warps, stages, swap)
            yield tile
            if part == "down" and one_tile and stages == 4 and not swap:
                yield from (replace(tile, split=split) for split in (2, 4) if split * depth <= summed)


def _depths(spec: ExpertsSpec, summed: int) -> tuple[int, ...]:
    """How much of the sum a decode tile takes: of 4 bits a quarter of the bytes, of FP8 no more than shares a scale."""
    if spec.form.quantized:
        return (64, 128) if spec.form.weights == "fp8" else (64, 128, 256)
    return tuple(depth for depth in (64, 128, 256) if summed % depth == 0) or (64,)


def _prefill(first: MatmulLaunch, rows_a_value: int, part: str) -> Iterator[MatmulLaunch]:
    """Tiles of 64 or 128 pairs and 128 or 256 rows, one or two programs a multiprocessor; of those of the usual depth
    also with loads ahead of the next item, and with the pairs of down through the copy engine.
    """
    for block_t, rows, depth in itertools.product((64, 128), (128, 256), (32, 64, 128)):
        for stages, warps, programs in itertools.product((3, 4, 5), (4, 8), (1, 2)):
            # A tile that 8 warps share is to be worth it; one program a multiprocessor needs them to fill it.
            if (warps == 8) != (block_t * rows >= 128 * 128) and programs == 1:
                continue
            tile = MatmulLaunch(
                block_t,
                rows // rows_a_value,
                depth,
                warps,
                stages,
                descriptors=first.descriptors,
                per_multiprocessor=programs,
            )
            forms = (False, True) if first.descriptors and depth == 64 and stages < 5 else (False,)
            for flatten, copied in itertools.product(forms, forms if part == "down" else (False,)):
                yield replace(tile, flatten=flatten, copied=copied)


def _quantized_prefill(rows_a_value: int) -> Iterator[MatmulLaunch]:
    """Tiles of 64 or 128 pairs and rows, with the weights on either side of the product."""
    for block_t, rows, depth, stages in itertools.product((64, 128), (64, 128), (64, 128), (3, 4)):
        for warps, programs, swap in itertools.product((4, 8), (1, 2), (False, True)):
            if (warps == 8) == (block_t * rows >= 128 * 128):
                yield MatmulLaunch(
                    block_t, rows // rows_a_value, depth, warps, stages, swap, per_multiprocessor=programs
                )
