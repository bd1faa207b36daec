"""Chat templates: the text that transformers renders, in a sandbox, for `generate --chat` and served `messages`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from test_serve_service import Served, tensors
from transformers.utils.chat_template_utils import render_jinja_template
from typer.testing import CliRunner

from lynx_trt.artifact import MANIFEST, TOKENIZER, Artifact, record_files
from lynx_trt.artifact import read as read_artifact
from lynx_trt.calibration.text import cut, read_text
from lynx_trt.errors import ArtifactError, GenerationError, UsageError
from lynx_trt.generate import app, generate_text
from lynx_trt.runtime.chat import ChatTemplate, parse_messages, parse_options
from lynx_trt.runtime.text import Tokenizer
from lynx_trt.serving.settings import Settings
from lynx_trt.serving.start import _template

MESSAGES = [
    {"role": "system", "content": "Short & <b>clear</b>, s'il vous plaît."},
    {"role": "user", "content": "def add(a, b):"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# What published templates do, each of it in one of these.
TEMPLATES = {
    "roles": (
        "{% for message in messages %}\n"
        "    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}\n"
        "{% endfor %}\n"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "begins with a token": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set messages = messages[1:] %}{% endif %}[INST] {{ system }}\n\n{{ messages[0]['content'] }} [/INST]"
    ),
    "namespaces and loop controls": (
        "{%- set seen = namespace(count=0) -%}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% set seen.count = seen.count + 1 %}{{ loop.index0 }}{{ m.content }}{% if seen.count == 2 %}{% break %}"
        "{% endif %}{% endfor %}{{ seen.count }}{{ eos_token }}"
    ),
    "json and macros": (
        "{% macro show(m) %}{{ m | tojson }}{% endmacro %}{% for m in messages %}{{ show(m) }}\n{% endfor %}"
        "{{ messages | tojson(indent=2) }}{{ tools is none }}{{ documents is none }}"
    ),
    "an option": (
        "{{ messages[-1].content }}{% if enable_thinking is defined and enable_thinking is false %}<think></think>"
        "{% endif %}{{ undefined_thing }}"
    ),
    "marked for training": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "methods of texts": (
        "{{ messages[1].content.split('(')[0].strip() }}{{ messages[1]['content'].startswith('def') }}"
        "{% for key, value in messages[0].items() %}{{ key ~ value | length }}{% endfor %}{{ strftime_now('%%') }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_as_transformers_renders_it(name: str, options: dict[str, Any]) -> None:
    wanted, _ = render_jinja_template(
        conversations=[MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=True, **TOKENS, **options
    )
    assert ChatTemplate(TEMPLATES[name], TOKENS).render(MESSAGES, options) == wanted[0]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages.append(1) }}", "refuses these messages"),  # what it is given can't be changed
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),  # nor left
        ("{{ messages[7].content.x }}", "refuses these messages"),
        ("{% for i in range(10000000000) %}{% endfor %}", "refuses these messages"),
        ("{{ 1 / 0 }}", "refuses these messages"),
        ("{% include '/etc/passwd' %}", "refuses these messages"),
        ("{{ messages[0].content + 3 }}", "refuses these messages"),
    ],
)
def test_what_a_template_may_not_do(template: str, words: str) -> None:
    with pytest.raises(GenerationError) as caught:
        ChatTemplate(template, {}).render(MESSAGES)
    assert words in str(caught.value)


def test_no_template_at_all() -> None:
    with pytest.raises(ArtifactError, match="can't be read"):
        ChatTemplate("{% for %}", {})


def test_where_a_template_lies(tmp_path: Path) -> None:
    """A file of its own, then a processor's, then the tokenizer's config, of which there may be several by name."""
    assert ChatTemplate.find(tmp_path) is None
    config = {"bos_token": {"content": "<b>"}, "eos_token": None}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(config))
    assert ChatTemplate.find(tmp_path) is None
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ bos_token }}d{{ eos_token }}"}]
    path.write_text(json.dumps({**config, "chat_template": named}))
    assert _rendered(tmp_path) == "<b>d"
    path.write_text(json.dumps({**config, "chat_template": "{{ bos_token }}c"}))
    assert _rendered(tmp_path) == "<b>c"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ bos_token }}p"}))
    assert _rendered(tmp_path) == "<b>p"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}f")
    assert _rendered(tmp_path) == "<b>f"
    path.write_text("{")
    with pytest.raises(ArtifactError, match=r"tokenizer_config\.json can't be read as JSON"):
        ChatTemplate.find(tmp_path)


def _rendered(folder: Path) -> str:
    template = ChatTemplate.find(folder)
    assert template is not None
    return template.render(MESSAGES)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '["x"]', '[{"content": "x"}]', '[{"role": 3}]', "[" * 100_000])
def test_messages_that_are_none(text: str) -> None:
    with pytest.raises(GenerationError, match=r'it has to be JSON like .*"role": "user"'):
        parse_messages(text)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"messages": []}', '{"add_generation_prompt": false}'])
def test_options_that_are_none(text: str) -> None:
    with pytest.raises(GenerationError, match="the chat options"):
        parse_options(text)


@pytest.fixture(scope="module")
def talking(text_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The artifact with a template, as that of a chat model is built."""
    folder = tmp_path_factory.mktemp("chat") / "artifact"
    shutil.copytree(text_artifact.folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if short %}...{% endif %}assistant:"
    )
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: record.model_dump() for name, record in record_files(folder).items()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return read_artifact(folder)


