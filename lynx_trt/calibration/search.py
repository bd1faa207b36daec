"""Budgets for each layer: the fewest bytes of experts that keep a promise, or the best quality for given bytes.

1. Each layer is restricted alone, to a ladder of budgets. This gives the shape of what its experts are worth.
2. With the shapes added up, a price for a byte decides every layer's budget by itself (a Lagrangian); the price is
   bisected, with every candidate measured as a whole.
3. Layers hurt more, or less, together than alone. So around the candidate each layer is moved up and down with all
   the others restricted too, and its shape is scaled to what that showed; then 2 again, until nothing is gained.

What is chosen is always something that was measured as a whole, never a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lynx_trt.calibration.measure import Measurement
from lynx_trt.calibration.model import Setting

Array = np.ndarray[Any, np.dtype[Any]]

# Rungs of the ladder, as shares of the most experts that any layer uses by itself.
RUNGS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Two KL below this, in nats a token, are the same: rounding of float32 logits is of this size.
NOISE = 1e-7
# Budgets whose active experts are within this share of the fewest that there can be do nothing but that.
SATURATED = 0.01
ROUNDS = 3
BISECTIONS = 7


# From budgets [N] to what is tried; other dials than budgets pass as budgets here.
Make = Callable[[tuple[int, ...]], Setting]


class Trials(Protocol):
    """Measures settings on the part of the text that choices are made on; remembers what it has measured."""

    def measure(self, settings: Sequence[Setting]) -> list[Measurement]:
        """One measurement for each setting."""
        ...


@dataclass(frozen=True)
class Sensitivity:
    """Each layer restricted alone: kl [N,R] and its active experts [N,R] for the ladder's budgets [R]."""

    budgets: list[int]
    kl: list[list[float]]
    active: list[list[float]]
    natural: list[float]  # [N]


@dataclass
class Curves:
    """What each layer's budget is thought to cost: kl [N][E+1] by budget, active experts [N][E+1].

    `lowest` [N] are the smallest budgets that mean anything: below, only what is guaranteed is kept.
    """

    kl: list[Array]
    active: list[Array]
    expert_bytes: Sequence[int]
    scale: Array = field(init=False)
    lowest: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.scale = np.ones(len(self.kl))
        self.lowest = [int(np.flatnonzero(line <= (1 + SATURATED) * line.min())[-1]) for line in self.active]

    def solve(self, price: float) -> tuple[int, ...]:
        """Each layer's cheapest budget where a byte of experts costs `price` nats; ties go to the larger."""
        budgets = []
        for layer, lowest in enumerate(self.lowest):
            total = self.scale[layer] * self.kl[layer] + price * self.expert_bytes[layer] * self.active[layer]
            budgets.append(len(total) - 1 - int(np.argmin(total[lowest:][::-1])))
        return tuple(budgets)

    def bytes_at(self, budgets: Sequence[int]) -> float:
        """Predicted bytes of experts a step."""
        return sum(
            size * float(active[budget])
            for size, active, budget in zip(self.expert_bytes, self.active, budgets, strict=True)
        )

    def price_range(self) -> tuple[float, float]:
        """Prices between which every layer goes from all of its experts to the fewest."""
        slopes: list[float] = []
        for kl, active, size, scale in zip(self.kl, self.active, self.expert_bytes, self.scale, strict=True):
            saved = size * np.maximum(active[-1] - active[:-1], 0)
            steps = scale * kl[:-1][saved > 0] / saved[saved > 0]
            slopes += [float(value) for value in steps if value > 0]
        return (min(slopes) / 10, max(slopes) * 10) if slopes else (1e-12, 1.0)

    def price_for(self, wanted: float) -> float:
        """The lowest price, about, at which `solve` reads at most `wanted` bytes a step."""
        low, high = self.price_range()
        for _ in range(40):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.bytes_at(self.solve(middle)) > wanted else (low, middle)
        return high


