"""The real server on loopback, over HTTP and gRPC: what a client gets, what it can't break, and how it ends.

The server is Triton Inference Server itself, from its wheel; each one started here is ended by its own process id.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from lynx_trt.artifact import Artifact
from lynx_trt.console import Progress
from lynx_trt.errors import ServingError
from lynx_trt.generate import generate_text
from lynx_trt.runtime.sampling import Sampling
from lynx_trt.serving.environment import prepare

pytest.importorskip("tritonclient.grpc", reason='needs the client: pip install "lynx-trt[serve]"')

# The example that users copy, and the load that benchmarks make, are what these tests talk with.
sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("examples", "benchmarks")]

from http_stream import ask  # noqa: E402
from serving_client import generate, stream, stream_grpc  # noqa: E402
from serving_soak import Target, metric, soak  # noqa: E402

PROMPTS = ["def add(a, b):\n", "import", "class Point:\n    def __init__(self, x, y):\n", "żółw = ["]
COUNTERS = ("lynx_output_tokens_total", "lynx_decode_steps_total")


def free_ports(number: int = 3) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Server:
    """A server process, its addresses and its log."""

    def __init__(self, artifact: Artifact, folder: Path, *options: str) -> None:
        self.repository = folder / "repository"
        self.log = folder / "log"
        self.ports = free_ports()
        ports = zip(("--http-port", "--grpc-port", "--metrics-port"), self.ports, strict=True)
        command = [sys.executable, "-m", "lynx_trt.serve", str(artifact.folder), "-o", str(self.repository)]
        command += ["--name", "tiny", "--start", *(str(word) for pair in ports for word in pair), *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.pid = self.process.pid
        self.http, self.grpc = (f"127.0.0.1:{port}" for port in self.ports[:2])
        self.target = Target("127.0.0.1", self.ports[0], self.ports[2], "tiny", self.pid)

    def wait(self) -> Server:
        end = time.monotonic() + 90
        while not self.ready():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, "it doesn't get ready"
            time.sleep(0.1)
        return self

    def ready(self) -> bool:
        try:
            return self.post("/v2/health/ready", method="GET")[0] == 200
        except OSError:
            return False

    def post(self, path: str, body: bytes = b"", method: str = "POST", **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.http, timeout=30)
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    def end(self, number: int) -> int:
        """Send a signal to this process alone; the exit code."""
        if self.process.poll() is None:
            os.kill(self.pid, number)
        return self.process.wait(60)

    def children(self) -> list[psutil.Process]:
        """The model's process, and the watchdog's."""
        return psutil.Process(self.pid).children(recursive=True)

    def model(self) -> psutil.Process:
        return next(child for child in self.children() if child.name().startswith("triton"))

    def until(self, name: str, value: float | None = None, *, at_least: float = 0) -> None:
        """Until a metric has a value, or one so high; gauges follow within a second or two."""
        end = time.monotonic() + 15
        while True:
            found = metric(self.target, name)
            if found == value or (value is None and found >= at_least):
                return
            assert time.monotonic() < end, f"{name} is {found}"
            time.sleep(0.1)


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    """The real server, installed as `--prepare` does it where it isn't yet: a download of 55 MB, once a machine.

    Without a registry, or on a machine that the wheel is not for, there is none to test; any other failure is one.
    """
    try:
        with Progress(quiet=True) as progress:
            prepare(server=True, phase=progress.phase)
    except ServingError as error:
        if re.search("pip install .* failed|use .*the vendor's container", str(error)):
            pytest.skip(f"there is no server to test: {error}")
        raise


@pytest.fixture(scope="module")
def server(long_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(long_artifact, tmp_path_factory.mktemp("server"))
    try:
        yield started.wait()
    finally:
        started.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def alone(long_artifact: Artifact) -> Callable[[str, int], str]:
    """What `lynx_trt.generate` writes: greedy, all experts, nothing else in the batch."""

    def text(prompt: str, new: int) -> str:
        (one,), _ = generate_text(long_artifact, [prompt], budget="8", max_new_tokens=new, threads=1)
        return one.text

    return text


# --- What a client gets.


def test_http_and_grpc_equal_generate_in_a_crowd(server: Server, alone: Callable[[str, int], str]) -> None:
    """Greedy with all experts, whatever else is in the batch: sampled, short, long and cancelled neighbours.

    The artifact is float32: in float16 another batch size can round a near-tie the other way.
    """

    def neighbour(number: int) -> None:
        settings = {"temperature": 1.5, "seed": number, "max_tokens": 20 + 17 * number % 90, "quality": "fast"}
        for answer in stream(server.http, "tiny", "x" * (1 + 31 * number % 200), **settings):
            if number % 5 == 0 and answer["text_output"]:
                return

    in_pieces = 0
    with ThreadPoolExecutor(12) as crowd:
        neighbours = [crowd.submit(neighbour, number) for number in range(24)]
        for prompt in PROMPTS:
            expected = alone(prompt, 40)
            whole = generate(server.http, "tiny", prompt, max_tokens=40, quality="max")
            assert whole["text_output"] == expected
            assert whole["finish_reason"] == "length"
            assert (whole["prompt_tokens"], whole["output_tokens"]) == (len(prompt.encode()), 40)
            for streamed in (
                stream(server.http, "tiny", prompt, max_tokens=40, quality="max"),
                stream_grpc(server.grpc, "tiny", prompt, max_tokens=40, quality="max"),
            ):
                answers = list(streamed)
                assert "".join(answer["text_output"] for answer in answers) == expected
                in_pieces += len(answers) > 1
        for one in neighbours:
            one.result()
    # Not each: 40 tokens of this model can be there before the first piece is sent.
    assert in_pieces


def test_64_streams_of_mixed_length(server: Server, long_artifact: Artifact) -> None:
    """All at once on 16 slots; each ends with its own text."""
    prompts = [("def f" + chr(97 + number % 26) * (number % 30)) for number in range(64)]
    lengths = [3 + number * 37 % 80 for number in range(64)]
    sequences, _ = generate_text(long_artifact, prompts, budget="8", max_new_tokens=max(lengths))
    model = {"max_tokens": 0, "quality": "max"}

    async def everyone() -> list[Any]:
        bodies = [{**model, "text_input": p, "max_tokens": n} for p, n in zip(prompts, lengths, strict=True)]
        return await asyncio.gather(*(ask("127.0.0.1", server.ports[0], "tiny", body) for body in bodies))

    time.sleep(1.5)
    before = [metric(server.target, name) for name in COUNTERS]
    answers = asyncio.run(everyone())
    assert [answer.error for answer in answers] == [None] * 64
    assert [answer.tokens for answer in answers] == lengths
    for answer, sequence in zip(answers, sequences, strict=True):
        assert sequence.text.startswith(answer.text)
        assert answer.text
    time.sleep(1.5)  # counters are handed over once a second
    after = [metric(server.target, name) for name in COUNTERS]
    tokens, steps = (late - early for late, early in zip(after, before, strict=True))
    assert tokens == sum(lengths)
    assert tokens / steps > 8, "sequences don't decode together"


def test_sampling_stop_and_seed(server: Server, long_artifact: Artifact) -> None:
    """The same draws as `lynx_trt.generate` with the same seed, over both protocols."""
    sampling = Sampling(temperature=0.75, top_p=0.5, seed=11, top_k=40)
    (expected,), _ = generate_text(
        long_artifact, PROMPTS[:1], budget="8", max_new_tokens=30, sampling=sampling, threads=1
    )
    stop = expected.text[10:13]
    settings = {"temperature": 0.75, "top_p": 0.5, "top_k": 40, "seed": 11, "max_tokens": 30, "quality": "max"}
    assert generate(server.http, "tiny", PROMPTS[0], **settings)["text_output"] == expected.text
    *_, last = answers = list(stream_grpc(server.grpc, "tiny", PROMPTS[0], stop=["\x00no", stop], **settings))
    assert "".join(answer["text_output"] for answer in answers) == expected.text[: expected.text.index(stop)]
    assert last["finish_reason"] == "stop"


def test_one_token(server: Server, alone: Callable[[str, int], str]) -> None:
    """No decode step at all, so no active experts: an empty list, not an error."""
    for answer in (
        generate(server.http, "tiny", "x", max_tokens=1, quality="max"),
        *stream_grpc(server.grpc, "tiny", "x", max_tokens=1, stream=False, quality="max"),
    ):
        assert answer["text_output"] == alone("x", 1)
        assert answer["active_experts"] == []


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_example_runs_as_it_is_printed(protocol: str, server: Server, alone: Callable[[str, int], str]) -> None:
    example = Path(__file__).parent.parent / "examples" / "serving_client.py"
    where = ["--address", getattr(server, protocol), "--model", "tiny", *(["--grpc"] if protocol == "grpc" else [])]
    command = [sys.executable, str(example), "import", "--max-tokens", "12", "--quality", "max", *where]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "import" + alone("import", 12)
    assert "length: 12 tokens" in result.stderr


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_example_chats(protocol: str, server: Server, alone: Callable[[str, int], str]) -> None:
    """The model's template is around the message; the answer alone is printed."""
    example = Path(__file__).parent.parent / "examples" / "serving_client.py"
    where = ["--address", getattr(server, protocol), "--model", "tiny", *(["--grpc"] if protocol == "grpc" else [])]
    command = [sys.executable, str(example), "hi", "--chat", "--max-tokens", "12", "--quality", "max", *where]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == alone("user:hi>", 12)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_example_says_what_is_wrong(protocol: str, server: Server) -> None:
    """No server there, no such model, and a request that is refused: a sentence each."""
    example = Path(__file__).parent.parent / "examples" / "serving_client.py"
    there = getattr(server, protocol)
    for arguments, words in (
        (["--address", "127.0.0.1:1"], "127.0.0.1:1"),
        (["--address", there, "--model", "nobody"], "nobody"),
        (["--address", there, "--model", "tiny", "--quality", "best"], "'best'"),
    ):
        command = [sys.executable, str(example), "import", *arguments, *(["--grpc"] if protocol == "grpc" else [])]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert result.stderr.startswith("error: ")
        assert words in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


