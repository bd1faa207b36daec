"""Continuous batching: what a sequence gets doesn't depend on who comes and goes around it, and nothing is lost."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx_trt.artifact import Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.errors import BusyError, GenerationError
from lynx_trt.runtime.backend import Array, NextTokens, StepResult, StepSizes
from lynx_trt.runtime.engine import Engine
from lynx_trt.runtime.sampling import Sampling, draw
from lynx_trt.runtime.scheduler import Policy, Scheduler, StepReport
from lynx_trt.runtime.sequence import Generated, Limits, Request

VOCABULARY = 50
LENGTH = 40
LIMITS = Limits(LENGTH, VOCABULARY, (8, 8, 4), frozenset({0}))


def next_of(tokens: list[int]) -> int:
    """The fake model: the next token hangs on every token before it."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCABULARY


class FakeBackend:
    """Keeps token ids as its cache, padding included, and checks what a real one can't survive."""

    def __init__(self, slots: int, sizes: StepSizes = StepSizes()) -> None:  # noqa: B008  (frozen)
        self.slots, self.sizes, self.rewinds = slots, sizes, LENGTH
        self.cache = np.full((slots, LENGTH), -1)
        self.states: list[list[int]] = [
            [] for _ in range(slots)
        ]  # all that the token of a row hangs on, if rewinds is 0
        self.steps: list[tuple[int, int, int]] = []  # (first, batch, width)
        self.budgets: list[list[int]] = []
        self.copies = 0
        self.cleared: list[int] = []
        self.broken = -1  # a token that makes the logits of its row NaN
        self.error: Exception | None = None
        self.delay = 0.0

    def step(
        self, input_ids: Array, past_lengths: Array, lengths: Array, restriction: Restriction, *, first: int = 0
    ) -> StepResult:
        batch, width = input_ids.shape
        assert first >= 0
        assert first + batch <= self.slots
        assert int(past_lengths.max()) + width <= LENGTH, "padding would run over the end of the cache"
        assert self.sizes.crossed(past_lengths, width) is None
        time.sleep(self.delay)
        if self.error:
            raise self.error
        logits = np.zeros((batch, VOCABULARY), dtype=np.float32)
        for row in range(batch):
            past, length = int(past_lengths[row]), int(lengths[row])
            self.cache[first + row, past : past + width] = input_ids[row]
            known = self.cache[first + row, : past + length].tolist()
            if self.rewinds == 0 and length:
                state = self.states[first + row] if past else []
                assert len(state) == past, "a state can't be taken back"
                known = self.states[first + row] = [*state, *input_ids[row, :length].tolist()]
            if length and self.broken in known:
                logits[row] = np.nan
            elif length:
                logits[row, next_of(known)] = 5.0
        self.steps.append((first, batch, width))
        self.budgets.append(list(restriction.budgets))
        return StepResult(logits, np.minimum(restriction.budgets, 3).astype(np.int32))

    def next_tokens(self, ids: Array, past: Array, lengths: Array, *others: Any, first: int = 0) -> NextTokens:
        restriction, draws = others
        # Who wants a token has one to be drawn from, and a row that is idle wants none.
        assert not draws.wanted[lengths == 0].any()
        result = self.step(ids, past, lengths, restriction, first=first)
        return NextTokens(draw(result.logits, draws), result.active)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        self.copies += 1
        self.cache[target, :length] = self.cache[source, :length]
        self.states[target] = list(self.states[source])

    def clear_slot(self, slot: int) -> None:
        self.cleared.append(slot)
        self.cache[slot] = 0


class NoText:
    """A stream for tests that look at tokens: each is one character."""

    def push(self, token: int) -> str:
        return chr(65 + token % 26)


