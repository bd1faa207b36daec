"""From a request's tensors to a sequence: everything a client can get wrong is said here, before anything is queued."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lynx_trt.errors import GenerationError
from lynx_trt.runtime.answers import PLAIN, Form, Parts
from lynx_trt.runtime.backend import Array
from lynx_trt.runtime.chat import ChatTemplate, parse_messages, parse_options
from lynx_trt.runtime.guide import Guide, Guides
from lynx_trt.runtime.quality import Dial
from lynx_trt.runtime.sampling import Sampling
from lynx_trt.runtime.scheduler import check_prompt
from lynx_trt.runtime.sequence import Generated, Limits, Request
from lynx_trt.runtime.text import Tokenizer
from lynx_trt.serving.schema import INPUTS, PENALTIES
from lynx_trt.serving.settings import Settings

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_GUIDE_CHARACTERS = 1 << 20
# A request has one of these.
PROMPTS = ("text_input", "messages", "input_ids")
_OTHERS = " or ".join(PROMPTS[1:])
# Parameters that the server and its clients set themselves.
SERVER_PARAMETERS = {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output"}


@dataclass(frozen=True)
class Asked:
    """One request."""

    sequence: Generated
    stream: bool  # pieces are to be sent as they come
    parts: Parts | None  # what takes the answer apart


@dataclass(frozen=True)
class _Prompt:
    """A prompt's tokens, and of messages how the model marks its answers, their text, and what takes answers apart."""

    tokens: list[int]
    form: Form = PLAIN
    rendered: str = ""
    parts: Parts | None = None


@dataclass(frozen=True)
class Parser:
    """Reads requests for one model."""

    tokenizer: Tokenizer
    limits: Limits
    dial: Dial
    settings: Settings
    guides: Guides
    template: ChatTemplate | None = None  # of messages, where the model has one

    def read(self, values: Mapping[str, Array], parameters: str = "{}") -> Asked:
        """What a request asks for.

        Args:
            values: the input tensors that the request has.
            parameters: JSON of the request's parameters.

        Raises:
            GenerationError: the request can't be answered; the message says why.
            UsageError: a sampling value is out of its range.
        """
        _refuse_parameters(parameters)
        prompt = self._prompt(values)
        sampling = Sampling(
            temperature=float(_one(values, "temperature", 0.0)),
            top_p=float(_one(values, "top_p", 1.0)),
            seed=self._at_least(values, "seed", 0, 0),
            top_k=int(_one(values, "top_k", 0)),
            logit_bias=self._biases(values),
            **{name: float(_one(values, name, default)) for name, default in PENALTIES.items()},
        )
        quality = _text(values, "quality")
        request = Request(
            max_new_tokens=self._at_least(values, "max_tokens", self.settings.max_tokens, 1),
            sampling=sampling,
            stop=_stops(values),
            restriction=None if quality is None else self.dial.restriction(quality),
            deadline=time.monotonic() + self._seconds(values),
            ignore_eos=bool(_one(values, "ignore_eos", False)),
        )
        parts = prompt.parts
        sequence = Generated(prompt.tokens, request, self.tokenizer.stream(parts.form.markers if parts else ()))
        sequence.guide = self._guide(values, prompt)
        return Asked(sequence, bool(_one(values, "stream", False)), parts)

    def _biases(self, values: Mapping[str, Array]) -> tuple[tuple[int, float], ...]:
        text = _text(values, "logit_bias")
        if text is None:
            return ()
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or not all(map(_is_bias, found, found.values())):
            raise GenerationError(
                f"logit_bias is {text[:64]!r}; it must be a JSON object of token ids and what is added to their logits"
            )
        biases = {int(token): float(bias) for token, bias in found.items()}
        if len(biases) < len(found):
            raise GenerationError("logit_bias has a token twice")
        for token in biases:
            if token >= self.limits.vocabulary:
                raise GenerationError(
                    f"logit_bias has the token {token}, and the model has the tokens 0 to {self.limits.vocabulary - 1}"
                )
        return tuple(biases.items())

    def _guide(self, values: Mapping[str, Array], prompt: _Prompt) -> Guide | None:
        text = _text(values, "guide")
        if text is None:
            return None
        if bool(_one(values, "ignore_eos", False)):
            raise GenerationError("there are guide and ignore_eos, and a guide says where an answer ends; give one")
        if len(text) > MAX_GUIDE_CHARACTERS:
            raise GenerationError(f"the guide has {len(text)} characters; it may have {MAX_GUIDE_CHARACTERS}")
        return self.guides.make(text, prompt.form, prompt.rendered)

    def _prompt(self, values: Mapping[str, Array]) -> _Prompt:
        prompts = [name for name in PROMPTS if values.get(name) is not None]
        if not prompts:
            raise GenerationError(f"text_input is missing: there is nothing to continue (nor are there {_OTHERS})")
        if len(prompts) > 1:
            raise GenerationError(f"there are {' and '.join(prompts)}; give one of them")
        text, messages, options = (_text(values, name) for name in ("text_input", "messages", "chat_options"))
        if options is not None and messages is None:
            raise GenerationError("chat_options is for messages, and there are none; leave it out")
        parts = bool(_one(values, "parts", False))
        if parts and messages is None:
            raise GenerationError("parts is for messages, and there are none; leave it out")
        if text is not None:
            return _Prompt(self._tokens(text, special=True))
        if messages is None:
            return _Prompt(self._ids(values["input_ids"]))
        if self.template is None:
            raise GenerationError("messages need a chat template, and this model has none; give text_input instead")
        self._check_length(messages)
        said, given = parse_messages(messages), parse_options(options or "{}")
        rendered = self.template.render(said, given)
        form = self.template.form
        apart = Parts(form, rendered, said, given.get("tools")) if parts else None
        return _Prompt(self._tokens(rendered, special=False), form, rendered, apart)

    def _ids(self, ids: Array) -> list[int]:
        prompt = [int(each) for each in ids.reshape(-1)]
        check_prompt(prompt, self.limits)
        return prompt

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        # Said here and not of its tokens: some tokenizers begin every text with one.
        if not text:
            raise GenerationError("the prompt is empty: there is nothing to continue")
        self._check_length(text)
        prompt = self.tokenizer.encode(text, special=special)
        check_prompt(prompt, self.limits)
        return prompt

    def _check_length(self, text: str) -> None:
        # A text that can't fit even in the longest of tokens isn't tokenized at all: that would take seconds.
        most = self.limits.max_length * self.tokenizer.longest
        if len(text) > most:
            raise GenerationError(
                f"the prompt has {len(text)} characters, and {self.limits.max_length} tokens, which is what the model "
                f"takes, can't hold more than {most}: shorten it"
            )

    @staticmethod
    def _at_least(values: Mapping[str, Array], name: str, default: int, least: int) -> int:
        value = int(_one(values, name, default))
        if value < least:
            raise GenerationError(f"{name} is {value}; it must be {least} or more")
        return value

    def _seconds(self, values: Mapping[str, Array]) -> float:
        value = float(_one(values, "deadline", self.settings.deadline))
        if not value > 0:  # NaN is not either
            raise GenerationError(f"the deadline is {value}; it must be above 0 seconds")
        return min(value, self.settings.deadline)