def test_curl_s_way(server: Server, alone: Callable[[str, int], str]) -> None:
    """What docs/serving.md says to curl, which calls its body a form."""
    body = b'{"text_input": "import", "max_tokens": 12, "quality": "max"}'
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    status, text = server.post("/v2/models/tiny/generate", body, **kind)
    assert status == 200
    assert json.loads(text)["text_output"] == alone("import", 12)


def test_labels_name_the_layers(server: Server, long_artifact: Artifact) -> None:
    """A client that asks for classes gets the layers by their names, the busiest first."""
    import queue

    from tritonclient import grpc

    responses: queue.Queue[Any] = queue.Queue()
    tensor = grpc.InferInput("text_input", [1], "BYTES").set_data_from_numpy(np.array([b"x"], dtype=np.object_))
    with grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: responses.put((result, error)))
        client.async_stream_infer(
            "tiny", [tensor], outputs=[grpc.InferRequestedOutput("active_experts", class_count=2)]
        )
        result, error = responses.get(timeout=20)
        client.stop_stream()
    assert error is None
    found = {value.decode().split(":")[2] for value in result.as_numpy("active_experts").reshape(-1)}
    assert found == {layer.name for layer in long_artifact.manifest.model.moe_layers}


# --- What a client can't break.


def test_vanishing_clients_free_their_slots(server: Server) -> None:
    """Streams that would last are dropped in the middle, over both protocols; all slots are free soon after.

    Sixteen at once, so that they last longer than it takes to notice. A busy machine may let some end all the same, or
    all of them: then once more.
    """
    gone = 'lynx_requests_total{finish="cancelled"'

    async def vanish() -> list[Any]:
        body = {"text_input": "x", "max_tokens": 590, "temperature": 1.0}
        asks = (ask("127.0.0.1", server.ports[0], "tiny", body, leave_after=0.1) for _ in range(16))
        return await asyncio.gather(*asks)

    def drop(_: int) -> None:
        pieces = stream_grpc(server.grpc, "tiny", "x", max_tokens=590, temperature=1.0)
        next(pieces)
        pieces.close()

    def over_http() -> None:
        assert "left" in [answer.error for answer in asyncio.run(vanish())]

    def over_grpc() -> None:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(drop, range(16)))

    for leave in (over_http, over_grpc):
        before = metric(server.target, gone)
        for _ in range(5):
            leave()
            with contextlib.suppress(AssertionError):
                server.until(gone, at_least=before + 1)
                break
        server.until(gone, at_least=before + 1)
        server.until("lynx_running", 0)