class Script:
    """A stream of text that says a line, whatever tokens there are: one word a token, and then nothing."""

    def __init__(self, text: str) -> None:
        self.words = [word + " " for word in text.split(" ")]

    def push(self, _: int) -> str:
        return self.words.pop(0) if self.words else ""


def _invoke(artifact: Artifact, *options: str) -> Any:
    return CliRunner().invoke(app, [str(artifact.folder), "--max-new-tokens", "6", "--json", *options])


def test_generate(talking: Artifact, text_artifact: Artifact) -> None:
    """The rendered text and nothing else is continued, without what the tokenizer puts around texts."""
    sequences, _ = generate_text(talking, ["hi"], chat=True, system="be", chat_options={"short": 1}, max_new_tokens=6)
    tokenizer = Tokenizer(talking.path(TOKENIZER))
    assert sequences[0].prompt == tokenizer.encode("system: be\nuser: hi\n...assistant:", special=False)
    result = _invoke(talking, "--chat", "--system", "be", "--chat-options", '{"short": 1}', "--prompt", "hi")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["sequences"][0]
    assert found["prompt"] == "hi"
    assert found["tokens"] == sequences[0].tokens
    command = [str(talking.folder), "--max-new-tokens", "6", "--prompt", "hi"]
    plain = CliRunner().invoke(app, [*command, "--chat"])
    assert "user" not in plain.stdout  # the answer alone
    assert "which --chat puts around" not in plain.stderr
    assert "which --chat puts around" in CliRunner().invoke(app, command).stderr
    result = _invoke(text_artifact, "--chat", "--prompt", "hi")
    assert isinstance(result.exception, ArtifactError)
    assert "has no chat template" in str(result.exception)


