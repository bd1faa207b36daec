"""What decoding needs of whatever runs the graph: one step over a batch, against caches that it keeps itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lynx_trt.budgets import Restriction
from lynx_trt.errors import GenerationError

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class StepResult:
    """One step's outcome: logits [B,V] f32 of each row's last real token, active experts [N] i32 of each MoE layer.

    The arrays may be overwritten by the next step.
    """

    logits: Array
    active: Array


# Tokens that are none.
NOT_WANTED, NOT_FINITE = -1, -2


class RowEdits(Protocol):
    """What is done to a row's logits before its token is drawn."""

    def apply(self, logits: Array) -> Array:
        """Other logits f32 [V] in the place of these, which stay as they are."""
        ...


@dataclass(frozen=True)
class Draws:
    """How the rows of a step draw their next token; [B] each.

    Attributes:
        wanted: bool; the other rows draw none.
        temperature: f64; 0 is greedy.
        top_p: f64, above 0; 1: no limit.
        top_k: i32; 0: no limit.
        uniform: f64, 0 to below 1: where in the distribution the token is, the tokens in the order of their ids, or
            from the likeliest on where top-k or top-p leave some of them.
        min_p: f64; tokens of less than this share of the likeliest's probability are not drawn; 0: no limit.
        edits: for some rows, by their number.
    """

    wanted: Array
    temperature: Array
    top_p: Array
    top_k: Array
    uniform: Array
    min_p: Array
    edits: Mapping[int, RowEdits] = field(default_factory=dict)

    @property
    def scale(self) -> Array:
        """1 / temperature, f32 [B], as far as a float32 goes; 0 is greedy, and nothing else is."""
        limits = np.finfo(np.float32)
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.clip(1 / self.temperature, limits.tiny, limits.max)
        return np.where(self.temperature > 0, inverse, 0).astype(np.float32)

    def row(self, row: int) -> Draws:
        """Those of one row."""
        one = slice(row, row + 1)
        edits = {0: self.edits[row]} if row in self.edits else {}
        how = self.temperature[one], self.top_p[one], self.top_k[one], self.uniform[one], self.min_p[one]
        return Draws(self.wanted[one], *how, edits)

    @property
    def on_host(self) -> Array:
        """The rows that kernels can't draw: those with edits, and with a min_p that leaves any out."""
        rows = (self.min_p > 0) & (self.temperature > 0)
        rows[list(self.edits)] = True
        return np.flatnonzero(rows & self.wanted)


@dataclass(frozen=True)
class NextTokens:
    """One step's outcome: tokens [B] i64, active experts [N] i32 of each MoE layer.

    A token is NOT_WANTED where none was, and NOT_FINITE where the logits are no numbers. The arrays may be overwritten
    by the next step.
    """

    tokens: Array
    active: Array


@dataclass(frozen=True)
class StepSizes:
    """The steps that a backend can run.

    Attributes:
        decode_rows: batch sizes of decode steps that it is prepared for, rising; a batch is filled up to the next
            one with idle rows. Empty: any.
        prefill_rows: sequences of a prefill step, at most.
        prefill_length: tokens of each in a prefill step, at most.
        boundary: a prefill step may begin and end at a multiple of this, but not go across one; 0: any may.
    """

    decode_rows: tuple[int, ...] = ()
    prefill_rows: int = 1 << 30
    prefill_length: int = 1 << 30
    boundary: int = 0

    def crossed(self, past_lengths: Array, length: int) -> int | None:
        """The first of some positions from which a step of so many tokens would cross the boundary."""
        if not self.boundary or length == 1:
            return None
        over = past_lengths[past_lengths % self.boundary + length > self.boundary]
        return int(over[0]) if over.size else None

    def check_boundary(self, past_lengths: Array, length: int) -> None:
        """Refuse a step that would cross the boundary.

        Raises:
            GenerationError: with its length and position.
        """
        if (start := self.crossed(past_lengths, length)) is not None:
            where = f"at position {start} crosses a multiple of {self.boundary}"
            raise GenerationError(f"a step of {length} tokens {where}")


def beginning(past_lengths: Array, lengths: Array, first: int) -> Array:
    """The slots in which a step begins a sequence: row b is slot `first + b`."""
    return first + np.flatnonzero((past_lengths == 0) & (lengths > 0))


class Backend(Protocol):
    """Runs the graph for a fixed number of sequence slots, each with its rows of the caches."""

    slots: int
    sizes: StepSizes
    # How many of a slot's last tokens can be left out, as if they had never been.
    rewinds: int

    def step(
        self, input_ids: Array, past_lengths: Array, lengths: Array, restriction: Restriction, *, first: int = 0
    ) -> StepResult:
        """Run one step for the slots `first` to `first + B - 1`; row b of the inputs is slot `first + b`.

        Args:
            input_ids: i64 [B,S], each row right-padded. Padding is written to the cache too, at the row's past
                length and behind: past_lengths + S must not exceed the model's maximum length in any row.
            past_lengths: i64 [B], tokens of each slot that the cache holds. Where it is 0 and the row has tokens, a
                sequence begins: what a layer keeps in place of keys and values begins as zeros.
            lengths: i64 [B], real tokens of each row; 0 is an idle row, which loads no expert.
            restriction: what each MoE layer may load where S is 1.
            first: the first slot.
        """
        ...

    def next_tokens(
        self,
        input_ids: Array,
        past_lengths: Array,
        lengths: Array,
        restriction: Restriction,
        draws: Draws,
        *,
        first: int = 0,
    ) -> NextTokens:
        """The same step, but for the logits: each row's next token is drawn from them where they are."""
        ...

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Make the first `length` cached tokens of slot `target` those of slot `source`.

        States and rings are copied whole: they have what they had in the source.
        """
        ...

    def clear_slot(self, slot: int) -> None:
        """Set a slot's caches to zeros: a value that is no number would reach the next sequence even where masked."""
        ...
