"""One sequence on its way: what was asked for, and what has become of it so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lynx_trt.budgets import Restriction
from lynx_trt.errors import LynxError
from lynx_trt.runtime.edits import Edits, History
from lynx_trt.runtime.sampling import Sampling
from lynx_trt.runtime.text import Stream

if TYPE_CHECKING:
    from lynx_trt.runtime.guide import Guide


@dataclass(frozen=True)
class Limits:
    """What the model allows: tokens a sequence, different tokens, and experts of each MoE layer."""

    max_length: int
    vocabulary: int
    experts: tuple[int, ...]
    end_tokens: frozenset[int]


@dataclass(frozen=True)
class Request:
    """What one sequence is to be.

    Attributes:
        max_new_tokens: tokens to write at most; the model's maximum length ends a sequence as well.
        number: which of the sequences that share a seed it is.
        stop: texts that end the sequence before them.
        restriction: what each MoE layer may load in a decode step; None follows the scheduler's default.
        deadline: time.monotonic() in seconds after which nobody wants it any more.
        ignore_eos: a token that ends a text is one as any other.
    """

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    number: int = 0
    stop: tuple[str, ...] = ()
    restriction: Restriction | None = None
    deadline: float = float("inf")
    ignore_eos: bool = False


@dataclass
class Times:
    """When things happened, in seconds of time.monotonic(); None: not yet."""

    submitted: float | None = None
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None


@dataclass(eq=False)
class Generated:
    """One prompt and what became of it."""

    prompt: list[int]
    request: Request
    stream: Stream
    on_text: Callable[[str], None] | None = None
    on_end: Callable[[], None] | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    thoughts: str = ""  # of a chat model, where they were taken out of the text
    finish: str | None = None  # stop | length | end | deadline | cancelled | error
    error: LynxError | None = None
    active: tuple[float, ...] = ()  # mean active experts of each MoE layer over the decode steps it was in
    times: Times = field(default_factory=Times)
    cancelled: bool = False
    cached: int = 0  # tokens in the KV cache
    reused: int = 0  # of the prompt, taken from there
    guide: Guide | None = None  # what it may write

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.generator: np.random.Generator = sampling.generator(self.request.number)
        self._history = History(self.prompt, sampling) if sampling.edits else None

    def edits(self) -> Edits | None:
        """What is done to the logits before its next token is drawn, if anything is."""
        if self._history is None and self.guide is None:
            return None
        if self._history is None:
            self._history = History((), self.request.sampling)
        return self._history.edits(self.guide.allowed() if self.guide is not None else None)

    def add(self, token: int, limits: Limits) -> None:
        """Take the next token: text grows and is passed on, and the sequence may have its end."""
        if self.times.first_token is None:
            self.times.first_token = time.monotonic()
        if token in limits.end_tokens and not self.request.ignore_eos:
            self.finish = "end"
            self._show("", final=True)
            return
        self.tokens.append(token)
        if self._history is not None:
            self._history.take(token)
        if self.guide is not None:
            self.guide.take(token)
        self._show(self.stream.push(token), final=False)
        room = limits.max_length - len(self.prompt)
        if self.finish is None and len(self.tokens) >= min(self.request.max_new_tokens, room):
            self.finish = "length"
            self._show("", final=True)
        if self.guide is not None and self.guide.ended and self.finish != "stop":
            self.finish = "end"
            self._show("", final=True)

    def end(self, finish: str, error: LynxError | None = None) -> None:
        """It goes no further; text that was held back for a stop string comes out."""
        if self.finish is None:
            self._show("", final=True)
        self.finish, self.error = finish, error
        self.times.ended = time.monotonic()

    def _show(self, piece: str, *, final: bool) -> None:
        """Append `piece`, up to the first stop string; text that may yet become one is held back from `on_text`."""
        stop = self.request.stop
        if not stop:
            self.text += piece
            if piece and self.on_text:
                self.on_text(piece)
            return
        shown = len(self.text) - held_back(self.text, stop)
        self.text += piece
        ends = [at for string in stop if (at := self.text.find(string)) >= 0]
        if ends:
            self.text, self.finish = self.text[: min(ends)], "stop"
        held = 0 if self.finish or final else held_back(self.text, stop)
        new = self.text[shown : len(self.text) - held]
        if new and self.on_text:
            self.on_text(new)


def held_back(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    lengths = (n for string in stop for n in range(len(string) - 1, 0, -1) if text.endswith(string[:n]))
    return max(lengths, default=0)