# What our model refuses is a 400; what the server's own frontend can't read it calls a 500, in this version.
MALFORMED: list[tuple[bytes, int, str]] = [
    (b"", 500, "failed to parse the request JSON buffer: The document is empty"),
    (b"{", 500, "failed to parse the request JSON buffer"),
    (b"[]", 500, "non-object"),
    (b'{"text_input": 7}', 500, "attempt to access JSON non-string as string"),
    (b'{"text_input": "x", "max_tokens": "many"}', 500, "attempt to access JSON non-signed-integer"),
    (b'{"text_input": "x", "max_tokens": 1e99}', 500, "attempt to access JSON non-signed-integer"),
    (b'{"max_tokens": 3}', 400, "text_input is missing"),
    (b'{"messages": "hi"}', 400, "messages can't be read"),
    (b'{"messages": [{"role": "user", "content": "hi"}]}', 500, "JSON"),
    (b'{"text_input": ""}', 400, "the prompt is empty"),
    (b'{"text_input": "x", "max_tokens": -1}', 400, "max_tokens is -1; it must be 1 or more"),
    (b'{"text_input": "x", "temperature": NaN}', 400, "temperature is nan"),
    (b'{"text_input": "x", "temperature": -1}', 400, "temperature is -1"),
    (b'{"text_input": "x", "quality": "best"}', 400, "quality is 'best'; it must be max, balanced, fast or a fraction"),
    (b'{"text_input": "x", "quality": "../../dial.json"}', 400, "quality is '../../dial.json'"),
    (b'{"text_input": "x", "stop": ""}', 400, "stop text has 0 characters"),
    (b'{"text_input": "x", "tokens": 3}', 400, "unknown parameter 'tokens'"),
    (b'{"text_input": "' + b"x" * 600 + b'"}', 400, "the prompt has 600 tokens"),
    (b'{"text_input": "' + b"x" * 10_000_000 + b'"}', 400, "the prompt has 10000000 characters"),
]


