"""Continuous batching: sequences join and leave a running decode batch at every step.

A sequence takes a slot (a row of the KV caches) when one is free, is prefilled there in chunks, and then decodes
together with all others that are that far. `Scheduler.step` does one round: it drops those that nobody waits for any
more, admits new ones, runs at most one chunk of prefill, and one decode step. So a long prompt delays the others by
one chunk a token, never by its whole length. Prefill always uses all experts; a decode step uses, in each layer, the
highest budget that anyone in its batch asked for.

What a prompt begins with may be in a slot already, of a conversation's last turn or of another request with the same
instructions: then it is copied from there, and not computed again (`held.py`). Of a sequence that is the prompt alone,
which all experts have seen.

Everything runs on the caller's thread, in the same order for the same input; `submit` and `cancel` may be called
from any thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from lynx_trt.budgets import Restriction
from lynx_trt.errors import BusyError, GenerationError, LynxError, first_line
from lynx_trt.runtime.backend import NOT_FINITE, Array, Backend, StepSizes
from lynx_trt.runtime.check import Check, Checks
from lynx_trt.runtime.held import Held
from lynx_trt.runtime.sampling import draws_of
from lynx_trt.runtime.sequence import Generated, Limits


@dataclass(frozen=True)
class Policy:
    """How the scheduler shares the machine.

    Attributes:
        queue: sequences that may wait for a slot.
        chunk: tokens of one prompt in one prefill step, at most.
        prefill_tokens: tokens of one prefill step, all rows and their padding together.
        prefill_rows: sequences of one prefill step, at most (an engine's prefill profile has a limit).
        prefill_first: no decode step before every admitted prompt is in the cache; a fixed batch then decodes
            together from its first token to its last.
        reuse: tokens of a prompt, at least, that are taken from a slot which has them; 0: none ever.
        check: restricted decode steps of which one is done with all experts too, to see what that changes; 0: none.
    """

    queue: int = 64
    chunk: int = 128
    prefill_tokens: int = 256
    prefill_rows: int = 64
    prefill_first: bool = False
    reuse: int = 32
    check: int = 0

    def within(self, sizes: StepSizes) -> Policy:
        """The policy as far as a backend can follow it."""
        return replace(
            self,
            chunk=min(self.chunk, sizes.prefill_length),
            prefill_rows=min(self.prefill_rows, sizes.prefill_rows),
        )


@dataclass(frozen=True)
class StepReport:
    """One step of the backend.

    Attributes:
        kind: prefill or decode.
        rows: sequences that it advanced.
        batch: rows that were computed, masked ones included.
        tokens: real tokens that went through the model.
        seconds: time of the step, with the draws of the next tokens.
        active: i32 [N], active experts of each MoE layer.
        restriction: the one in force.
        delayed: sequences in decode that a step of prefill kept waiting.
        check: what the restriction changed, where that was looked at.
    """

    kind: str
    rows: int
    batch: int
    tokens: int
    seconds: float
    active: Array
    restriction: Restriction
    delayed: int = 0
    check: Check | None = None


class Observer(Protocol):
    """Who keeps the statistics."""

    def on_step(self, report: StepReport) -> None:
        """One step of the backend is done."""
        ...

    def on_end(self, sequence: Generated) -> None:
        """A sequence has ended, whatever its way."""
        ...


class Scheduler:
    """Decodes whatever is submitted, on the slots of one backend."""

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        *,
        restriction: Restriction,
        policy: Policy | None = None,
        observer: Observer | None = None,
    ) -> None:
        """`restriction` is that of sequences that ask for none; see also `set_restriction`."""
        self.policy = (policy or Policy()).within(backend.sizes)
        self._backend, self._limits, self._observer = backend, limits, observer
        self._everything = Restriction(limits.experts)
        self._restriction = restriction
        self._waiting: deque[Generated] = deque()
        self._lock = threading.Lock()
        self._slots: list[Generated | None] = [None] * backend.slots
        # Sums over all decode steps; a sequence's own means come from what they were when it began to decode.
        self._steps = 0
        self._active = np.zeros(len(limits.experts))
        self._joined: dict[Generated, tuple[int, Array]] = {}
        self._held = Held(backend.slots, self.policy.reuse, backend.rewinds)
        self._checks = Checks(backend, limits.experts, self.policy.check)

    @property
    def waiting(self) -> int:
        """Sequences without a slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Slots in use."""
        return sum(sequence is not None for sequence in self._slots)

    def set_restriction(self, restriction: Restriction) -> None:
        """The default from the next step on, for running sequences too if they asked for none of their own."""
        self._restriction = restriction

    def submit(self, sequence: Generated) -> None:
        """Queue a sequence; its callbacks run on the thread that calls `step`.

        Raises:
            BusyError: as many wait as may.
            GenerationError: its prompt is empty or leaves no room for a new token.
        """
        check_prompt(sequence.prompt, self._limits)
        with self._lock:
            # Who finds a free slot at the next step only waits for that.
            if len(self._waiting) >= self.policy.queue + len(self._slots) - self.running:
                raise BusyError(
                    f"the queue is full: {len(self._waiting)} requests wait and {self.running} are being answered; "
                    "try again later"
                )
            sequence.times.submitted = time.monotonic()
            self._waiting.append(sequence)

    def cancel(self, sequence: Generated) -> None:
        """Nobody waits for this one any more: the next step frees its place."""
        sequence.cancelled = True

    def step(self) -> bool:
        """One round; False if there was nothing to do."""
        self._drop()
        self._admit()
        prefilled = self._prefill()
        if prefilled and self.policy.prefill_first:
            return True
        self._compact()
        return self._decode() or prefilled

    def abort(self, error: LynxError) -> None:
        """End everything that waits or runs with `error`."""
        with self._lock:
            waiting, self._waiting = list(self._waiting), deque()
        running = [sequence for sequence in self._slots if sequence is not None]
        for slot in range(len(self._slots)):
            self._free(slot)
            self._held.forget(slot)
        for sequence in [*waiting, *running]:
            self._end(sequence, "error", error)

    # --- Who is where.

    def _decoding(self) -> list[int]:
        """Slots whose prompt is in the cache."""
        return [slot for slot, s in enumerate(self._slots) if s is not None and s.cached >= len(s.prompt)]

    def _drop(self) -> None:
        """End what was cancelled or has passed its deadline."""
        now = time.monotonic()
        for slot, sequence in enumerate(self._slots):
            if sequence is not None and (sequence.cancelled or sequence.request.deadline <= now):
                self._free(slot)
                self._end(sequence, "cancelled" if sequence.cancelled else "deadline")
        with self._lock:
            gone = [s for s in self._waiting if s.cancelled or s.request.deadline <= now]
            if gone:
                self._waiting = deque(s for s in self._waiting if s not in gone)
        for sequence in gone:
            if sequence.cancelled:
                self._end(sequence, "cancelled")
            else:
                self._end(sequence, "deadline", GenerationError("the deadline passed while the request waited"))

    def _admit(self) -> None:
        """Free slots, the lowest first, to those that have waited longest."""
        for slot, sequence in enumerate(self._slots):
            if sequence is not None:
                continue
            with self._lock:
                if not self._waiting:
                    return
                sequence = self._waiting.popleft()
                self._slots[slot] = sequence
            sequence.times.started = time.monotonic()

    def _free(self, slot: int) -> None:
        sequence, self._slots[slot] = self._slots[slot], None
        if sequence is not None and (joined := self._joined.pop(sequence, None)):
            steps = self._steps - joined[0]
            if steps:
                sequence.active = tuple(((self._active - joined[1]) / steps).tolist())

    def _end(self, sequence: Generated, finish: str, error: LynxError | None = None) -> None:
        sequence.end(finish, error)
        if self._observer:
            self._observer.on_end(sequence)
        if sequence.on_end:
            sequence.on_end()

    def _batch(self, rows: int) -> int:
        """The batch size that a decode step of `rows` rows has: the next one that the backend is prepared for."""
        return next((size for size in self._backend.sizes.decode_rows if rows <= size <= len(self._slots)), rows)

    def _compact(self) -> None:
        """Move the last decoding sequence into a hole while that makes the batch smaller.

        A row of cache is copied once; every later step has one row less to compute. 120 requests of mixed length on
        16 slots (lynx-tiny, ONNX Runtime): 20% fewer rows than with masked holes, 5 to 15% less CPU; batches filled
        up to powers of two would cost 45% more rows, so that is for backends that need it.
        """
        while (slots := self._decoding()) and None in self._slots[: slots[-1]]:
            source, target = slots[-1], self._slots.index(None)
            highest = max(target, slots[-2] if len(slots) > 1 else 0)
            if self._batch(highest + 1) >= self._batch(source + 1):
                return
            sequence = self._slots[source]
            assert sequence is not None
            self._backend.copy_slot(source, target, sequence.cached)
            self._slots[source], self._slots[target] = None, sequence
            self._held.copied(source, target)

    # --- Steps of the backend.

    def _prefill(self) -> bool:
        """One chunk for the prompt that was admitted first, and for its neighbours as far as they fit in."""
        pending = [(s.times.started or 0, i) for i, s in enumerate(self._slots) if s and s.cached < len(s.prompt)]
        if not pending:
            return False
        head = min(pending)[1]
        self._reuse(head)
        first, rows, width = self._chunk(head)
        ids = np.zeros((len(rows), width), dtype=np.int64)
        for row, sequence in enumerate(rows):
            piece = sequence.prompt[sequence.cached : sequence.cached + width]
            ids[row, : len(piece)] = piece
        past = np.array([sequence.cached for sequence in rows], dtype=np.int64)
        lengths = np.array([min(width, len(s.prompt) - s.cached) for s in rows], dtype=np.int64)
        self._run("prefill", first, rows, ids, past, lengths, self._everything)
        return True

    def _reuse(self, slot: int) -> None:
        """Spare a prompt that is about to begin what some slot has of it."""
        sequence = self._slots[slot]
        assert sequence is not None
        if sequence.cached:
            return
        source, size = self._held.find(sequence.prompt, slot)
        if not size:
            return
        if source != slot:
            self._backend.copy_slot(source, slot, size)
        self._held.copied(source, slot, size)
        sequence.cached = sequence.reused = size

    def _keep(self, slot: int, prompt: list[int]) -> None:
        """A prompt with states goes into a free slot, if there is one: where it decodes they don't stay as they are."""
        free = [each for each, other in enumerate(self._slots) if other is None]
        if self._waiting or not free or len(prompt) < self.policy.reuse or self._held.has(prompt, free):
            return
        target = self._held.oldest(free)
        self._backend.copy_slot(slot, target, len(prompt))
        self._held.copied(slot, target)

    def _chunk(self, slot: int) -> tuple[int, list[Generated], int]:
        """(first slot, its sequences, tokens a row) of the next prefill step, around `slot`.

        Only neighbours can join: a step is a range of slots. A row may be padded no further than its cache reaches.
        """
        head = self._slots[slot]
        assert head is not None
        width = min(self.policy.chunk, len(head.prompt) - head.cached)
        if boundary := self._backend.sizes.boundary:
            width = min(width, boundary - head.cached % boundary)
        most = min(self.policy.prefill_rows, max(1, self.policy.prefill_tokens // width))

        def fits(sequence: Generated | None) -> bool:
            if sequence is None or sequence.cached >= len(sequence.prompt):
                return False
            # One that can be spared work waits for its turn.
            if not sequence.cached and self._held.spares(sequence.prompt, head.prompt):
                return False
            if self._backend.sizes.crossed(np.array([sequence.cached]), width) is not None:
                return False
            return sequence.cached + width <= self._limits.max_length

        first, last = slot, slot
        while last - first + 1 < most and last + 1 < len(self._slots) and fits(self._slots[last + 1]):
            last += 1
        while last - first + 1 < most and first > 0 and fits(self._slots[first - 1]):
            first -= 1
        return first, [s for s in self._slots[first : last + 1] if s is not None], width

    def _decode(self) -> bool:
        """One token for every sequence whose prompt is in the cache; other rows in between are masked."""
        slots = self._decoding()
        if not slots:
            return False
        batch = self._batch(slots[-1] + 1)
        ids = np.zeros((batch, 1), dtype=np.int64)
        lengths = np.zeros(batch, dtype=np.int64)
        past = np.zeros(batch, dtype=np.int64)
        longest = max(self._slots[slot].cached for slot in slots)  # type: ignore[union-attr]  # it is decoding
        rows = []
        for slot, sequence in enumerate(self._slots[:batch]):
            # A masked row writes its padding where its next token will overwrite it; where nothing is cached yet,
            # behind what the slot holds of others, unless the step would then go over more rows than without it.
            cached = sequence.cached if sequence is not None else 0
            past[slot] = min(cached or self._held.padding(slot, longest), self._limits.max_length - 1)
            if sequence is not None and sequence.cached >= len(sequence.prompt):
                ids[slot, 0], lengths[slot] = sequence.tokens[-1], 1
                rows.append(sequence)
        self._run("decode", 0, rows, ids, past, lengths, self._in_force(rows))
        return True

    def _in_force(self, rows: list[Generated]) -> Restriction:
        """In each layer the mildest that anyone asked for."""
        return Restriction.mildest({sequence.request.restriction or self._restriction for sequence in rows})

    def _run(
        self,
        kind: str,
        first: int,
        rows: list[Generated],
        ids: Array,
        past: Array,
        lengths: Array,
        restriction: Restriction,
    ) -> None:
        """One step of the backend, and what follows from it for each of its sequences."""
        started = time.perf_counter()
        delayed = len(self._decoding()) if kind == "prefill" else 0
        placed = list(zip(np.flatnonzero(lengths).tolist(), rows, strict=True))
        # Those whose prompt goes on after this chunk have no next token yet.
        whole = [(place, s) for place, s in placed if s.cached + lengths[place] >= len(s.prompt)]
        edits = {place: made for place, s in whole if (made := s.edits()) is not None}
        draws = draws_of(len(ids), [(place, s.request.sampling, s.generator) for place, s in whole], edits)
        check = None
        try:
            if kind == "decode":
                result, check = self._checks.step(ids, past, lengths, restriction, draws)
            else:
                result = self._backend.next_tokens(ids, past, lengths, restriction, draws, first=first)
        except Exception as error:
            self._fail(rows, GenerationError(f"the model failed in a {kind} step: {first_line(error)}"))
            return
        if kind == "decode":
            self._steps += 1
            self._active += result.active
        self._held.wrote(first, past, ids.shape[1], lengths)
        for place, sequence in placed:
            sequence.cached += int(lengths[place])
            if kind == "prefill":
                self._held.prompt(first + place, sequence.prompt[: sequence.cached])
        for place, sequence in whole:
            self._take(first + place, sequence, int(result.tokens[place]))
            if kind == "prefill" and self._held.keeps and sequence.error is None:
                self._keep(first + place, sequence.prompt)
        if self._observer:
            seconds = time.perf_counter() - started
            tokens = int(lengths.sum())
            self._observer.on_step(
                StepReport(kind, len(rows), len(ids), tokens, seconds, result.active, restriction, delayed, check)
            )

    def _take(self, slot: int, sequence: Generated, token: int) -> None:
        if sequence.guide is not None and (problem := sequence.guide.problem):
            self._fail([sequence], GenerationError(f"the guide can't go on: {problem}"))
            return
        if token == NOT_FINITE:
            reason = "the model gave logits that are no numbers (NaN or infinite)"
            self._fail([sequence], GenerationError(f"{reason}; its weights or its precision are broken"))
            return
        if not sequence.tokens:
            self._joined[sequence] = (self._steps, self._active.copy())
        sequence.add(token, self._limits)
        if sequence.finish:
            self._free(slot)
            self._end(sequence, sequence.finish)

    def _fail(self, rows: list[Generated], error: LynxError) -> None:
        """End `rows` with an error; their caches may hold values that are no numbers, so they are cleared."""
        for sequence in rows:
            slot = self._slots.index(sequence)
            self._free(slot)
            self._backend.clear_slot(slot)
            self._held.forget(slot)
            self._end(sequence, "error", error)


def check_prompt(prompt: Sequence[int], limits: Limits, what: str = "the prompt") -> None:
    """Refuse a prompt without tokens, one that leaves no room for a new token, and tokens that the model hasn't.

    Raises:
        GenerationError: such a prompt.
    """
    if not prompt:
        raise GenerationError(f"{what} is empty: it has no tokens to continue from")
    if len(prompt) >= limits.max_length:
        raise GenerationError(
            f"{what} has {len(prompt)} tokens, and the cache holds {limits.max_length} with the output: "
            f"shorten it to {limits.max_length - 1} tokens, or build with a larger --max-length if the model takes more"
        )
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < limits.vocabulary:
            raise GenerationError(f"{what} has the token {token}, and the model has 0 to {limits.vocabulary - 1}")
