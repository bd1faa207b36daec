"""How far a number from a few sequences can be trusted: the bootstrap over sequences, and a bound for the next text.

Tokens of one sequence depend on each other, so sequences are what is drawn again, with replacement (the cluster
bootstrap; Davison & Hinkley 1997, section 3.8), and the 2.5% and 97.5% percentiles of the redrawn numbers are given.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

DRAWS = 1000
LEVEL = 95.0


class Interval(NamedTuple):
    """A number and its 95% confidence interval."""

    mean: float
    low: float
    high: float


class Bootstrap:
    """One set of draws from `count` units, so that numbers of different settings are compared on the same draws."""

    def __init__(self, count: int, seed: int, draws: int = DRAWS) -> None:
        """Draw; the same seed gives the same draws."""
        generator = np.random.default_rng([seed, count])
        self._weights = generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)

    def ratio(self, numerators: Array, denominators: Array) -> Interval:
        """Sum of `numerators` [n] over the sum of `denominators` [n]."""
        drawn = (self._weights @ numerators) / (self._weights @ denominators)
        return _interval(float(numerators.sum() / denominators.sum()), drawn)

    def mean(self, values: Array) -> Interval:
        """The mean of `values` [n]."""
        return self.ratio(np.asarray(values, np.float64), np.ones(len(values)))

    def with_mean(self, values: Array) -> Array:
        """The mean of `values` [n], then the mean of each draw: [1 + draws]."""
        count = len(values)
        return np.concatenate([[values.mean()], self._weights @ values / count])

    def upper_quantile(self, values: Array, quantile: float) -> Interval:
        """The `quantile` (0.5 to 1) of all of `values` [n,D], whose rows are the units.

        The smallest value that at most a share of 1 - quantile of the others exceed.
        """
        units, width = values.shape
        flat = values.reshape(-1)
        # Only the largest can be the answer in any draw: four times the share leaves room for lucky draws.
        keep = min(flat.size, math.ceil(4 * (1 - quantile) * flat.size) + 1)
        order = np.argsort(-flat, kind="stable")[:keep]
        above = np.cumsum(self._weights[:, order // width], axis=1)
        allowed = (1 - quantile) * units * width
        drawn = flat[order][np.minimum((above <= allowed).sum(axis=1), keep - 1)]
        return _interval(float(flat[order[min(int(allowed), keep - 1)]]), drawn)


def _interval(mean: float, drawn: Array) -> Interval:
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(mean, float(low), float(high))


def bound_for_new_text(
    values: Array,
    new: int,
    confidence: float,
    *,
    factor: float = 1.0,
    shift: float = 0.0,
    freedom: int | None = None,
    known: int | None = None,
) -> float:
    """What the mean over `new` more sequences stays below with probability `confidence`, given `values` [n] of n.

    The one-sided prediction bound for the mean of a future sample: mean + t s sqrt(1/n + 1/new) (Hahn & Meeker 1991,
    section 4.7). What is known of the company that sequences keep goes in: s times `factor`, the mean moved by `shift`
    times s, resting on `freedom` degrees and on `known` sequences (see `company`). Infinite for fewer than three
    sequences, which say nothing about their spread.
    """
    count = len(values)
    if count < 3:
        return math.inf
    spread = float(np.std(values, ddof=1))
    t = student_t(confidence, min(count - 1, freedom or count))
    room = t * factor * math.sqrt(1 / (known or count) + 1 / new)
    return float(np.mean(values)) + (shift + room) * spread


def student_t(confidence: float, freedom: int) -> float:
    """Quantile of Student's t (Cornish-Fisher expansion, Abramowitz & Stegun 26.7.5); within 2% from 4 degrees on."""
    z = NormalDist().inv_cdf(confidence)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + math.fsum(term / freedom ** (power + 1) for power, term in enumerate(terms))