@pytest.mark.parametrize(("body", "code", "words"), MALFORMED, ids=[str(body[:40]) for body, _, _ in MALFORMED])
@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded"])
def test_malformed_http(body: bytes, code: int, words: str, kind: str, server: Server) -> None:
    """A sentence, at once; sent as a form too, which is what curl says by default."""
    started = time.monotonic()
    status, text = server.post("/v2/models/tiny/generate", body, **{"Content-Type": kind})
    assert (status, words in json.loads(text)["error"]) == (code, True), text
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("settings", "types", "words"),
    [
        ({"max_tokens": 3}, {"max_tokens": "INT64"}, "INT32"),
        ({"text_input": 3.0}, {"text_input": "FP32"}, "BYTES"),
        ({"temperature": float("nan")}, {}, "temperature is nan"),
        ({"max_tokens": -5}, {}, "max_tokens is -5"),
        ({"quality": "best"}, {}, "quality is 'best'"),
        ({"text_input": ""}, {}, "the prompt is empty"),
        ({"text_input": "x" * 10_000_000}, {}, "10000000 characters"),
        ({"nonsense": 1.0}, {"nonsense": "FP32"}, "nonsense"),
    ],
)
def test_malformed_grpc(
    settings: dict[str, Any], types: dict[str, str], words: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    import serving_client

    monkeypatch.setattr(serving_client, "TYPES", {**serving_client.TYPES, **types})
    with pytest.raises(RuntimeError, match=re.escape(words)):
        list(stream_grpc(server.grpc, "tiny", **{"text": "x", **_renamed(settings)}))


def _renamed(settings: dict[str, Any]) -> dict[str, Any]:
    """The client's parameter for text_input is `text`."""
    return {("text" if name == "text_input" else name): value for name, value in settings.items()}


def test_nothing_has_changed_for_others(server: Server, alone: Callable[[str, int], str]) -> None:
    """After all of the above; and a wrong request in the middle of a right one."""
    answers = stream(server.http, "tiny", PROMPTS[2], max_tokens=150, quality="max")
    text = next(answers)["text_output"]
    for body, _, _ in MALFORMED[:16]:
        server.post("/v2/models/tiny/generate", body)
    text += "".join(answer["text_output"] for answer in answers)
    assert text == alone(PROMPTS[2], 150)


def test_other_doors_are_closed(server: Server) -> None:
    """Loading models, mapping shared memory, log and trace files: not without the operator's key."""
    doors = [
        ("POST", "/v2/repository/index", b""),
        ("POST", "/v2/repository/models/tiny/unload", b""),
        ("POST", "/v2/repository/models/x/load", b'{"parameters": {"config": "{}"}}'),
        ("POST", "/v2/systemsharedmemory/region/x/register", b'{"key": "/x", "offset": 0, "byte_size": 1}'),
        ("POST", "/v2/logging", b'{"log_file": "/tmp/x"}'),
        ("POST", "/v2/trace/setting", b'{"trace_file": "/tmp/x"}'),
    ]
    for method, path, body in doors:
        assert server.post(path, body, method)[0] == 403
    assert server.post("/v2/models/other/generate", b'{"text_input": "x"}')[0] in (400, 404)
    assert server.ready()


def test_listens_on_loopback_alone(server: Server) -> None:
    listening = [one.laddr for one in psutil.Process(server.pid).net_connections("tcp") if one.status == "LISTEN"]
    assert {address.port for address in listening} == set(server.ports)
    # gRPC's socket takes both families: the address is loopback's, mapped.
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


# --- Dial and statistics.


def test_dial_turns_while_it_runs(server: Server) -> None:
    """The operator's default is in force within two seconds for requests that ask for nothing; no restart."""

    def active() -> float:
        with ThreadPoolExecutor(8) as pool:
            asks = [pool.submit(generate, server.http, "tiny", text, max_tokens=60) for text in PROMPTS * 2]
            return max(max(ask.result()["active_experts"]) for ask in asks)

    command = [sys.executable, "-m", "lynx_trt.serve", "-o", str(server.repository), "--set-quality"]
    found = {}
    for quality, share in (("max", 1.0), ("balanced", 0.25)):
        subprocess.run([*command, quality], check=True, capture_output=True)
        server.until("lynx_quality_default", share)
        found[quality] = active()
    assert found["max"] > found["balanced"] + 1


def test_metrics_are_prometheus_s(server: Server, long_artifact: Artifact) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports[2])
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    for layer in long_artifact.manifest.model.moe_layers:
        assert f'lynx_active_experts{{layer="{layer.name}",model="tiny",version="1"}}' in text
    for kind in ("histogram", "counter", "gauge"):
        assert f" {kind}" in text
    for name in ("lynx_first_token_seconds_bucket", "lynx_tokens_per_second", "lynx_batch_size", "lynx_waiting"):
        assert name in text
    assert metric(server.target, "lynx_output_tokens_total") > 100


