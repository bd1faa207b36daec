"""What does a served model give at 1 to 64 requests at once, and what does the server cost? One command, 6 minutes:

    python benchmarks/serving_load.py
    python benchmarks/serving_load.py --show     # only tables and plot of what is recorded

It builds the shipped model, serves it on free ports of loopback, and measures three things. *Load*: so many clients
ask one request after the other, of mixed lengths, for each quality; tokens a second, and percentiles of the time to the
first token (TTFT) and of each further one (TPOT). *Batching*: one client against sixteen, in turn, with short prompts
and long answers. *Overhead*: batches of requests, in turn to the server and to `lynx_trt.generate` in this process; the
ratio of their times per token. Everything goes to benchmarks/results/serving_load.json with what it ran on; the
tables in docs/serving.md and the plot come from that file alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from http_stream import Answer, ask
from serving_common import RESULTS, Target, metric, recorded, where
from serving_report import insert, plot, tables

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
QUALITIES = ("max", "balanced", "fast")
COUNTERS = ("lynx_output_tokens_total", "lynx_decode_steps_total", "lynx_decode_seconds_total")
FLUSH_SECONDS = 1.5  # counters are handed over once a second
NAME = "lynx-tiny"
DOCS = Path(__file__).parent.parent / "docs"
PLOT, PAGE = DOCS / "images" / "serving_load.png", DOCS / "serving.md"


def prompts(seed: int, count: int, most: int = 600) -> list[str]:
    """Pieces of the standard library's sources, of 20 to `most` characters, most of them short."""
    chance = random.Random(seed)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [chance.choice(files).read_text(encoding="utf-8", errors="ignore") for _ in range(count)]
    pieces = []
    for text in texts:
        length = min(most, int(chance.lognormvariate(4.5, 0.8)) + 20)
        start = chance.randrange(max(1, len(text) - length))
        pieces.append(text[start : start + length])
    return pieces


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99, in milliseconds."""
    return {f"p{p}": round(float(np.percentile(values, p)) * 1e3, 2) for p in (50, 90, 99)}


def tpot(answer: Answer) -> float | None:
    """Seconds of each token after the first."""
    if answer.ended is None or answer.first is None or answer.tokens < 2:
        return None
    return (answer.ended - answer.first) / (answer.tokens - 1)


async def crowd(target: Target, clients: int, seconds: float, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """So many clients for so long, each asking one request after the other."""
    answers: list[Answer] = []
    end = time.perf_counter() + seconds
    waiting = iter(bodies[number % len(bodies)] for number in range(1_000_000))

    async def client() -> None:
        while time.perf_counter() < end:
            answers.append(await ask(target.host, target.http, target.model, next(waiting)))

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


def observe(target: Target, clients: int, seconds: float, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Load the server; what the clients saw and what the server counted meanwhile."""
    before, cpu = [metric(target, name) for name in COUNTERS], cpu_seconds(target.pid)
    started = time.perf_counter()
    answers = asyncio.run(crowd(target, clients, seconds, bodies))
    wall = time.perf_counter() - started
    cpu = cpu_seconds(target.pid) - cpu
    time.sleep(FLUSH_SECONDS)
    tokens, steps, decode = (metric(target, name) - early for name, early in zip(COUNTERS, before, strict=True))
    good = [answer for answer in answers if not answer.error and answer.first]
    active = [np.mean(answer.last["active_experts"]) for answer in good if answer.last["active_experts"]]
    return {
        "requests": len(good),
        "failed": [answer.error for answer in answers if answer.error][:3],
        "tokens_per_second": round(sum(answer.tokens for answer in good) / wall, 1),
        "ttft_ms": percentiles([answer.first - answer.started for answer in good if answer.first]),
        "tpot_ms": percentiles([value for answer in good if (value := tpot(answer)) is not None]),
        "active_experts": round(float(np.mean(active)), 2),
        "mean_batch": round(tokens / steps, 2),
        "step_ms": round(decode / steps * 1e3, 3),
        # The first token of a request comes from its prefill.
        "decode_tokens_per_second": round((tokens - len(good)) / decode, 1),
        "server_cpu_ms_per_token": round(cpu / tokens * 1e3, 3),
    }


