"""The restriction of requests that ask for no quality: what an operator set, as pace and guard have turned it."""

from __future__ import annotations

import threading

from lynx_trt.budgets import Restriction
from lynx_trt.runtime.guard import Guard
from lynx_trt.runtime.pace import Pace, Target
from lynx_trt.runtime.scheduler import StepReport


class Control:
    """Pace and guard of one served model; `set` and `on_step` may come from two threads."""

    def __init__(self, experts: tuple[int, ...], target: Target, max_kl: float, every: int) -> None:
        """`experts` of the MoE layers; `every`: restricted decode steps of which one is checked."""
        self.pace = Pace(target, every)
        self.guard = Guard(experts, max_kl, every)
        self.restriction: Restriction = target.default
        # A change of an operator's and a step's must not each write half of what comes of both.
        self._lock = threading.Lock()

    def set(self, target: Target, max_kl: float) -> None:
        """What an operator wants from now on."""
        with self._lock:
            self.pace.set_target(target)
            self.guard.set_max_kl(max_kl)
            self._turn()

    def on_step(self, report: StepReport) -> None:
        """What a step took, and what it cost where that was looked at."""
        with self._lock:
            # What a request asked for itself is its own affair.
            if report.restriction == self.restriction:
                self.guard.on_step(report)
            self.pace.on_step(report)
            self._turn()

    def _turn(self) -> None:
        self.restriction = self.guard.applied(self.pace.restriction)
