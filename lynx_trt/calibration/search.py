"""Levels of a dial for each layer: the fewest bytes of experts under a promise, or the best quality for given bytes.

1. Each layer is restricted alone, at a ladder of levels. This gives the shape of what its experts are worth.
2. With the shapes added up, a price for a byte decides every layer's level by itself (a Lagrangian); the price is
   bisected, with every candidate measured as a whole.
3. Layers hurt more, or less, together than alone. So around the candidate each layer is moved up and down with all
   the others restricted too, and its shape is scaled to what that showed; then 2 again, until nothing is gained.

What is chosen is always something that was measured as a whole, never a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lynx_trt.calibration.dials import SATURATED, Dial, Trials
from lynx_trt.calibration.intervals import Array
from lynx_trt.calibration.measure import Measurement

# Two KL below this, in nats a token, are the same: rounding of float32 logits is of this size.
NOISE = 1e-7
ROUNDS = 3
BISECTIONS = 7


@dataclass(frozen=True)
class Sensitivity:
    """Each layer restricted alone: kl [N,R] and its active experts [N,R] at R levels of a dial.

    `values` [R] are those levels' floors or budgets.
    """

    dial: str
    levels: list[int]
    values: list[float]
    kl: list[list[float]]
    active: list[list[float]]
    natural: list[float]  # [N]


@dataclass
class Curves:
    """What each layer's level is thought to cost: kl [N][levels] and active experts [N][levels].

    `lowest` [N] are the smallest levels that mean anything: below, only what is guaranteed is kept.
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
        """Each layer's cheapest level where a byte of experts costs `price` nats; ties go to the higher."""
        levels = []
        for layer, lowest in enumerate(self.lowest):
            total = self.scale[layer] * self.kl[layer] + price * self.expert_bytes[layer] * self.active[layer]
            levels.append(len(total) - 1 - int(np.argmin(total[lowest:][::-1])))
        return tuple(levels)

    def bytes_at(self, levels: Sequence[int]) -> float:
        """Predicted bytes of experts a step."""
        return sum(
            size * float(active[level])
            for size, active, level in zip(self.expert_bytes, self.active, levels, strict=True)
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


def measure_sensitivity(trials: Trials, dial: Dial, natural: Array) -> Sensitivity:
    """Restrict each layer alone, at each of the dial's rungs; `natural` [N] are the experts active unrestricted."""
    layers, rungs = range(len(dial.last)), dial.rungs
    settings = [
        dial.setting([min(level, last) if n == layer else last for n, last in enumerate(dial.last)])
        for layer in layers
        for level in rungs
    ]
    found = trials.measure(settings)
    rows = [found[layer * len(rungs) : (layer + 1) * len(rungs)] for layer in layers]
    return Sensitivity(
        dial.name,
        list(rungs),
        [dial.value(level) for level in rungs],
        [[item.kl.mean for item in row] for row in rows],
        [[item.active_by_layer[layer] for item in row] for layer, row in enumerate(rows)],
        [float(value) for value in natural],
    )


def curves(sensitivity: Sensitivity, dial: Dial, most: Sequence[int], expert_bytes: Sequence[int]) -> Curves:
    """Every level, from the rungs: log KL and active experts interpolated linearly.

    Args:
        sensitivity: what was measured.
        dial: its dial.
        most: experts that any step of each layer uses by itself [N].
        expert_bytes: of each layer [N].
    """
    kl, active = [], []
    for layer, last in enumerate(dial.last):
        grid = np.arange(last + 1)
        free = dial.free(layer, most[layer])
        known = [level for level in sensitivity.levels if level < free]
        values = np.maximum(sensitivity.kl[layer][: len(known)], NOISE)
        # More experts never cost quality; a rise is noise, and would make holes that no price reaches.
        values = np.maximum.accumulate(values[::-1])[::-1]
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


class Search:
    """One search over the levels of a dial."""

    def __init__(self, trials: Trials, dial: Dial, model: Curves, goal: Goal) -> None:
        """`model` is updated as the layers are measured together."""
        self._trials = trials
        self._dial = dial
        self._model = model
        self._goal = goal
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
        return Found(self._seen[best] if best else None, self._steps)

    def centre(self) -> tuple[int, ...]:
        """The best allowed levels so far, or those that are nearest to being allowed."""
        return self._best() or min(self._seen, key=lambda levels: self._goal.strain(self._seen[levels]))

    def _best(self) -> tuple[int, ...] | None:
        allowed = [levels for levels, item in self._seen.items() if self._goal.strain(item) <= 1]
        return min(allowed, key=self._value_of, default=None)

    def _value_of(self, levels: tuple[int, ...]) -> float:
        return self._goal.prefer(self._seen[levels])

    def _measure(self, candidates: Sequence[tuple[int, ...]], what: str) -> list[Measurement]:
        found = self._trials.measure([self._dial.setting(levels) for levels in candidates])
        for levels, item in zip(candidates, found, strict=True):
            if levels not in self._seen:
                self._seen[levels] = item
                self._steps.append(
                    {
                        "what": what,
                        "levels": list(levels),
                        **item.setting.restriction.to_dict(),
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
        self._measure([levels for pair in pairs for levels in pair], what)
        for layer, (less, more) in enumerate(pairs):
            curve = self._model.kl[layer]
            predicted = float(curve[less[layer]] - curve[more[layer]])
            seen = self._seen[less].kl.mean - self._seen[more].kl.mean
            if predicted > NOISE:
                # Bounds, so that one noisy slope can't switch a layer off or on for good.
                self._model.scale[layer] = min(max(seen / predicted, 0.1), 10.0)

    def _neighbours(self, at: tuple[int, ...], layer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        step = self._dial.stride(at[layer])
        less = max(at[layer] - step, min(self._model.lowest[layer], at[layer]))
        more = min(at[layer] + step, self._dial.last[layer])
        return (*at[:layer], less, *at[layer + 1 :]), (*at[:layer], more, *at[layer + 1 :])

    def _polish(self) -> None:
        """Trade single levels between layers as the curves advise, while that gains and is allowed."""
        for _ in range(ROUNDS):
            best = self._best()
            if best is None:
                return
            self._measure(self._moves(best), "Single levels")
            after = self._best()
            if after is None or self._value_of(after) >= self._value_of(best):
                return

    def _moves(self, at: tuple[int, ...], count: int = 8) -> list[tuple[int, ...]]:
        """The most promising changes of one layer by one level, or of two layers in opposite directions."""
        layers = range(len(at))
        better = -1 if self._goal.saving else 1  # the direction in which a layer alone can only gain
        changes: list[dict[int, int]] = [{layer: better} for layer in layers]
        changes += [{a: -1, b: 1} for a in layers for b in layers if a != b]
        price = self._model.price_for(self._model.bytes_at(at))
        scored = []
        for change in changes:
            moved = tuple(level + change.get(layer, 0) for layer, level in enumerate(at))
            limits = zip(self._model.lowest, moved, self._dial.last, strict=True)
            if all(low <= level <= high for low, level, high in limits) and moved not in self._seen:
                scored.append((self._value(moved, price), moved))
        return [moved for _, moved in sorted(scored)[:count]]

    def _value(self, levels: tuple[int, ...], price: float) -> float:
        curve = zip(self._model.scale, self._model.kl, levels, strict=True)
        nats = math.fsum(float(scale * kl[level]) for scale, kl, level in curve)
        return nats + price * self._model.bytes_at(levels)
