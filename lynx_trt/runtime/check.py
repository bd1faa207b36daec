"""What the selection costs in quality on the traffic that is served: some decode steps are looked at.

Such a step is done with all experts, then as the restriction in force has it, on the same caches, and the distributions
of the next tokens are compared. Then it is done as ever, and writes the rows that the others have written. So this is
what a step's own restriction changes; what earlier ones have left in the caches is the same for both.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from lynx_trt.budgets import Restriction
from lynx_trt.runtime.backend import Array, Backend, Draws, NextTokens

# Of a step: the softmax of more takes a while for large vocabularies (2 ms a row of 150,000 on one core).
ROWS = 4


@dataclass(frozen=True)
class Check:
    """Sums over the tokens that were compared.

    Attributes:
        tokens: how many.
        kl: of the distribution with all experts from that with the selection, nats.
        agreed: tokens whose likeliest next one is the same.
        seconds: that it took beside the step itself.
    """

    tokens: int
    kl: float
    agreed: int
    seconds: float = 0.0

    @classmethod
    def of(cls, full: Array, own: Array) -> Check:
        """Of logits f32 [n,V] with all experts and with the selection; rows that are no numbers are left out.

        A logit may be -inf: a token that the model never gives, either way.
        """
        broken = np.isnan(full) | np.isnan(own) | (np.isneginf(full) != np.isneginf(own))
        best = np.stack([full.max(1), own.max(1)])
        good = ~broken.any(1) & np.isfinite(best).all(0)
        full, own = full[good], own[good]
        if not len(full):
            return cls(0, 0.0, 0)
        agreed = int((full.argmax(1) == own.argmax(1)).sum())
        full, own = full - full.max(1, keepdims=True), own - own.max(1, keepdims=True)
        weights = np.exp(full)
        total, other = weights.sum(1, dtype=np.float64), np.exp(own).sum(1, dtype=np.float64)
        difference = np.subtract(full, own, out=np.zeros_like(full), where=weights > 0)
        kl = (weights * difference).sum(1, dtype=np.float64) / total + np.log(other) - np.log(total)
        return cls(len(full), float(np.maximum(kl, 0).sum()), agreed)  # rounding can make a zero negative


class Checks:
    """Decode steps of one backend, of which one in `every` that restrict anything is checked."""

    def __init__(self, backend: Backend, experts: tuple[int, ...], every: int) -> None:
        """`every` 0: none. Nor of a backend whose caches can't be without their last token, as states can't be."""
        self._backend, self._everything = backend, Restriction(experts)
        self._every = every if backend.rewinds else 0
        self._steps = 0

    def step(
        self, input_ids: Array, past_lengths: Array, lengths: Array, restriction: Restriction, draws: Draws
    ) -> tuple[NextTokens, Check | None]:
        """A decode step from the first slot; see Backend.next_tokens, which also says what it raises."""
        check = None
        if self._due(restriction):
            started = time.perf_counter()
            decoding = np.flatnonzero(lengths)
            # Others each time, so that no sequence stands for all.
            rows = np.roll(decoding, -ROWS * (self._steps // self._every))[:ROWS]
            full, own = (  # copies, by the index: the next step may write where they were
                self._backend.step(input_ids, past_lengths, lengths, how).logits[rows]
                for how in (self._everything, restriction)
            )
            check = replace(Check.of(full, own), seconds=time.perf_counter() - started)
        # Its own draws, wherever the backend makes them: a step that was looked at gives what any other would.
        return self._backend.next_tokens(input_ids, past_lengths, lengths, restriction, draws), check

    def _due(self, restriction: Restriction) -> bool:
        if not self._every or restriction == self._everything:
            return False
        self._steps += 1
        return self._steps % self._every == 0
