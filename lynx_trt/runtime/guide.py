"""Answers of a form that a request asks for: a JSON schema, a regular expression, or one of some texts.

llguidance keeps a grammar's state and says which tokens may come next; the draw takes one of those. What a chat model
thinks before its answer is free: the grammar is that of its whole answer, thoughts included.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lynx_trt.errors import GenerationError
from lynx_trt.runtime.answers import PLAIN, Form
from lynx_trt.runtime.backend import Array

KINDS = ("json_schema", "regex", "choice")
_FORM = f"it has to be a JSON object with one of {', '.join(KINDS)}"
# White space between two tokens of JSON, at most: a model must not fill its answer with nothing.
_SPACES = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\n\r\t]{0,64}"}


class Guides:
    """Makes guides for one model."""

    def __init__(self, tokenizer: Path, vocabulary: int, end_tokens: Iterable[int]) -> None:
        """Of a `tokenizer.json` of the model's `vocabulary`, which is read with the first guide, or by `prepare`."""
        self._path, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(end_tokens)
        self._tokenizer: Any = None
        self._added: dict[str, int] = {}

    def prepare(self) -> None:
        """Read the tokenizer, two seconds for one of 150,000 tokens; whoever asks for a guide is told if that fails."""
        with contextlib.suppress(GenerationError):
            self._tokens()

    def make(self, text: str, form: Form = PLAIN, prompt: str = "") -> Guide:
        """The guide that a request asks for, of an answer to a rendered prompt.

        Args:
            text: JSON, {"json_schema": {...}}, {"regex": "..."} or {"choice": ["...", ...]}.
            form: how the model marks thoughts, which come before what is guided.
            prompt: which may have begun them.

        Raises:
            GenerationError: it is none of these, or can't be followed.
        """
        grammar = form.grammar(_answer(text), prompt, self._tokens())
        return Guide(self._tokenizer, grammar, self._vocabulary)

    def _tokens(self) -> dict[str, int]:
        """The tokenizer's added tokens, which llguidance takes by their ids."""
        if self._tokenizer is None:
            try:
                from llguidance import LLTokenizer
                from tokenizers import Tokenizer
            except ImportError:
                raise GenerationError('guides need llguidance: pip install "lynx-trt[serve]"') from None
            source = self._path.read_text(encoding="utf-8")
            # Some tokenizers have more tokens than the model; those are never allowed.
            number = max(self._vocabulary, Tokenizer.from_str(source).get_vocab_size(with_added_tokens=True))
            self._added = {each["content"]: each["id"] for each in json.loads(source).get("added_tokens", [])}
            try:
                self._tokenizer = LLTokenizer(source, n_vocab=number, eos_token=self._ends or None)
            except ValueError as error:
                raise GenerationError(f"answers of this model's tokenizer can't be guided: {error}") from None
        return self._added


class Guide:
    """One answer on its way through a grammar."""

    def __init__(self, tokenizer: Any, grammar: str, vocabulary: int) -> None:
        """Raises GenerationError: the grammar can't be followed."""
        from llguidance import LLMatcher

        self._matcher, self._vocabulary = LLMatcher(tokenizer, grammar, log_level=0), vocabulary
        if self._matcher.is_error():
            raise GenerationError(f"the guide can't be followed: {self.problem}")

    @property
    def problem(self) -> str | None:
        """Why it can't go on; None: it can."""
        return str(self._matcher.get_error()).strip().partition("\n")[0][:200] if self._matcher.is_error() else None

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> Array:
        """Which tokens may come next, bool [V]; all of them once there is a problem."""
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            return np.ones(self._vocabulary, np.bool_)
        return np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[: self._vocabulary].astype(np.bool_)

    def take(self, token: int) -> None:
        """The token that came."""
        self._matcher.consume_token(token)


def _answer(text: str) -> str:
    """The grammar's rule `answer`, in llguidance's form of Lark."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GenerationError(f"the guide can't be read: {error}; {_FORM}") from None
    if not isinstance(found, dict) or len(found) != 1 or next(iter(found)) not in KINDS:
        raise GenerationError(f"the guide is {text[:64]}; {_FORM}")
    ((kind, value),) = found.items()
    if kind == "json_schema" and isinstance(value, dict | bool):
        schema = {"x-guidance": _SPACES, **value} if isinstance(value, dict) else value
        return f"answer: %json {json.dumps(schema)}"
    if kind == "regex" and isinstance(value, str) and value:
        return f"answer: /{_slashes(value)}/"
    if kind == "choice" and isinstance(value, list) and value and all(isinstance(x, str) and x for x in value):
        return "answer: " + " | ".join(json.dumps(each) for each in value)
    raise GenerationError(f"the guide's {kind} is {json.dumps(value)[:64]}, which is none; {_FORM}")


def _slashes(regex: str) -> str:
    """A regular expression between slashes."""
    escaped = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", regex, flags=re.DOTALL)
    return escaped.replace("\n", r"\n")
