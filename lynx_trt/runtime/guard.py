"""The guard: experts given back while the traffic pays more for the others than was allowed.

What a selection costs was promised on some text; here it is kept on the text that comes, by what `check.py` finds.
"""

from __future__ import annotations

from lynx_trt.budgets import Restriction
from lynx_trt.runtime.check import ROWS
from lynx_trt.runtime.scheduler import StepReport

# Tokens between two looks. A token's KL is some four times its mean off, so that this many give a quarter of it.
WINDOW = 256
# Of what is allowed: below it experts are taken away again. Between that and what is allowed nothing moves.
LOW = 0.6
AIM = 0.8
# What one look changes the share by, at most: twice the noise down, and less up than down.
DOWN, UP = 0.6, 1.15
LEAST = 0.02  # of a restriction: next to nothing, from which the way back is some thirty looks


class Guard:
    """How much of a restriction is in force, so that its cost stays within `max_kl` nats a token; 0: all of it."""

    def __init__(self, experts: tuple[int, ...], max_kl: float = 0.0, every: int = 1) -> None:
        """`experts` [N] of the layers; `every`: restricted decode steps of which one is checked."""
        self._everything, self._every = Restriction(experts), every
        self._max_kl, self.share = max_kl, 1.0
        self._tokens, self._kl, self._free = 0, 0.0, 0
        self._applied: tuple[Restriction, float, Restriction] | None = None

    def set_max_kl(self, max_kl: float) -> None:
        """From the next look on; 0 puts all of the restriction in force at once."""
        self._max_kl = max_kl
        self._tokens, self._kl = 0, 0.0
        if not max_kl:
            self.share = 1.0

    def applied(self, restriction: Restriction) -> Restriction:
        """As much of it as is in force: the same object as long as nothing changes."""
        if self.share == 1.0:
            return restriction
        if self._applied is None or self._applied[0] is not restriction or self._applied[1] != self.share:
            self._applied = restriction, self.share, self._everything.towards(restriction, self.share)
        return self._applied[2]

    def on_step(self, report: StepReport) -> None:
        """Take the cost of a step that had what this guard has put in force."""
        if report.check is not None:
            self._take(report.check.tokens, report.check.kl)
        elif report.kind == "decode" and self.share < 1 and report.restriction == self._everything:
            # So little is left of it that it restricts nothing, which is never checked, and costs nothing.
            self._free += 1
            if self._free % self._every == 0:
                self._take(min(report.rows, ROWS), 0.0)

    def _take(self, tokens: int, kl: float) -> None:
        self._tokens, self._kl = self._tokens + tokens, self._kl + kl
        if self._tokens < WINDOW:
            return
        mean = self._kl / self._tokens
        self._tokens, self._kl = 0, 0.0
        if self._max_kl and not LOW * self._max_kl <= mean <= self._max_kl:
            # The cost grows with about the square of the floors.
            change = (AIM * self._max_kl / max(mean, 1e-12)) ** 0.5
            self.share = max(LEAST, min(1.0, self.share * max(DOWN, min(UP, change))))