def ladder(natural: Sequence[float], experts: Sequence[int], fewest: int) -> list[int]:
    """Budgets at which every layer is tried: `fewest`, and shares of the most experts that a layer uses by itself."""
    most = max(natural)
    return sorted({fewest, *(max(fewest, min(round(share * most), max(experts) - 1)) for share in RUNGS)})


def measure_sensitivity(
    trials: Trials, make: Make, experts: Sequence[int], budgets: list[int], natural: Array
) -> Sensitivity:
    """Restrict each layer alone, to each of `budgets`; `natural` [N] are the experts active unrestricted."""
    layers = range(len(experts))
    settings = [
        make(tuple(min(budget, experts[n]) if n == layer else experts[n] for n in layers))
        for layer in layers
        for budget in budgets
    ]
    found = trials.measure(settings)
    rows = [found[layer * len(budgets) : (layer + 1) * len(budgets)] for layer in layers]
    return Sensitivity(
        budgets,
        [[item.kl.mean for item in row] for row in rows],
        [[item.active_by_layer[layer] for item in row] for layer, row in enumerate(rows)],
        [float(value) for value in natural],
    )


def curves(
    sensitivity: Sensitivity, experts: Sequence[int], most: Sequence[int], expert_bytes: Sequence[int]
) -> Curves:
    """Every budget from 0 to E, from the ladder's: log KL and active experts interpolated linearly.

    Args:
        sensitivity: what was measured.
        experts: E of each layer [N].
        most: experts that any step of each layer uses by itself [N]; from there on nothing is restricted.
        expert_bytes: of each layer [N].
    """
    kl, active = [], []
    for layer, count in enumerate(experts):
        grid = np.arange(count + 1)
        known = [budget for budget in sensitivity.budgets if budget < min(count, most[layer])]
        values = np.maximum(sensitivity.kl[layer][: len(known)], NOISE)
        # More experts never cost quality; a rise is noise, and would make holes that no price reaches.
        values = np.maximum.accumulate(values[::-1])[::-1]
        free = min(count, most[layer])
        points, logs = [*known, free], [*np.log(values), math.log(NOISE)]
        line = np.exp(np.interp(grid, points, logs))
        line[free:] = 0.0
        kl.append(line)
        used = [*sensitivity.active[layer][: len(known)], sensitivity.natural[layer]]
        active.append(np.interp(grid, points, used))
    return Curves(kl, active, expert_bytes)


@dataclass(frozen=True)
class Goal:
    """What the search is for: `strain` is at most 1 where a measurement is allowed; `prefer` is least at the best."""

    strain: Callable[[Measurement], float]
    prefer: Callable[[Measurement], float]
    saving: bool  # True: fewer experts strain more (a promise); False: more experts do (a limit on bytes)


@dataclass
class Found:
    """The outcome: the best allowed measurement (None: there is none), and how the search went."""

    best: Measurement | None
    steps: list[dict[str, Any]]
    budgets: tuple[int, ...] | None = None


