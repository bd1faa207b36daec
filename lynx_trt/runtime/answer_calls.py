"""Calls of tools as models write them: from the text between two markers to names and arguments.

Source of the forms: the models' own chat templates, which show each model how to write a call.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """One call of a tool; `arguments` is a JSON object as text."""

    name: str
    arguments: str


# Tools' parameters that are strings, as (tool, parameter): values that stand for themselves.
Texts = Set[tuple[str, str]]


def texts_of(tools: object) -> Texts:
    """Those that tools' schemas say are strings, in the form of OpenAI's API; of anything else none."""
    found: set[tuple[str, str]] = set()
    for tool in tools if isinstance(tools, list) else []:
        function = _mapping(tool, "function") or _mapping(tool)
        properties = _mapping(_mapping(function, "parameters"), "properties")
        texts = (key for key in properties if _mapping(properties, key).get("type") == "string")
        found |= {(str(function.get("name")), key) for key in texts}
    return found


def _mapping(value: Any, key: str | None = None) -> dict[str, Any]:
    """A JSON object, or what it has by a key if that is one; else an empty one."""
    value = value.get(key) if key is not None and isinstance(value, dict) else value
    return value if isinstance(value, dict) else {}


def json_calls(text: str, texts: Texts) -> list[Call]:
    """{"name": ..., "arguments": {...}}, one or more (Qwen3, Granite 4, Hermes).

    Here and below: raises ValueError if it is no such text.
    """
    decoder, calls, at = json.JSONDecoder(), [], 0
    text = text.strip()
    while at < len(text):
        found, at = decoder.raw_decode(text, at)
        for each in found if isinstance(found, list) else [found]:
            calls.append(call_of(each["name"], each.get("arguments", each.get("parameters", {}))))
        at += len(text[at:]) - len(text[at:].lstrip(" \n,;"))
    return _some(calls)


def function_calls(text: str, texts: Texts) -> list[Call]:
    """<function=NAME><parameter=KEY>VALUE</parameter></function> (Qwen3-Coder, Qwen3.5, Nemotron 3)."""
    calls = []
    for name, body in _between(r"<function=([^>\n]{1,256})>", "</function>", text, open_ended=True):
        values = _between(r"<parameter=([^>\n]{1,256})>", "</parameter>", body)
        calls.append(call_of(name.strip(), _values(name.strip(), values, texts)))
    return _some(calls)


def key_calls(text: str, texts: Texts) -> list[Call]:
    """NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value> (GLM)."""
    name, _, body = text.partition("<arg_key>")
    pairs = _between(r"<arg_key>([^<]{1,256})</arg_key>\s*<arg_value>", "</arg_value>", f"<arg_key>{body}")
    if not re.fullmatch(r"\s*[\w.:-]+\s*", name):
        raise ValueError(text)
    return [call_of(name.strip(), _values(name.strip(), pairs, texts))]


def section_key_calls(text: str, texts: Texts) -> list[Call]:
    """<tool_call:opensource>NAME<tool_sep:opensource> and keys and values as above, one or more (HY v3)."""
    bodies = _between("<tool_call>()", "</tool_call>", text.replace(":opensource>", ">"))
    return _some(call for _, body in bodies for call in key_calls(body.replace("<tool_sep>", ""), texts))


def invoke_calls(text: str, texts: Texts) -> list[Call]:
    """<invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke> (MiniMax-M2; DeepSeek-V3.2 says of each
    value whether it is a string).
    """
    calls = []
    for name, body in _between(r'<invoke name="([^"]{1,256})">', "</invoke>", text.replace("｜DSML｜", "")):
        values = list(_between(r'<parameter name="([^>]{1,256})>', "</parameter>", body))
        pairs = [(key.partition('"')[0], value) for key, value in values]
        said = {(name, key.partition('"')[0]) for key, _ in values if key.endswith(' string="true"')}
        calls.append(call_of(name, _values(name, pairs, texts | said)))
    return _some(calls)


def section_calls(text: str, texts: Texts) -> list[Call]:
    """Calls between tokens of their own (Kimi K2: functions.NAME:0 and JSON; DeepSeek-V3.1: NAME and JSON)."""
    calls = []
    begin = r"<\|tool_call_begin\|>([^<]{1,256})<\|tool_call_argument_begin\|>"
    for head, body in _between(begin, "<|tool_call_end|>", text, open_ended=True):
        name = head.strip().removeprefix("functions.")
        calls.append(call_of(name.rpartition(":")[0] or name, json.loads(body)))
    begin = "<｜tool▁call▁begin｜>([^<]{1,256})<｜tool▁sep｜>"
    for head, body in _between(begin, "<｜tool▁call▁end｜>", text, open_ended=True):
        name, arguments = head.strip(), body
        if fenced := re.fullmatch(r"\s*([^\n]+)\n```json\n(.*?)\n```\s*", body, re.DOTALL):  # DeepSeek-V3 and R1
            name, arguments = fenced.groups()
        calls.append(call_of(name, json.loads(arguments)))
    return _some(calls)


def bracket_calls(text: str, texts: Texts) -> list[Call]:
    """NAME[ARGS]{...} (Mistral), or a list of {"name": ..., "arguments": {...}} (its older models)."""
    if text.lstrip().startswith("["):
        return json_calls(text, texts)
    parts = text.split("[TOOL_CALLS]")
    pairs = [part.partition("[ARGS]")[::2] for part in parts if part.strip()]
    return _some([call_of(re.sub(r"\[CALL_ID\].*", "", name).strip(), json.loads(body)) for name, body in pairs])


def python_calls(text: str, texts: Texts) -> list[Call]:
    """[NAME(KEY='VALUE')], Python of which nothing is run (LFM2)."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else [tree]
        made = []
        for call in calls:
            if not isinstance(call, ast.Call) or call.args:
                raise ValueError(text)
            values = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
            made.append(call_of(ast.unparse(call.func), values))
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(text) from error
    return _some(made)


