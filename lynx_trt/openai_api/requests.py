"""Requests of OpenAI's API, and what they ask of the served model: a set of its inputs for each choice.

What our model can't do is refused by name and not left out in silence; the values that ask for nothing pass. Ranges
are checked by the served model, once for all its ways in.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lynx_trt.openai_api.errors import ApiError
from lynx_trt.serving.schema import INPUTS, PENALTIES

# What OpenAI's API and its servers' extensions have and this one hasn't, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "suffix": ("",),
    "top_logprobs": (0,),
    "web_search_options": (),
}
# What changes nothing in an answer.
IGNORED = (
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
)
MOST_CHOICES = 128
SEED_BITS = 32  # of a seed that is drawn here: draws differ from request to request unless one asks for a seed
# Tokens that a completion has where nobody says how many, as OpenAI's own; chats go on to the model's end.
COMPLETION_TOKENS = 16
ALL_TOKENS = 2**31 - 1

# The served model's inputs by name; what each is, says lynx_trt.serving.schema.
Inputs = dict[str, Any]
AnyBody = TypeVar("AnyBody", bound="Body")


@dataclass(frozen=True)
class Sampling:
    """How a model draws where a request doesn't say: its checkpoint's generation config, else OpenAI's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class StreamOptions(BaseModel):
    """Of a stream: whether its last chunk says how many tokens there were."""

    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Beyond OpenAI's: the dial of the selection, the seconds an answer may take, and ends that don't count.
    quality: str | float | None = None
    deadline: float | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    parallel_tool_calls: bool = True  # False: of the calls in an answer the first alone
    structured_outputs: dict[str, Any] | None = None  # as other servers call what an answer has to be

    @classmethod
    def read(cls: type[AnyBody], text: bytes) -> AnyBody:
        """A request from JSON.

        Raises:
            ApiError: it is none, or asks for something that there isn't.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the request can't be read as JSON: {error}") from None
        if not isinstance(found, dict):
            raise ApiError(400, "the request is no JSON object")
        given = {name: value for name, value in found.items() if value is not None and name not in IGNORED}
        for name, neutral in UNSUPPORTED.items():
            if name in given and given.pop(name) not in neutral:
                raise ApiError(400, f"{name} is not supported; leave it out", name)
        try:
            made = cls.model_validate(given)
        except ValidationError as error:
            raise _in_words(error) from None
        if made.min_tokens and not made.ignore_eos:
            raise ApiError(400, "min_tokens is supported with ignore_eos alone; leave it out", "min_tokens")
        return made

    def choices(self, sampling: Sampling) -> list[Inputs]:
        """The inputs of each answer, in the order of their indices; `sampling` is the model's own.

        Raises:
            ApiError: one is no prompt, or a number that the served model's types can't hold.
        """
        try:
            settings = self._settings(sampling)
            made = [
                {**prompt, **settings, "seed": self._seed(number)}
                for prompt in self._prompts()
                for number in range(self.n)
            ]
        except RecursionError:
            raise ApiError(400, "the request is nested too deeply") from None
        for inputs in made:
            _check_types(inputs)
        return made

    @property
    def forced(self) -> str | None:
        """See ChatBody."""
        return None

    def _prompts(self) -> list[Inputs]:
        raise NotImplementedError

    def _most_tokens(self) -> int:
        raise NotImplementedError

    def _seed(self, number: int) -> int:
        return secrets.randbits(SEED_BITS) if self.seed is None else self.seed + number

    def _settings(self, sampling: Sampling) -> Inputs:
        """What all answers have in common."""
        settings: Inputs = {
            "max_tokens": self._most_tokens(),
            # Also of an answer that goes out as a whole: the server notices that we hung up when it has to write.
            "stream": True,
        }
        for name, own in {**PENALTIES, **asdict(sampling)}.items():
            value = own if getattr(self, name) is None else getattr(self, name)
            # What asks for nothing is left away, for a server that is older than this.
            if value != PENALTIES.get(name):
                settings[name] = value
        settings["top_k"] = max(settings["top_k"], 0)  # the others' extension has -1 for all tokens
        if self.logit_bias:
            settings["logit_bias"] = json.dumps(self.logit_bias)
        if self.stop:
            settings["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.quality is not None:
            settings["quality"] = str(self.quality)
        if self.deadline is not None:
            settings["deadline"] = self.deadline
        if self.ignore_eos:
            settings["ignore_eos"] = True
        if (guide := self._guide()) is not None:
            settings["guide"] = json.dumps(guide)
        return settings

    def _guide(self) -> dict[str, Any] | None:
        """What the answer has to be, as the served model's `guide`."""
        if self.structured_outputs is None:
            return None
        given = {name: value for name, value in self.structured_outputs.items() if value is not None}
        if len(given) != 1 or next(iter(given)) not in _GUIDES:
            word = json.dumps(self.structured_outputs)[:64]
            names = ", ".join(_GUIDES)
            raise ApiError(400, f"structured_outputs is {word}; it has one of {names}", "structured_outputs")
        ((name, value),) = given.items()
        return {_GUIDES[name]: value}


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]

    def _prompts(self) -> list[Inputs]:
        every = self.prompt if isinstance(self.prompt, list) and not _is_ids(self.prompt) else [self.prompt]
        if not every:
            raise ApiError(400, "the prompt is an empty list: there is nothing to continue", "prompt")
        if len(every) * self.n > MOST_CHOICES:
            raise ApiError(400, f"{len(every)} prompts of {self.n} answers are more than {MOST_CHOICES}", "prompt")
        return [{"text_input": each} if isinstance(each, str) else {"input_ids": each} for each in every]

    def _most_tokens(self) -> int:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    max_completion_tokens: int | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None  # for templates that know it
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    def _prompts(self) -> list[Inputs]:
        options = dict(self.chat_template_kwargs)
        if self.tools and self.tool_choice != "none":
            options["tools"] = self.tools
        if self.reasoning_effort is not None:
            options["reasoning_effort"] = self.reasoning_effort
        prompt: Inputs = {"messages": json.dumps([_message(each) for each in self.messages]), "parts": True}
        return [{**prompt, "chat_options": json.dumps(options)} if options else prompt]

    @property
    def forced(self) -> str | None:
        """The tool that is to be called; "" if it may be any, None if none has to be."""
        if self.tool_choice in ("none", "auto", "required"):
            return "" if self.tool_choice == "required" else None
        function = self.tool_choice.get("function") if isinstance(self.tool_choice, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            word = json.dumps(self.tool_choice)[:64]
            raise ApiError(400, f"tool_choice is {word}; it is none, auto, required or a function", "tool_choice")
        return name

    def _call(self, forced: str) -> dict[str, Any]:
        """The guide of an answer that is a call: a tool's arguments, or the name of one and its arguments."""
        schemas: dict[str, Any] = {}
        for tool in self.tools:
            function = tool.get("function")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise ApiError(400, f"tools has {json.dumps(tool)[:64]}, which is no function with a name", "tools")
            schemas[function["name"]] = function.get("parameters") or {"type": "object"}
        if forced:
            if forced not in schemas:
                raise ApiError(400, f"tool_choice is {forced[:64]!r}, which is none of the tools", "tool_choice")
            return {"json_schema": schemas[forced]}
        if not schemas:
            raise ApiError(400, "tool_choice is 'required', and there are no tools", "tool_choice")
        closed = {"type": "object", "required": ["name", "arguments"], "additionalProperties": False}
        calls = []
        for number, (name, schema) in enumerate(schemas.items()):
            arguments = _moved(schema, f"#/anyOf/{number}/properties/arguments")
            calls.append({**closed, "properties": {"name": {"const": name}, "arguments": arguments}})
        return {"json_schema": {"anyOf": calls}}

    def _guide(self) -> dict[str, Any] | None:
        asked, guide = self.response_format or {"type": "text"}, super()._guide()
        if (forced := self.forced) is not None:
            if guide is not None or asked != {"type": "text"}:
                raise ApiError(400, "a tool_choice that has to be made leaves no other form to ask for", "tool_choice")
            return self._call(forced)
        if asked == {"type": "text"}:
            return guide
        if guide is not None:
            raise ApiError(400, "there are response_format and structured_outputs; give one", "response_format")
        if asked == {"type": "json_object"}:
            return {"json_schema": {"type": "object"}}
        schema = asked.get("json_schema")
        if asked.get("type") == "json_schema" and isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
            return {"json_schema": schema["schema"]}
        word = json.dumps(asked)[:64]
        raise ApiError(400, f"response_format is {word}; it is text, json_object or json_schema", "response_format")

    def _most_tokens(self) -> int:
        given = [each for each in (self.max_tokens, self.max_completion_tokens) if each is not None]
        return min(given, default=ALL_TOKENS)


# Names of what an answer has to be, and ours.
_GUIDES = {"json": "json_schema", "regex": "regex", "choice": "choice"}
# The largest numbers of the served model's types.
_MOST = {"TYPE_INT32": 2**31 - 1, "TYPE_INT64": 2**63 - 1, "TYPE_FP32": 3.4e38}
_LIMITS = {tensor.name: _MOST[tensor.type] for tensor in INPUTS if tensor.type in _MOST}


def _check_types(inputs: Inputs) -> None:
    for name, most in _LIMITS.items():
        values = inputs.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            if not -most <= value <= most:  # NaN is not either
                raise ApiError(400, f"{name} is {str(value)[:64]}, which is out of range", name)


def _moved(schema: Any, place: str) -> Any:
    """A JSON schema that becomes a part of another: what it refers to in itself is found there."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _moved(value, place) for name, value in schema.items()}
    reference = made.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        made["$ref"] = place + reference[1:]
    return made


def _is_ids(prompt: list[Any]) -> bool:
    return bool(prompt) and isinstance(prompt[0], int)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it, its text in one piece. Raises ApiError: it has more than text."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            raise ApiError(400, f"a message has a part of type {kind!r}; this model takes text alone", "messages")
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


def _in_words(error: ValidationError) -> ApiError:
    """The first thing that is wrong, with its value."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{str(name)[:64]!r} is unknown; leave it out", name)
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing", name)
    value = json.dumps(first["input"], default=str)[:64]
    return ApiError(400, f"{name} is {value}: {first['msg'].lower()}", name)