class Search:
    """One search over budgets."""

    def __init__(self, trials: Trials, make: Make, model: Curves, goal: Goal, experts: Sequence[int]) -> None:
        """`model` is updated as the layers are measured together."""
        self._trials = trials
        self._make = make
        self._model = model
        self._goal = goal
        self._experts = experts
        self._seen: dict[tuple[int, ...], Measurement] = {}
        self._steps: list[dict[str, Any]] = []

    def run(self, rounds: int = ROUNDS, *, polish: bool = True) -> Found:
        """Search until a round gains less than 0.5%, at most `rounds` rounds of measuring the layers together."""
        self._bisect("Prices, layers alone")
        for number in range(1, rounds + 1):
            before = self._best()
            self._measure_together(self.centre(), f"Layers together, round {number}")
            self._bisect(f"Prices, round {number}")
            after = self._best()
            if before and after and self._value_of(after) > 0.995 * self._value_of(before):
                break
        if polish:
            self._polish()
        best = self._best()
        return Found(self._seen[best] if best else None, self._steps, best)

    def centre(self) -> tuple[int, ...]:
        """The best allowed budgets so far, or those that are nearest to being allowed."""
        return self._best() or min(self._seen, key=lambda budgets: self._goal.strain(self._seen[budgets]))

    def _best(self) -> tuple[int, ...] | None:
        allowed = [budgets for budgets, item in self._seen.items() if self._goal.strain(item) <= 1]
        return min(allowed, key=self._value_of, default=None)

    def _value_of(self, budgets: tuple[int, ...]) -> float:
        return self._goal.prefer(self._seen[budgets])

    def _measure(self, candidates: Sequence[tuple[int, ...]], what: str) -> list[Measurement]:
        found = self._trials.measure([self._make(budgets) for budgets in candidates])
        for budgets, item in zip(candidates, found, strict=True):
            if budgets not in self._seen:
                self._seen[budgets] = item
                self._steps.append(
                    {
                        "what": what,
                        "budgets": list(budgets),
                        "kl": item.kl.mean,
                        "active": item.active.mean,
                        "strain": self._goal.strain(item),
                    }
                )
        return found

    def _bisect(self, what: str) -> None:
        """Find the price at which the goal is just met, measuring a candidate for each price that is tried."""
        low, high = self._model.price_range()
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            (item,) = self._measure([self._model.solve(middle)], what)
            # A higher price buys fewer experts.
            if (self._goal.strain(item) <= 1) == self._goal.saving:
                low = middle
            else:
                high = middle
            if self._model.solve(low) == self._model.solve(high):
                break

    def _measure_together(self, at: tuple[int, ...], what: str) -> None:
        """Scale each layer's curve to its slope around `at`, where the other layers are restricted too."""
        pairs = [self._neighbours(at, layer) for layer in range(len(at))]
        self._measure([budgets for pair in pairs for budgets in pair], what)
        for layer, (less, more) in enumerate(pairs):
            curve = self._model.kl[layer]
            predicted = float(curve[less[layer]] - curve[more[layer]])
            seen = self._seen[less].kl.mean - self._seen[more].kl.mean
            if predicted > NOISE:
                # Bounds, so that one noisy slope can't switch a layer off or on for good.
                self._model.scale[layer] = min(max(seen / predicted, 0.1), 10.0)

    def _neighbours(self, at: tuple[int, ...], layer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        step = max(1, round(at[layer] / 8))
        less = max(at[layer] - step, min(self._model.lowest[layer], at[layer]))
        more = min(at[layer] + step, self._experts[layer])
        return (*at[:layer], less, *at[layer + 1 :]), (*at[:layer], more, *at[layer + 1 :])

    def _polish(self) -> None:
        """Trade single experts between layers as the curves advise, while that gains and is allowed."""
        for _ in range(ROUNDS):
            best = self._best()
            if best is None:
                return
            self._measure(self._moves(best), "Single experts")
            after = self._best()
            if after is None or self._value_of(after) >= self._value_of(best):
                return

    def _moves(self, at: tuple[int, ...], count: int = 8) -> list[tuple[int, ...]]:
        """The most promising changes of one layer by one expert, or of two layers in opposite directions."""
        layers = range(len(at))
        better = -1 if self._goal.saving else 1  # the direction in which a layer alone can only gain
        changes: list[dict[int, int]] = [{layer: better} for layer in layers]
        changes += [{a: -1, b: 1} for a in layers for b in layers if a != b]
        price = self._model.price_for(self._model.bytes_at(at))
        scored = []
        for change in changes:
            moved = tuple(budget + change.get(layer, 0) for layer, budget in enumerate(at))
            limits = zip(self._model.lowest, moved, self._experts, strict=True)
            if all(low <= budget <= high for low, budget, high in limits) and moved not in self._seen:
                scored.append((self._value(moved, price), moved))
        return [moved for _, moved in sorted(scored)[:count]]

    def _value(self, budgets: tuple[int, ...], price: float) -> float:
        curve = zip(self._model.scale, self._model.kl, budgets, strict=True)
        nats = math.fsum(float(scale * kl[budget]) for scale, kl, budget in curve)
        return nats + price * self._model.bytes_at(budgets)
