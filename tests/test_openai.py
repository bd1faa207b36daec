"""OpenAI's API in front of the real server, asked by OpenAI's own client: answers, streams, mistakes, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import psutil
import pytest
from typer.testing import CliRunner

from lynx_trt.artifact import TOKENIZER, Artifact
from lynx_trt.errors import ServingError, UsageError
from lynx_trt.runtime.guide import Guides
from lynx_trt.runtime.text import Tokenizer

openai = pytest.importorskip("openai", reason='needs the client: pip install "lynx-trt[test]"')
pytest.importorskip("aiohttp", reason='needs its server: pip install "lynx-trt[serve]"')

from aiohttp.test_utils import TestClient, TestServer  # noqa: E402
from test_serve_server import Server, alone, free_ports, metric, prepared  # noqa: E402

from lynx_trt.openai import app as command  # noqa: E402
from lynx_trt.openai_api import app  # noqa: E402
from lynx_trt.openai_api.errors import ApiError  # noqa: E402
from lynx_trt.openai_api.replies import Form  # noqa: E402
from lynx_trt.openai_api.requests import ALL_TOKENS, ChatBody, CompletionBody, Sampling  # noqa: E402
from lynx_trt.openai_api.upstream import End, Model, Piece, whole  # noqa: E402
from lynx_trt.serve import app as serve_command  # noqa: E402

__all__ = ["alone", "prepared"]  # fixtures

PROMPT = "def add(a, b):\n"
MESSAGES = [{"role": "user", "content": "hi"}]
Text = Callable[[str, int], str]


class Front:
    """A served model with OpenAI's API in front, and its client."""

    def __init__(self, artifact: Artifact, folder: Any) -> None:
        (self.port,) = free_ports(1)
        self.server = Server(artifact, folder, "--openai-port", str(self.port)).wait()
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="any", max_retries=0)
        end = time.monotonic() + 20
        while self.ask("GET", "/health")[0] != 200:
            assert time.monotonic() < end, self.server.log.read_text()[-3000:]
            time.sleep(0.1)

    def ask(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {"Content-Type": kind})
            response = connection.getresponse()
            return response.status, response.read().decode()
        except ConnectionError:
            return 0, ""
        finally:
            connection.close()

    def process(self) -> psutil.Process:
        return next(each for each in self.server.children() if "lynx_trt.openai" in each.cmdline())


@pytest.fixture(scope="module")
def front(long_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    started = Front(long_artifact, tmp_path_factory.mktemp("openai"))
    try:
        yield started
    finally:
        started.server.end(signal.SIGKILL)


# --- What a client gets.


def complete(front: Front, prompt: Any = PROMPT, **settings: Any) -> Any:
    greedy = {"temperature": 0, "max_tokens": 30, "extra_body": {"quality": "max"}}
    return front.client.completions.create(model="tiny", prompt=prompt, **{**greedy, **settings})


def chat(front: Front, messages: Any = MESSAGES, **settings: Any) -> Any:
    greedy = {"temperature": 0, "max_completion_tokens": 30, "extra_body": {"quality": "max"}}
    return front.client.chat.completions.create(model="tiny", messages=messages, **{**greedy, **settings})


def test_usage_says_what_the_cache_had(front: Front) -> None:
    """What an earlier prompt began with, all but the last token, which has to be computed."""
    prompt = "the same instructions at the beginning of each prompt"
    assert [complete(front, prompt).usage.prompt_tokens_details.cached_tokens for _ in range(2)] == [0, len(prompt) - 1]
    two = complete(front, [prompt, prompt + " and more"], n=2)
    assert two.usage.prompt_tokens_details.cached_tokens >= 2 * len(prompt) - 2


def test_completion(front: Front, alone: Text) -> None:
    answer = complete(front)
    (choice,) = answer.choices
    assert choice.text == alone(PROMPT, 30)
    assert (choice.finish_reason, choice.index) == ("length", 0)
    tokens = len(PROMPT.encode())
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        tokens, 30, tokens + 30
    )  # fmt: skip
    assert choice.lynx["output_tokens"] == 30
    assert answer.usage.prompt_tokens_details.cached_tokens == choice.lynx["cached_tokens"] < tokens
    assert choice.lynx["active_experts"] == [2.0, 2.0]
    assert complete(front, max_tokens=openai.NOT_GIVEN).usage.completion_tokens == 16
    stopped = complete(front, stop=choice.text[5:8]).choices[0]
    assert stopped.text == choice.text[: choice.text.index(choice.text[5:8])]
    assert stopped.finish_reason == "stop"


