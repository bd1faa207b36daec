"""How much more a batch's mean varies than the spread of its sequences says.

Sequences that decode together share their experts: one with unusual text takes votes from all the others, so a whole
batch does well or badly. Within a batch this can't be seen, since it moves all of them alike; between batches it can.
A part of the text has few batches, so the same sequences are grouped anew, at random, until enough pairs of batches
have been compared (a randomised analysis of variance: with no company effect, batches' means vary as the spread of
sequences has it, and the factor is 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lynx_trt.calibration.intervals import Array

if TYPE_CHECKING:
    from lynx_trt.calibration.journal import Measured
    from lynx_trt.calibration.model import Setting

# Degrees of freedom to reach: the factor is then known to about a fifth.
FREEDOM = 15


@dataclass(frozen=True)
class Company:
    """Factors on the standard deviation between sequences, 1 or more; `freedom` are the degrees that they rest on."""

    kl: float = 1.0
    nats: float = 1.0
    agreement: float = 1.0
    freedom: int | None = None  # None: no other than that of the sequences


ALONE = Company()


def measure_company(measured: Measured, setting: Setting) -> Company:
    """The factors under `setting`, from as many new groupings as `FREEDOM` needs."""
    size, rounds = grouping(measured.meter.sequences, measured.batch)
    if size < 2:
        return ALONE
    found = [measured.regrouped(number, size).measure([setting])[0] for number in range(rounds)]

    def factor_of(rows: list[list[float]]) -> float:
        return factor(np.array(rows), size)

    groups = measured.meter.sequences // size
    return Company(
        kl=factor_of([item.kl_by_sequence for item in found]),
        nats=factor_of([item.nats_added_by_sequence for item in found]),
        agreement=factor_of([item.agreement_by_sequence for item in found]),
        freedom=rounds * (groups - 1),
    )


def grouping(sequences: int, batch: int) -> tuple[int, int]:
    """Sequences of a group and how many groupings; where there is one batch only, its halves stand for batches."""
    size = min(batch, sequences // 2)
    return size, math.ceil(FREEDOM / (sequences // size - 1))


def factor(rows: Array, size: int) -> float:
    """The factor from numbers by sequence [R,n] of R groupings, whose rows are groups of `size` after one another."""
    between = rows.reshape(len(rows), -1, size).mean(2).var(axis=1, ddof=1).mean()
    alone = rows.var(axis=1, ddof=1).mean() / size
    return max(1.0, math.sqrt(between / alone)) if alone > 0 else 1.0
