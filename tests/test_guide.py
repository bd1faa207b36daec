"""Answers of a form that is asked for: whatever a model would write, they have it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_answers import ANSWERS
from test_serve_service import Served

from lynx_trt.artifact import TOKENIZER, Artifact
from lynx_trt.errors import GenerationError
from lynx_trt.runtime.answers import form_of
from lynx_trt.runtime.chat import ChatTemplate
from lynx_trt.runtime.guide import Guides
from lynx_trt.serving.settings import Settings

pytest.importorskip("llguidance", reason='needs the grammars: pip install "lynx-trt[serve]"')

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served(text_artifact: Artifact) -> Iterator[Served]:
    """A model of bytes whose weights are random, so that it has no form by itself."""
    made = Served(text_artifact, Settings(slots=4, quality="max"))
    yield made
    made.service.close()


def answers(served: Served, guide: dict[str, Any], **settings: Any) -> list[tuple[str, str]]:
    """What it writes, greedy and at random, each with how it ended."""
    asked = {"text_input": "x", "max_tokens": 60, "guide": json.dumps(guide), **settings}
    replies = [served.ask(**asked, seed=seed, temperature=1.5 * (seed > 0)) for seed in range(6)]
    for reply in replies:
        assert reply.wait().error is None
    return [(reply.text, reply.responses[-1]["finish_reason"][0].decode()) for reply in replies]


def test_json_schema(served: Served) -> None:
    found = answers(served, {"json_schema": SCHEMA})
    for text, finish in found:
        if finish == "length":  # white space has an end, and so has everything else
            assert text.startswith("{")
            continue
        assert finish == "end"
        value = json.loads(text)
        assert set(value) == {"n", "ok"}
        assert isinstance(value["n"], int)
        assert value["n"] <= 99
        assert isinstance(value["ok"], bool)
    assert len([finish for _, finish in found if finish == "end"]) >= 2
    assert len({text for text, _ in found}) > 2


def test_regex_and_choice(served: Served) -> None:
    for text, finish in answers(served, {"regex": r"[a-c]{2}/[0-9]+\.txt"}, max_tokens=40):
        assert re.fullmatch(r"[a-c]{2}/[0-9]+(\.(t(xt?)?)?)?" if finish == "length" else r"[a-c]{2}/[0-9]+\.txt", text)
    found = answers(served, {"choice": ["yes", "no way", 'a "quoted" żółw']})
    assert {text for text, _ in found} <= {"yes", "no way", 'a "quoted" żółw'}
    assert {finish for _, finish in found} == {"end"}


def test_others_are_free_in_the_same_batch(served: Served) -> None:
    alone = served.ask(text_input="x", max_tokens=30).wait().text
    guided = [served.ask(text_input="x", max_tokens=30, guide='{"regex": "[ab]{20}"}') for _ in range(2)]
    free = served.ask(text_input="x", max_tokens=30)
    assert free.wait().text == alone
    assert all(re.fullmatch("[ab]{20}", reply.wait().text) for reply in guided)


MISTAKES = [
    ({"guide": "{"}, "the guide can't be read"),
    ({"guide": "[]"}, "the guide is []; it has to be a JSON object with one of json_schema, regex, choice"),
    ({"guide": '{"json_schema": {}, "regex": "x"}'}, "it has to be a JSON object with one of"),
    ({"guide": '{"grammar": "x"}'}, "it has to be a JSON object with one of"),
    ({"guide": '{"choice": []}'}, "the guide's choice is [], which is none"),
    ({"guide": '{"choice": ["a", 3]}'}, "which is none"),
    ({"guide": '{"regex": ""}'}, "the guide's regex is"),
    ({"guide": '{"regex": "("}'}, "the guide can't be followed"),
    ({"guide": '{"json_schema": 3}'}, "the guide's json_schema is 3"),
    ({"guide": '{"json_schema": {"type": 3}}'}, "the guide can't be followed: "),
    ({"guide": '{"json_schema": {"$ref": "file:///etc/passwd"}}'}, "the guide can't be followed"),
    ({"guide": '{"json_schema": {"not": {}}}'}, "the guide can't be followed"),
    ({"guide": '{"choice": ["a"]}', "ignore_eos": True}, "there are guide and ignore_eos"),
    ({"guide": " " * (1 << 21)}, "the guide has 2097152 characters"),
    ({"guide": '{"json_schema": ' + '{"not":' * 2000 + "{}" + "}" * 2001}, "the guide"),
]


@pytest.mark.parametrize(("values", "words"), MISTAKES, ids=[str(at) for at in range(len(MISTAKES))])
def test_mistakes(served: Served, values: dict[str, Any], words: str) -> None:
    reply = served.ask(text_input="x", **values)
    assert reply.error is not None
    assert reply.error[0] == "invalid"
    assert words in reply.error[1]
    assert len(reply.error[1]) < 400


def test_a_guide_that_gives_up_ends_its_own_answer(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from lynx_trt.runtime.guide import Guide

    monkeypatch.setattr(Guide, "problem", property(lambda _: "too complex"))
    free = served.ask(text_input="x", max_tokens=20)
    reply = served.ask(text_input="x", max_tokens=20, guide='{"choice": ["a"]}').wait()
    assert reply.error == ("internal", "this request failed: the guide can't go on: too complex")
    assert free.wait().error is None


# --- Thoughts come first.


def tokenizer_with(tokens: list[str], artifact: Artifact, folder: Path) -> Path:
    found = json.loads(artifact.path(TOKENIZER).read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    found["added_tokens"] = [{"id": 256 + at, "content": token, **flags} for at, token in enumerate(tokens)]
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(found))
    return path


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "gpt-oss", "gemma4", "mistral", "kimi-k2", "hy-v3", "plain"])
def test_thoughts_are_free(family: str, added: bool, text_artifact: Artifact, tmp_path: Path) -> None:
    """In the model's own form, where its markers are tokens and where they are text; or the answer comes at once."""
    form = form_of(ANSWERS[family][0])
    path = tokenizer_with(list(form.markers) if added else [], text_artifact, tmp_path)
    guides = Guides(path, 256 + len(form.markers), [])
    thought = {
        "qwen3": "<think>hm { [</think>\n\n",
        "gpt-oss": "<|channel|>analysis<|message|>hm { [<|end|><|start|>assistant",
        "gemma4": "<|channel>thought\nhm { [<channel|>",
        "mistral": "[THINK]hm { [[/THINK]",
        "kimi-k2": "<think>hm { [</think>",
        "hy-v3": "<think:opensource>hm { [</think:opensource>",
        "plain": "",
    }[family]
    final = "<|channel|>final<|message|>" if family == "gpt-oss" else ""
    for answer in (thought + final, final):
        guide = guides.make('{"choice": ["yes"]}', form)
        ids = guides._tokenizer.tokenize_str(answer + "yes", parse_special=True)
        for at, token in enumerate(ids):
            assert guide.allowed()[token], (answer, at)
            guide.take(token)
        assert guide.ended
    if family == "qwen3":  # the prompt has opened them
        guide = guides.make('{"choice": ["yes"]}', form, prompt="assistant\n<think>\n")
        for token in guides._tokenizer.tokenize_str("hm { [</think>\n\nyes", parse_special=True):
            assert guide.allowed()[token]
            guide.take(token)
        assert guide.ended


