"""Messages as the text that a chat model was trained on: the checkpoint's own template, rendered in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lynx_trt.errors import ArtifactError, GenerationError
from lynx_trt.runtime.answers import form_of

# Where a template lies: in a file of its own, or under this key of another.
FILE, KEY = "chat_template.jinja", "chat_template"
OTHERS = ("chat_template.json", "tokenizer_config.json")
# What templates call the tokens around a text.
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


class ChatTemplate:
    """A template of Hugging Face's form, which is Jinja: it may compute, but reach no files and change no messages.

    Source of the form: transformers' documentation of chat templates.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """Compile `source`; `tokens` are the special tokens' texts by the names that templates have for them.

        Raises:
            ArtifactError: it is no template.
        """
        from jinja2 import TemplateError

        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ArtifactError(
                f"the chat template can't be read: {error}; the model takes text, but no messages"
            ) from None
        self._tokens = dict(tokens)
        self.form = form_of(source)

    @classmethod
    def find(cls, folder: Path) -> ChatTemplate | None:
        """The template among the files of an artifact's tokenizer; None if there is none.

        Raises:
            ArtifactError: a file can't be read, or what it holds is no template.
        """
        path = folder / FILE
        source = _read(path) if path.is_file() else None
        others = [_json(folder / name) for name in OTHERS]
        source = source or next((found for each in others if (found := _default(each.get(KEY)))), None)
        if source is None:
            return None
        named = {**_json(folder / "special_tokens_map.json"), **others[-1]}
        tokens = {name: text for name in TOKENS if (text := _text(named.get(name))) is not None}
        return cls(source, tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None, *, answer: bool = True
    ) -> str:
        """The text up to where the model's answer begins; special tokens are in it.

        Args:
            messages: {"role": ..., "content": ...}, the user's last.
            options: what the template takes beside them, such as {"enable_thinking": false}.
            answer: an answer is to follow; False: the messages are all, the model's own among them.

        Raises:
            GenerationError: the template refuses them, or can't be rendered.
        """
        from jinja2 import TemplateError

        given = {"tools": None, "documents": None, **self._tokens, **(options or {})}
        try:
            return str(
                self._template.render(messages=self.form.messages(messages), add_generation_prompt=answer, **given)
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise GenerationError(f"the model's chat template refuses these messages: {error}") from None


_FORM = 'it has to be JSON like [{"role": "user", "content": "Hello"}]'


def parse_messages(text: str) -> list[dict[str, Any]]:
    """Messages from JSON.

    Raises:
        GenerationError: it is no list of objects that have a role, or has none.
    """
    try:
        return check_messages(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise GenerationError(f"messages can't be read: {error}; {_FORM}") from None


def check_messages(messages: object) -> list[dict[str, Any]]:
    """The same of what JSON holds."""
    if not isinstance(messages, list) or not messages:
        raise GenerationError(f"messages is no list of one or more; {_FORM}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise GenerationError(f"messages has {json.dumps(message)[:64]}, which has no role; {_FORM}")
    return messages


def parse_options(text: str) -> dict[str, Any]:
    """Options of a template from JSON.

    Raises:
        GenerationError: it is no object, or has a name that is the renderer's own.
    """
    form = 'it has to be a JSON object like {"enable_thinking": false}'
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GenerationError(f"the chat options can't be read: {error}; {form}") from None
    if not isinstance(options, dict):
        raise GenerationError(f"the chat options are {text[:64]}; {form}")
    if taken := {"messages", "add_generation_prompt"} & options.keys():
        raise GenerationError(f"the chat options have {min(taken)!r}, which is not for them to say; leave it out")
    return options


def _environment() -> Any:
    """As transformers has it, whose templates these are."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the model's own words for training; here it is nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise GenerationError(f"the model's chat template refuses these messages: {message}")

    def as_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})  # not escaped for HTML, as Jinja's own is

    def now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = as_json
    environment.globals.update(raise_exception=refuse, strftime_now=now)
    return environment


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} can't be read: {error}; copy it again, or do without chat") from None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(_read(path))
    except ValueError as error:
        raise ArtifactError(f"{path} can't be read as JSON: {error}; copy it again, or do without chat") from None
    return found if isinstance(found, dict) else {}


def _default(found: Any) -> str | None:
    """The template, or of several with names the one for everything."""
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
