"""The served model without a server: requests in, responses out, and every mistake a client can make."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lynx_trt.artifact import TOKENIZER, Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.errors import LynxError, UsageError
from lynx_trt.generate import generate_text
from lynx_trt.runtime.backend import Array
from lynx_trt.runtime.chat import ChatTemplate
from lynx_trt.runtime.guide import Guides
from lynx_trt.runtime.open import limits_of, open_backend
from lynx_trt.runtime.quality import Dial
from lynx_trt.runtime.text import Tokenizer
from lynx_trt.serving import watchdog
from lynx_trt.serving.metrics import SPECS, Metrics, ServerSink
from lynx_trt.serving.requests import Parser
from lynx_trt.serving.schema import OUTPUTS
from lynx_trt.serving.service import Service
from lynx_trt.serving.settings import Settings

PROMPT = "def add(a, b):\n"


class Reply:
    """The way back to one client, kept."""

    def __init__(self) -> None:
        self.responses: list[dict[str, Array]] = []
        self.error: tuple[str, str] | None = None
        self.final = False
        self.gone = False

    def send(self, outputs: Mapping[str, Array], *, final: bool) -> None:
        assert not self.final
        self.responses.append(dict(outputs))
        self.final = final

    def fail(self, kind: str, message: str) -> None:
        assert not self.final
        self.error, self.final = (kind, message), True

    def cancelled(self) -> bool:
        return self.gone

    def wait(self) -> Reply:
        end = time.monotonic() + 20
        while not self.final:
            assert time.monotonic() < end, "no answer"
            time.sleep(0.005)
        return self

    @property
    def text(self) -> str:
        return b"".join(response["text_output"][0] for response in self.responses).decode()


class Sink:
    """Metrics, kept: (name, label) to value."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str | None], float] = {}
        self.observed: dict[str, list[float]] = {}

    def add(self, name: str, label: str | None, amount: float) -> None:
        assert amount >= 0
        self.values[name, label] = self.values.get((name, label), 0) + amount

    def set(self, name: str, label: str | None, value: float) -> None:
        self.values[name, label] = value

    def observe(self, name: str, value: float) -> None:
        self.observed.setdefault(name, []).append(value)


class Served:
    """A service and what belongs to it."""

    def __init__(self, artifact: Artifact, settings: Settings, dial_file: Path | None = None) -> None:
        dial = Dial.of(artifact.manifest)
        tokenizer, template = Tokenizer(artifact.path(TOKENIZER)), ChatTemplate.find(artifact.folder)
        limits = limits_of(artifact.manifest)
        guides = Guides(artifact.path(TOKENIZER), limits.vocabulary, limits.end_tokens)
        self.parser = Parser(tokenizer, limits, dial, settings, guides, template)
        self.sink = Sink()
        layers = [layer.name for layer in artifact.manifest.model.moe_layers]
        self.backend = open_backend(artifact, settings.slots, threads=1)
        self.dial_file = dial_file
        self.service = Service(self.backend, self.parser, Metrics(self.sink, layers, dial), dial_file)

    def turn(self, text: str) -> None:
        """Write the dial file, and wait until it is taken."""
        assert self.dial_file is not None
        self.dial_file.write_text(text)
        end = time.monotonic() + 5
        while self.service._dial_text != text:
            assert time.monotonic() < end
            time.sleep(0.02)

    def ask(self, parameters: str = "{}", **values: Any) -> Reply:
        reply = Reply()
        self.service.accept(tensors(**values), parameters, reply)
        return reply


def slowly(step: Callable[..., Any], seconds: float = 0.005) -> Callable[..., Any]:
    """A backend's step that takes longer."""

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return step(*arguments, **options)

    return slow


def tensors(**values: Any) -> dict[str, Array]:
    """As the server's Python backend hands them over."""
    dtypes = {"max_tokens": np.int32, "temperature": np.float32, "top_p": np.float32, "seed": np.int64}
    dtypes |= {"deadline": np.float32, "top_k": np.int32, "input_ids": np.int32}
    dtypes |= dict.fromkeys(("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"), np.float32)
    dtypes |= dict.fromkeys(("stream", "ignore_eos", "parts"), np.bool_)
    made = {}
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        coded = [item.encode() if isinstance(item, str) else item for item in items]
        made[name] = np.array(coded, dtype=dtypes.get(name, object))
    return made