def test_a_served_chat_may_think_first(served: Served) -> None:
    """This model's thoughts never end, so that there is no answer; where none may begin, there is nothing else."""
    thinking = "{{ messages[0].content }}<think>{# </think> #}"
    asked = {"messages": '[{"role": "user", "content": "hi"}]', "guide": '{"choice": ["yes"]}', "parts": True}
    for source, thoughts in ((thinking, True), ("{{ messages[0].content }}", False)):
        object.__setattr__(served.parser, "template", ChatTemplate(source, {}))
        reply = served.ask(**asked, max_tokens=20).wait()
        assert reply.error is None
        assert reply.text == ("" if thoughts else "yes")
        assert bool(b"".join(r["thought_output"][0] for r in reply.responses)) == thoughts
    object.__setattr__(served.parser, "template", None)


# --- Tokenizers.


def test_tokenizers(text_artifact: Artifact, tmp_path: Path) -> None:
    """One with more tokens than the model never gives any of them; one that is of no known kind is told."""
    path = tokenizer_with(["<extra>"], text_artifact, tmp_path)
    guide = Guides(path, 200, []).make('{"regex": ".*"}')
    assert len(guide.allowed()) == 200
    words = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}
    words |= {"added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "decoder": None, "normalizer": None}
    path.write_text(json.dumps({**words, "post_processor": None, "truncation": None, "padding": None}))
    guides = Guides(path, 2, [])
    guides.prepare()  # no trouble of those who ask for none
    with pytest.raises(GenerationError, match="answers of this model's tokenizer can't be guided: "):
        guides.make('{"regex": ".*"}')


def test_the_tokenizer_is_read_before_it_is_asked_for(text_artifact: Artifact, tmp_path: Path) -> None:
    path = tokenizer_with([], text_artifact, tmp_path)
    guides = Guides(path, 256, [])
    guides.prepare()
    path.unlink()
    assert guides.make('{"choice": ["a"]}').allowed().any()


def test_a_model_without_the_library(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    guides = Guides(Path("nothing"), 10, [])
    with pytest.raises(GenerationError, match=r'guides need llguidance: pip install "lynx-trt\[serve\]"'):
        guides.make('{"choice": ["a"]}')
