"""Answers of OpenAI's API as JSON objects: whole ones, and the chunks of streams."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

    def whole(self, answers: Sequence[Piece], prompts: int) -> dict[str, Any]:
        """All answers at once; `prompts` is how many prompts they are to."""
        choices = [
            self._choice(index, self._said(answer, "message", 0), answer) for index, answer in enumerate(answers)
        ]
        kind = "chat.completion" if self.chat else "text_completion"
        ends = [answer.end for answer in answers if answer.end is not None]
        return {**self._about(kind), "choices": choices, "usage": usage(ends, prompts)}

    def begin(self, index: int) -> dict[str, Any] | None:
        """What comes before the first piece of an answer."""
        if not self.chat:
            return None
        return self._chunk([self._choice(index, {"delta": {"role": "assistant", "content": ""}}, Piece(""))])

    def piece(self, index: int, piece: Piece, before: int) -> dict[str, Any] | None:
        """A piece of an answer that had some calls `before`, its last one with the end; None: it has nothing in it."""
        if piece.end is None and not (piece.text or piece.thought or piece.calls):
            return None
        # How it ends hangs on all its calls.
        called = Piece(piece.text, piece.end, piece.thought, piece.calls or ("",) * before)
        return self._chunk([self._choice(index, self._said(piece, "delta", before), called)])

    def usage(self, ends: Sequence[End], prompts: int) -> dict[str, Any]:
        """The chunk at a stream's end that says how many tokens there were."""
        return {**self._chunk([]), "usage": usage(ends, prompts)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._about("chat.completion.chunk" if self.chat else "text_completion"), "choices": choices}

    def _about(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _said(self, piece: Piece, name: str, before: int) -> dict[str, Any]:
        """The words of a piece or of a whole answer, by the `name` that its kind has for them."""
        if not self.chat:
            return {"text": piece.text}
        whole = name == "message"
        said: dict[str, Any] = {"role": "assistant"} if whole else {}
        if piece.text or whole:
            said["content"] = piece.text or (None if piece.calls else "")
        if piece.thought:
            said["reasoning_content"] = piece.thought
        if piece.calls:
            said["tool_calls"] = [
                _call(json.loads(call), {} if whole else {"index": number})
                for number, call in enumerate(piece.calls, before)
            ]
        return {name: said}

    def _choice(self, index: int, said: dict[str, Any], piece: Piece) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": None}
        if (end := piece.end) is not None:
            reason = REASONS.get(end.finish_reason, "stop")
            reason = "tool_calls" if piece.calls and reason == "stop" else reason
            choice |= {"finish_reason": reason, "lynx": end.rounded()}
        return choice


def as_call(piece: Piece, forced: str) -> Piece:
    """The last piece of an answer that had to be a call of the tool `forced` ("": of any); one that was cut is text."""
    try:
        found = json.loads(piece.text)
        name = forced or found["name"]
        arguments = found if forced else found["arguments"]
    except (ValueError, KeyError, TypeError):
        return piece
    # Nine letters and digits: Mistral's templates take no others.
    call = {"id": secrets.token_hex(5)[:9], "name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return replace(piece, text="", calls=(json.dumps(call),))


def _call(call: dict[str, str], where: dict[str, int]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {**where, "id": call["id"], "type": "function", "function": function}


def usage(ends: Sequence[End], prompts: int) -> dict[str, Any]:
    """Tokens of a request: of each prompt once, and of all answers to it."""
    each = max(len(ends) // prompts, 1)
    asked = sum(end.prompt_tokens for end in ends[::each])
    cached = sum(end.cached_tokens for end in ends[::each])
    written = sum(end.output_tokens for end in ends)
    return {
        "prompt_tokens": asked,
        "completion_tokens": written,
        "total_tokens": asked + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
