"""The pace: on a simulated machine, whose steps take longer the more experts they load and the more rows they have."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx_trt.budgets import Restriction
from lynx_trt.runtime.check import Check
from lynx_trt.runtime.pace import WINDOW, Pace, Target
from lynx_trt.runtime.scheduler import StepReport

EXPERTS = 64
DEFAULT = Restriction((EXPERTS, EXPERTS), (0.0, 0.0))
LOWEST = Restriction((EXPERTS, 16), (0.04, 0.0))


def report(seconds: float, kind: str = "decode", delayed: int = 0) -> StepReport:
    return StepReport(kind, 1, 1, 1, seconds, np.zeros(2), DEFAULT, delayed)


class Machine:
    """Milliseconds of a step: 4, and up to 26 for the experts that a batch loads, with noise of a tenth.

    A layer's active experts grow with its rows, as of `EXPERTS` of which a token takes 8, until the budget; a floor
    takes as many as a budget of as much would.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def seconds(self, rows: int, restriction: Restriction) -> float:
        loaded = 0.0
        for budget, floor in zip(restriction.budgets, restriction.floors, strict=True):
            wanted = EXPERTS * (1 - (1 - 8 / EXPERTS) ** rows)
            loaded += min(wanted, budget, wanted * (1 - 12 * floor))
        return (4 + 26 * loaded / (2 * EXPERTS)) * 1e-3 * float(self._random.normal(1, 0.1))

    def run(self, pace: Pace, rows: int, steps: int) -> list[float]:
        """Decode; the time of each step."""
        times = []
        for _ in range(steps):
            times.append(self.seconds(rows, pace.restriction))
            pace.on_step(report(times[-1]))
        return times


def test_load_comes_and_goes() -> None:
    """Quality is whole while the target is kept, as low as it has to be under load, and whole again afterwards."""
    machine, pace = Machine(), Pace(Target(DEFAULT, LOWEST, seconds=0.025))
    machine.run(pace, rows=2, steps=200)
    assert pace.restriction == DEFAULT
    machine.run(pace, rows=32, steps=200)
    settled = machine.run(pace, rows=32, steps=400)
    assert 0.02 < statistics.mean(settled) < 0.0245
    assert 0.1 < pace.position < 0.9
    assert statistics.mean(machine.run(Pace(Target(DEFAULT, LOWEST)), rows=32, steps=100)) > 0.028
    machine.run(pace, rows=2, steps=100)
    assert pace.restriction == DEFAULT


def test_it_does_not_swing() -> None:
    """Where all of a step's time is its experts', the steepest there is; without noise it comes to rest."""
    lowest = Restriction((1, 1))
    pace = Pace(Target(DEFAULT, lowest, seconds=0.01))
    seen = []
    for _ in range(100 * WINDOW):
        pace.on_step(report(0.02 * sum(pace.restriction.budgets) / (2 * EXPERTS)))
        seen.append(pace.position)
    assert max(seen) < 0.6
    assert max(seen[-50 * WINDOW :]) - min(seen[-50 * WINDOW :]) < 0.02


def test_who_keeps_the_target_pays_nothing() -> None:
    pace = Pace(Target(DEFAULT, LOWEST, seconds=0.01))
    for _ in range(100 * WINDOW):
        pace.on_step(report(0.0094))
        assert pace.restriction is pace._target.default


def test_a_target_out_of_reach() -> None:
    """It goes no lower than the lowest, and comes back at once when load leaves."""
    machine, pace = Machine(), Pace(Target(DEFAULT, LOWEST, seconds=0.01))
    machine.run(pace, rows=32, steps=2000)
    assert pace.restriction == LOWEST
    machine.run(pace, rows=1, steps=20 * WINDOW)
    assert pace.restriction == DEFAULT


def test_without_a_target() -> None:
    machine, pace = Machine(), Pace(Target(DEFAULT, LOWEST))
    machine.run(pace, rows=64, steps=300)
    assert (pace.restriction, pace.position) == (DEFAULT, 0.0)


def test_prefill_counts_where_somebody_waits_for_it() -> None:
    """A decode step of 5 ms after each chunk of 20 ms is a token each 25 ms, for sequences that decode."""
    alone, together = (Pace(Target(DEFAULT, LOWEST, seconds=0.02)) for _ in range(2))
    for _ in range(10 * WINDOW):
        for pace, delayed in ((alone, 0), (together, 3)):
            pace.on_step(report(0.02, "prefill", delayed))
            pace.on_step(report(0.005))
    assert alone.position == 0.0
    assert together.position == 1.0


def test_one_slow_step_is_no_reason() -> None:
    pace = Pace(Target(DEFAULT, LOWEST, seconds=0.02))
    for seconds in [0.01] * 20 + [3.0] + [0.01] * 40:
        pace.on_step(report(seconds))
        assert pace.position <= 0.2
    assert pace.position == 0.0


@pytest.mark.parametrize("every", [500, 50])
def test_checks_cost_no_quality_but_what_they_take(every: int) -> None:
    """A look in which a check was is no slower than the others: in all of them it is counted a little."""
    found = {}
    for checked in (False, True):
        pace = Pace(Target(DEFAULT, LOWEST, seconds=0.01), every)
        positions = []
        for number in range(40_000):
            seconds = 0.012 * (1 - 0.4 * pace.position)
            one = report(seconds)
            if checked and number % every == 0:
                # As in a real one, three steps in the place of one.
                one = dataclasses.replace(one, seconds=3 * seconds, check=Check(4, 0.0, 4, seconds=2 * seconds))
            pace.on_step(one)
            positions.append(pace.position)
        found[checked] = statistics.mean(positions[-20_000:])
    # A step that brings it back below MOST, and 2 / every more time, of which 0.4 can be saved.
    assert 0 <= found[True] - found[False] < 0.1 + 2 / every / 0.4


def test_another_target() -> None:
    machine, pace = Machine(), Pace(Target(DEFAULT, LOWEST, seconds=0.008))
    machine.run(pace, rows=32, steps=500)
    assert pace.restriction == LOWEST
    pace.set_target(Target(DEFAULT, Restriction((8, 8)), seconds=0.008))
    assert pace.restriction == Restriction((8, 8))
    pace.set_target(Target(DEFAULT, LOWEST))  # none any more
    assert (pace.restriction, pace.position) == (DEFAULT, 0.0)


def restrictions() -> Iterator[st.SearchStrategy[Restriction]]:
    layer = st.tuples(st.integers(0, EXPERTS), st.floats(0, 1))
    made = st.lists(layer, min_size=3, max_size=3)
    return iter([made.map(lambda layers: Restriction(*zip(*layers, strict=True)))] * 2)  # type: ignore[arg-type]


@settings(deadline=None)
@given(*restrictions(), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_the_way_to_the_lowest(default: Restriction, lowest: Restriction, positions: list[float]) -> None:
    """From the default, never milder and never below both, and stricter in each layer the further it goes."""
    target = Target(default, lowest, 0.01)
    end = Restriction.strictest([default, lowest])
    assert target.at(0) == default
    assert target.at(1).budgets == end.budgets
    assert target.at(1).floors == pytest.approx(end.floors)
    way = [default, *(target.at(position) for position in sorted(positions))]
    for milder, stricter in itertools.pairwise(way):
        assert all(a >= b for a, b in zip(milder.budgets, stricter.budgets, strict=True))
        assert all(a <= b for a, b in zip(milder.floors, stricter.floors, strict=True))
    assert all(a >= b for a, b in zip(way[-1].budgets, end.budgets, strict=True))
    assert all(a <= b + 1e-12 for a, b in zip(way[-1].floors, end.floors, strict=True))
