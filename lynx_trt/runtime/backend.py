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
    """Runs the graph for a fixed number of sequence slots; slot b is row b of every step."""

    slots: int

    def step(self, input_ids: Array, past_lengths: Array, lengths: Array, budgets: Array) -> StepResult:
        """Run input_ids [B,S] i64 with past_lengths [B] i64, lengths [B] i64 (0: idle row), budgets [N] i32."""
        ...
