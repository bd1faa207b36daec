"""What is done to the logits of one sequence before its next token is drawn: penalties, biases, what a guide allows.

The order is that of other servers: biases, repetition, then presence and frequency; what isn't allowed goes last, so
nothing brings it back. Sequences with any of it are drawn on the host, as their history is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lynx_trt.runtime.backend import Array
from lynx_trt.runtime.sampling import Sampling


@dataclass(frozen=True)
class Edits:
    """Of one row of a step; see `backend.RowEdits`.

    Attributes:
        biased: i64 [n], tokens with a bias; `biases` f32 [n] is added.
        seen: i64 [m], tokens of prompt and answer, whose logits `repetition` divides, or multiplies where below 0.
        written: i64 [k], tokens of the answer, from which `penalties` f32 [k] are taken.
        allowed: bool [V], the tokens that may be drawn; None: all.
    """

    biased: Array
    biases: Array
    seen: Array
    repetition: float
    written: Array
    penalties: Array
    allowed: Array | None = None

    def apply(self, logits: Array) -> Array:
        """Other logits f32 [V] in the place of these."""
        made = logits.astype(np.float32)
        made[self.biased] += self.biases
        if self.repetition != 1:
            values = made[self.seen]
            factor = np.float32(self.repetition)
            made[self.seen] = np.where(values > 0, values / factor, values * factor)
        made[self.written] -= self.penalties
        return made if self.allowed is None else np.where(self.allowed, made, np.float32(-np.inf))


class History:
    """What of a sequence its penalties go by."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """At its beginning."""
        self._sampling = sampling
        biases = dict(sampling.logit_bias)
        self._biased = np.array(list(biases), np.int64), np.array(list(biases.values()), np.float32)
        self._prompt = np.unique(np.array(prompt if sampling.repetition_penalty != 1 else (), np.int64))
        self._known = set(self._prompt.tolist())
        self._new: list[int] = []  # that the prompt hasn't
        self._written: Counter[int] = Counter()

    def take(self, token: int) -> None:
        """One more token of the answer."""
        if self._sampling.repetition_penalty != 1 and token not in self._known:
            self._known.add(token)
            self._new.append(token)
        if self._sampling.presence_penalty or self._sampling.frequency_penalty:
            self._written[token] += 1

    def edits(self, allowed: Array | None = None) -> Edits:
        """What is to be done before the next token."""
        sampling = self._sampling
        counts = np.fromiter(self._written.values(), np.float32, len(self._written))
        return Edits(
            *self._biased,
            seen=np.concatenate([self._prompt, np.array(self._new, np.int64)]),
            repetition=sampling.repetition_penalty,
            written=np.array(list(self._written), np.int64),
            penalties=np.float32(sampling.presence_penalty) + np.float32(sampling.frequency_penalty) * counts,
            allowed=allowed,
        )