class Seen:
    """An observer that keeps what it sees."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.ends: list[str | None] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)

    def on_end(self, one: Generated) -> None:
        self.ends.append(one.finish)


def sequence(prompt: list[int], new: int = 10, **request: Any) -> Generated:
    return Generated(list(prompt), Request(new, **request), NoText())  # type: ignore[arg-type]


def expected(prompt: list[int], new: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < min(new, LENGTH - len(prompt)):
        token = next_of(prompt + tokens)
        if token == 0:
            break
        tokens.append(token)
    return tokens


def scheduler(backend: FakeBackend, **policy: Any) -> Scheduler:
    return Scheduler(backend, LIMITS, restriction=Restriction((4, 4, 2)), policy=Policy(**policy))


def finish(scheduled: Scheduler) -> None:
    for _ in range(10_000):
        if not scheduled.step():
            return
    raise AssertionError("it doesn't end")


# --- Whoever comes and goes.

# Many prompts begin alike.
PROMPTS = st.builds(
    lambda shared, own: [*range(1, 1 + shared), *own][: LENGTH - 1],
    st.integers(0, LENGTH),
    st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=LENGTH - 1),
)
ARRIVALS = st.lists(
    st.tuples(
        PROMPTS,
        st.integers(1, LENGTH),  # new tokens
        st.integers(0, 12),  # steps after the one before
        st.one_of(st.none(), st.integers(0, 15)),  # steps after which the client goes away
    ),
    min_size=1,
    max_size=12,
)
POLICIES = st.builds(
    Policy,
    queue=st.just(100),
    chunk=st.integers(1, 16),
    prefill_tokens=st.integers(1, 48),
    prefill_rows=st.integers(1, 4),
    prefill_first=st.booleans(),
    reuse=st.sampled_from([0, 1, 3, 10]),
)
BOUNDARIES = st.sampled_from([0, 1, 4, 7])
DECODE_ROWS = st.sampled_from([(), (1, 2, 4, 8), (4,), (3, 100)])


@settings(max_examples=150, deadline=None)
@given(
    slots=st.integers(1, 6),
    policy=POLICIES,
    rows=DECODE_ROWS,
    boundary=BOUNDARIES,
    states=st.booleans(),
    arrivals=ARRIVALS,
)
def test_every_sequence_is_what_it_is_alone(
    slots: int, policy: Policy, rows: tuple[int, ...], boundary: int, states: bool, arrivals: list[Any]
) -> None:
    """Random arrivals, lengths, clients that go away, chunks, batch sizes: tokens as alone, every slot free after."""
    backend = FakeBackend(slots, StepSizes(rows, boundary=boundary))
    backend.rewinds = 0 if states else LENGTH
    scheduled = Scheduler(backend, LIMITS, restriction=Restriction((4, 4, 2)), policy=policy)
    sequences, leave = [], {}
    for prompt, new, wait, patience in arrivals:
        for _ in range(wait):
            scheduled.step()
            _leave(scheduled, leave)
        sequences.append(sequence(prompt, new))
        scheduled.submit(sequences[-1])
        if patience is not None:
            leave[sequences[-1]] = patience
    while scheduled.step() or leave:
        _leave(scheduled, leave)
    assert scheduled.running == scheduled.waiting == 0
    for one in sequences:
        full = expected(one.prompt, one.request.max_new_tokens)
        if one.finish == "cancelled":
            assert one.tokens == full[: len(one.tokens)]
        else:
            assert one.tokens == full
            assert one.finish in ("length", "end")


def _leave(scheduled: Scheduler, leave: dict[Generated, int]) -> None:
    for one in list(leave):
        leave[one] -= 1
        if leave[one] < 0:
            del leave[one]
            scheduled.cancel(one)


# --- What a prompt shares with another.


def shared(backend: FakeBackend, *prompts: list[int], together: bool = False, **policy: Any) -> list[Generated]:
    """Prompts one after another, or all at once; each has to come out as it is alone."""
    scheduled = scheduler(backend, **{"reuse": 4, **policy})
    sequences = [sequence(prompt, 5) for prompt in prompts]
    for one in sequences:
        scheduled.submit(one)
        if not together:
            finish(scheduled)
    finish(scheduled)
    assert [one.tokens for one in sequences] == [expected(one.prompt, 5) for one in sequences]
    return sequences


BEGIN = [5, 6, 7, 8, 9, 10]


def test_a_prompt_that_begins_as_another_is_spared_that() -> None:
    """In its own slot nothing is copied; the last token is computed always."""
    backend = FakeBackend(1)
    sequences = shared(backend, [*BEGIN, 11, 12], [*BEGIN, 13], [*BEGIN, 13], [5, 6, 7, 20])
    assert [one.reused for one in sequences] == [0, 6, 6, 0]  # of the last fewer than 4
    assert backend.copies == 0
    assert [width for _, _, width in backend.steps if width > 1] == [8, 4]


def test_it_is_copied_from_another_slot() -> None:
    """Also while that one decodes; of what it has written itself nothing is taken."""
    backend = FakeBackend(3)
    scheduled = scheduler(backend, reuse=4)
    first = sequence([*BEGIN, 11], 20)
    scheduled.submit(first)
    for _ in range(4):
        scheduled.step()
    second = sequence([*BEGIN, 11, *expected(first.prompt, 3), 30], 5)
    scheduled.submit(second)
    finish(scheduled)
    assert (second.reused, backend.copies) == (7, 1)
    assert second.tokens == expected(second.prompt, 5)
    assert first.tokens == expected(first.prompt, 20)


def test_prompts_that_come_together_wait_for_the_first() -> None:
    """Those that begin as it does; another one is computed beside it."""
    backend = FakeBackend(4)
    prompts = [[*BEGIN, 11], [*BEGIN, 12], [*BEGIN, 13], [30, 31, 32, 33, 34, 35, 36]]
    sequences = shared(backend, *prompts, together=True, prefill_tokens=100)
    assert [one.reused for one in sequences] == [0, 6, 6, 0]


def test_a_state_can_not_be_cut() -> None:
    """So a prompt is kept in a free slot, and taken from there as a whole."""
    backend = FakeBackend(3)
    backend.rewinds = 0
    sequences = shared(backend, BEGIN, [*BEGIN, 11], [*BEGIN, 12, 13], [*BEGIN, 12, 13, 14], [5, 6, 7, 8, 20])
    assert [one.reused for one in sequences] == [0, 6, 6, 8, 0]


def test_a_state_is_kept_where_there_is_room() -> None:
    """Neither where all slots are used nor where somebody waits for one; the oldest goes first."""
    alone = FakeBackend(1)
    alone.rewinds = 0
    assert [one.reused for one in shared(alone, BEGIN, [*BEGIN, 11])] == [0, 0]
    assert alone.copies == 0
    backend = FakeBackend(3)
    backend.rewinds = 0
    others = [[number, *range(30, 36)] for number in (1, 2, 3)]
    sequences = shared(backend, BEGIN, *others, [*others[-1], 9], [*BEGIN, 11])
    assert [one.reused for one in sequences] == [0, 0, 0, 0, 7, 0]


def test_a_broken_state_is_not_kept() -> None:
    backend = FakeBackend(3)
    backend.rewinds, backend.broken = 0, 10
    scheduled = scheduler(backend, reuse=4)
    for prompt in (BEGIN, [*BEGIN, 11]):
        scheduled.submit(sequence(prompt, 5))
        finish(scheduled)
    assert backend.copies == 0


def test_a_slot_that_failed_is_no_source() -> None:
    """Its values may be no numbers; and nobody's are after an error of ours."""
    backend = FakeBackend(2)
    scheduled = scheduler(backend, reuse=4)
    backend.broken = 11
    bad = sequence([*BEGIN, 11, 12], 5)
    scheduled.submit(bad)
    finish(scheduled)
    assert bad.finish == "error"
    good = sequence([*BEGIN, 13], 5)
    scheduled.submit(good)
    finish(scheduled)
    assert (good.reused, good.tokens) == (0, expected(good.prompt, 5))
    scheduled.abort(GenerationError("an internal error"))
    after = sequence([*BEGIN, 13], 5)
    scheduled.submit(after)
    finish(scheduled)
    assert (after.reused, after.tokens) == (0, expected(after.prompt, 5))