@pytest.fixture(scope="module")
def serve(text_artifact: Artifact) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def start(dial_file: Path | None = None, **settings: Any) -> Served:
        made.append(Served(text_artifact, Settings(**{"slots": 4, "quality": "max", **settings}), dial_file))
        return made[-1]

    yield start
    for served in made:
        served.service.close()


@pytest.fixture(scope="module")
def served(serve: Callable[..., Served]) -> Served:
    return serve()


def test_equals_generate(served: Served, text_artifact: Artifact) -> None:
    (alone,), _ = generate_text(text_artifact, [PROMPT], budget="8", max_new_tokens=20, threads=1)
    reply = served.ask(text_input=PROMPT, max_tokens=20).wait()
    assert reply.text == alone.text
    assert len(reply.responses) == 1
    final = reply.responses[0]
    assert set(final) == {tensor.name for tensor in OUTPUTS} - {"thought_output", "tool_calls"}
    assert final["finish_reason"][0] == b"length"
    assert (final["prompt_tokens"][0], final["output_tokens"][0]) == (15, 20)
    assert final["active_experts"].tolist() == [2.0, 2.0]
    assert 0 <= final["queue_seconds"][0] <= final["first_token_seconds"][0]
    assert final["token_seconds"][0] > 0


def test_stream_is_the_same_text_in_pieces(
    served: Served, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are slowed down: this model writes 30 tokens before the other thread looks twice."""
    whole = served.ask(text_input=PROMPT, max_tokens=30).wait()
    eager = serve(stream_interval=0.0)
    for one in (eager, served):
        monkeypatch.setattr(one.backend, "step", slowly(one.backend.step))
    every = eager.ask(text_input=PROMPT, max_tokens=30, stream=True).wait()
    some = served.ask(text_input=PROMPT, max_tokens=30, stream=True).wait()
    assert whole.text == every.text == some.text
    assert len(every.responses) > len(some.responses) >= 1
    assert all(set(response) == {"text_output"} for response in every.responses[:-1])


def test_stop_seed_and_sampling(served: Served) -> None:
    full = served.ask(text_input=PROMPT, max_tokens=20).wait().text
    stopped = served.ask(text_input=PROMPT, max_tokens=20, stop=["\x00never", full[5:8]]).wait()
    assert stopped.text == full[: full.index(full[5:8])]
    assert stopped.responses[-1]["finish_reason"][0] == b"stop"
    warm = {"text_input": PROMPT, "max_tokens": 20, "temperature": 1.0, "top_p": 0.9}
    texts = [served.ask(**warm, seed=seed).wait().text for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]
    assert served.ask(**warm, seed=6, top_k=1).wait().text == full  # of one token there is one draw


def test_token_ids_are_taken_as_they_are(served: Served) -> None:
    ids = served.parser.tokenizer.encode(PROMPT)
    wanted = served.ask(text_input=PROMPT, max_tokens=20).wait()
    got = served.ask(input_ids=ids, max_tokens=20).wait()
    assert got.text == wanted.text
    assert got.responses[-1]["prompt_tokens"][0] == len(ids)


def test_an_answer_may_go_on_past_its_end(text_artifact: Artifact) -> None:
    """The token that ends a text is made one that the model writes."""
    (alone,), _ = generate_text(text_artifact, [PROMPT], budget="8", max_new_tokens=20, threads=1)
    model = text_artifact.manifest.model.model_copy(update={"end_tokens": [alone.tokens[4]]})
    artifact = Artifact(text_artifact.folder, text_artifact.manifest.model_copy(update={"model": model}))
    served = Served(artifact, Settings(slots=2, quality="max"))
    ends = [served.ask(text_input=PROMPT, max_tokens=20, ignore_eos=on).wait().responses[-1] for on in (False, True)]
    served.service.close()
    assert [end["finish_reason"][0] for end in ends] == [b"end", b"length"]
    assert ends[0]["output_tokens"][0] <= 4
    assert ends[1]["output_tokens"][0] == 20


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"text_input": ""}, "the prompt is empty"),
    ({"max_tokens": 5}, "text_input is missing"),
    ({"text_input": "x" * 64}, "64 tokens"),
    ({"text_input": "x" * 10_000_000}, "10000000 characters"),
    ({"text_input": b"\xff\xfe"}, "text_input is no valid UTF-8"),
    ({"text_input": ["a", "b"]}, "text_input has 2 values"),
    ({"text_input": "x", "max_tokens": 0}, "max_tokens is 0"),
    ({"text_input": "x", "max_tokens": -1}, "max_tokens is -1"),
    ({"text_input": "x", "temperature": float("nan")}, "temperature is nan"),
    ({"text_input": "x", "temperature": -0.5}, "temperature is -0.5"),
    ({"text_input": "x", "temperature": float("inf")}, "temperature is inf"),
    ({"text_input": "x", "top_p": 0.0}, "top-p is 0"),
    ({"text_input": "x", "top_p": 1.5}, "top-p is 1.5"),
    ({"text_input": "x", "top_k": -1}, "top-k is -1"),
    ({"text_input": "x", "seed": -3}, "seed is -3"),
    ({"text_input": "x", "quality": "best"}, "quality is 'best'; it must be max, balanced, fast"),
    ({"text_input": "x", "quality": "1.5"}, "quality is '1.5'"),
    ({"text_input": "x", "quality": "nan"}, "quality is 'nan'"),
    ({"text_input": "x", "quality": "/etc/passwd"}, "quality is '/etc/passwd'"),
    ({"text_input": "x", "quality": "9" * 100_000}, "quality is '9999"),
    ({"text_input": "x", "stop": [""]}, "stop text has 0 characters"),
    ({"text_input": "x", "stop": ["y" * 257]}, "stop text has 257 characters"),
    ({"text_input": "x", "stop": ["y"] * 17}, "stop has 17 texts"),
    ({"text_input": "x", "deadline": 0.0}, "deadline is 0.0"),
    ({"text_input": "x", "deadline": float("nan")}, "deadline is nan"),
    ({"input_ids": []}, "the prompt is empty"),
    ({"input_ids": [1] * 64}, "the prompt has 64 tokens"),
    ({"input_ids": [3, 256]}, "the prompt has the token 256, and the model has 0 to 255"),
    ({"input_ids": [3, -1]}, "the prompt has the token -1"),
    ({"input_ids": [3], "text_input": "x"}, "there are text_input and input_ids; give one of them"),
    ({"text_input": "x", "parameters": '{"temprature": 0.3}'}, "unknown parameter 'temprature'; a request has these"),
]


@pytest.mark.parametrize(("values", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_mistakes_are_told_at_once(values: dict[str, Any], words: str, served: Served) -> None:
    """One sentence with the value and what is allowed, in no time, and nothing is queued."""
    values = dict(values)
    parameters = values.pop("parameters", "{}")
    started = time.monotonic()
    reply = served.ask(parameters, **values)
    assert time.monotonic() - started < 1.0
    assert reply.error is not None
    assert reply.error[0] == "invalid"
    assert words in reply.error[1]
    assert len(reply.error[1]) < 400


def test_empty_prompt_of_a_tokenizer_that_begins_every_text(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As lynx-tiny's does: there is a token, but no text."""
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: [1])
    assert served.ask(text_input="").error == ("invalid", "the prompt is empty: there is nothing to continue")


