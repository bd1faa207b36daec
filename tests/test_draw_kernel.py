"""The draw of the next tokens on the GPU against `sampling.draw`, which is the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernel_process import on_device
from numpy.typing import NDArray

from lynx_trt.plugins import execute
from lynx_trt.plugins.aot import compile_for
from lynx_trt.plugins.plans import draw_plan
from lynx_trt.plugins.specs import DrawSpec, Op
from lynx_trt.runtime.backend import NOT_FINITE, Draws
from lynx_trt.runtime.draws import BEYOND
from lynx_trt.runtime.sampling import Sampling, draw, draws_of

Array = NDArray[Any]

# (tokens, block): one block that isn't full; ten whose tokens are all leading; three that have more, the last short.
SIZES = [(7, 32), (300, 32), (700, 256)]


def kernels(logits: Array, draws: Draws, block: int | None, *, nucleus: bool = True) -> list[int]:
    inputs = (logits, draws.scale, draws.top_p, draws.top_k, draws.uniform)
    tensors = [torch.from_numpy(np.ascontiguousarray(each)) for each in inputs]
    return [int(token) for token in on_device(execute.draw, DrawSpec(logits.shape[1], nucleus), *tensors, block=block)]


def draws_for(rows: int, *ways: Sampling, seed: int = 0) -> Draws:
    how = [(row, ways[row % len(ways)], np.random.default_rng([seed, row])) for row in range(rows)]
    return draws_of(rows, how)


@pytest.mark.parametrize(("vocabulary", "block", "nucleus"), [*((*size, False) for size in SIZES), (300, 32, True)])
def test_greedy(vocabulary: int, block: int, nucleus: bool) -> None:
    """Ties within and across blocks, the first and the last token, -inf, and zeros of both signs."""
    rng = np.random.default_rng(vocabulary)
    logits = np.round(rng.standard_normal((6, vocabulary)), 1).astype(np.float32)
    logits[1, 0] = logits[2, -1] = 9
    logits[3] = -np.inf
    logits[3, vocabulary // 2] = -5
    logits[4] = 0.0
    logits[4, :3] = -0.0
    logits[5] = -np.abs(logits[5])
    draws = draws_for(6, Sampling())
    assert kernels(logits, draws, block, nucleus=nucleus) == draw(logits, draws).tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    ("vocabulary", "block", "nucleus"),
    [*((*size, False) for size in SIZES), pytest.param(300, 32, True, marks=pytest.mark.slow)],
)
def test_temperature(vocabulary: int, block: int, nucleus: bool) -> None:
    """Draws from all tokens, peaked and nearly even, with tokens that can't be; the ends of the distribution."""
    rng = np.random.default_rng(vocabulary)
    logits = (rng.standard_normal((12, vocabulary)) * rng.choice([0.1, 3, 20], (12, 1))).astype(np.float32)
    logits[rng.random(logits.shape) < 0.2] = -np.inf
    logits[:, vocabulary // 2] = 0
    draws = draws_for(12, Sampling(0.7), Sampling(1.0), Sampling(2.5), Sampling(1e-30))
    draws.uniform[:2] = 0.0
    draws.uniform[2:4] = np.nextafter(1.0, 0.0)
    assert kernels(logits, draws, block, nucleus=nucleus) == draw(logits, draws).tolist()


@pytest.mark.parametrize(
    ("vocabulary", "block"), [SIZES[0], *(pytest.param(*each, marks=pytest.mark.slow) for each in SIZES[1:])]
)
def test_nucleus(vocabulary: int, block: int) -> None:
    """top-k and top-p, alone and together, beside rows that are greedy and rows that have neither."""
    rng = np.random.default_rng(vocabulary)
    logits = (rng.standard_normal((16, vocabulary)) * 4).astype(np.float32)
    logits[::2] = np.round(logits[::2])  # many equal ones, at the border of a nucleus too
    ways = [
        Sampling(1.0, 0.5),
        Sampling(0.7, 0.8),
        Sampling(1.0, top_k=1),
        Sampling(1.5, top_k=20),
        Sampling(1.0, 0.9, top_k=64),
        Sampling(1.0, top_k=vocabulary),  # no limit
        Sampling(1.0),
        Sampling(),
    ]
    draws = draws_for(16, *ways)
    expected = draw(logits, draws).tolist()
    got = kernels(logits, draws, block)
    drawn = [row for row in range(16) if got[row] != BEYOND]
    assert [got[row] for row in drawn] == [expected[row] for row in drawn]
    # Where a nucleus isn't within what is known, the host draws: hardly ever.
    assert len(drawn) >= 15
    assert not [row for row in range(16) if ways[row % 8].top_k in (1, 20) and got[row] == BEYOND]


def test_a_nucleus_beyond_what_is_known_is_the_hosts() -> None:
    """Even logits in blocks of 256, whose best 32 are at hand: after the first block's, others may come before."""
    logits = np.zeros((5, 700), np.float32)
    beyond, within = [Sampling(1.0, 0.5), Sampling(1.0, top_k=33)], [Sampling(1.0, 0.04), Sampling(1.0, top_k=32)]
    draws = draws_for(5, *beyond, *within, Sampling(0.0, 0.5))
    got, expected = kernels(logits, draws, 256), draw(logits, draws).tolist()
    assert got[:2] == [BEYOND, BEYOND]
    assert got[2:] == expected[2:]


def test_a_nucleus_of_more_than_a_blocks_leading_tokens() -> None:
    """Likely tokens spread over eleven blocks: 200 of them are in order, and all of a top-k of 200."""
    logits = np.random.default_rng(3).standard_normal((4, 700)).astype(np.float32)
    draws = draws_for(4, Sampling(1.0, top_k=200), Sampling(0.9, 0.7))
    draws.uniform[:2] = 0.97
    assert kernels(logits, draws, 64) == draw(logits, draws).tolist()


@pytest.mark.parametrize(("vocabulary", "block"), SIZES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_broken_rows_are_known_and_alone(vocabulary: int, block: int, bad: float) -> None:
    """A NaN of either sign, or infinity, at the first, a middle and the last token; the row between them is whole."""
    logits = np.random.default_rng(0).standard_normal((4, vocabulary)).astype(np.float32)
    for row, place in ((0, 0), (1, vocabulary // 2), (3, vocabulary - 1)):
        logits[row, place] = bad
    draws = draws_for(4, Sampling(), Sampling(1.0, 0.9), Sampling(1.0))
    got = kernels(logits, draws, block)
    assert [got[row] for row in (0, 1, 3)] == [NOT_FINITE] * 3
    assert got[2] == draw(logits, draws)[2]


def test_nothing_but_minus_infinity() -> None:
    logits = np.full((1, 300), -np.inf, np.float32)
    draws = draws_for(1, Sampling(1.0))
    assert kernels(logits, draws, 64) == draw(logits, draws).tolist() == [NOT_FINITE]


def test_the_sizes_that_ship() -> None:
    """A vocabulary of ten blocks of 512: greedy, warm and nucleus."""
    assert dict(draw_plan(DrawSpec(5000, True), 1).steps[0].kernel.constants)["BLOCKS"] == 10
    logits = (np.random.default_rng(0).standard_normal((3, 5000)) * 6).astype(np.float32)
    draws = draws_for(3, Sampling(), Sampling(1.0), Sampling(1.0, 0.8, top_k=50))
    assert kernels(logits, draws, None) == draw(logits, draws).tolist()


def test_nothing_spills() -> None:
    """As it ships, for a large vocabulary; by hand for all SMs and vocabularies up to 262,144."""
    kernels = compile_for([Op(DrawSpec(151_936, nucleus), ((1, 64),)) for nucleus in (False, True)], [90])
    assert {cubin.function for cubin in kernels.cubins} == {"draw_blocks_kernel", "draw_kernel"}
    assert all(cubin.spills == 0 for cubin in kernels.cubins)
