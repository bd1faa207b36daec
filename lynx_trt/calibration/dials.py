"""What a search turns in each layer: a vote floor (the default), or a budget.

A dial has levels, from 0, where little more is kept than what is guaranteed, to `last`, which restricts nothing.

A floor keeps whatever enough tokens want: steps that need many experts get them, and others give them up. So it costs
less quality than a budget at equal active experts, and a step is only bounded by the cap that the search adds. A
budget bounds every step by itself.

Floors are votes for each voting token. Whatever votes are counted, a token gives an expert at most 1, so a floor of 1
keeps what is guaranteed and nothing else, for any model; how far down floors still do something is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lynx_trt.budgets import Restriction
from lynx_trt.calibration.intervals import Array
from lynx_trt.calibration.measure import Measurement
from lynx_trt.calibration.model import Setting
from lynx_trt.selection import Selection

# Budgets at which each layer is tried, as shares of the most experts that any layer uses by itself.
RUNGS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Levels whose active experts are within this share of the fewest that there can be do nothing but that.
SATURATED = 0.01
# Floors are looked for from 1 down, by this factor, until so large a share of the experts is in use, or so small a
# share of the KL is left; at most so many.
SWEEP, WHOLE, NEGLIGIBLE, SWEEPS = 4.0, 0.97, 1e-3, 16
# Levels of a factor of 2 in the floor, and at how many floors, at most, each layer is tried.
OCTAVE, MOST_RUNGS = 4, 10


class Trials(Protocol):
    """Measures settings on the part of the text that choices are made on; remembers what it has measured."""

    def measure(self, settings: Sequence[Setting]) -> list[Measurement]:
        """One measurement for each setting."""
        ...


class Dial(Protocol):
    """Levels for each layer, and what they mean."""

    @property
    def name(self) -> str:
        """`floors` or `budgets`."""
        ...

    @property
    def last(self) -> tuple[int, ...]:
        """The level of each layer that restricts nothing [N]."""
        ...

    @property
    def rungs(self) -> list[int]:
        """Levels at which each layer is tried alone, from few experts to many."""
        ...

    def setting(self, levels: Sequence[int]) -> Setting:
        """From levels [N] to what is tried."""
        ...

    def value(self, level: int) -> float:
        """The floor, or the budget, of a level."""
        ...

    def free(self, layer: int, most: int) -> int:
        """The lowest level that restricts no step of a layer, if by itself none uses more than `most` experts."""
        ...

    def stride(self, level: int) -> int:
        """How far to move from a level to see a difference."""
        ...


@dataclass(frozen=True)
class Budgets:
    """A level is a budget."""

    selection: Selection
    last: tuple[int, ...]  # [N], the experts of each layer
    rungs: list[int]
    name: str = "budgets"

    def setting(self, levels: Sequence[int]) -> Setting:
        """From levels [N] to what is tried."""
        return Setting(self.selection, Restriction(tuple(levels)))

    def value(self, level: int) -> float:
        """The budget."""
        return level

    def free(self, layer: int, most: int) -> int:
        """The most that a step uses by itself, or E."""
        return min(self.last[layer], most)

    def stride(self, level: int) -> int:
        """An eighth of the budget."""
        return max(1, round(level / 8))


@dataclass(frozen=True)
class Floors:
    """Level n is the floor `values[n]`; the level after those is none, and all experts."""

    selection: Selection
    experts: tuple[int, ...]  # [N]
    values: tuple[float, ...]
    name: str = "floors"
    last: tuple[int, ...] = field(init=False)
    rungs: list[int] = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.values)
        object.__setattr__(self, "last", (count,) * len(self.experts))
        octaves = 1 + (count - 1) // OCTAVE
        spread = np.linspace(0, count - 1, min(octaves, MOST_RUNGS))
        object.__setattr__(self, "rungs", sorted({round(level) for level in spread}))

    def setting(self, levels: Sequence[int]) -> Setting:
        """From levels [N] to what is tried, without a cap."""
        return Setting(self.selection, Restriction(self.experts, tuple(self.value(level) for level in levels)))

    def value(self, level: int) -> float:
        """The floor; 0 at the last level."""
        return self.values[level] if level < len(self.values) else 0.0

    def free(self, layer: int, most: int) -> int:
        """The last level."""
        return self.last[layer]

    def stride(self, level: int) -> int:
        """Half of a factor of 2."""
        return max(1, OCTAVE // 2)


def budget_dial(selection: Selection, experts: Sequence[int], natural: Array, experts_per_token: int) -> Budgets:
    """The dial of budgets; `natural` [N] are the mean experts active unrestricted."""
    most = float(max(natural))
    fewest = 0 if selection.guaranteed(experts_per_token) else 1  # 0 would leave a token without any expert
    rungs = {fewest, *(max(fewest, min(round(share * most), max(experts) - 1)) for share in RUNGS)}
    return Budgets(selection, tuple(experts), sorted(rungs))


def floor_dial(trials: Trials, selection: Selection, experts: Sequence[int], natural: Array) -> Floors:
    """The dial of floors: from the highest at which a layer still keeps more than it must to the lowest that matters.

    Both are measured, with one floor for all layers, at falling floors until next to nothing is lost.
    """
    found: list[Array] = []
    highest = 0.0
    for number in range(SWEEPS + 1):
        one = Floors(selection, tuple(experts), (_sweep(number),))
        (item,) = trials.measure([one.setting((0,) * len(experts))])
        found.append(np.array(item.active_by_layer))
        highest = max(highest, item.kl.mean)
        if found[-1].sum() >= WHOLE * natural.sum() or item.kl.mean <= NEGLIGIBLE * highest:
            break
    few = [bool((active <= (1 + SATURATED) * found[0]).all()) for active in found]
    top = few.index(False) - 1 if False in few else 0
    count = round(np.log2(SWEEP)) * OCTAVE * (len(found) - 1 - top) + 1
    values = (_sweep(top) * 2 ** (-level / OCTAVE) for level in range(count))
    return Floors(selection, tuple(experts), tuple(float(f"{value:.4g}") for value in values))


def _sweep(number: int) -> float:
    return float(SWEEP**-number)