def test_padding_of_an_empty_slot_leaves_what_it_holds() -> None:
    """In a batch that is filled up to four rows; what lies behind the longest sequence's rows is given up."""
    backend = FakeBackend(4, StepSizes((4,)))
    scheduled = scheduler(backend, reuse=4)
    first, second = sequence([*range(30, 38)], 3), sequence([*BEGIN, 11, 12, 13, 14, 15, 16], 1)
    for one in (first, second):
        scheduled.submit(one)
    finish(scheduled)
    third = sequence([*BEGIN, 11, 12, 13, 14, 15, 17], 5)
    scheduled.submit(third)
    finish(scheduled)
    assert third.tokens == expected(third.prompt, 5)
    assert 8 <= third.reused < 11


def test_joins_at_the_next_step() -> None:
    """A sequence that comes in the middle decodes with the others at once, and leaves without disturbing them."""
    backend = FakeBackend(4)
    scheduled = scheduler(backend)
    long = sequence([1, 2, 3], 30)
    scheduled.submit(long)
    for _ in range(5):
        scheduled.step()
    short = sequence([4, 5], 3)
    scheduled.submit(short)
    scheduled.step()
    assert backend.steps[-2:] == [(1, 1, 2), (0, 2, 1)]
    finish(scheduled)
    assert (long.tokens, short.tokens) == (expected([1, 2, 3], 30), expected([4, 5], 3))