def test_parameters_of_the_server_itself_pass(served: Served) -> None:
    reply = served.ask('{"triton_enable_empty_final_response": true, "timeout": 1}', text_input="x", max_tokens=2)
    assert reply.wait().error is None


def test_full_queue_answers_at_once(serve: Callable[..., Served]) -> None:
    served = serve(slots=1, queue=1)
    replies = [served.ask(text_input="x", max_tokens=60) for _ in range(8)]
    busy = [reply for reply in replies if reply.error]
    assert len(busy) >= 5
    assert all(reply.error and reply.error[0] == "busy" and "queue is full" in reply.error[1] for reply in busy)
    assert all(reply.wait().text for reply in replies if not reply.error)


def test_gone_client_frees_its_slot(serve: Callable[..., Served]) -> None:
    served = serve(slots=1)
    gone, waiting = served.ask(text_input="x", max_tokens=63, stream=True), served.ask(text_input="x", max_tokens=2)
    gone.gone = True
    assert waiting.wait().error is None
    assert gone.wait().final


def test_deadline(serve: Callable[..., Served]) -> None:
    """Of the request, of the operator when that is shorter; one that waited too long is told it was busy."""
    served = serve(slots=1, deadline=0.02)
    running, waiting = (served.ask(text_input="x", max_tokens=63, deadline=100.0) for _ in range(2))
    assert running.wait().responses[-1]["finish_reason"][0] in (b"deadline", b"length")
    if waiting.wait().error:
        assert waiting.error is not None
        assert waiting.error[0] == "busy"


