"""Does a served model stay sound? Random load of every kind for minutes, then: no slot lost, no memory growing.

    python -m lynx_trt.serve ARTIFACT --name lynx-tiny --start &
    python benchmarks/serving_soak.py --pid $! --minutes 30

Requests of random length, quality and sampling; clients that go away; bursts beyond the queue; requests that are
wrong. The server's processes (the one of --pid and its children) are measured twice a second. The report, with what
it ran on, goes to benchmarks/results/serving_soak.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from http_stream import ask
from serving_common import RESULTS, Target, metric, where

WRONG: list[dict[str, Any]] = [
    {"text_input": ""},
    {"text_input": "x", "max_tokens": -1},
    {"text_input": "x", "quality": "best"},
    {"text_input": "x", "temperature": -1},
    {"text_input": "x" * 200_000},
    {"text_input": "x", "tokens": 3},
    {"text_input": "x", "repetition_penalty": 1e-30},
    {"text_input": "x", "logit_bias": '{"x": 1}'},
]
WORDS = ["def", "class", "import", "return", "(", ")", ":", "=", "\n", "    ", "# żółw", '"', "0", "1", "foo", "bar"]


@dataclass
class Report:
    """What a run came to. Memory in megabytes; `slope` is per minute over the second half of the run."""

    seconds: float = 0.0
    requests: int = 0
    complete: int = 0
    left: int = 0
    refused: int = 0
    busy: int = 0
    failed: int = 0
    tokens: int = 0
    running_after: float = -1.0
    waiting_after: float = -1.0
    first_mb: float = 0.0
    last_mb: float = 0.0
    slope_mb: float = 0.0
    noise_mb: float = 0.0
    failures: tuple[str, ...] = ()
    minutes_mb: dict[str, list[float]] = field(default_factory=dict)  # each process's mean of each minute


def memory(pid: int) -> dict[str, float]:
    """Resident memory of a process and of each of its children, in megabytes."""
    process = psutil.Process(pid)
    return {
        f"{one.name()} {one.pid}": one.memory_info().rss / 1e6 for one in [process, *process.children(recursive=True)]
    }


def request(chance: random.Random, longest: int) -> dict[str, Any]:
    """A request that can be answered."""
    text = " ".join(chance.choices(WORDS, k=max(1, int(chance.paretovariate(1.0)) % (longest // 8))))
    body: dict[str, Any] = {"text_input": text, "max_tokens": min(longest, max(1, int(chance.expovariate(1 / 40))))}
    if chance.random() < 0.5:
        body |= {"temperature": chance.uniform(0.1, 2.0), "top_p": chance.uniform(0.3, 1.0)}
        body["top_k"] = chance.choice([0, 1, 20, 5000])
        body["seed"] = chance.randrange(1 << 40)
    if chance.random() < 0.5:
        body["quality"] = chance.choice(["max", "balanced", "fast", "0.3"])
    if chance.random() < 0.2:
        body |= {"repetition_penalty": chance.uniform(0.5, 2.0), "presence_penalty": chance.uniform(-2.0, 2.0)}
        body |= {"frequency_penalty": chance.uniform(-2.0, 2.0), "min_p": chance.choice([0.0, 0.05, 1.0])}
        body["logit_bias"] = json.dumps({str(chance.randrange(200)): chance.uniform(-100, 100) for _ in range(5)})
    if chance.random() < 0.2:
        body["stop"] = ["\n\n", "def "]
    return body


async def _one(target: Target, chance: random.Random, longest: int, report: Report) -> None:
    report.requests += 1
    wrong = chance.random() < 0.1
    body = chance.choice(WRONG) if wrong else request(chance, longest)
    leave = chance.uniform(0.01, 0.6) if chance.random() < 0.15 else None
    answer = await ask(target.host, target.http, target.model, body, leave_after=leave)
    report.tokens += answer.tokens
    if answer.error == "left":
        report.left += 1
    elif answer.error and "queue is full" in answer.error:
        report.busy += 1
    elif wrong and answer.error and answer.status == 400:
        report.refused += 1
    elif not wrong and answer.error is None and answer.last.get("finish_reason") in ("length", "end", "stop"):
        report.complete += 1
    else:
        report.failed += 1
        report.failures = (*report.failures, f"{answer.status} {answer.error} {answer.last}"[:200])[-5:]


async def soak(target: Target, *, seconds: float, seed: int = 0, longest: int = 200, crowd: int = 24) -> Report:
    """Load the server for `seconds` with about `crowd` requests at once, and now and then with far more."""
    chance, report = random.Random(seed), Report()
    samples: list[tuple[float, dict[str, float]]] = []
    tasks: set[asyncio.Task[None]] = set()
    started, next_sample = time.monotonic(), 0.0
    while (now := time.monotonic() - started) < seconds:
        wanted = 5 * crowd if chance.random() < 0.02 else chance.randint(1, crowd)
        while len(tasks) < wanted:
            tasks.add(asyncio.create_task(_one(target, chance, longest, report)))
        done, tasks = await asyncio.wait(tasks, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        if now >= next_sample:
            samples.append((now, memory(target.pid)))
            next_sample = now + 0.5
    await asyncio.gather(*tasks)
    await _until_idle(target, report)
    report.seconds = time.monotonic() - started
    _fit(samples, report)
    return report


async def _until_idle(target: Target, report: Report) -> None:
    """The gauges follow within two seconds; clients that left are noticed within one."""
    for _ in range(20):
        await asyncio.sleep(0.5)
        report.running_after = metric(target, "lynx_running")
        report.waiting_after = metric(target, "lynx_waiting")
        if report.running_after == report.waiting_after == 0:
            return


def _fit(samples: list[tuple[float, dict[str, float]]], report: Report) -> None:
    """A line through the second half: its slope, and how far the samples lie around it."""
    totals = np.array([(second, sum(megabytes.values())) for second, megabytes in samples])
    half = totals[len(totals) // 2 :]
    slope, offset = np.polyfit(half[:, 0], half[:, 1], 1)
    report.first_mb, report.last_mb = float(totals[0, 1]), float(totals[-1, 1])
    report.slope_mb = float(slope) * 60
    report.noise_mb = float(np.std(half[:, 1] - (slope * half[:, 0] + offset)))
    for name in samples[-1][1]:
        minutes: dict[int, list[float]] = {}
        for second, megabytes in samples:
            minutes.setdefault(int(second // 60), []).append(megabytes.get(name, 0.0))
        report.minutes_mb[name] = [round(float(np.mean(values)), 1) for values in minutes.values()]


def main() -> None:
    """Run it, print the report as JSON; exit 1 if a slot is lost or a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pid", type=int, required=True, help="the server's process")
    parser.add_argument("--model", default="lynx-tiny")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--longest", type=int, default=200, help="new tokens of a request, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "serving_soak.json")
    options = parser.parse_args()
    target = Target(options.host, options.http_port, options.metrics_port, options.model, options.pid)
    place = where()
    report = asyncio.run(soak(target, seconds=options.minutes * 60, seed=options.seed, longest=options.longest))
    text = json.dumps({**place, **asdict(report)}, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    sys.exit(1 if report.failed or report.running_after or report.waiting_after else 0)


if __name__ == "__main__":
    main()