def test_completion_in_pieces(front: Front, alone: Text) -> None:
    chunks = list(complete(front, max_tokens=400, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == alone(PROMPT, 400)
    assert len(chunks) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 400
    assert all(chunk.usage is None for chunk in complete(front, stream=True))


def test_chat(front: Front, alone: Text) -> None:
    """The model's template is around the messages; text in parts is text."""
    answer = chat(front)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == alone("user:hi>", 30)
    assert answer.usage.prompt_tokens == len("user:hi>")
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    assert chat(front, parts).choices[0].message.content == alone("user:h\ni>", 30)
    chunks = list(chat(front, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    # Where nobody says how long, it goes on to the model's end.
    whole = chat(front, max_completion_tokens=openai.NOT_GIVEN)
    assert whole.usage.total_tokens == 600


def test_thoughts_are_apart(front: Front, alone: Text) -> None:
    """The prompt opens them, and this model never closes them."""
    thinking = {"quality": "max", "chat_template_kwargs": {"think": True}}
    said = alone("user:hi><think>", 30).rstrip()
    message = chat(front, extra_body=thinking).choices[0].message
    assert message.content == ""
    assert message.reasoning_content.rstrip() == said.lstrip()
    chunks = list(chat(front, stream=True, extra_body=thinking))
    assert "".join(getattr(c.choices[0].delta, "reasoning_content", "") for c in chunks) == message.reasoning_content
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_answers_of_a_form(front: Front) -> None:
    """This model would write no JSON by itself."""
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}
    ended = 0
    for choice in chat(front, response_format=form, temperature=1.0, seed=1, n=8, max_completion_tokens=400).choices:
        if getattr(choice.message, "reasoning_content", ""):  # it may think before, and never stops
            assert (choice.finish_reason, choice.message.content) == ("length", "")
            continue
        assert choice.finish_reason == "stop"
        assert isinstance(json.loads(choice.message.content)["ok"], bool)
        ended += 1
    assert ended
    chunks = list(complete(front, stream=True, max_tokens=400, extra_body={"structured_outputs": {"json": schema}}))
    assert isinstance(json.loads("".join(chunk.choices[0].text for chunk in chunks))["ok"], bool)
    chosen = complete(front, extra_body={"structured_outputs": {"choice": ["left", "right"]}})
    assert chosen.choices[0].text in ("left", "right")
    message = chat(front, response_format={"type": "json_object"}).choices[0].message
    assert message.content.startswith("{") or message.reasoning_content


def test_tools_that_have_to_be_called(front: Front) -> None:
    """One by its name, or any; as a stream and as a whole. This model would call none by itself."""
    names = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": names}} for name in ("left", "right")]
    plain = {"tools": tools, "max_completion_tokens": 500, "temperature": 1.0, "n": 4, "seed": 3}
    for choice, wanted in (
        ({"type": "function", "function": {"name": "right"}}, {"right"}),
        ("required", {"left", "right"}),
    ):
        called = 0
        for answer in chat(front, tool_choice=choice, **plain).choices:
            if getattr(answer.message, "reasoning_content", ""):  # thoughts may come first, and never end here
                continue
            (call,) = answer.message.tool_calls
            assert call.function.name in wanted
            assert isinstance(json.loads(call.function.arguments)["ok"], bool)
            assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
            called += 1
        chunks = list(chat(front, tool_choice=choice, stream=True, **plain))
        streamed = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        assert called == len(streamed) > 0
        assert {call.function.name for call in streamed} <= wanted
    cut = chat(front, tool_choice="required", **{**plain, "max_completion_tokens": 3, "n": 1}).choices[0]
    assert (cut.finish_reason, cut.message.tool_calls) == ("length", None)


def test_several_answers(front: Front) -> None:
    """Each prompt's in a row; the same seed gives the same ones, none gives others each time."""
    ids = Tokenizer(front.server.repository / "tiny" / "1" / "artifact" / TOKENIZER).encode("import")
    prompts = [complete(front, prompt).choices[0].text for prompt in (PROMPT, "import")]
    assert [choice.text for choice in complete(front, [PROMPT, "import"]).choices] == prompts
    assert complete(front, ids).choices[0].text == complete(front, [ids]).choices[0].text == prompts[1]
    warm = {"temperature": 1.0, "n": 2, "max_tokens": 20}
    seeded = [complete(front, [PROMPT, "import"], seed=7, **warm) for _ in range(2)]
    texts = [[choice.text for choice in answer.choices] for answer in seeded]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 4
    assert seeded[0].usage.prompt_tokens == len(PROMPT) + len("import")
    assert seeded[0].usage.completion_tokens == 80
    assert complete(front, **warm).choices[0].text != complete(front, **warm).choices[0].text
    chunks = list(complete(front, [PROMPT, "import"], seed=7, stream=True, **warm))
    streamed = ["".join(c.choices[0].text for c in chunks if c.choices[0].index == index) for index in range(4)]
    assert streamed == texts[0]


def test_load_generators(front: Front) -> None:
    """They ask for answers of a length, and look at what the model takes."""
    exact = {"quality": "max", "ignore_eos": True, "min_tokens": 25}
    assert complete(front, max_tokens=25, extra_body=exact).usage.completion_tokens == 25
    (model,) = front.client.models.list().data
    assert (model.id, model.max_model_len) == ("tiny", 600)
    assert front.client.models.retrieve("tiny").id == "tiny"


def test_the_dial(front: Front) -> None:
    """A quality is a field of a request: this artifact's budget is 2 experts a layer."""
    varied = {"max_tokens": 60, "n": 8, "temperature": 1.0, "seed": 1}
    fast, full = (complete(front, extra_body={"quality": quality}, **varied) for quality in ("fast", "max"))
    assert fast.choices[0].lynx["active_experts"][0] < full.choices[0].lynx["active_experts"][0]
    assert complete(front, extra_body={"quality": 0.5}).choices[0].text


# --- What it can't break.

MISTAKES: list[tuple[str, Any, int, str]] = [
    ("completions", b"{", 400, "can't be read as JSON"),
    ("completions", b"[" * 100_000, 400, "can't be read as JSON"),
    ("completions", b"[]", 400, "no JSON object"),
    ("completions", {"prompt": "x"}, 400, "model is missing"),
    ("completions", {"model": "tiny"}, 400, "prompt is missing"),
    ("completions", {"model": "gpt-5", "prompt": "x"}, 404, "there is no model 'gpt-5' here; it is 'tiny'"),
    ("completions", {"model": "tiny", "prompt": ""}, 400, "the prompt is empty"),
    ("completions", {"model": "tiny", "prompt": []}, 400, "the prompt is an empty list"),
    ("completions", {"model": "tiny", "prompt": [[]]}, 400, "the prompt is empty"),
    ("completions", {"model": "tiny", "prompt": [1 << 40]}, 400, "input_ids is 1099511627776, which is out of"),
    ("completions", {"model": "tiny", "prompt": [999]}, 400, "the prompt has the token 999"),
    ("completions", {"model": "tiny", "prompt": "x" * 5000}, 400, "the prompt has 5000"),
    ("completions", {"model": "tiny", "prompt": "x", "temperature": "hot"}, 400, 'temperature is "hot": input should'),
    ("completions", {"model": "tiny", "prompt": "x", "temperature": -1}, 400, "the temperature is -1"),
    ("completions", {"model": "tiny", "prompt": "x", "max_tokens": 0}, 400, "max_tokens is 0"),
    ("completions", {"model": "tiny", "prompt": "x", "max_tokens": 1 << 40}, 400, "max_tokens is 1099511627776"),
    ("completions", {"model": "tiny", "prompt": "x", "n": 0}, 400, "n is 0: input should be greater"),
    ("completions", {"model": "tiny", "prompt": ["x"] * 100, "n": 2}, 400, "100 prompts of 2 answers are more than"),
    ("completions", {"model": "tiny", "prompt": "x", "temprature": 1}, 400, "'temprature' is unknown; leave it out"),
    ("completions", {"model": "tiny", "prompt": "x", "logprobs": 3}, 400, "logprobs is not supported; leave it out"),
    ("completions", {"model": "tiny", "prompt": "x", "min_tokens": 3}, 400, "min_tokens is supported with ignore_eos"),
    ("completions", {"model": "tiny", "prompt": "x", "quality": "best"}, 400, "quality is 'best'"),
    ("completions", {"model": "tiny", "prompt": "x", "stream": True, "stop": [""]}, 400, "stop text has 0 characters"),
    ("chat/completions", {"model": "tiny", "messages": []}, 400, "messages is no list of one or more"),
    ("chat/completions", {"model": "tiny", "messages": [{"content": "x"}]}, 400, "which has no role"),
    ("chat/completions", {"model": "tiny", "messages": "hi"}, 400, 'messages is "hi": input should be a valid list'),
    ("chat/completions", {"model": "tiny", "messages": MESSAGES, "functions": [{}]}, 400, "functions is not supported"),
    (
        "chat/completions",
        {"model": "tiny", "messages": MESSAGES, "tool_choice": "required"},
        400,
        "tool_choice is 'required', and there are no tools",
    ),
    (
        "chat/completions",
        {"model": "tiny", "messages": MESSAGES, "response_format": {"type": "xml"}},
        400,
        'response_format is {"type": "xml"}; it is text, json_object or json_schema',
    ),
    (
        "chat/completions",
        {"model": "tiny", "messages": MESSAGES, "structured_outputs": {"grammar": "x"}},
        400,
        'structured_outputs is {"grammar": "x"}; it has one of json, regex, choice',
    ),
    (
        "chat/completions",
        {
            "model": "tiny",
            "messages": MESSAGES,
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}},
        },
        400,
        "the guide can't be followed: ",
    ),
    (
        "chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "a message has a part of type 'image_url'; this model takes text alone",
    ),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), MISTAKES, ids=[f"{m[0]}-{m[3]}" for m in MISTAKES])