def test_long_prompt_delays_others_by_one_chunk_a_token() -> None:
    """While 36 tokens are prefilled in chunks of 4, the running sequence gets a token between any two chunks."""
    backend = FakeBackend(2)
    scheduled = scheduler(backend, chunk=4)
    running = sequence([1], 30)
    scheduled.submit(running)
    scheduled.step()
    scheduled.submit(sequence(list(range(1, 37)), 2))
    before = len(running.tokens)
    for _ in range(9):
        scheduled.step()
    assert len(running.tokens) == before + 9
    widths = [width for first, _, width in backend.steps if first == 1]
    assert widths == [4] * 9


def test_neighbours_prefill_together() -> None:
    """Three prompts that arrive together go through in one step, padded to the first one's width."""
    backend = FakeBackend(4)
    scheduled = scheduler(backend)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    sequences = [sequence(prompt, 4) for prompt in prompts]
    for one in sequences:
        scheduled.submit(one)
    scheduled.step()
    assert backend.steps[0] == (0, 3, 3)
    finish(scheduled)
    assert [one.tokens for one in sequences] == [expected(prompt, 4) for prompt in prompts]


def test_prefill_step_is_bounded() -> None:
    backend = FakeBackend(6)
    scheduled = scheduler(backend, prefill_tokens=10, prefill_rows=3)
    for _ in range(6):
        scheduled.submit(sequence([1, 2, 3, 4], 2))
    finish(scheduled)
    assert max(batch * width for _, batch, width in backend.steps if width > 1) <= 10


def test_holes_are_closed() -> None:
    """When the first of four ends, the last moves into its slot: no step has more rows than sequences."""
    backend = FakeBackend(4)
    seen = Seen()
    scheduled = Scheduler(backend, LIMITS, restriction=Restriction((4, 4, 2)), observer=seen)
    sequences = [sequence([number + 1], 2 if number == 0 else 12) for number in range(4)]
    for one in sequences:
        scheduled.submit(one)
    finish(scheduled)
    assert backend.copies >= 1
    decode = [step for step in seen.steps if step.kind == "decode"]
    assert {step.rows for step in decode} == {step.batch for step in decode} >= {4, 3}
    assert all(step.rows == step.batch for step in decode)
    assert [one.tokens for one in sequences] == [expected(o.prompt, o.request.max_new_tokens) for o in sequences]


def test_a_backend_that_is_prepared_for_some_sizes() -> None:
    """An engine's profiles have limits: no prefill step is larger, and decode batches are filled up."""
    backend = FakeBackend(6, StepSizes(decode_rows=(2, 6), prefill_rows=2, prefill_length=3))
    scheduled = scheduler(backend, chunk=8, prefill_tokens=100)
    sequences = [sequence([number + 1, 2, 3, 4, 5], 6) for number in range(3)]
    for each in sequences:
        scheduled.submit(each)
    finish(scheduled)
    assert [each.tokens for each in sequences] == [expected(each.prompt, 6) for each in sequences]
    prefills = [(batch, width) for _, batch, width in backend.steps if width > 1]
    assert max(width for _, width in prefills) == 3
    assert max(batch for batch, _ in prefills) == 2
    assert {batch for _, batch, width in backend.steps if width == 1} <= {2, 6}


def test_batches_are_filled_up_with_masked_rows() -> None:
    backend = FakeBackend(8, StepSizes((1, 4, 8)))
    scheduled = scheduler(backend)
    for number in range(3):
        scheduled.submit(sequence([number + 1, 2], 6))
    finish(scheduled)
    decode = {batch for first, batch, width in backend.steps if width == 1 and first == 0}
    assert decode <= {1, 4}