# --- For long.


def test_a_minute_of_random_load(server: Server) -> None:
    """No request fails that shouldn't, no slot is lost, memory stays (the script for 30 minutes is the same)."""
    report = asyncio.run(soak(server.target, seconds=60, longest=120))
    assert report.failed == 0, report.failures
    assert report.running_after == report.waiting_after == 0
    assert min(report.complete, report.left, report.refused) > 20
    # Allocators settle for a minute or two; a leak of a request's tokens would show as tens of megabytes.
    assert report.slope_mb < max(20.0, 6 * report.noise_mb), report


# --- Ends.


def test_full_queue_and_three_ends(long_artifact: Artifact, tmp_path: Path) -> None:
    """A small server: a full queue refuses at once, and of a target that it can't keep it goes to the lowest quality;
    when its model's process dies it ends, instead of calling itself ready; kill -9 leaves no process and nothing that
    hinders the next start; SIGTERM lets requests in flight end."""
    options = ("--slots", "1", "--queue", "2", "--drain", "20", "--tpot", "0.001", "--check", "10")
    for check in (_check_full_queue_and_dead_model, _check_kill, _check_drain):
        server = Server(long_artifact, tmp_path, *options).wait()
        try:
            check(server)
        finally:
            server.end(signal.SIGKILL)
    assert not list(Path("/dev/shm").glob(f"lynx_trt_{server.pid}_*"))


def _check_full_queue_and_dead_model(server: Server) -> None:
    _check_full_queue(server)
    server.model().kill()
    # How differs: its Python backend may unload the model, wait for it as long as --drain allows, or abort by itself.
    server.process.wait(60)
    assert not server.ready()


def _check_kill(server: Server) -> None:
    """Also where the model's process hangs at that moment and can't notice by itself."""
    children = server.children()
    assert len(children) == 2
    server.model().suspend()
    server.end(signal.SIGKILL)
    end = time.monotonic() + 15
    while [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < end
        time.sleep(0.1)


def _check_full_queue(server: Server) -> None:
    async def crowd() -> list[Any]:
        body = {"text_input": "x", "max_tokens": 300, "temperature": 1.0}
        return await asyncio.gather(*(ask("127.0.0.1", server.ports[0], "tiny", body) for _ in range(10)))

    answers = asyncio.run(crowd())
    refused = [answer for answer in answers if answer.error]
    assert len(refused) in (7, 6)
    for answer in refused:
        assert "the queue is full" in answer.error
        assert answer.status == 400
    server.until("lynx_pace", 1)
    server.until("lynx_checked_tokens_total", at_least=10)
    slowest = max(answer.ended - answer.started for answer in refused)
    assert slowest < min(answer.ended - answer.started for answer in answers if not answer.error)


def _check_drain(server: Server) -> None:
    answers = stream(server.http, "tiny", "x", max_tokens=500, temperature=1.0)
    received = [next(answers)]
    os.kill(server.pid, signal.SIGTERM)
    time.sleep(0.3)
    with pytest.raises((OSError, RuntimeError, http.client.HTTPException)):
        generate(server.http, "tiny", "x", max_tokens=1)
    received += list(answers)
    assert received[-1]["output_tokens"] == 500
    assert server.process.wait(30) == 0
