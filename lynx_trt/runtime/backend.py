"""What decoding needs of whatever runs the graph: one step over a batch, against caches that it keeps itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class StepResult:
    """One step's outcome: logits [B,V] f32 of each row's last real token, active experts [N] i32 of each MoE layer."""

    logits: Array
    active: Array


class Backend(Protocol):
    """Runs the graph for a fixed number of sequence slots, each with its rows of the caches."""

    slots: int

    def step(
        self, input_ids: Array, past_lengths: Array, lengths: Array, budgets: Array, *, first: int = 0
    ) -> StepResult:
        """Run one step for the slots `first` to `first + B - 1`; row b of the inputs is slot `first + b`.

        Args:
            input_ids: i64 [B,S], each row right-padded. Padding is written to the cache too, at the row's past
                length and behind: past_lengths + S must not exceed the model's maximum length in any row.
            past_lengths: i64 [B], tokens of each slot that the cache holds.
            lengths: i64 [B], real tokens of each row; 0 is an idle row, which loads no expert.
            budgets: i32 [N], experts that each MoE layer may load where S is 1.
            first: the first slot.
        """
        ...

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Make the first `length` cached tokens of slot `target` those of slot `source`."""
        ...

    def clear_slot(self, slot: int) -> None:
        """Set a slot's caches to zeros: a value that is no number would reach the next sequence even where masked."""
        ...
