"""Decoding a batch of prompts: prefill with all experts, then one token a sequence and step under the budgets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lynx_trt.errors import GenerationError, UsageError
from lynx_trt.runtime.backend import Array, Backend
from lynx_trt.runtime.sampling import Sampling, next_token
from lynx_trt.runtime.text import Stream, Tokenizer

# Tokens of a prompt that go through the model at once: enough to fill its matrix products, little enough that
# the activations of a long prompt don't dwarf the weights.
PREFILL_CHUNK = 256


@dataclass(frozen=True)
class Limits:
    """What the model allows: tokens a sequence, and experts of each MoE layer."""

    max_length: int
    experts: tuple[int, ...]
    end_tokens: frozenset[int]


@dataclass
class Generated:
    """One prompt and what became of it."""

    prompt: list[int]
    stream: Stream
    generator: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None  # stop | length | end


@dataclass(frozen=True)
class Statistics:
    """What a run cost. Times in seconds; `active` [N] is the mean number of active experts a decode step."""

    prompt_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    decode_steps: int
    active: tuple[float, ...]

    @property
    def mean_active(self) -> float:
        """Mean over layers and steps; NaN if there was no decode step."""
        return float(np.mean(self.active)) if self.decode_steps else float("nan")


def generate(
    backend: Backend,
    tokenizer: Tokenizer,
    limits: Limits,
    prompts: Sequence[str],
    *,
    budgets: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> tuple[list[Generated], Statistics]:
    """Continue `prompts` as one batch; `on_text(sequence, piece)` is called as text appears.

    Raises:
        UsageError: no prompt, or max_new_tokens below 1.
        GenerationError: a prompt is empty or doesn't leave room for one token.
    """
    if not prompts:
        raise UsageError("there is no prompt; pass --prompt TEXT, once for each sequence of the batch")
    if max_new_tokens < 1:
        raise UsageError(f"max-new-tokens is {max_new_tokens}; it must be 1 or more")
    sequences = [
        Generated(_encode(tokenizer, limits, number, prompt), tokenizer.stream(), sampling.generator(number))
        for number, prompt in enumerate(prompts)
    ]
    run = _Run(backend, limits, sequences, sampling, max_new_tokens, tuple(stop), on_text)
    logits, prefill_seconds = run.prefill()
    statistics = run.decode(logits, np.array(budgets, dtype=np.int32), prefill_seconds)
    return sequences, statistics


def _encode(tokenizer: Tokenizer, limits: Limits, number: int, prompt: str) -> list[int]:
    ids = tokenizer.encode(prompt)
    if not ids:
        raise GenerationError(f"prompt {number + 1} is empty: it has no tokens to continue from")
    if len(ids) >= limits.max_length:
        raise GenerationError(
            f"prompt {number + 1} has {len(ids)} tokens, and the cache holds {limits.max_length} with the output: "
            f"shorten it to {limits.max_length - 1} tokens or build with a larger --max-length"
        )
    return ids


class _Run:
    """One batch on its way: the rows' lengths, and what is to be done with each new token."""

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        sequences: list[Generated],
        sampling: Sampling,
        max_new_tokens: int,
        stop: tuple[str, ...],
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        self.backend, self.limits, self.sequences = backend, limits, sequences
        self.sampling, self.max_new_tokens, self.stop, self.on_text = sampling, max_new_tokens, stop, on_text
        self.past = np.zeros(len(sequences), dtype=np.int64)

    def prefill(self) -> tuple[Array, float]:
        """Every prompt into the cache, in chunks and with all experts; logits [B,V] of each prompt's last token."""
        started = time.perf_counter()
        prompts = [sequence.prompt for sequence in self.sequences]
        longest = max(len(prompt) for prompt in prompts)
        everything = np.array(self.limits.experts, dtype=np.int32)
        logits: Array | None = None
        for start in range(0, longest, PREFILL_CHUNK):
            width = min(PREFILL_CHUNK, longest - start)
            lengths = np.array([max(0, min(len(prompt) - start, width)) for prompt in prompts], dtype=np.int64)
            ids = np.zeros((len(prompts), width), dtype=np.int64)
            for row, prompt in enumerate(prompts):
                ids[row, : lengths[row]] = prompt[start : start + lengths[row]]
            # A row that is through writes its padding behind its prompt, where its own next tokens overwrite it.
            past = np.where(lengths > 0, start, self.past)
            result = self.backend.step(ids, past, lengths, everything)
            self.past += lengths
            logits = result.logits if logits is None else np.where((lengths > 0)[:, None], result.logits, logits)
        assert logits is not None
        return logits, time.perf_counter() - started

    def decode(self, logits: Array, budgets: Array, prefill_seconds: float) -> Statistics:
        """Tokens for every sequence until each has ended; rows that have are masked and load no expert."""
        started = time.perf_counter()
        steps, tokens = 0, 0
        active = np.zeros(len(self.limits.experts))
        self._draw(logits, range(len(self.sequences)))
        while running := [row for row, sequence in enumerate(self.sequences) if sequence.finish is None]:
            ids = np.zeros((len(self.sequences), 1), dtype=np.int64)
            lengths = np.zeros(len(self.sequences), dtype=np.int64)
            for row in running:
                ids[row, 0], lengths[row] = self.sequences[row].tokens[-1], 1
            # A row that has ended at the cache's last position still writes its padding somewhere.
            past = np.minimum(self.past, self.limits.max_length - 1)
            result = self.backend.step(ids, past, lengths, budgets)
            self.past += lengths
            steps, tokens, active = steps + 1, tokens + len(running), active + result.active
            self._draw(result.logits, running)
        seconds = time.perf_counter() - started
        return Statistics(
            prompt_tokens=sum(len(sequence.prompt) for sequence in self.sequences),
            prefill_seconds=prefill_seconds,
            decode_tokens=tokens,
            decode_seconds=seconds,
            decode_steps=steps,
            active=tuple((active / max(steps, 1)).tolist()),
        )

    def _draw(self, logits: Array, rows: Iterable[int]) -> None:
        for row in rows:
            sequence = self.sequences[row]
            token = next_token(logits[row], self.sampling, sequence.generator)
            if token in self.limits.end_tokens:
                sequence.finish = "end"
                continue
            sequence.tokens.append(token)
            self._emit(row, sequence, sequence.stream.push(token))
            room = self.limits.max_length - len(sequence.prompt)
            if sequence.finish is None and len(sequence.tokens) >= min(self.max_new_tokens, room):
                sequence.finish = "length"

    def _emit(self, row: int, sequence: Generated, piece: str) -> None:
        """Append `piece`, up to the first stop string; text that may yet become one is held back from `on_text`."""
        shown = len(sequence.text) - _held_back(sequence.text, self.stop)
        sequence.text += piece
        ends = [at for string in self.stop if (at := sequence.text.find(string)) >= 0]
        if ends:
            sequence.text, sequence.finish = sequence.text[: min(ends)], "stop"
        held = 0 if sequence.finish else _held_back(sequence.text, self.stop)
        new = sequence.text[shown : len(sequence.text) - held]
        if new and self.on_text:
            self.on_text(row, new)


def _held_back(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    lengths = (n for string in stop for n in range(len(string) - 1, 0, -1) if text.endswith(string[:n]))
    return max(lengths, default=0)