def test_quality_of_a_request(served: Served) -> None:
    """The budget of 2 holds for the batch: two sequences may load 4 experts a layer at max, 2 at the artifact's own."""

    def active(quality: str) -> float:
        replies = [served.ask(text_input=text, max_tokens=25, quality=quality) for text in (PROMPT, "import os")]
        return max(float(reply.wait().responses[-1]["active_experts"].max()) for reply in replies)

    assert active("max") > active("balanced")
    assert active("0.25") <= 2.5


def test_dial_file_changes_the_default(serve: Callable[..., Served], tmp_path: Path, capfd: Any) -> None:
    """An operator's change is taken within two seconds; what can't be read changes nothing, and the log says so."""
    dial = tmp_path / "dial.json"
    dial.write_text('{"quality": "fast"}')
    served = serve(dial_file=dial)
    assert served.service._control.restriction == Restriction((1, 1))
    for content, default in (('{"quality": "max"}', (8, 8)), ("{", (8, 8)), ('{"quality": "0.5"}', (4, 4))):
        dial.write_text(content)
        end = time.monotonic() + 5
        while served.service._dial_text != content or served.service._control.restriction.budgets != default:
            assert time.monotonic() < end
            time.sleep(0.02)
    log = capfd.readouterr().err
    assert "the default quality is 0.5" in log
    assert served.service._rewinds > 0
    served.service._rewinds = 0  # as of a model with states
    dial.write_text('{"quality": "0.2", "max_kl": 0.01}')
    end = time.monotonic() + 5
    while "layers of this model keep a state" not in capfd.readouterr().err:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert served.service._control.restriction.budgets == (4, 4)
    assert "can't be read" in log


def test_quality_is_lowered_for_a_target(serve: Callable[..., Served], tmp_path: Path) -> None:
    """Of requests that ask for none, and only while tokens take longer than they may."""
    dial = tmp_path / "dial.json"
    dial.write_text("{}")
    served = serve(dial_file=dial, tpot=2.0, lowest="0.1")

    def active(**values: Any) -> float:
        reply = served.ask(text_input=PROMPT, max_tokens=40, **values).wait()
        return float(reply.responses[-1]["active_experts"].max())

    with pytest.MonkeyPatch.context() as slower:
        slower.setattr(served.backend, "next_tokens", slowly(served.backend.next_tokens))
        active()
        active()
        assert served.service._control.pace.position == 1.0
        assert (active(quality="max"), active()) == (2.0, 1.0)
        served.service._flush()
        assert served.sink.values["lynx_pace", None] == 1.0
        assert served.sink.values["lynx_quality_default", None] == 0.125
    served.turn('{"tpot": 0}')
    assert served.service._control.pace.position == 0.0
    assert active() == 2.0


def test_close_tells_those_that_are_left(text_artifact: Artifact) -> None:
    served = Served(text_artifact, Settings(slots=1, queue=5))
    replies = [served.ask(text_input="x", max_tokens=63) for _ in range(4)]
    served.service.close()
    assert all(reply.final for reply in replies)
    assert any(reply.error and "shutting down" in reply.error[1] for reply in replies)