def _is_bias(token: str, bias: Any) -> bool:
    """A token's id, and a number that a float holds."""
    number = isinstance(bias, int | float) and not isinstance(bias, bool) and not abs(bias) > 1e300
    return number and token.isascii() and token.isdigit() and len(token) < 12


def _refuse_parameters(parameters: str) -> None:
    """A misspelt or misplaced setting must not be ignored in silence."""
    given = json.loads(parameters or "{}")
    unknown = [name for name in given if name not in SERVER_PARAMETERS and not name.startswith("triton_")]
    if unknown:
        inputs = ", ".join(tensor.name for tensor in INPUTS)
        raise GenerationError(f"unknown parameter {unknown[0][:64]!r}; a request has these inputs: {inputs}")


def _one(values: Mapping[str, Array], name: str, default: Any) -> Any:
    array = values.get(name)
    if array is None:
        return default
    if array.size != 1:
        raise GenerationError(f"{name} has {array.size} values; it must have one")
    return array.reshape(-1)[0]


def _text(values: Mapping[str, Array], name: str) -> str | None:
    value = _one(values, name, None)
    return None if value is None else _decoded(value, name)


def _decoded(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError:
        raise GenerationError(f"{name} is no valid UTF-8") from None


def _stops(values: Mapping[str, Array]) -> tuple[str, ...]:
    array = values.get("stop")
    if array is None:
        return ()
    stops = tuple(_decoded(value, "stop") for value in array.reshape(-1))
    if len(stops) > MAX_STOPS:
        raise GenerationError(f"stop has {len(stops)} texts; it may have {MAX_STOPS}")
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise GenerationError(
                f"a stop text has {len(stop)} characters; it must have 1 to {MAX_STOP_CHARACTERS} (an empty one would "
                "end every answer at once)"
            )
    return stops
