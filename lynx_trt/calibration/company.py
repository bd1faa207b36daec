"""How much more a batch's mean varies than the spread of its sequences says.

Sequences that decode together share their experts: one with unusual text takes votes from all the others, so a whole
batch does well or badly. Within a batch this can't be seen, since it moves all of them alike; between batches it can.
The part of the text that choices are made on has few batches. Where there is more text, one setting is measured on
that as well: it shows how batches differ, and how far the part at hand is from the rest. Where there isn't, the same
sequences are grouped anew, at random (a randomised analysis of variance), which misses what text is not at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lynx_trt.calibration.intervals import Array

if TYPE_CHECKING:
    from lynx_trt.calibration.journal import Measured
    from lynx_trt.calibration.measure import Measurement
    from lynx_trt.calibration.model import Setting

# Degrees of freedom to reach with new groupings: the factor is then known to about a fifth.
FREEDOM = 15
# Batches of other text from which on that is used, and how much of it for each sequence that choices are made on.
FEWEST_BATCHES = 6
MORE = 8


class Effect(NamedTuple):
    """What company does to one number, in standard deviations between sequences.

    `factor` times 1 / sqrt(B) is that of a batch's mean; `shift` is how much higher other text's mean is.
    """

    factor: float = 1.0
    shift: float = 0.0


NONE = Effect()


@dataclass(frozen=True)
class Company:
    """The effects, and what they rest on: `freedom` degrees, `known` sequences (None: those at hand)."""

    kl: Effect = NONE
    nats: Effect = NONE
    agreement: Effect = NONE
    freedom: int | None = None
    known: int | None = None


ALONE = Company()


def measure_company(measured: Measured, more: Measured | None, setting: Setting) -> Company:
    """The effects under `setting`, from `more` text if that is enough, else from new groupings."""
    if more is not None and more.meter.sequences // more.batch >= FEWEST_BATCHES:
        return _from_more(measured.measure([setting])[0], more.measure([setting])[0])
    size, rounds = grouping(measured.meter.sequences, measured.batch)
    if size < 2:
        return ALONE
    found = [measured.regrouped(number, size).measure([setting])[0] for number in range(rounds)]

    def effect(rows: list[list[float]]) -> Effect:
        return Effect(factor(np.array(rows), size))

    return Company(
        kl=effect([item.kl_by_sequence for item in found]),
        nats=effect([item.nats_added_by_sequence for item in found]),
        agreement=effect([item.agreement_by_sequence for item in found]),
        freedom=rounds * (measured.meter.sequences // size - 1),
    )


def _from_more(near: Measurement, far: Measurement) -> Company:
    def effect(here: list[float], there: list[float]) -> Effect:
        return from_more(np.array(here), np.array(there), near.batch)

    return Company(
        kl=effect(near.kl_by_sequence, far.kl_by_sequence),
        nats=effect(near.nats_added_by_sequence, far.nats_added_by_sequence),
        agreement=effect(near.agreement_by_sequence, far.agreement_by_sequence),
        freedom=len(far.kl_by_sequence) // far.batch - 1,
        known=len(far.kl_by_sequence),
    )


def from_more(here: Array, there: Array, batch: int) -> Effect:
    """The effect from numbers by sequence at hand [n] and of other text [m], whose rows are batches in order."""
    spread = float(here.std(ddof=1))
    if spread == 0:
        return NONE
    between = float(there.reshape(-1, batch).mean(1).std(ddof=1)) * math.sqrt(batch)
    return Effect(max(1.0, between / spread), float(there.mean() - here.mean()) / spread)


def grouping(sequences: int, batch: int) -> tuple[int, int]:
    """Sequences of a group and how many groupings; where there is one batch only, its halves stand for batches."""
    size = min(batch, sequences // 2)
    return size, math.ceil(FREEDOM / (sequences // size - 1))


def factor(rows: Array, size: int) -> float:
    """The factor from numbers by sequence [R,n] of R groupings, whose rows are groups of `size` after one another."""
    between = rows.reshape(len(rows), -1, size).mean(2).var(axis=1, ddof=1).mean()
    alone = rows.var(axis=1, ddof=1).mean() / size
    return max(1.0, math.sqrt(between / alone)) if alone > 0 else 1.0