def braces_calls(text: str, texts: Texts) -> list[Call]:
    """call:NAME{KEY:<|"|>VALUE<|"|>} (Gemma 4): JSON but for the marks around strings, and keys without any."""
    found = re.fullmatch(r"\s*call:([\w.:-]+)(\{.*\})\s*", text, re.DOTALL)
    if not found:
        raise ValueError(text)
    quoted = re.split(r'<\|"\|>', found[2])
    pieces = [
        json.dumps(piece) if number % 2 else re.sub(r"([{,]\s*)([\w.-]+)(\s*:)", r'\1"\2"\3', piece)
        for number, piece in enumerate(quoted)
    ]
    return [call_of(found[1], json.loads("".join(pieces)))]


def call_of(name: Any, arguments: Any) -> Call:
    """A call of a tool with arguments as a JSON object, or as its text. Raises ValueError: they are none."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except RecursionError:
            raise ValueError("the arguments are nested too deeply") from None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError(f"{name}: {arguments}")
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def _values(tool: str, pairs: Iterable[tuple[str, str]], texts: Texts) -> dict[str, Any]:
    """Values of parameters: strings where the tool says so, else JSON where it is any, else strings too."""
    made = {}
    for key, value in pairs:
        key = key.strip()
        made[key] = value = value.removeprefix("\n").removesuffix("\n")  # a line break on each side is the form's
        if (tool, key) not in texts:
            with contextlib.suppress(ValueError, RecursionError):
                made[key] = json.loads(value)
    return made


def _between(begin: str, end: str, text: str, *, open_ended: bool = False) -> Iterator[tuple[str, str]]:
    """What the group of the pattern `begin` is, and the text from there to `end`, again and again.

    Without an end there is no further one; `open_ended`: the text's own is one too. So a text is gone through once.
    """
    pattern, at = re.compile(begin), 0
    while found := pattern.search(text, at):
        stop = text.find(end, found.end())
        if stop < 0 and not open_ended:
            return
        yield found[1], text[found.end() : stop if stop >= 0 else len(text)]
        at = stop + len(end) if stop >= 0 else len(text)


def _some(calls: Iterable[Call]) -> list[Call]:
    made = list(calls)
    if not made:
        raise ValueError("there is no call")
    return made
