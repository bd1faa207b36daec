"""Decoding a fixed batch of prompts: prefill with all experts, then one token a sequence and step, restricted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lynx_trt.budgets import Restriction
from lynx_trt.errors import GenerationError, UsageError
from lynx_trt.runtime.backend import Backend
from lynx_trt.runtime.sampling import Sampling
from lynx_trt.runtime.scheduler import Policy, Scheduler, StepReport, check_prompt
from lynx_trt.runtime.sequence import Generated, Limits, Request
from lynx_trt.runtime.text import Tokenizer

__all__ = ["Generated", "Limits", "Statistics", "generate"]

# Tokens of a prompt that go through the model at once: enough to fill its matrix products, little enough that
# the activations of a long prompt don't dwarf the weights.
PREFILL_CHUNK = 256


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
    restriction: Restriction,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    special: bool = True,
    shown: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> tuple[list[Generated], Statistics]:
    """Continue `prompts` as one batch; `on_text(sequence, piece)` is called as text appears.

    `special`: the tokenizer puts around a prompt what it puts around texts; a chat template has done that itself.
    `shown`: special tokens that are part of the text.

    Raises:
        UsageError: no prompt, or max_new_tokens below 1.
        GenerationError: a prompt is empty or doesn't leave room for one token, or the model gives no numbers.
    """
    if not prompts:
        raise UsageError("there is no prompt; pass --prompt TEXT, once for each sequence of the batch")
    if max_new_tokens < 1:
        raise UsageError(f"max-new-tokens is {max_new_tokens}; it must be 1 or more")
    sequences = []
    for number, prompt in enumerate(prompts):
        # As the server does, and said of the text: some tokenizers begin every one with a token.
        if not prompt:
            raise GenerationError(f"prompt {number + 1} is empty: there is nothing to continue")
        ids = tokenizer.encode(prompt, special=special)
        check_prompt(ids, limits, f"prompt {number + 1}")
        request = Request(max_new_tokens, sampling, number, tuple(stop))
        sequences.append(Generated(ids, request, tokenizer.stream(shown), _to(on_text, number)))
    sums = _Sums(limits)
    policy = Policy(
        queue=len(prompts),
        chunk=PREFILL_CHUNK,
        prefill_tokens=PREFILL_CHUNK * len(prompts),
        prefill_rows=len(prompts),
        prefill_first=True,
        reuse=0,  # what is measured is the model
    )
    scheduler = Scheduler(backend, limits, restriction=restriction, policy=policy, observer=sums)
    for sequence in sequences:
        scheduler.submit(sequence)
    while scheduler.step():
        pass
    for sequence in sequences:
        if sequence.error:
            raise sequence.error
    return sequences, sums.statistics(sum(len(sequence.prompt) for sequence in sequences))


def _to(on_text: Callable[[int, str], None] | None, number: int) -> Callable[[str], None] | None:
    return None if on_text is None else lambda piece: on_text(number, piece)


class _Sums:
    """An observer that adds up what the steps cost."""

    def __init__(self, limits: Limits) -> None:
        self._seconds = {"prefill": 0.0, "decode": 0.0}
        self._tokens = self._steps = 0
        self._active = np.zeros(len(limits.experts))

    def on_step(self, report: StepReport) -> None:
        self._seconds[report.kind] += report.seconds
        if report.kind == "decode":
            self._tokens, self._steps = self._tokens + report.rows, self._steps + 1
            self._active += report.active

    def on_end(self, sequence: Generated) -> None:
        pass

    def statistics(self, prompt_tokens: int) -> Statistics:
        return Statistics(
            prompt_tokens=prompt_tokens,
            prefill_seconds=self._seconds["prefill"],
            decode_tokens=self._tokens,
            decode_seconds=self._seconds["decode"],
            decode_steps=self._steps,
            active=tuple((self._active / max(self._steps, 1)).tolist()),
        )