# --- The dial.


def test_step_runs_at_the_highest_quality_asked_for() -> None:
    """Layer by layer the maximum over the batch; when that sequence has left, the default is back."""
    backend = FakeBackend(2)
    scheduled = scheduler(backend)
    scheduled.submit(sequence([1, 2], 12))
    scheduled.submit(sequence([3, 4], 4, restriction=Restriction((8, 1, 3))))
    finish(scheduled)
    decode = [b for b, (_, _, width) in zip(backend.budgets, backend.steps, strict=True) if width == 1]
    assert decode[0] == [8, 4, 3]
    assert decode[-1] == [4, 4, 2]


def test_step_runs_at_the_lowest_floor_asked_for() -> None:
    one, other = Restriction((4, 4, 2), (0.1, 0.0, 0.2)), Restriction((8, 1, 3), (0.2, 0.3, 0.1))
    assert Restriction.mildest([one]) is one
    assert Restriction.mildest({one, other}) == Restriction((8, 4, 3), (0.1, 0.0, 0.1))


def test_default_quality_changes_while_it_runs() -> None:
    backend = FakeBackend(1)
    scheduled = scheduler(backend)
    scheduled.submit(sequence([1, 2], 20))
    for _ in range(3):
        scheduled.step()
    scheduled.set_restriction(Restriction((1, 1, 1)))
    scheduled.step()
    assert backend.budgets[-2:] == [[4, 4, 2], [1, 1, 1]]


def test_prefill_uses_all_experts_even_for_one_token() -> None:
    """The graph lifts the budgets where S > 1; a chunk of one token has to bring them itself."""
    backend = FakeBackend(1)
    scheduled = scheduler(backend, chunk=2)
    scheduled.submit(sequence([1, 2, 3], 3, restriction=Restriction((1, 1, 1))))
    finish(scheduled)
    assert [step[2] for step in backend.steps[:2]] == [2, 1]
    assert backend.budgets[:3] == [[8, 8, 4], [8, 8, 4], [1, 1, 1]]


def test_active_experts_are_those_of_its_own_steps() -> None:
    """A sequence's mean covers the steps it was in: min(budget, 3) of the fake model, in each layer."""
    backend = FakeBackend(2)
    scheduled = scheduler(backend)
    early, late = sequence([1, 2], 20), sequence([3], 5)
    scheduled.submit(early)
    for _ in range(4):
        scheduled.step()
    scheduled.set_restriction(Restriction((1, 2, 2)))
    scheduled.submit(late)
    finish(scheduled)
    assert late.active == (1.0, 2.0, 2.0)
    assert 1.0 < early.active[0] < 3.0


# --- Ends.


def test_queue_is_bounded() -> None:
    """Those that will find a free slot at the next step are not in the way of others: a burst fills slots and queue."""
    scheduled = scheduler(FakeBackend(1), queue=2)
    for _ in range(3):
        scheduled.submit(sequence([1]))
    with pytest.raises(BusyError, match="the queue is full: 3 requests wait and 0 are being answered"):
        scheduled.submit(sequence([1]))
    scheduled.step()
    with pytest.raises(BusyError, match="the queue is full: 2 requests wait and 1 are being answered"):
        scheduled.submit(sequence([1]))
    finish(scheduled)
    scheduled.submit(sequence([1]))
    finish(scheduled)


def test_without_a_queue() -> None:
    scheduled = scheduler(FakeBackend(2), queue=0)
    for _ in range(2):
        scheduled.submit(sequence([1]))
    with pytest.raises(BusyError, match="the queue is full"):
        scheduled.submit(sequence([1]))
    finish(scheduled)


@pytest.mark.parametrize(("prompt", "words"), [([], "empty"), (list(range(1, 41)), "40 tokens")])
def test_prompt_that_does_not_fit(prompt: list[int], words: str) -> None:
    with pytest.raises(GenerationError, match=words):
        scheduler(FakeBackend(1)).submit(sequence(prompt))


