"""What a chat model's answer is made of: thoughts, text, and calls of tools, told apart while it comes.

Models mark thoughts and calls each in a form of its own, which their chat template shows (it has to write earlier
answers in it). So the form is found in the template's source, and markers that are special tokens are kept in the text
for this alone.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lynx_trt.runtime import answer_calls
from lynx_trt.runtime.answer_calls import Call, Texts
from lynx_trt.runtime.sequence import held_back


@dataclass(frozen=True)
class Part:
    """A piece of an answer."""

    kind: Literal["text", "thought", "call"]
    text: str = ""
    call: Call | None = None


class Splitter(Protocol):
    """Takes the text of one answer as it comes."""

    def feed(self, text: str) -> list[Part]:
        """What can be told by now."""
        ...

    def end(self) -> list[Part]:
        """The rest: the answer goes no further."""
        ...


@dataclass(frozen=True)
class Form:
    """How a model marks what is no text.

    Attributes:
        thought: what is before and after its thoughts; None: they can't be told.
        calls: the same of calls, and how to read what is between; with no end, up to the answer's.
        channels: gpt-oss' form, of messages in channels, which has no such pairs.
        markers: special tokens that belong to the form.
        text_arguments: its template takes the arguments of earlier calls as JSON text, others as objects.
        thoughts_as: what its template calls the thoughts of an earlier answer.
        named_ids: its template writes the ids of calls, which are of a form.
    """

    thought: tuple[str, str] | None = None
    calls: tuple[str, str, Callable[[str, Texts], list[Call]]] | None = None
    channels: bool = False
    markers: tuple[str, ...] = ()
    text_arguments: bool = False
    thoughts_as: str = "reasoning_content"
    named_ids: bool = False

    def splitter(self, prompt: str, tools: object = None) -> Splitter:
        """For an answer to a rendered prompt, which may have begun its thoughts; calls are told if it had `tools`."""
        if self.channels:
            return _Channels(bool(tools))
        texts = answer_calls.texts_of(tools)
        return _Marked(self.thought, self.calls if tools else None, texts, self._begun(prompt))

    def _begun(self, prompt: str) -> bool:
        """Whether a rendered prompt ends within thoughts."""
        return self.thought is not None and prompt.rstrip().endswith(self.thought[0])

    def grammar(self, answer: str, prompt: str, tokens: Mapping[str, int]) -> str:
        """A grammar of the whole answer to a rendered prompt: thoughts, and then the rule `answer`, which is given.

        In llguidance's form of Lark, which takes added `tokens` by their ids and anything else as text.
        """
        known = [marker for marker in self.markers if marker in tokens]

        def terms(text: str) -> str:
            pieces = re.split(f"({'|'.join(map(re.escape, known))})", text) if known else [text]
            return " ".join(
                f"<[{tokens[piece]}]>" if piece in known else json.dumps(piece) for piece in pieces if piece
            )

        def until(end: str) -> tuple[str, str]:
            """(the rule, what stands for it): any text up to `end`, which is no text if it begins with a token."""
            if any(end.startswith(marker) for marker in known):
                return "lynx_body: /(?s:.*)/", f"lynx_body {terms(end)}"
            return f"lynx_body[suffix={json.dumps(end)}]: /(?s:.*)/", "lynx_body"

        if self.channels:
            rule, thought = until("<|end|><|start|>assistant")
            begin = terms("<|channel|>analysis<|message|>")
            start = f"({begin} {thought})* {terms('<|channel|>final<|message|>')} answer"
        elif self.thought is not None:
            rule, thought = until(self.thought[1])
            if self._begun(prompt):
                start = f"{thought} LYNX_SPACE answer"
            else:
                start = f"({terms(self.thought[0])} {thought} LYNX_SPACE)? answer"
        else:
            rule, start = "", "answer"
        return "\n".join([f"start: {start}", rule, r"LYNX_SPACE: /[ \n]{0,8}/", answer])

    def call_id(self, call: Call, number: int) -> str:
        """The id of a call that has `number` before it in its conversation; nine letters are what Mistral takes."""
        if self.named_ids:
            return f"functions.{call.name}:{number}"
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages as OpenAI's API has them, as this template wants them: earlier calls and thoughts."""
        return [self._message(message) for message in messages]

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        made = dict(message)
        if (thoughts := made.get("reasoning_content")) is not None:
            made.setdefault(self.thoughts_as, thoughts)
        if made.get("tool_calls"):
            made["content"] = made.get("content") or ""
            made["tool_calls"] = [self._earlier(call) for call in made["tool_calls"]]
        return made

    def _earlier(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or isinstance(function.get("arguments"), str) == self.text_arguments:
            return call
        arguments = function.get("arguments")
        try:
            turned = json.loads(arguments) if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        except ValueError:  # a model's own mistake, which its template may take as it is
            return call
        return {**call, "function": {**function, "arguments": turned}}


_THINK = ("<think>", "</think>")
_TOOL = ("<tool_call>", "</tool_call>")
_KIMI = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_KIMI_INSIDE = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_INSIDE = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
_LFM2 = ("<|tool_call_start|>", "<|tool_call_end|>")
_GEMMA = ("<|tool_call>", "<tool_call|>")
_GEMMA_THOUGHT = ("<|channel>thought", "<channel|>")
_CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
_MISTRAL = ("[TOOL_CALLS]", "")
_MISTRAL_THOUGHT = ("[THINK]", "[/THINK]")

_HY = ("<tool_calls:opensource>", "</tool_calls:opensource>")
_HY_THOUGHT = ("<think:opensource>", "</think:opensource>")
_HY_INSIDE = tuple(
    f"<{word}:opensource>"
    for word in ("tool_call", "/tool_call", "tool_sep", "arg_key", "/arg_key", "arg_value", "/arg_value")
)
_OF_LFM2 = Form(_THINK, (*_LFM2, answer_calls.python_calls), markers=(*_THINK, *_LFM2), thoughts_as="thinking")

# What a template has to have in it, all of it, and the form that it then is; the first that fits.
FORMS: tuple[tuple[tuple[str, ...], Form], ...] = (
    (("<|channel|>", "<|start|>"), Form(channels=True, markers=_CHANNELS, thoughts_as="thinking")),
    (
        ("<|tool_call>", "<|channel>"),
        Form(
            _GEMMA_THOUGHT,
            (*_GEMMA, answer_calls.braces_calls),
            markers=(*_GEMMA, "<|channel>", "<channel|>", '<|"|>'),
        ),
    ),
    (
        (_KIMI[0],),
        Form(_THINK, (*_KIMI, answer_calls.section_calls), markers=(*_THINK, *_KIMI, *_KIMI_INSIDE), named_ids=True),
    ),
    (
        (_DEEPSEEK[0],),
        Form(
            _THINK,
            (*_DEEPSEEK, answer_calls.section_calls),
            markers=(*_THINK, *_DEEPSEEK, *_DEEPSEEK_INSIDE),
            text_arguments=True,
        ),
    ),
    (
        ("｜DSML｜",),
        Form(
            _THINK,
            ("<｜DSML｜function_calls>", "</｜DSML｜function_calls>", answer_calls.invoke_calls),
            markers=(*_THINK, "｜DSML｜"),
        ),
    ),
    (
        ("minimax:tool_call",),
        Form(
            _THINK,
            ("<minimax:tool_call>", "</minimax:tool_call>", answer_calls.invoke_calls),
            markers=(*_THINK, "<minimax:tool_call>", "</minimax:tool_call>"),
        ),
    ),
    (
        (_MISTRAL[0],),
        Form(
            _MISTRAL_THOUGHT,
            (*_MISTRAL, answer_calls.bracket_calls),
            markers=(*_MISTRAL_THOUGHT, _MISTRAL[0], "[ARGS]", "[CALL_ID]"),
        ),
    ),
    ((_LFM2[0],), _OF_LFM2),
    (("<|tool_list_start|>",), _OF_LFM2),  # the first of them, whose template shows no calls
    (
        ("HYTK", ":opensource"),
        Form(
            _HY_THOUGHT,
            (*_HY, answer_calls.section_key_calls),
            markers=(*_HY_THOUGHT, *_HY, *_HY_INSIDE),
        ),
    ),
    (("<tool_call>", "<arg_key>"), Form(_THINK, (*_TOOL, answer_calls.key_calls), markers=(*_THINK, *_TOOL))),
    (("<tool_call>", "<function="), Form(_THINK, (*_TOOL, answer_calls.function_calls), markers=(*_THINK, *_TOOL))),
    (("<tool_call>",), Form(_THINK, (*_TOOL, answer_calls.json_calls), markers=(*_THINK, *_TOOL))),
    (("</think>",), Form(_THINK, markers=_THINK)),
)
PLAIN = Form()


def form_of(template: str) -> Form:
    """The form that a chat template shows; `PLAIN` if it is none that is known."""
    return next((form for words, form in FORMS if all(word in template for word in words)), PLAIN)


@dataclass
class _Spaces:
    """Text of one kind without the white space around it, which belongs to the form; inside it is kept."""

    begun: bool = False
    held: str = ""

    def take(self, text: str) -> str:
        text = self.held + text
        if not self.begun:
            text = text.lstrip()
        shown = text.rstrip()
        self.begun, self.held = self.begun or bool(shown), text[len(shown) :] if shown or self.begun else ""
        return shown


@dataclass
class _Marked:
    """An answer with pairs of markers around what is no text."""

    thought: tuple[str, str] | None
    calls: tuple[str, str, Callable[[str, Texts], list[Call]]] | None
    texts: Texts  # parameters of tools that are strings
    inside: bool  # of thoughts, at the beginning
    _rest: str = ""  # not told yet
    _state: str = "text"
    _spaces: _Spaces = field(default_factory=_Spaces)
    _trimmed: bool = False  # whether white space around the text is the form's
    _dropped: str = ""  # white space before a call

    def __post_init__(self) -> None:
        if self.inside:
            self._state = "thought"

    def feed(self, text: str) -> list[Part]:
        self._rest += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return parts

    def end(self) -> list[Part]:
        if self._state == "call":
            return self._called(self._rest, whole=False)
        parts = self._shown(self._rest)
        if self._state == "text" and self._spaces.held:  # nothing came after it, so it was the text's own
            parts.append(Part("text", self._spaces.held))
        return parts

    def _step(self, parts: list[Part]) -> bool:
        """Tell what is before the next marker; whether there was one."""
        ends = self._markers()
        found = [(at, marker) for marker in ends if marker and (at := self._rest.find(marker)) >= 0]
        if not found:
            if self._state != "call":
                sure = len(self._rest) - held_back(self._rest, ends)
                parts += self._shown(self._rest[:sure])
                self._rest = self._rest[sure:]
            return False
        at, marker = min(found)
        before, self._rest = self._rest[:at], self._rest[at + len(marker) :]
        if self._state != "call":
            parts += self._shown(before)
            self._go_on(marker)
            return True
        called = self._called(before, whole=True)
        parts += called
        self._go_on(marker)
        self._spaces.begun = called[0].kind == "text"  # it is one text with what follows
        return True

    def _markers(self) -> tuple[str, ...]:
        """Those that may come now."""
        if self._state == "thought":
            assert self.thought
            return (self.thought[1],)
        if self._state == "call":
            assert self.calls
            return (self.calls[1],)
        return tuple(each[0] for each in (self.thought, self.calls) if each)

    def _go_on(self, marker: str) -> None:
        if self._state != "text":
            self._state = "text"
        else:
            self._state = "thought" if self.thought and marker == self.thought[0] else "call"
        self._trimmed = True
        self._dropped, self._spaces = self._spaces.held, _Spaces()

    def _shown(self, text: str) -> list[Part]:
        kind: Literal["text", "thought"] = "thought" if self._state == "thought" else "text"
        if kind == "text" and not self._trimmed and not self._spaces.begun:
            # Where nothing was before it, white space at its beginning is the model's own.
            self._spaces.begun = bool(text)
        shown = self._spaces.take(text)
        return [Part(kind, shown)] if shown else []

    def _called(self, text: str, *, whole: bool) -> list[Part]:
        """Calls; what can't be read as any is text, markers and all, so that nothing is lost."""
        assert self.calls
        try:
            return [Part("call", call=call) for call in self.calls[2](text, self.texts)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return [Part("text", self._dropped + self.calls[0] + text + (self.calls[1] if whole else ""))]


_HEADER = re.compile(r"<\|channel\|>(?P<channel>\w+)|to=(?:functions\.)?(?P<tool>[\w.-]+)")


@dataclass
class _Channels:
    """gpt-oss' answer: messages that each have a channel, and one that goes to a tool is a call of it.

    Source: OpenAI's description of its "harmony" format.
    """

    tools: bool
    _rest: str = ""
    _channel: str | None = None  # of the message that is open; None: between messages
    _tool: str | None = None
    _ended: tuple[str, ...] = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")

    def feed(self, text: str) -> list[Part]:
        self._rest += text
        parts: list[Part] = []
        while True:
            if self._channel is None:
                header, marker, rest = self._rest.partition("<|message|>")
                if not marker:
                    return parts
                found = [match.groupdict() for match in _HEADER.finditer(header)]
                self._channel = next((each["channel"] for each in found if each["channel"]), "final")
                self._tool = next((each["tool"] for each in found if each["tool"]), None)
                self._rest = rest
            ends = [(at, marker) for marker in self._ended if (at := self._rest.find(marker)) >= 0]
            if not ends:
                return parts + self._open()
            at, marker = min(ends)
            message, self._rest = self._rest[:at], self._rest[at + len(marker) :]
            parts += self._message(message)
            self._channel = None

    def end(self) -> list[Part]:
        if self._channel is None:
            return []
        return self._message(self._rest)

    def _open(self) -> list[Part]:
        """What can be shown of a message that goes on: all but what may become a marker, and calls only whole."""
        if self._tool is not None and self.tools:
            return []
        sure = len(self._rest) - held_back(self._rest, self._ended)
        shown, self._rest = self._rest[:sure], self._rest[sure:]
        return self._message(shown)

    def _message(self, text: str) -> list[Part]:
        if self._tool is not None and self.tools:
            try:
                return [Part("call", call=answer_calls.call_of(self._tool, text))]
            except ValueError:
                return [Part("text", text)]
        kind: Literal["text", "thought"] = "text" if self._channel == "final" else "thought"
        return [Part(kind, text)] if text else []


class Parts:
    """An answer that is taken apart as it is served."""

    def __init__(self, form: Form, prompt: str, messages: Sequence[Mapping[str, Any]], tools: object) -> None:
        """Of the answer to `messages`, rendered as `prompt`, with `tools`."""
        self.form, self._splitter = form, form.splitter(prompt, tools)
        earlier = (message.get("tool_calls") for message in messages)
        self._number = sum(len(calls) for calls in earlier if isinstance(calls, list))

    def take(self, text: str, *, end: bool) -> tuple[str, str, list[dict[str, str]]]:
        """New text as (text, thoughts, calls with an id, a name and arguments); at the end all that is left."""
        parts = [*self._splitter.feed(text), *(self._splitter.end() if end else ())]
        calls = []
        for call in (part.call for part in parts if part.call):
            number, self._number = self._number, self._number + 1
            calls.append({"id": self.form.call_id(call, number), "name": call.name, "arguments": call.arguments})
        return joined(parts, "text"), joined(parts, "thought"), calls


def joined(parts: Iterable[Part], kind: str) -> str:
    """The text of one kind."""
    return "".join(part.text for part in parts if part.kind == kind)