def test_mistakes(front: Front, path: str, body: Any, status: int, words: str) -> None:
    """One sentence in OpenAI's form, with the value, whether whole or streamed."""
    found, text = front.ask("POST", f"/v1/{path}", body if isinstance(body, bytes) else json.dumps(body).encode())
    error = json.loads(text)["error"]
    assert (found, error["type"]) == (status, "invalid_request_error")
    assert words in error["message"]
    assert len(error["message"]) < 400


def test_other_paths_and_bodies(front: Front) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/v1/models/x", 404),
    ):
        found, text = front.ask(method, path)
        assert found == status
        assert json.loads(text)["error"]["message"]
    status, text = front.ask("POST", "/v1/completions", b'{"model": "tiny", "prompt": "x"}', kind="text/plain")
    assert (status, "send application/json" in text) == (415, True)
    status, text = front.ask("POST", "/v1/completions", b" " * (1 << 25) + b"{}")
    assert (status, "more than 33554432 bytes" in text) == (413, True)


def test_a_full_queue_is_for_later(front: Front) -> None:
    """16 slots and 64 places: with 100 answers some are refused, and then none is left of the others."""
    with pytest.raises(openai.InternalServerError, match="the queue is full") as caught:
        complete(front, n=100, max_tokens=500)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"
    front.server.until("lynx_running", 0)
    front.server.until("lynx_waiting", 0)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_its_slots(front: Front, streamed: bool) -> None:
    gone = 'lynx_requests_total{finish="cancelled"'
    before = metric(front.server.target, gone)
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=30)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 580, "n": 64, "stream": streamed}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    time.sleep(0.3)  # of the seconds that they take
    connection.sock.close()  # type: ignore[union-attr]
    front.server.until(gone, at_least=before + 1)
    front.server.until("lynx_running", 0)
    front.server.until("lynx_waiting", 0)