def test_deadline_ends_with_what_there_is() -> None:
    """Running it keeps its text, waiting it gets an error; the slot is free for the next."""
    backend = FakeBackend(1)
    backend.delay = 0.01
    scheduled = scheduler(backend)
    deadline = time.monotonic() + 0.05
    running, waiting = sequence([1, 2], 36, deadline=deadline), sequence([3], 5, deadline=deadline)
    after = sequence([4], 3)
    for one in (running, waiting, after):
        scheduled.submit(one)
    finish(scheduled)
    assert running.finish == "deadline"
    assert running.error is None
    assert 0 < len(running.tokens) < len(expected([1, 2], 36))
    assert waiting.finish == "deadline"
    assert "while the request waited" in str(waiting.error)
    assert after.tokens == expected([4], 3)


def test_numbers_that_are_none_end_one_sequence_alone() -> None:
    """NaN in one row: that sequence gets an error, its cache is cleared, its neighbours go on."""
    backend = FakeBackend(3)
    backend.broken = 49
    scheduled = scheduler(backend)
    good, bad, other = sequence([1, 2], 8), sequence([3, 49], 8), sequence([5], 8)
    for one in (good, bad, other):
        scheduled.submit(one)
    finish(scheduled)
    assert bad.finish == "error"
    assert "NaN" in str(bad.error)
    assert backend.cleared == [1]
    assert (good.tokens, other.tokens) == (expected([1, 2], 8), expected([5], 8))


def test_failing_step_is_told_and_the_next_works() -> None:
    backend = FakeBackend(2)
    scheduled = scheduler(backend)
    hit = [sequence([1, 2], 8), sequence([3], 8)]
    for one in hit:
        scheduled.submit(one)
    scheduled.step()
    backend.error = RuntimeError("out of memory\nsecond line")
    scheduled.step()
    backend.error = None
    assert [str(one.error) for one in hit] == ["the model failed in a decode step: out of memory"] * 2
    scheduled.submit(fresh := sequence([4], 5))
    finish(scheduled)
    assert fresh.tokens == expected([4], 5)


def test_stop_string_and_what_was_held_back() -> None:
    """A stop string is never shown; text held back for one that doesn't come is, when the sequence ends."""
    backend = FakeBackend(2)
    text = "".join(NoText().push(token) for token in expected([1, 2], 12))
    shown: list[str] = []
    stopped = sequence([1, 2], 12, stop=(text[4:7],))
    stopped.on_text = shown.append
    rest: list[str] = []
    held = sequence([1, 2], 12, stop=(text[-2:] + "\x00",))
    held.on_text = rest.append
    scheduled = scheduler(backend)
    scheduled.submit(stopped)
    scheduled.submit(held)
    finish(scheduled)
    assert stopped.finish == "stop"
    assert "".join(shown) == stopped.text == text[: text.index(text[4:7])]
    assert "".join(rest) == held.text == text


def test_seed_is_the_sequence_s_own() -> None:
    """The same seed draws the same tokens alone and in a crowd; another one draws others."""

    def drawn(seed: int, crowd: int) -> list[int]:
        scheduled = scheduler(FakeBackend(4))
        for number in range(crowd):
            scheduled.submit(sequence([number + 5], 20, sampling=Sampling(2.0, 1.0, 99)))
        one = sequence([1, 2], 20, sampling=Sampling(2.0, 1.0, seed))
        scheduled.submit(one)
        finish(scheduled)
        return one.tokens

    assert drawn(1, 0) == drawn(1, 3) != drawn(2, 0)


def test_observer_sees_every_step_and_end() -> None:
    seen = Seen()
    scheduled = Scheduler(FakeBackend(2), LIMITS, restriction=Restriction((4, 4, 2)), observer=seen)
    scheduled.submit(sequence([1, 2, 3], 2))
    finish(scheduled)
    found = [(step.kind, step.rows, step.batch, step.tokens) for step in seen.steps]
    assert found == [("prefill", 1, 1, 3), ("decode", 1, 1, 1)]
    assert seen.ends == ["length"]


# --- On its own thread.


