"""Answers of OpenAI's API as JSON objects: whole ones, and the chunks of streams."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lynx_trt.openai_api.upstream import End, Piece

# How answers end: what OpenAI's clients know; our own word is among the statistics.
REASONS = {"end": "stop", "stop": "stop", "length": "length", "deadline": "length"}


@dataclass(frozen=True)
class Form:
    """The words of one kind of answer: chats or completions."""

    chat: bool
    id: str
    created: int
    model: str

    @classmethod
    def new(cls, model: str, *, chat: bool) -> Form:
        """Of one request."""
        name = "chatcmpl" if chat else "cmpl"
        return cls(chat, f"{name}-{secrets.token_hex(12)}", int(time.time()), model)

    def whole(self, answers: Sequence[tuple[str, End]], prompts: int) -> dict[str, Any]:
        """All answers at once; `prompts` is how many prompts they are to."""
        choices = []
        for index, (text, end) in enumerate(answers):
            said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append(self._choice(index, said, end))
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._about(kind), "choices": choices, "usage": usage([end for _, end in answers], prompts)}

    def begin(self, index: int) -> dict[str, Any] | None:
        """What comes before the first piece of an answer."""
        if not self.chat:
            return None
        return self._chunk([self._choice(index, {"delta": {"role": "assistant", "content": ""}}, None)])

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of an answer, its last one with the end."""
        said: dict[str, Any] = {"text": piece.text}
        if self.chat:
            said = {"delta": {"content": piece.text} if piece.text else {}}
        return self._chunk([self._choice(index, said, piece.end)])

    def usage(self, ends: Sequence[End], prompts: int) -> dict[str, Any]:
        """The chunk at a stream's end that says how many tokens there were."""
        return {**self._chunk([]), "usage": usage(ends, prompts)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._about("chat.completion.chunk" if self.chat else "text_completion"), "choices": choices}

    def _about(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    @staticmethod
    def _choice(index: int, said: dict[str, Any], end: End | None) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": None}
        if end is not None:
            choice |= {"finish_reason": REASONS.get(end.finish_reason, "stop"), "lynx": end.rounded()}
        return choice


def usage(ends: Sequence[End], prompts: int) -> dict[str, int]:
    """Tokens of a request: of each prompt once, and of all answers to it."""
    each = max(len(ends) // prompts, 1)
    asked = sum(end.prompt_tokens for end in ends[::each])
    written = sum(end.output_tokens for end in ends)
    return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}