def cpu_seconds(pid: int) -> float:
    """Processor time of the server and its children so far: what a busy machine distorts least."""
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in [process, *process.children(recursive=True)]]
    return float(sum(one.user + one.system for one in times))


# --- The three measurements.


def load(target: Target, concurrency: int, quality: str, seconds: float) -> dict[str, Any]:
    """Mixed lengths: prompts of 20 to 600 characters, 16 to 160 new tokens."""
    chance = random.Random(concurrency)
    bodies = [
        {"text_input": text, "max_tokens": min(160, 16 + int(chance.expovariate(1 / 48))), "quality": quality}
        for text in prompts(concurrency, 64)
    ]
    return {"concurrency": concurrency, "quality": quality, **observe(target, concurrency, seconds, bodies)}


def batching(target: Target, quality: str, rounds: int, seconds: float, many: int = 16) -> dict[str, Any]:
    """Decode throughput of `many` clients over one: short prompts, all different, 128 new tokens."""
    bodies = [{"text_input": text, "max_tokens": 128, "quality": quality} for text in prompts(0, 64, most=60)]
    found: dict[int, list[dict[str, Any]]] = {1: [], many: []}
    for _ in range(rounds):
        for clients, results in found.items():
            results.append(observe(target, clients, seconds, bodies))
    summary: dict[str, Any] = {"quality": quality, "rounds": rounds, "concurrency": many}
    for key in ("tokens_per_second", "decode_tokens_per_second"):
        ratios = [most[key] / one[key] for one, most in zip(found[1], found[many], strict=True)]
        summary[key] = {str(n): statistics.median(result[key] for result in results) for n, results in found.items()}
        summary[f"{key}_ratio"] = round(statistics.median(ratios), 2)
        summary[f"{key}_ratios"] = [round(ratio, 2) for ratio in ratios]
    return summary


