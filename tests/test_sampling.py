"""Drawing tokens: what greedy, temperature, top-k and top-p may give, against a slow definition of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lynx_trt.errors import UsageError
from lynx_trt.runtime.backend import NOT_FINITE, NOT_WANTED
from lynx_trt.runtime.sampling import LEADING, Sampling, draw, draws_of, recommended

Array = NDArray[Any]


def drawn(logits: Array, *how: Sampling, seeds: int = 1) -> set[tuple[int, ...]]:
    """The tokens of a batch in which row i is drawn by `how[i]`, for each seed."""
    rows = np.asarray(logits, np.float32).reshape(len(how), -1)
    return {
        tuple(draw(rows, draws_of(len(how), [(i, s, np.random.default_rng([seed, i])) for i, s in enumerate(how)])))
        for seed in range(seeds)
    }


def allowed(logits: Array, sampling: Sampling) -> list[int]:
    """The tokens that may be drawn, by the definition: sort all, cut at k, then at p."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    chances = np.exp((logits[order] - logits.max()).astype(np.float64) / sampling.temperature)
    if sampling.top_k:
        chances[sampling.top_k :] = 0
    before = np.cumsum(chances) - chances
    return [
        t for t, chance, b in zip(order, chances, before, strict=True) if chance and b < sampling.top_p * chances.sum()
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top-p is 0"),
        ({"top_p": 1.1}, "top-p is 1.1"),
        ({"top_p": float("nan")}, "top-p is nan"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_k": 1 << 31}, "top-k is 2147483648"),  # an int32 on the GPU
    ],
)
def test_sampling_out_of_range(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Sampling(**values)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            '{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.05}',
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.05},
        ),
        ('{"temperature": "hot", "top_k": -5, "top_p": 1.5, "min_p": null, "repetition_penalty": 0}', {}),
        ("[]", {}),
        ("{", {}),
    ],
)
def test_what_a_checkpoint_recommends(text: str, found: dict[str, float], tmp_path: Path) -> None:
    """What can't be used is as if it weren't there, and so is a file that can't be read."""
    assert recommended(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(text)
    assert recommended(tmp_path) == found


def test_greedy_takes_the_best_and_of_equals_the_lower() -> None:
    assert drawn([[1.0, 3.0, 3.0, -np.inf]], Sampling()) == {(1,)}


def test_top_p_keeps_the_smallest_set() -> None:
    """Probabilities 0.5, 0.3, 0.2: with p = 0.6 the first two are drawn, never the third."""
    logits = np.log([[0.5, 0.3, 0.2]])
    assert drawn(logits, Sampling(1.0, 0.6), seeds=200) == {(0,), (1,)}


@pytest.mark.parametrize(
    ("sampling", "tokens"),
    [
        (Sampling(1.0, top_k=1), {1}),  # greedy by another name
        (Sampling(1.0, top_k=2), {1, 0}),  # of the two equal ones the lower
        (Sampling(1.0, top_k=3), {1, 0, 2}),
        (Sampling(1.0, top_k=99), {1, 0, 2, 3}),  # more than there are: no limit; never the impossible one
        # k before p: of the two that k leaves, the best has 0.63 and is enough; of all it has 0.41.
        (Sampling(1.0, 0.6, top_k=2), {1}),
    ],
)
def test_top_k(sampling: Sampling, tokens: set[int]) -> None:
    logits = np.log([[0.24, 0.41, 0.24, 0.11, 1e-45]])
    logits[0, 4] = -np.inf
    assert {one for (one,) in drawn(logits, sampling, seeds=300)} == tokens


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])  # nearly even: past LEADING; peaked: a few tokens
@pytest.mark.parametrize("sampling", [Sampling(0.8, 0.9), Sampling(1.0, 0.9, top_k=300), Sampling(1.3, 0.999)])
def test_nucleus_of_a_large_vocabulary(sampling: Sampling, spread: float) -> None:
    """The ways through it: the first 256 are enough, the first 8192, or all; with many equal logits at the border."""
    logits = np.round(np.random.default_rng(1).standard_normal(LEADING[-1] + 4000) * spread, 2).astype(np.float32)
    tokens = allowed(logits, sampling)
    got = {one for (one,) in drawn(logits, sampling, seeds=40)}
    assert got <= set(tokens)
    # Both ends of the distribution are reached: the likeliest token at 0, the last one just below 1.
    for uniform, token in ((0.0, tokens[0]), (np.nextafter(1.0, 0.0), tokens[-1])):
        draws = draws_of(1, [(0, sampling, np.random.default_rng(0))])
        draws.uniform[0] = uniform
        assert draw(logits[None], draws) == [token]


def test_frequencies_are_the_probabilities() -> None:
    """3000 draws at temperature 2: within 5 standard deviations of the softmax of half the logits."""
    logits = np.array([2.0, 0.0, -2.0, 1.0])
    rows, draws = 3000, draws_of(3000, [(i, Sampling(2.0), np.random.default_rng(i)) for i in range(3000)])
    counts = np.bincount(draw(np.tile(logits.astype(np.float32), (rows, 1)), draws), minlength=4)
    chances = np.exp(logits / 2) / np.exp(logits / 2).sum()
    assert (np.abs(counts - rows * chances) < 5 * np.sqrt(rows * chances * (1 - chances))).all()


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    """1 / temperature is above every float32; 0 times it is still 0."""
    assert drawn([[1.0, 2.0, 1.999]], Sampling(temperature), seeds=20) == {(1,)}


def test_a_temperature_beyond_float32_is_not_greedy() -> None:
    """1 / 1e300 is 0 as a float32: every token that can be is as likely."""
    assert drawn([[1.0, 2.0, -np.inf]], Sampling(1e300), seeds=40) == {(0,), (1,)}


def test_rows_are_drawn_each_its_own_way() -> None:
    """A batch of a greedy, a warm, an idle and two broken rows: no row changes another's token."""
    logits = np.array([[0, 1, 2], [0, 1, 2], [9, 0, 0], [0, np.nan, 0], [0, np.inf, 0]], np.float32)
    warm = Sampling(1.0, top_k=2)
    for seed in range(20):
        generator = np.random.default_rng(seed)
        alone = draw(logits[1:2], draws_of(1, [(0, warm, np.random.default_rng(seed))]))[0]
        how = [(0, Sampling(), generator), (1, warm, generator), (3, Sampling(), generator), (4, warm, generator)]
        assert draw(logits, draws_of(5, how)).tolist() == [2, alone, NOT_WANTED, NOT_FINITE, NOT_FINITE]


def test_greedy_rows_take_nothing_of_a_generator() -> None:
    """So that a seed gives the same text whatever was greedy before."""
    generator = np.random.default_rng(5)
    draws_of(1, [(0, Sampling(), generator)])
    assert generator.random() == np.random.default_rng(5).random()