def test_failing_reply_harms_nobody_else(serve: Callable[..., Served]) -> None:
    served = serve()

    class Broken(Reply):
        def send(self, outputs: Mapping[str, Array], *, final: bool) -> None:
            raise RuntimeError("the pipe is broken")

    served.service.accept(tensors(text_input="x", max_tokens=5, stream=True), "{}", Broken())
    assert served.ask(text_input="x", max_tokens=5).wait().text


def test_defect_is_told_to_one_client(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    served = serve()
    with monkeypatch.context() as broken:
        broken.setattr(Tokenizer, "encode", lambda *_, **__: 1 / 0)
        reply = served.ask(text_input="x", max_tokens=5)
    assert reply.error == ("internal", "this request failed: see the server's log")
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert served.ask(text_input="x", max_tokens=5).wait().text


def test_metrics(serve: Callable[..., Served]) -> None:
    served = serve()
    for number in range(3):
        served.ask(text_input=PROMPT, max_tokens=10 + number).wait()
    served.ask(text_input="").wait()
    served.service._flush()
    values, observed = served.sink.values, served.sink.observed
    assert values["lynx_output_tokens_total", None] == 33
    assert values["lynx_prompt_tokens_total", None] == 45
    assert values["lynx_decode_steps_total", None] == 30
    assert values["lynx_requests_total", "length"] == 3
    assert values["lynx_requests_total", "invalid"] == 1
    assert values["lynx_requests_total", "error"] == 0  # there before the first, or no rate would see that
    layers = {label for name, label in values if name == "lynx_active_experts_total"}
    assert len(layers) == 2
    assert all(values["lynx_active_experts_total", layer] == 60 for layer in layers)
    assert values["lynx_quality_default", None] == 1.0
    assert values["lynx_running", None] == 0
    assert len(observed["lynx_first_token_seconds"]) == 3
    assert {name for name, _ in values} | set(observed) == {spec.name for spec in SPECS}


def test_metrics_of_the_server() -> None:
    """One series a label, made when first used; a server without histograms keeps the rest."""
    calls: list[Any] = []

    class Metric:
        def __init__(self, name: str, labels: dict[str, str]) -> None:
            self.of = (name, tuple(sorted(labels.items())))

        def increment(self, amount: float) -> None:
            calls.append((*self.of, "+", amount))

        def set(self, value: float) -> None:
            calls.append((*self.of, "=", value))

    class MetricFamily:
        COUNTER, GAUGE = 1, 2

        def __init__(self, name: str, description: str, kind: int) -> None:
            self.name = name

        def Metric(self, labels: dict[str, str]) -> Metric:
            return Metric(self.name, labels)

    class Utils:
        pass

    utils: Any = Utils()
    utils.MetricFamily = MetricFamily
    sink = ServerSink(utils, {"model": "m"})
    sink.add("lynx_requests_total", "length", 2)
    sink.set("lynx_running", None, 3)
    sink.observe("lynx_queue_seconds", 0.1)
    assert calls == [
        ("lynx_requests_total", (("finish", "length"), ("model", "m")), "+", 2),
        ("lynx_running", (("model", "m"),), "=", 3),
    ]


def test_settings_round_trip() -> None:
    settings = Settings(slots=3, quality="0.5", stream_interval=0.0)
    assert Settings.of({**settings.parameters(), "lynx_model": "x"}) == settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"slots": 0}, "slots is 0; it must be 1 or more"),
        ({"queue": 0}, "queue is 0"),
        ({"threads": -1}, "threads is -1; it must be 0 or more"),
        ({"deadline": float("nan")}, "deadline is nan"),
        ({"stream_interval": -1.0}, "stream-interval is -1.0; it must be 0.0 or more"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Settings(**values)


def test_dial_of_an_artifact(text_artifact: Artifact) -> None:
    dial = Dial.of(text_artifact.manifest)
    found = {quality: dial.restriction(quality).budgets for quality in ("max", "balanced", "fast", "0.5", "0", "1")}
    assert found == {
        "max": (8, 8),
        "balanced": (2, 2),
        "fast": (1, 1),
        "0.5": (4, 4),
        "0": (0, 0),  # the preset guarantees each token an expert
        "1": (8, 8),
    }
    assert dial.share(Restriction((4, 8))) == 0.75


def test_floors_go_with_the_artifacts_own_budgets(text_artifact: Artifact) -> None:
    """All experts and a fraction of them are asked for by name: no floor takes some away."""
    manifest = text_artifact.manifest
    chosen = manifest.selection.model_copy(update={"budgets": [6, 4], "floors": [0.25, 0.0]})
    dial = Dial.of(manifest.model_copy(update={"selection": chosen}))
    assert dial.restriction("balanced") == Restriction((6, 4), (0.25, 0.0))
    assert dial.restriction("fast") == Restriction((6, 2), (1.0, 0.0))
    assert dial.restriction("max") == Restriction((8, 8), (0.0, 0.0))
    assert dial.restriction("0.5") == Restriction((4, 4), (0.0, 0.0))


def test_dial_keeps_an_expert_and_obeys_off(text_artifact: Artifact) -> None:
    """Where no expert is guaranteed a budget of 0 would empty the block; `off` has no dial at all."""
    manifest = text_artifact.manifest
    chosen = manifest.selection
    bare = chosen.model_copy(update={"parameters": {**chosen.parameters, "guarantee": 0}})
    assert Dial.of(manifest.model_copy(update={"selection": bare})).restriction("0").budgets == (1, 1)
    off = chosen.model_copy(update={"preset": "off", "budgets": [8, 8]})
    dial = Dial.of(manifest.model_copy(update={"selection": off}))
    assert {dial.restriction(quality).budgets for quality in ("max", "fast", "0.1")} == {(8, 8)}
    with pytest.raises(LynxError):
        dial.restriction("bogus")


def test_final_outputs_are_json_ready(served: Served) -> None:
    """The server turns the outputs into JSON: no NaN, no infinity."""
    final = served.ask(text_input="x", max_tokens=1).wait().responses[-1]
    numbers = {name: value.tolist() for name, value in final.items() if value.dtype != object}
    json.dumps(numbers, allow_nan=False)


# --- The watchdog: processes of our own take the parts of server and model.


def watched(tmp_path: Path, *, end_server: bool) -> tuple[subprocess.Popen[bytes], int]:
    """(a server, the process id of its model, which has a watchdog)."""
    code = (
        "import subprocess, sys, time; from lynx_trt.serving import watchdog\n"
        f"model = subprocess.Popen([sys.executable, '-c', {MODEL!r}, {str(tmp_path)!r}])\n"
        "time.sleep(60)"
    )
    variables = {**os.environ, watchdog.VARIABLE: str(int(end_server))}
    server = subprocess.Popen([sys.executable, "-c", code], env=variables)
    end = time.monotonic() + 20
    while not (tmp_path / "model").is_file() or not (tmp_path / "model").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    return server, int((tmp_path / "model").read_text())


MODEL = (
    "import os, pathlib, sys, time; from lynx_trt.serving import watchdog\n"
    "watchdog.start(); pathlib.Path(sys.argv[1], 'model').write_text(str(os.getpid())); time.sleep(60)"
)


def test_watchdog_ends_a_model_without_server(tmp_path: Path) -> None:
    server, model = watched(tmp_path, end_server=False)
    server.kill()
    server.wait()
    _until_gone(model)


@pytest.mark.parametrize("end_server", [True, False])
def test_watchdog_ends_a_server_without_model_if_it_shall(end_server: bool, tmp_path: Path) -> None:
    server, model = watched(tmp_path, end_server=end_server)
    os.kill(model, signal.SIGKILL)
    if end_server:
        assert server.wait(15) == -signal.SIGTERM
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait(6)
        server.kill()
        server.wait()


def _until_gone(process: int) -> None:
    import psutil

    end = time.monotonic() + 15
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.1)