def overhead(target: Target, artifact: Path, batch: int, rounds: int, new: int, threads: int) -> dict[str, Any]:
    """Time per token of the server over that of `lynx_trt.generate`: the same prompts, all experts, in turns.

    0 threads leave both the choice: `generate` takes all cores, the server what start.py says.
    """
    from lynx_trt.artifact import TOKENIZER, read
    from lynx_trt.budgets import Restriction
    from lynx_trt.runtime.decode import generate
    from lynx_trt.runtime.open import limits_of, open_backend
    from lynx_trt.runtime.sampling import Sampling
    from lynx_trt.runtime.text import Tokenizer

    opened = read(artifact)
    limits, tokenizer = limits_of(opened.manifest), Tokenizer(opened.path(TOKENIZER))
    backend = open_backend(opened, batch, threads=threads or None)
    texts = prompts(batch, batch, most=60)

    def here() -> float:
        sequences, _ = generate(
            backend,
            tokenizer,
            limits,
            texts,
            restriction=Restriction(limits.experts),
            max_new_tokens=new,
            sampling=Sampling(),
        )
        spans = [(one.times.ended or 0) - (one.times.first_token or 0) for one in sequences]
        return statistics.median(span / (len(one.tokens) - 1) for span, one in zip(spans, sequences, strict=True))

    async def burst() -> list[Answer]:
        bodies = ({"text_input": text, "max_tokens": new, "quality": "max"} for text in texts)
        return await asyncio.gather(*(ask(target.host, target.http, target.model, body) for body in bodies))

    def served() -> float:
        return statistics.median(value for answer in asyncio.run(burst()) if (value := tpot(answer)) is not None)

    here(), served()
    pairs = [(here(), served()) for _ in range(rounds)]
    ratios = [there / own for own, there in pairs]
    return {
        "batch": batch,
        "threads": threads,
        "rounds": rounds,
        "generate_ms": round(statistics.median(own for own, _ in pairs) * 1e3, 3),
        "served_ms": round(statistics.median(there for _, there in pairs) * 1e3, 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


# --- The server.


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def serving(artifact: Path, folder: Path, threads: int, *more: str) -> Iterator[Target]:
    """The artifact, served with 64 slots, or with the options that are given, until the block ends."""
    http, grpc, metrics = free_ports(3)
    options = f"--name {NAME} --slots 64 --start --threads {threads}".split()
    options += f"--http-port {http} --grpc-port {grpc} --metrics-port {metrics}".split()
    command = [sys.executable, "-m", "lynx_trt.serve", str(artifact), "-o", str(folder / "repository")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, *options, *more], stdout=log, stderr=subprocess.STDOUT)  # noqa: S603
    target = Target("127.0.0.1", http, metrics, NAME, process.pid)
    try:
        for _ in range(600):
            try:
                metric(target, "lynx_running")
                answer = asyncio.run(ask(target.host, http, NAME, {"text_input": "x", "max_tokens": 2}))
                if answer.error is None:
                    break
            except OSError:
                pass
            if process.poll() is not None:
                break
            time.sleep(0.2)
        else:
            raise SystemExit(f"the server doesn't get ready; its log:\n{(folder / 'log').read_text()[-3000:]}")
        if process.poll() is not None:
            raise SystemExit(f"the server ended; its log:\n{(folder / 'log').read_text()[-3000:]}")
        yield target
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def shipped(folder: Path) -> Path:
    """The shipped model, built for ONNX Runtime."""
    command = [sys.executable, "-m", "lynx_trt.build", "-o", str(folder / "artifact"), "--tensorrt", "none"]
    subprocess.run(command, check=True)  # noqa: S603
    return folder / "artifact"


def told(results: dict[str, Any]) -> dict[str, Any]:
    """The same, after a line for whoever waits."""
    print(json.dumps(results), flush=True)
    return results


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything, as one record."""
    from lynx_trt.artifact import read

    artifact = options.artifact or shipped(folder)
    manifest = read(artifact).manifest
    record: dict[str, Any] = {
        **where(),
        "model": manifest.model.name,
        "precision": manifest.model.precision,
        "experts": [layer.experts for layer in manifest.model.moe_layers],
        "budgets": manifest.selection.budgets,
        "floors": manifest.selection.floors,
        "threads": options.threads,
        "seconds": options.seconds,
    }
    with serving(artifact, folder, options.threads) as target:
        record["overhead"] = [
            told(overhead(target, artifact, batch, options.rounds, 120, options.threads)) for batch in (1, 16)
        ]
        record["batching"] = [told(batching(target, quality, options.rounds, 2.0)) for quality in options.quality]
        record["load"] = [
            told(load(target, concurrency, quality, options.seconds))
            for concurrency in options.concurrency
            for quality in options.quality  # side by side, so that a busy moment hits them all
        ]
    return record


def main() -> None:
    """Measure, record, and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="instead of the shipped model")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each point of the load")
    parser.add_argument("--concurrency", type=int, nargs="*", default=list(CONCURRENCY))
    parser.add_argument("--quality", nargs="*", default=list(QUALITIES))
    parser.add_argument("--rounds", type=int, default=5, help="of batching and overhead")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime, both sides; 0: what each takes itself")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving_load.json")
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--page", type=Path, default=PAGE, help="where the tables go")
    parser.add_argument("--show", action="store_true", help="only what is recorded")
    options = parser.parse_args()
    record = recorded(options, lambda folder: measure(options, folder))
    plot(record, options.plot)
    insert(tables(record), options.page, "serving_load")
    print(tables(record))


if __name__ == "__main__":
    main()
