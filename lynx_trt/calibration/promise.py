"""A promise about quality: what is promised, whether a measurement keeps it, and with how much room."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lynx_trt.calibration.company import ALONE, Company, Effect
from lynx_trt.calibration.intervals import bound_for_new_text
from lynx_trt.errors import UsageError

if TYPE_CHECKING:
    from lynx_trt.calibration.measure import Measurement

# Floors and budgets are chosen so that text of the same kind keeps the promise this surely.
CONFIDENCE = 0.99


class Check(NamedTuple):
    """One part of a promise: `value` has to be at most `limit`; `bound` is what new text stays below."""

    name: str
    value: float
    bound: float
    limit: float

    @property
    def kept(self) -> bool:
        """Whether the measured value is within the limit."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Promise:
    """What a user asks for; parts that are None are not promised.

    Attributes:
        max_kl: mean KL to the unrestricted model, nats a token.
        max_perplexity_increase: 0.01 is 1%.
        min_agreement: share of tokens whose likeliest successor stays the same.

    Raises:
        UsageError: nothing is promised, or a limit is out of its range.
    """

    max_kl: float | None = None
    max_perplexity_increase: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        if self.max_kl is None and self.max_perplexity_increase is None and self.min_agreement is None:
            raise UsageError("nothing is promised: give --max-kl, --max-perplexity-increase or --min-agreement")
        for name, limit in (("--max-kl", self.max_kl), ("--max-perplexity-increase", self.max_perplexity_increase)):
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise UsageError(f"{name} is {limit:g}; it must be above 0")
        if self.min_agreement is not None and not 0 < self.min_agreement < 1:
            raise UsageError(
                f"--min-agreement is {self.min_agreement:g}; it must lie between 0 and 1 (0.98: 98% of the tokens)"
            )

    def __str__(self) -> str:
        """The promise in words."""
        parts = [f"KL at most {self.max_kl:g}"] if self.max_kl is not None else []
        if self.max_perplexity_increase is not None:
            parts.append(f"perplexity at most {100 * self.max_perplexity_increase:.3g}% above")
        if self.min_agreement is not None:
            parts.append(f"agreement at least {self.min_agreement:g}")
        return ", ".join(parts)

    def checks(self, measurement: Measurement, new_sequences: int, company: Company = ALONE) -> list[Check]:
        """Each part of the promise against `measurement`, and against `new_sequences` that nobody has seen."""
        return list(self._checks(measurement, new_sequences, company))

    def _checks(self, measurement: Measurement, new: int, company: Company) -> Iterator[Check]:
        def bound(values: list[float], effect: Effect, sign: float = 1.0) -> float:
            return bound_for_new_text(
                sign * np.array(values),
                new,
                CONFIDENCE,
                factor=effect.factor,
                shift=sign * effect.shift,
                freedom=company.freedom,
                known=company.known,
            )

        if self.max_kl is not None:
            yield Check("KL", measurement.kl.mean, bound(measurement.kl_by_sequence, company.kl), self.max_kl)
        if self.max_perplexity_increase is not None:
            yield Check(
                "perplexity increase",
                measurement.perplexity_increase.mean,
                _expm1(bound(measurement.nats_added_by_sequence, company.nats)),
                self.max_perplexity_increase,
            )
        if self.min_agreement is not None:
            yield Check(
                "disagreement",
                1 - measurement.agreement.mean,
                1 + bound(measurement.agreement_by_sequence, company.agreement, -1.0),
                1 - self.min_agreement,
            )

    def is_kept(self, measurement: Measurement) -> bool:
        """Whether the measured means are within every limit."""
        return all(check.kept for check in self._checks(measurement, 1, ALONE))

    def will_be_kept(self, measurement: Measurement, new_sequences: int, company: Company = ALONE) -> bool:
        """Whether `new_sequences` of the same kind of text will keep it, as surely as `CONFIDENCE`."""
        return all(check.bound <= check.limit for check in self._checks(measurement, new_sequences, company))

    def strain(self, measurement: Measurement, new_sequences: int, company: Company = ALONE) -> float:
        """How much of the tightest limit is used up; above 1 the promise will not be kept."""
        return max(check.bound / check.limit for check in self._checks(measurement, new_sequences, company))


def _expm1(value: float) -> float:
    return math.expm1(value) if value < 700 else math.inf
