"""What slots still have of prompts, for others that begin alike."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from lynx_trt.runtime.backend import Array

NOTHING: Array = np.zeros(0, np.int64)


class Held:
    """The tokens of prompts whose keys and values each slot has from its first row on, also when nobody uses it.

    Some of them can be taken from a slot where `rewinds` allows for all that was written behind them. With `rewinds` 0
    a layer keeps a state, which has all of its sequence: then they are all taken, before anything came behind them.
    """

    def __init__(self, slots: int, least: int, rewinds: int) -> None:
        """`least`: tokens that are worth it; 0: nothing is held."""
        self._least, self._rewinds = least, rewinds
        self._tokens = [NOTHING] * slots
        self._real = np.zeros(slots, np.int64)  # tokens of the sequence in the slot
        self._written = np.zeros(slots, np.int64)  # where what was written of it ends, padding included
        self._clock = itertools.count(1)
        self._used = np.zeros(slots, np.int64)

    @property
    def keeps(self) -> bool:
        """Whether a prompt has to be kept in a slot of its own, for it can't be taken from one that decodes."""
        return self._least > 0 and self._rewinds == 0

    def wrote(self, first: int, past: Array, width: int, real: Array) -> None:
        """A step wrote `width` rows from `past` [B] on into the slots from `first` on, `real` [B] of them sequences'.

        From 0 on it is a new one.
        """
        slots = slice(first, first + len(past))
        self._written[slots] = np.maximum(np.where(past > 0, self._written[slots], 0), past + width)
        self._real[slots] = np.where(real > 0, past + real, self._real[slots])

    def prompt(self, slot: int, tokens: Sequence[int]) -> None:
        """These are what the slot has now."""
        self._tokens[slot], self._used[slot] = np.array(tokens), next(self._clock)

    def copied(self, source: int, target: int, size: int | None = None) -> None:
        """The target has what the source has; or its first `size` tokens."""
        self._tokens[target] = self._tokens[source][:size]
        self._real[target] = self._real[source] if size is None else size
        self._written[target] = self._written[source]
        self._used[source] = self._used[target] = next(self._clock)

    def forget(self, slot: int) -> None:
        """What it has is not to be taken."""
        self._tokens[slot] = NOTHING

    def padding(self, slot: int, most: int) -> int:
        """Where a step may write a row of padding into a slot that nobody uses: behind what it has, or at `most`."""
        self._tokens[slot] = self._tokens[slot][:most]
        return len(self._tokens[slot])

    def find(self, prompt: Sequence[int], slot: int) -> tuple[int, int]:
        """The slot to take the begin of a prompt from, itself if it serves as well, and how many tokens; 0: none.

        The last token is always left, since its logits are wanted.
        """
        if not self._least:
            return slot, 0
        wanted = np.array(prompt[:-1])
        sizes = [self._taken(wanted, source) for source in range(len(self._tokens))]
        source = max(range(len(sizes)), key=lambda each: (sizes[each], each == slot))
        return (source, sizes[source]) if sizes[source] >= self._least else (slot, 0)

    def spares(self, prompt: Sequence[int], other: Sequence[int]) -> bool:
        """Whether the prompt will be spared work once the other one is there."""
        if not self._least:
            return False
        size = begins(np.array(prompt[:-1]), np.array(other))
        return size >= self._least and (self._rewinds > 0 or size == len(other))

    def oldest(self, slots: Sequence[int]) -> int:
        """That of some slots which was of no use for longest."""
        return min(slots, key=lambda slot: int(self._used[slot]))

    def has(self, prompt: Sequence[int], slots: Sequence[int]) -> bool:
        """Whether one of the slots has this prompt, and no more."""
        return any(self._real[s] == len(prompt) and np.array_equal(self._tokens[s], prompt) for s in slots)

    def _taken(self, prompt: Array, source: int) -> int:
        size = begins(prompt, self._tokens[source])
        if self._rewinds == 0:
            return size if size == self._real[source] else 0
        return size if self._written[source] - size <= self._rewinds else 0


def begins(prompt: Array, other: Array) -> int:
    """With how many tokens of another a prompt begins."""
    size = min(len(prompt), len(other))
    differs = np.flatnonzero(prompt[:size] != other[:size])
    return int(differs[0]) if len(differs) else size