def test_engine_serves_many_threads() -> None:
    """Twelve threads submit to two slots; everyone gets its own, and the engine sleeps after."""
    engine = Engine(scheduler(FakeBackend(2), queue=100))
    results: dict[int, list[int]] = {}

    def client(number: int) -> None:
        done = threading.Event()
        one = sequence([number + 1, 7], 15)
        one.on_end = done.set
        engine.submit(one)
        assert done.wait(20)
        results[number] = one.tokens

    threads = [threading.Thread(target=client, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.stop()
    assert results == {number: expected([number + 1, 7], 15) for number in range(12)}
    with pytest.raises(GenerationError, match="shutting down"):
        engine.submit(sequence([1]))


def test_engine_stop_tells_those_that_wait() -> None:
    backend = FakeBackend(1)
    backend.delay = 0.05
    engine = Engine(scheduler(backend))
    sequences = [sequence([1, 2], 30) for _ in range(3)]
    for one in sequences:
        engine.submit(one)
    time.sleep(0.1)
    engine.stop()
    assert {str(one.error) for one in sequences} == {"the server is shutting down"}


def test_engine_survives_a_defect(capsys: pytest.CaptureFixture[str]) -> None:
    """A callback that raises ends what runs, with the traceback in the log; the next request is served."""
    engine = Engine(scheduler(FakeBackend(2)))
    done = threading.Event()
    bad = sequence([1, 2], 8)
    bad.on_text = lambda _: 1 / 0  # type: ignore[assignment, return-value]
    bad.on_end = done.set
    engine.submit(bad)
    assert done.wait(10)
    assert "internal error" in str(bad.error)
    assert "ZeroDivisionError" in capsys.readouterr().err
    done.clear()
    good = sequence([1, 2], 8)
    good.on_end = done.set
    engine.submit(good)
    assert done.wait(10)
    engine.stop()
    assert good.tokens == expected([1, 2], 8)


# --- With a real model.


def test_onnx_runtime_with_arrivals(text_artifact: Artifact) -> None:
    """Float32 and all experts: sequences that join and leave, slots moved and used again, prompts of which the begin is
    there already, give generate's own tokens.

    Float32, since in float16 another batch size can round a near-tie the other way.
    """
    from lynx_trt.artifact import TOKENIZER
    from lynx_trt.generate import generate_text
    from lynx_trt.runtime.open import limits_of, open_backend
    from lynx_trt.runtime.text import Tokenizer

    prompts = ["def add(a, b):\n", "import", "def add(a, c):\n    def __init__(self):\n", "x = [", "def add(self"] * 2
    tokenizer = Tokenizer(text_artifact.path(TOKENIZER))
    limits = limits_of(text_artifact.manifest)
    scheduled = Scheduler(
        open_backend(text_artifact, 3, threads=1),
        limits,
        restriction=Restriction(limits.experts),
        policy=Policy(chunk=8, reuse=4),
    )
    sequences = []
    for number, prompt in enumerate(prompts):
        new = 4 + number * 3
        sequences.append(Generated(tokenizer.encode(prompt), Request(new), tokenizer.stream()))
        scheduled.submit(sequences[-1])
        for _ in range(2):
            scheduled.step()
    finish(scheduled)
    assert sum(one.reused > 0 for one in sequences) >= 2
    for one, prompt in zip(sequences, prompts, strict=True):
        (alone,), _ = generate_text(
            text_artifact, [prompt], budget="8", max_new_tokens=one.request.max_new_tokens, threads=1
        )
        assert (one.tokens, one.text) == (alone.tokens, alone.text)


def test_cleared_slot_forgets_what_is_no_number(text_artifact: Artifact) -> None:
    """NaN in a slot's cache reaches whoever comes next, even where masked; cleared it doesn't."""
    from lynx_trt.runtime.ort import OrtBackend

    backend = OrtBackend(text_artifact, 2, threads=1)
    restriction = Restriction((8, 8))

    def logits() -> Any:
        ids = np.array([[65, 66, 67]])
        return backend.step(ids, np.zeros(1, np.int64), np.array([3]), restriction, first=1).logits

    clean = logits()
    for cache in backend._caches.values():
        cache[1, :, 10:20] = np.nan
    backend.clear_slot(1)
    assert np.array_equal(logits(), clean)


def test_runtime_imports_nothing_heavy() -> None:
    """The serving process has NumPy, ONNX, ONNX Runtime, tokenizers and pydantic, and nothing else of ours."""
    code = (
        "import sys, lynx_trt.runtime.engine, lynx_trt.runtime.lowering, lynx_trt.serving.start\n"
        "print(sorted({'torch', 'transformers', 'typer', 'rich', 'psutil'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