# --- In front of other servers, and of none.


@contextlib.contextmanager
def in_front_of(server: str, model: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """The command of its own: the port that it listens on, and its process."""
    (port,) = free_ports(1)
    words = [sys.executable, "-m", "lynx_trt.openai", model, "--server", server, "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"OpenAI's API at http://127.0.0.1:{port}/v1 for {model}\n"
        yield port, process
    finally:
        process.kill()
        process.wait()


def refusal(port: int) -> str:
    """What it says to a client that doesn't try again by itself, once it listens."""
    end = time.monotonic() + 20
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            break
        assert time.monotonic() < end
        time.sleep(0.05)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
    with pytest.raises(openai.InternalServerError) as caught:
        client.models.list()
    assert caught.value.status_code == 503
    return str(caught.value.body["message"])


def test_another_model(front: Front) -> None:
    with in_front_of(front.server.http, "large") as (port, _):
        assert f"the server at {front.server.http} has no model large: " in refusal(port)


def test_it_ends_with_the_server(front: Front) -> None:
    """On SIGTERM what is in flight is answered first, and no connection of the front's keeps the server after that."""
    process = front.process()
    stream = complete(front, max_tokens=580, n=16, stream=True, extra_body={"ignore_eos": True})
    pieces = [next(iter(stream))]
    started = time.monotonic()
    os.kill(front.server.pid, signal.SIGTERM)
    pieces += list(stream)
    assert sum(piece.choices[0].finish_reason == "length" for piece in pieces) == 16
    front.client.close()
    front.server.process.wait(25)
    assert time.monotonic() - started < 25  # of the 30 that it would wait
    process.wait(10)
    assert front.ask("GET", "/health")[0] == 0


class Calling:
    """A server's model that calls two tools, one after the other."""

    model = "tiny"

    def __init__(self, *_: str) -> None:
        pass

    async def about(self) -> Model:
        return Model(Sampling(), 10)

    async def answer(self, _: Any) -> AsyncIterator[Piece]:
        for name in ("find", "stop"):
            yield Piece("", None, "", (json.dumps({"id": "1", "name": name, "arguments": "{}"}),))
        yield Piece("", End("end", 5, 9, 0.0, 0.1, 0.01, [2.0]))

    async def close(self) -> None:
        pass


def test_one_call_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "Upstream", Calling)

    async def ask(**more: Any) -> list[str]:
        async with TestClient(TestServer(app.make_app("", "tiny"))) as client:
            response = await client.post(
                "/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "tools": [{"type": "x"}], **more}
            )
            (choice,) = (await response.json())["choices"]
            assert choice["finish_reason"] == "tool_calls"
            return [call["function"]["name"] for call in choice["message"]["tool_calls"]]

    assert asyncio.run(ask()) == ["find", "stop"]
    assert asyncio.run(ask(parallel_tool_calls=False)) == ["find"]


class Broken:
    """A server's model whose answers begin and then fail: with a defect, or because the server went away."""

    model = "tiny"
    errors: ClassVar[list[Exception]] = []

    def __init__(self, *_: str) -> None:
        pass

    async def about(self) -> Model:
        return Model(Sampling(), 10)

    async def answer(self, _: Any) -> AsyncIterator[Piece]:
        yield Piece("so it beg")
        raise self.errors[0]

    async def close(self) -> None:
        pass


def test_answers_that_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream ends with the error in it, anything else is the error alone; only a defect is in the log."""
    logged: list[str] = []
    monkeypatch.setattr(app, "Upstream", Broken)
    monkeypatch.setattr(app._log, "error", lambda _, exc_info: logged.append(str(exc_info)))

    async def ask(stream: bool) -> tuple[int, str]:
        async with TestClient(TestServer(app.make_app("", "tiny"))) as client:
            body = {"model": "tiny", "prompt": "x", "stream": stream}
            response = await client.post("/v1/completions", json=body)
            return response.status, await response.text()

    for error, words in ((ValueError("secret"), "see the log"), (ApiError(503, "the server is gone"), "is gone")):
        Broken.errors[:] = [error]
        status, text = asyncio.run(ask(stream=True))
        events = text.strip().split("\n\n")
        assert status == 200
        assert "so it beg" in events[0]
        assert words in json.loads(events[1].removeprefix("data: "))["error"]["message"]
        assert events[2:] == ["data: [DONE]"]
        status, text = asyncio.run(ask(stream=False))
        assert status == (500 if isinstance(error, ValueError) else 503)
        assert words in json.loads(text)["error"]["message"]
        assert "secret" not in text
    assert logged == ["secret"] * 2


def test_no_server_to_ask() -> None:
    with in_front_of("127.0.0.1:9", "tiny") as (port, process):
        assert refusal(port) == "nothing answers at 127.0.0.1:9: is the server up?"
        taken = CliRunner().invoke(command, ["tiny", "--port", str(port)])
        assert isinstance(taken.exception, ServingError)
        assert f"can't listen on 127.0.0.1:{port}" in str(taken.exception)
        assert "(--port)" in str(taken.exception)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_options_that_do_not_go_together() -> None:
    refused = CliRunner().invoke(serve_command, ["anything", "--openai-port", "9000"])
    assert isinstance(refused.exception, UsageError)
    assert "python -m lynx_trt.openai NAME" in str(refused.exception)


def test_tools_are_for_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
    base = {"model": "m", "messages": MESSAGES, "tools": tools}
    for more, wanted in (({}, tools), ({"tool_choice": "auto"}, tools), ({"tool_choice": "none"}, None)):
        (asked,) = ChatBody.read(json.dumps({**base, **more}).encode()).choices(Sampling())
        assert json.loads(asked.get("chat_options", "{}")).get("tools") == wanted
    for more, words in (
        ({"tool_choice": {"type": "function"}}, "it is none, auto, required or a function"),
        ({"tool_choice": "maybe"}, 'tool_choice is "maybe"; it is none'),
        ({"tool_choice": {"function": {"name": "other"}}}, "tool_choice is 'other', which is none of the tools"),
        ({"tool_choice": "required", "tools": [{"name": "find"}]}, "which is no function with a name"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "leaves no other form"),
    ):
        with pytest.raises(ApiError, match=words):
            ChatBody.read(json.dumps({**base, **more}).encode()).choices(Sampling())


def test_schemas_that_are_nested_too_deeply() -> None:
    schema: dict[str, Any] = {}
    for _ in range(3000):
        schema = {"not": schema}
    tools = [{"type": "function", "function": {"name": "find", "parameters": schema}}]
    body = ChatBody(model="m", messages=MESSAGES, tools=tools, tool_choice="required")
    with pytest.raises(ApiError, match="nested too deeply"):
        body.choices(Sampling())


def test_schemas_that_refer_to_themselves(long_artifact: Artifact) -> None:
    """As pydantic writes nested ones: among several tools each still means its own."""
    tools = []
    for name, least in (("left", 3), ("right", 7)):
        inner = {
            "type": "object",
            "properties": {"n": {"const": least}},
            "required": ["n"],
            "additionalProperties": False,
        }
        outer = {"$defs": {"Inner": inner}, "type": "object", "properties": {"it": {"$ref": "#/$defs/Inner"}}}
        parameters = {**outer, "required": ["it"], "additionalProperties": False}
        tools.append({"type": "function", "function": {"name": name, "parameters": parameters}})
    request = {"model": "m", "messages": MESSAGES, "tools": tools, "tool_choice": "required"}
    (asked,) = ChatBody.read(json.dumps(request).encode()).choices(Sampling())
    guides = Guides(long_artifact.path(TOKENIZER), 256, [])
    for name, number, fits in (("left", 3, True), ("right", 7, True), ("left", 7, False)):
        guide = guides.make(asked["guide"])
        answer = json.dumps({"name": name, "arguments": {"it": {"n": number}}}, separators=(",", ":"))
        allowed = []
        for token in guides._tokenizer.tokenize_str(answer):
            allowed.append(bool(guide.allowed()[token]))
            if not allowed[-1]:
                break
            guide.take(token)
        assert all(allowed) == fits


def test_calls_of_tools_in_an_answer() -> None:
    """As OpenAI's own types read them; a stream counts on where it was."""
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    end = End("end", 5, 9, 0.0, 0.1, 0.01, [2.0])
    calls = tuple(json.dumps({"id": name[0], "name": name, "arguments": '{"a": 1}'}) for name in ("find", "stop"))
    pieces = [Piece("Let me see."), Piece("", None, "", calls[:1]), Piece("", None, "", calls[1:]), Piece("", end)]
    form = Form.new("tiny", chat=True)
    answer = ChatCompletion.model_validate(form.whole([whole(pieces)], 1)).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", "Let me see.")
    assert answer.message.tool_calls is not None
    assert [(each.id, each.function.name) for each in answer.message.tool_calls] == [("f", "find"), ("s", "stop")]  # type: ignore[union-attr]
    silent = form.whole([whole(pieces[1:])], 1)["choices"][0]["message"]
    assert silent["content"] is None
    before, found = 0, []
    for piece in pieces:
        chunk = ChatCompletionChunk.model_validate(form.piece(0, piece, before))
        before += len(piece.calls)
        found += [(each.index, each.function.name) for each in chunk.choices[0].delta.tool_calls or ()]  # type: ignore[union-attr]
    assert found == [(0, "find"), (1, "stop")]
    assert chunk.choices[0].finish_reason == "tool_calls"
    assert form.piece(0, Piece(""), 0) is None
    cut = form.whole([whole([*pieces[:2], Piece("", replace(end, finish_reason="length"))])], 1)
    assert cut["choices"][0]["finish_reason"] == "length"


def test_what_a_request_asks_of_the_model() -> None:
    """The checkpoint's own sampling where it doesn't say; values that ask for nothing pass; seeds differ."""
    own = Sampling(0.6, 0.95, 20)
    neutral = {
        "user": "me",
        "logit_bias": {},
        "presence_penalty": 0.0,
        "response_format": {"type": "text"},
        "seed": None,
    }
    plain = ChatBody.read(json.dumps({"model": "m", "messages": MESSAGES, **neutral}).encode())
    (asked,) = plain.choices(own)
    assert asked.pop("seed") != plain.choices(own)[0]["seed"]
    assert asked == {
        "messages": json.dumps(MESSAGES),
        "parts": True,
        "max_tokens": ALL_TOKENS,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "stream": True,
    }
    penalties = {"min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 1, "frequency_penalty": -0.5}
    (asked,) = ChatBody.read(
        json.dumps({"model": "m", "messages": MESSAGES, **penalties, "logit_bias": {"5": -100}}).encode()
    ).choices(own)
    assert {name: asked[name] for name in penalties} == penalties
    assert asked["logit_bias"] == '{"5": -100.0}'
    more = {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 9, "top_k": -1}
    more |= {"max_completion_tokens": 7, "deadline": 2.5, "n": 2, "seed": 5, "stop": "\n", "quality": 0.5}
    first, second = ChatBody.read(json.dumps({"model": "m", "messages": MESSAGES, **more}).encode()).choices(own)
    assert json.loads(first["chat_options"]) == {"enable_thinking": False, "reasoning_effort": "low"}
    assert (first["max_tokens"], first["deadline"], first["stop"], first["quality"]) == (7, 2.5, ["\n"], "0.5")
    assert (first["top_k"], first["seed"], second["seed"]) == (0, 5, 6)
    completion = CompletionBody.read(b'{"model": "m", "prompt": "x"}').choices(Sampling())
    assert [completion[0][name] for name in ("max_tokens", "temperature", "top_p")] == [16, 1.0, 1.0]
    for setting in ('"seed": 1180591620717411303424', '"temperature": NaN', '"top_p": -Infinity', '"deadline": 1e39'):
        body = CompletionBody.read(f'{{"model": "m", "prompt": "x", {setting}}}'.encode())
        with pytest.raises(ApiError, match="which is out of range"):
            body.choices(Sampling())
