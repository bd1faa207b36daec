"""Batches do well or badly as a whole: the room that is left for chance has to know it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny_models

from lynx_trt.budgets import Restriction
from lynx_trt.calibration.company import FREEDOM, factor, from_more, grouping
from lynx_trt.calibration.cost import cost_model
from lynx_trt.calibration.intervals import bound_for_new_text
from lynx_trt.calibration.journal import Measured
from lynx_trt.calibration.measure import Meter
from lynx_trt.calibration.model import Probed, Setting
from lynx_trt.calibration.text import Sequences
from lynx_trt.selection import PRESETS

Array = np.ndarray[Any, np.dtype[Any]]


class Text:
    """Sequences that lose 10 +- 1 by themselves, and each of which costs every one of its batch some more."""

    def __init__(self, count: int, burden: float, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.own = 10 + generator.standard_normal(count)
        self.burden = burden * generator.standard_normal(count)

    def losses(self, order: Array, size: int) -> Array:
        """By sequence, decoded in this order."""
        return self.own[order] + np.repeat(self.burden[order].reshape(-1, size).mean(1), size)


def factor_of(text: Text, size: int) -> float:
    count = len(text.own)
    _, rounds = grouping(count, size)
    return factor(
        np.array([text.losses(np.random.default_rng(n).permutation(count), size) for n in range(rounds)]), size
    )


@pytest.mark.parametrize(("burden", "spread"), [(0.0, 1.0), (3.0, math.sqrt(10))])
def test_factor_is_the_spread_of_what_a_sequence_does_to_all(burden: float, spread: float) -> None:
    """One sequence changes its batch's sum by own + burden: its spread over the one seen within batches, about 1."""
    found = np.mean([factor_of(Text(32, burden, seed), 16) for seed in range(60)])
    seen = math.sqrt(1 + burden**2 / 16)
    assert found == pytest.approx(max(1.0, spread / seen), rel=0.15)


def test_bound_holds_for_whole_new_batches() -> None:
    """Two batches to choose on, two new ones: without the factor the 99% bound is broken many times as often."""
    broken = {"with": 0, "without": 0}
    order = np.arange(32)
    for seed in range(300):
        known, new = Text(32, 3.0, seed), Text(32, 3.0, 10_000 + seed)
        seen, mean = known.losses(order, 16), new.losses(order, 16).mean()
        bound = bound_for_new_text(seen, 32, 0.99, factor=factor_of(known, 16), freedom=FREEDOM)
        broken["with"] += mean > bound
        broken["without"] += mean > bound_for_new_text(seen, 32, 0.99)
    assert broken["with"] / 300 <= 0.03
    assert broken["without"] / 300 >= 0.1


def test_other_text_shows_where_the_part_at_hand_lies() -> None:
    """A part that is too easy by chance is corrected, and the bound holds, though the budgets were chosen on it."""
    broken = {"with": 0, "without": 0}
    for seed in range(300):
        # The easiest of four parts, as a search that prefers low numbers would have it.
        known = min(
            (Text(32, 3.0, 4 * seed + n).losses(np.arange(32), 16) for n in range(4)), key=lambda losses: losses.mean()
        )
        new = Text(32, 3.0, 10_000 + seed).losses(np.arange(32), 16).mean()
        effect = from_more(known, Text(256, 3.0, 20_000 + seed).losses(np.arange(256), 16), 16)
        bound = bound_for_new_text(known, 32, 0.99, factor=effect.factor, shift=effect.shift, freedom=15, known=256)
        broken["with"] += new > bound
        broken["without"] += new > bound - effect.shift * known.std(ddof=1)
    assert broken["with"] / 300 <= 0.03
    assert broken["without"] / 300 >= 0.05


@pytest.mark.parametrize(
    ("sequences", "batch", "size", "rounds"),
    [
        (32, 16, 16, 15),  # two batches: one comparison a grouping
        (32, 4, 4, 3),  # eight: seven
        (32, 32, 16, 15),  # one batch only: its halves
        (35, 16, 16, 15),  # what is left over stays out
        (8, 1, 1, 3),  # nobody shares anything
    ],
)
def test_enough_groupings(sequences: int, batch: int, size: int, rounds: int) -> None:
    assert grouping(sequences, batch) == (size, rounds)
    assert rounds * (sequences // size - 1) >= FREEDOM


def test_regrouped_is_the_same_text_in_another_order() -> None:
    """The numbers are those of a meter made for the new order; and every grouping is its own, the same each time."""
    ids = np.random.default_rng(5).integers(3, 256, size=(12, 24))
    sizes = np.random.default_rng(6).integers(1, 4, size=ids.shape)
    probed = Probed(tiny_models.random_model("qwen3_moe"))
    cost = cost_model("h100", [1000] * len(probed.layers), 5000)

    def meter(order: Array) -> Meter:
        return Meter(probed, Sequences(ids[order], sizes[order]), prompt=7, cost=cost, threads=1)

    setting = Setting(PRESETS["lynx"], Restriction((3, 3)))
    order = np.random.default_rng([2, 12]).permutation(12)
    measured = Measured(meter(np.arange(12)), 4, "choose")
    (got,) = measured.regrouped(2, 4).measure([setting])
    (want,) = meter(order).measure([setting], 4)
    np.testing.assert_allclose(got.kl_by_sequence, want.kl_by_sequence, rtol=1e-4)
    assert got.bits_a_byte.mean == pytest.approx(want.bits_a_byte.mean)
    assert got.active == want.active
    (before,) = measured.measure([setting])
    assert before.active != got.active  # others decode together
    (again,) = measured.regrouped(2, 4).measure([setting])
    assert again == got
