"""Thoughts, text and calls of tools in the answers of chat models, in the form of each family."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_trt.runtime.answers import FORMS, PLAIN, Form, Parts, form_of

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {"type": "object", "properties": {"text": {"type": "string"}, "count": {"type": "integer"}}},
        },
    }
]
FIND = ("find", {"text": "12", "count": 3})

# What a template of the family has in it, an answer of its model, and its parts.
ANSWERS: dict[str, tuple[str, str, list[Any]]] = {
    "qwen3": (
        "<tool_call></think>",
        "<think>\nwell, a < b\n</think>\n\nLet me see.\n\n"
        '<tool_call>\n{"name": "find", "arguments": {"text": "12", "count": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>',
        [("thought", "well, a < b"), ("text", "Let me see."), FIND, ("stop", {})],
    ),
    "qwen3-coder": (
        "<tool_call>\n<function=example_function_name>",
        "Now.\n<tool_call>\n<function=find>\n<parameter=text>\n12\n</parameter>\n<parameter=count>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        [("text", "Now."), FIND],
    ),
    "glm": (
        "<tool_call>{function-name}\n<arg_key>",
        "\n<think>hm</think>\nNow.\n<tool_call>find\n<arg_key>text</arg_key>\n<arg_value>12</arg_value>\n"
        "<arg_key>count</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        [("thought", "hm"), ("text", "Now."), FIND],
    ),
    "minimax-m2": (
        "'<minimax:tool_call>'",
        'Now.\n<minimax:tool_call>\n<invoke name="find">\n<parameter name="text">12</parameter>\n'
        '<parameter name="count">3</parameter>\n</invoke>\n<invoke name="stop">\n</invoke>\n</minimax:tool_call>',
        [("text", "Now."), FIND, ("stop", {})],
    ),
    "deepseek-v3.2": (
        '"｜DSML｜"',
        '<think>hm</think>Now.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="find">\n'
        '<｜DSML｜parameter name="text" string="true">12</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="count" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls>",
        [("thought", "hm"), ("text", "Now."), FIND],
    ),
    "kimi-k2": (
        "<|tool_calls_section_begin|>",
        "<think>hm</think>Now.<|tool_calls_section_begin|><|tool_call_begin|>functions.find:0"
        '<|tool_call_argument_begin|>{"text": "12", "count": 3}<|tool_call_end|><|tool_call_begin|>functions.stop:1'
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        [("thought", "hm"), ("text", "Now."), FIND, ("stop", {})],
    ),
    "deepseek-v3.1": (
        "<｜tool▁calls▁begin｜>",
        'Now.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>find<｜tool▁sep｜>{"text": "12", "count": 3}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>",
        [("text", "Now."), FIND],
    ),
    "deepseek-v3": (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n```json\n"
        '{"text": "12", "count": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        [FIND],
    ),
    "gpt-oss": (
        "<|start|>assistant<|channel|>",
        "<|channel|>analysis<|message|>hm <b><|end|><|start|>assistant<|channel|>commentary to=functions.find "
        '<|constrain|>json<|message|>{"text": "12", "count": 3}',
        [("thought", "hm <b>"), FIND],
    ),
    "gpt-oss, no call": (
        "<|start|>assistant<|channel|>",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes. \n",
        [("thought", "hm"), ("text", "Yes. \n")],
    ),
    "gemma4": (
        "'<|channel>thought\n<channel|>' '<|tool_call>call:'",
        '<|channel>thought\nhm\n<channel|>Now.<|tool_call>call:find{count:3,text:<|"|>12<|"|>}<tool_call|>',
        [("thought", "hm"), ("text", "Now."), FIND],
    ),
    "mistral": (
        "[TOOL_CALLS]",
        '[THINK]hm[/THINK]Now.[TOOL_CALLS]find[ARGS]{"text": "12", "count": 3}[TOOL_CALLS]stop[ARGS]{}',
        [("thought", "hm"), ("text", "Now."), FIND, ("stop", {})],
    ),
    "mistral, before": (
        "[TOOL_CALLS]",
        '[TOOL_CALLS] [{"name": "find", "arguments": {"text": "12", "count": 3}}]',
        [FIND],
    ),
    "lfm2": (
        "<|tool_call_start|>",
        "<think>hm</think>Now.<|tool_call_start|>[find(text='12', count=3), stop()]<|tool_call_end|>",
        [("thought", "hm"), ("text", "Now."), FIND, ("stop", {})],
    ),
    "lfm2, before": ("<|tool_list_start|>", "<|tool_call_start|>[find(text='12', count=3)]<|tool_call_end|>", [FIND]),
    "hy-v3": (
        "set HYTK = ':opensource'",
        "<think:opensource>hm</think:opensource>Now.<tool_calls:opensource>\n<tool_call:opensource>find"
        "<tool_sep:opensource>\n<arg_key:opensource>text</arg_key:opensource>\n<arg_value:opensource>12"
        "</arg_value:opensource>\n<arg_key:opensource>count</arg_key:opensource>\n<arg_value:opensource>3"
        "</arg_value:opensource>\n</tool_call:opensource>\n</tool_calls:opensource>",
        [("thought", "hm"), ("text", "Now."), FIND],
    ),
    "thoughts alone": (
        "content.split('</think>')",
        "<think>\nhm\n</think>\n\nA <tool_call> is no call here. \n",
        [("thought", "hm"), ("text", "A <tool_call> is no call here. \n")],
    ),
    "plain": ("{{ messages }}", " <think>all</think> text \n", [("text", " <think>all</think> text \n")]),
}


def parts(form: Form, pieces: list[str], prompt: str = "", tools: object = TOOLS) -> list[Any]:
    """As in ANSWERS: pieces of one kind together."""
    splitter = form.splitter(prompt, tools)
    made: list[Any] = []
    for part in [*(part for piece in pieces for part in splitter.feed(piece)), *splitter.end()]:
        if part.call:
            made.append((part.call.name, json.loads(part.call.arguments)))
        elif made and made[-1][0] == part.kind:
            made[-1] = (part.kind, made[-1][1] + part.text)
        else:
            made.append((part.kind, part.text))
    return made


def test_every_form_has_an_answer() -> None:
    found = {id(form_of(template)) for template, _, _ in ANSWERS.values()}
    assert found == {id(form) for _, form in FORMS} | {id(PLAIN)}


@pytest.mark.parametrize("family", ANSWERS)
def test_parts(family: str) -> None:
    """Whole, and letter by letter."""
    template, answer, wanted = ANSWERS[family]
    assert parts(form_of(template), [answer]) == wanted
    assert parts(form_of(template), list(answer)) == wanted


@given(st.sampled_from(sorted(ANSWERS)), st.lists(st.integers(1, 60), max_size=12))
def test_pieces_may_be_cut_anywhere(family: str, lengths: list[int]) -> None:
    template, answer, wanted = ANSWERS[family]
    pieces, at = [], 0
    for length in lengths:
        pieces.append(answer[at : at + length])
        at += length
    assert parts(form_of(template), [*pieces, answer[at:]]) == wanted


@given(st.sampled_from(sorted(ANSWERS)), st.text("<>|/{}[]\"'=:, \ntoolcaljsnfidARGS｜▁", max_size=80), st.booleans())
def test_no_answer_breaks_it(family: str, noise: str, inside: bool) -> None:
    """Whatever a model writes; of a form without markers all of it is there again."""
    template, answer, _ = ANSWERS[family]
    form = form_of(template)
    for text in (noise, noise + answer, answer[: len(answer) // 2] + noise):
        found = parts(form, [text], prompt="<think>\n" if inside else "")
        if form is PLAIN and text:
            assert found == [("text", text)]


def test_a_prompt_may_have_begun_the_thoughts() -> None:
    form = form_of("<tool_call></think>")
    assert parts(form, ["hm\n", "</think>\n\nYes."], prompt="assistant\n<think>\n") == [
        ("thought", "hm"),
        ("text", "Yes."),
    ]
    assert parts(form, ["hm"], prompt="<think>\n") == [("thought", "hm")]  # and it was cut
    assert parts(form, ["Yes."], prompt="<think>\n\n</think>\n\n") == [("text", "Yes.")]


def test_what_is_no_call_is_text() -> None:
    """Nothing is lost: markers, spaces, and what comes after."""
    form = form_of("<tool_call>")
    for broken in (
        "{",
        '{"name": 3}',
        "[1]",
        '{"name": "f", "arguments": "x"}',
        '{"arguments": {}}',
        "[" * 100_000,
        "",
    ):
        text = f"a <tool_call>{broken}</tool_call> b"
        assert parts(form, [text]) == [("text", text)], broken[:40]
    assert parts(form, ['a <tool_call>{"name": "f"']) == [("text", 'a <tool_call>{"name": "f"')]
    assert parts(form, ["a <tool_call>"], tools=None) == [("text", "a <tool_call>")]
    for family in ("qwen3-coder", "glm", "minimax-m2", "kimi-k2", "gemma4", "mistral", "lfm2"):
        template, _, _ = ANSWERS[family]
        calls = form_of(template).calls
        assert calls
        text = f"{calls[0]}nothing that is a call{calls[1]}"
        assert parts(form_of(template), [text]) == [("text", text)], family
    deep = "<|channel|>commentary to=find<|message|>" + "[" * 100_000
    assert parts(form_of("<|channel|><|start|>"), [deep]) == [("text", "[" * 100_000)]
    lfm2 = form_of("<|tool_call_start|>")
    evil = "<|tool_call_start|>[f(a=__import__('os').getcwd())]<|tool_call_end|>"
    assert parts(lfm2, [evil]) == [("text", evil)]  # read, and never run


def test_values_are_what_the_tool_says() -> None:
    """A string parameter stays one, whatever it looks like; what no tool declares is JSON where it can be."""
    form = form_of("<tool_call><function=")
    call = "<tool_call><function={}><parameter=text>{}</parameter></function></tool_call>"
    assert parts(form, [call.format("find", "[1]")]) == [("find", {"text": "[1]"})]
    assert parts(form, [call.format("other", "[1]")]) == [("other", {"text": [1]})]
    assert parts(form, [call.format("other", "\na\nb\n")]) == [("other", {"text": "a\nb"})]
    for tools in ("x", [1], [{}], [{"function": {"name": "find", "parameters": {"properties": {"text": 1}}}}]):
        assert parts(form, [call.format("find", "1")], tools=tools) == [("find", {"text": 1})]


def test_earlier_answers_as_templates_take_them() -> None:
    """Arguments as objects, for DeepSeek as text; thoughts by the template's own name."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"}
    (made,) = form_of("<tool_call>").messages([message])
    assert made["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert made["content"] == ""
    assert message["tool_calls"] == [call]
    (again,) = form_of("<｜tool▁calls▁begin｜>").messages([made])
    assert json.loads(again["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    (channels,) = form_of("<|channel|><|start|>").messages([message])
    assert channels["thinking"] == "hm"
    for odd in ("x", [], [1], [{"function": 1}], [{"function": {"name": "f", "arguments": "{"}}]):
        assert form_of("<tool_call>").messages([{"role": "assistant", "tool_calls": odd}])[0]["role"] == "assistant"


def test_ids_of_calls() -> None:
    """Nine letters and digits; Kimi K2's template writes them, so they have names and count through a conversation."""
    earlier = [{"role": "assistant", "tool_calls": [{}, {}]}, {"role": "tool"}, {"role": "user", "tool_calls": 3}]
    template, answer, _ = ANSWERS["kimi-k2"]
    text, thoughts, calls = Parts(form_of(template), "", earlier, TOOLS).take(answer, end=True)
    assert (text, thoughts) == ("Now.", "hm")
    assert [call["id"] for call in calls] == ["functions.find:2", "functions.stop:3"]
    template, answer, _ = ANSWERS["mistral"]
    parts = Parts(form_of(template), "", earlier, TOOLS)
    made = [*parts.take(answer[:60], end=False)[2], *parts.take(answer[60:], end=True)[2]]
    assert len({call["id"] for call in made}) == 2
    assert all(len(call["id"]) == 9 and call["id"].isalnum() for call in made)


def test_long_answers() -> None:
    """A long call in small pieces, one that never closes what it opens, and what may be the beginning of a marker."""
    form = form_of("<tool_call><function=")
    long = "<tool_call><function=find><parameter=text>" + "x" * 100_000 + "</parameter></function></tool_call>"
    for answer, wanted in (
        (long, [("find", {"text": "x" * 100_000})]),
        ("<tool_call>" + "<function=f><parameter=a>" * 5000, [("f", {})]),
        ("<" * 50_000, [("text", "<" * 50_000)]),
    ):
        assert parts(form, [answer[at : at + 100] for at in range(0, len(answer), 100)]) == wanted
