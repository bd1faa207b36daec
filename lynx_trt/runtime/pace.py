"""The pace: quality given up under load, as little as a target for the time of a token asks for.

In decode an MoE layer's time grows with the experts that a batch loads, and those with the batch, so a target that is
kept at night is missed at noon. Someone has to choose then: fewer sequences, more machines, or fewer experts for each
step. `Pace` does the last: an integral controller between two restrictions that an operator names, on the time that
decoding sequences have waited for their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from lynx_trt.budgets import Restriction
from lynx_trt.runtime.scheduler import StepReport

WINDOW = 8  # decode steps between two looks: a mean of fewer says more of the noise than of the load
# Of the target: what a look finds is a mean, and single answers vary around it, so quality is lowered from a little
# below the target on, and given back below AIM. Between both nothing moves: it would only follow the noise.
AIM, MOST = 0.85, 0.95
# Of the way for each relative error. From all experts to few a step's time falls by a half or so: the error's own
# share that one look takes away is then a quarter, which settles within some ten looks and doesn't swing. Kernels whose
# time is all experts' have twice that, which still doesn't.
GAIN = 0.5
STRIDE = 0.2  # of the way, at most, for one look: one outlier moves little


@dataclass(frozen=True)
class Target:
    """What an operator asks for.

    Attributes:
        default: the restriction of requests that ask for no quality, as long as the target is kept.
        lowest: the one that they may come to; where the default is stricter already, that stays.
        seconds: of a token after the first (TPOT), at most; 0: no target.
    """

    default: Restriction
    lowest: Restriction
    seconds: float = 0.0

    def at(self, position: float) -> Restriction:
        """The restriction so far (0 to 1) on the way from the default to the lowest."""
        return self.default.towards(Restriction.strictest([self.default, self.lowest]), position)


class Pace:
    """Where on that way a served model is; `on_step` moves it."""

    def __init__(self, target: Target, every: int = 0) -> None:
        """Begin at the default. `every`: decode steps of which one is checked, see check.py."""
        self._target, self.position = target, 0.0
        self.restriction = target.default
        self._seconds, self._steps = 0.0, 0
        self._every, self._unchecked, self._check_seconds = every, 0, 0.0

    def set_target(self, target: Target) -> None:
        """Another target from the next step on; how far quality is turned down stays until the next look."""
        if target != self._target:
            self._target = target
            self._place(self.position)

    def on_step(self, report: StepReport) -> None:
        """Take one step's time, where sequences waited for it that decode."""
        if report.kind == "decode":
            self._steps += 1
            self._seconds += self._checks(report)
        elif not report.delayed:
            return
        self._seconds += report.seconds
        if self._steps < WINDOW:
            return
        mean = self._seconds / self._steps
        self._seconds, self._steps = 0.0, 0
        if not self._target.seconds:
            return
        took = mean / self._target.seconds
        if not AIM <= took <= MOST:
            position = max(0.0, min(1.0, self.position + max(-STRIDE, min(STRIDE, GAIN * (took - AIM)))))
            if position != self.position:  # at either end it stays the same object, whose arrays are made once
                self._place(position)

    def _checks(self, report: StepReport) -> float:
        """What checks add to this step: clients wait for them, but not for all of one in a single window of many."""
        self._unchecked += 1
        if report.check is not None:
            self._unchecked, self._check_seconds = 0, report.check.seconds
            return self._check_seconds / self._every - self._check_seconds
        if self._unchecked > 2 * self._every:  # nothing is restricted any more
            return 0.0
        return self._check_seconds / self._every

    def _place(self, position: float) -> None:
        self.position = position if self._target.seconds else 0.0
        self.restriction = self._target.at(self.position)