def test_generate_tells_thoughts_from_text(talking: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is what is printed; where there is none, that is said."""
    template = ChatTemplate("{{ messages[0].content }} {# </think> #}", {})
    monkeypatch.setattr(ChatTemplate, "find", lambda _: template)
    for said, text, thoughts in (
        ("<think>hm, hm</think>\n\nYes. It is.", "Yes. It is. ", "hm, hm"),
        ("<think>hm, hm", "", "hm, hm"),
        ("Yes. It is.", "Yes. It is. ", ""),
    ):
        monkeypatch.setattr(Tokenizer, "stream", lambda *_, said=said: Script(said))
        found = json.loads(_invoke(talking, "--chat", "--prompt", "hi").stdout)["sequences"][0]
        assert (found["text"], found["thoughts"]) == (text, thoughts)
        command = [str(talking.folder), "--max-new-tokens", "6", "--prompt", "hi", "--chat"]
        plain = CliRunner().invoke(app, command)
        assert plain.stdout.strip() == text.strip()
        assert ("answer 1 ended within its thoughts" in plain.stderr) == (text == "")


@pytest.mark.parametrize("option", ["--system", "--chat-options"])
def test_options_of_chat_alone(option: str, text_artifact: Artifact) -> None:
    result = _invoke(text_artifact, option, "{}", "--prompt", "hi")
    assert "add --chat" in str(result.exception)


def test_served(talking: Artifact) -> None:
    served = Served(talking, Settings(slots=2, quality="max"))
    try:
        messages = json.dumps([{"role": "user", "content": "hi"}])
        reply = served.ask(messages=messages, chat_options='{"short": true}', max_tokens=6).wait()
        assert reply.error is None
        sequences, _ = generate_text(
            talking, ["hi"], chat=True, chat_options={"short": 1}, max_new_tokens=6, budget="8"
        )
        assert int(reply.responses[-1]["prompt_tokens"][0]) == len(sequences[0].prompt)
        for values, words in (
            ({"messages": messages, "text_input": "x"}, "give one of them"),
            ({"messages": "hi"}, "messages can't be read"),
            ({"messages": messages, "chat_options": "[]"}, "the chat options are []"),
            ({"text_input": "x", "chat_options": "{}"}, "chat_options is for messages"),
            ({"text_input": "x", "parts": True}, "parts is for messages"),
            ({"messages": " " * 10_000_000}, "10000000 characters"),
        ):
            refused = served.ask(**values)
            assert refused.error is not None
            assert words in refused.error[1]
    finally:
        served.service.close()
    with pytest.raises(GenerationError, match="this model has none"):
        replace(served.parser, template=None).read(tensors(messages=messages))


TALK = '<think>hm</think>Let me see. <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize("stream", [True, False])
def test_parts_of_a_served_answer(talking: Artifact, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """Thoughts, text and calls in outputs of their own; without `parts` all of it is text."""
    served = Served(talking, Settings(slots=2, quality="max", stream_interval=0.0))
    try:
        template = ChatTemplate("{{ messages[0].content }} {# </think> <tool_call> #}", {})
        object.__setattr__(served.parser, "template", template)
        kept: list[tuple[str, ...]] = []
        monkeypatch.setattr(Tokenizer, "stream", lambda _, shown=(): (kept.append(tuple(shown)), Script(TALK))[1])
        asked = {
            "messages": json.dumps([{"role": "user", "content": "hi"}]),
            "chat_options": '{"tools": [{"type": "function", "function": {"name": "f"}}]}',
            "max_tokens": 20,
            "stream": stream,
        }
        reply = served.ask(**asked, parts=True).wait()
        assert reply.error is None
        thoughts = b"".join(response["thought_output"][0] for response in reply.responses)
        calls = [json.loads(call) for response in reply.responses for call in response.get("tool_calls", ())]
        assert (thoughts, reply.text) == (b"hm", "Let me see.")
        assert [(len(call["id"]), call["name"], call["arguments"]) for call in calls] == [(9, "f", '{"a": 1}')]
        plain = served.ask(**asked).wait()
        assert plain.text == TALK + " "
        assert "thought_output" not in plain.responses[-1]
        assert kept == [("<think>", "</think>", "<tool_call>", "</tool_call>"), ()]
    finally:
        served.service.close()


def test_an_answer_that_can_not_be_told_apart_ends(talking: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect in that ends one answer with an error, and its client doesn't wait for ever."""
    served = Served(talking, Settings(slots=2, quality="max"))
    try:
        asked = {"messages": json.dumps([{"role": "user", "content": "hi"}]), "max_tokens": 5}
        with monkeypatch.context() as broken:
            broken.setattr("lynx_trt.runtime.answers.Parts.take", lambda *_, **__: 1 / 0)
            reply = served.ask(**asked, parts=True).wait()
        assert reply.error == ("internal", "this request failed: see the server's log")
        assert served.ask(**asked).wait().error is None
    finally:
        served.service.close()


def test_markers_that_are_special_tokens(talking: Artifact, tmp_path: Path) -> None:
    """Of special tokens only those that are asked for are text."""
    found = json.loads(talking.path(TOKENIZER).read_text())
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    number = 1 + max(token["id"] for token in found["added_tokens"]) if found["added_tokens"] else 256
    found["added_tokens"] += [
        {"id": number + at, "content": content, **special} for at, content in enumerate(("<|call|>", "<|end|>"))
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    ids = tokenizer.encode("a<|call|>b<|end|>c", special=False)
    texts = ["".join(map(tokenizer.stream(shown).push, ids)) for shown in ((), ("<|call|>",))]
    assert texts == ["abc", "a<|call|>bc"]


CHATS = [[{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "answer"}] for n in range(3)]


def test_chats_to_calibrate_on(tmp_path: Path) -> None:
    """A chat a line, whole, and no more special tokens than the template has."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(TOKENS))
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}|{% endfor %}{{ '>' * add_generation_prompt }}"
    )
    path = tmp_path / "chats.jsonl"
    lines = [json.dumps({"messages": CHATS[0], "id": 7}), "", json.dumps(CHATS[1]), json.dumps({"messages": CHATS[2]})]
    path.write_text("\n".join(lines))
    plain = tmp_path / "plain.txt"
    plain.write_text("text")
    text = read_text([path, plain], artifact=tmp_path)
    assert text.texts == (tuple(f"<s>question {n}|answer|" for n in range(3)), "text")
    assert text.nbytes == 3 * len("<s>question 0|answer|") + 4

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("|", "isolated")
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    drawn = cut(text, tokenizer, separator=None, count=1, length=3 * 5 + 2, seed=0)
    assert (drawn.ids == 0).sum() == 4  # one of each chat, and what the tokenizer puts before a text
    assert drawn.nbytes.sum() == text.nbytes


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 of"),
        ('{"text": "x"}', "messages is no list"),
        ('{"messages": [{"content": "x"}]}', "has no role"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "no system here"),
        ("[" * 100_000, "line 2 of"),
    ],
)
def test_lines_that_are_no_chats(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages if m.role == 'system' %}{{ raise_exception('no system here') }}{% endfor %}"
    )
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(CHATS[0]) + "\n" + line)
    with pytest.raises(UsageError) as caught:
        read_text([path], artifact=tmp_path)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500
    with pytest.raises(UsageError, match="the artifact has no chat template"):
        read_text([path])


def test_a_line_ends_at_its_end(tmp_path: Path) -> None:
    """JSON may have what Python takes for ends of lines within a text."""
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    path = tmp_path / "chats.jsonl"
    content = "a\u2028b\x85c\x0bd"
    path.write_text(json.dumps([{"role": "user", "content": content}], ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_text([path], artifact=tmp_path).texts == ((content,),)


def test_a_broken_template_keeps_nothing_but_chats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text is served without it, and calibrated on."""
    (tmp_path / "chat_template.jinja").write_text("{% unknown %}")
    assert _template(tmp_path) is None
    assert "the chat template can't be read" in capsys.readouterr().err
    plain = tmp_path / "plain.txt"
    plain.write_text("text")
    assert read_text([plain], artifact=tmp_path).texts == ("text",)
