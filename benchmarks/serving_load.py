"""What does a served model give, at 1 to 64 requests at once, and what does the server cost?

    python -m lynx_trt.serve ARTIFACT --name lynx-tiny --slots 64 --start &
    python benchmarks/serving_load.py --artifact ARTIFACT --pid $!
    python benchmarks/serving_load.py --plot

Two questions. *Load*: so many clients ask one request after the other, of mixed lengths, for each quality; tokens a
second, and percentiles of the time to the first token (TTFT) and of each further one (TPOT). *Overhead*: batches of
equal requests, in turn to the server and to `lynx_trt.generate` in this process; the ratio of their times per token.
Every run is appended to benchmarks/results/serving_load.jsonl with what it ran on; plots come from that file alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from http_stream import Answer, ask
from serving_soak import Target, metric

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "serving_load.jsonl"
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
QUALITIES = ("max", "balanced", "fast")
COUNTERS = ("lynx_output_tokens_total", "lynx_decode_steps_total", "lynx_decode_seconds_total")


def prompts(seed: int, count: int) -> list[str]:
    """Pieces of the standard library's sources, of 20 to 600 characters, most of them short."""
    chance = random.Random(seed)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [chance.choice(files).read_text(encoding="utf-8", errors="ignore") for _ in range(count)]
    pieces = []
    for text in texts:
        length = min(600, int(chance.lognormvariate(4.5, 0.8)) + 20)
        start = chance.randrange(max(1, len(text) - length))
        pieces.append(text[start : start + length])
    return pieces


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90 and p99, in milliseconds."""
    return {f"p{p}": round(float(np.percentile(values, p)) * 1e3, 2) for p in (50, 90, 99)}


async def load(target: Target, concurrency: int, quality: str, seconds: float) -> dict[str, Any]:
    """So many clients for so long, each asking one request after the other."""
    texts, chance = prompts(concurrency, 64), random.Random(concurrency)
    answers: list[Answer] = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            new = min(160, 16 + int(chance.expovariate(1 / 48)))
            body = {"text_input": chance.choice(texts), "max_tokens": new, "quality": quality}
            answers.append(await ask(target.host, target.http, target.model, body))

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    wall = time.perf_counter() - started
    failed = [answer.error for answer in answers if answer.error]
    good = [answer for answer in answers if not answer.error and answer.first and answer.ended]
    tpot = [(a.ended - a.first) / (a.tokens - 1) for a in good if a.ended and a.first and a.tokens > 1]
    active = [np.mean(a.last["active_experts"]) for a in good if a.last["active_experts"]]
    return {
        "concurrency": concurrency,
        "quality": quality,
        "seconds": round(wall, 2),
        "requests": len(good),
        "failed": failed[:3],
        "tokens_per_second": round(sum(answer.tokens for answer in good) / wall, 1),
        "ttft_ms": percentiles([a.first - a.started for a in good if a.first]),
        "tpot_ms": percentiles(tpot),
        "active_experts": round(float(np.mean(active)), 2),
    }


def cpu_seconds(pid: int) -> float:
    """Processor time of the server and its children so far: what a busy machine doesn't distort."""
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in [process, *process.children(recursive=True)]]
    return float(sum(time.user + time.system for time in times))


async def _burst(target: Target, batch: int, new: int, quality: str) -> float:
    """Seconds per decode step of `batch` equal requests, as the clients see it (median of their TPOT)."""
    body = {"text_input": "def add(a, b):\n", "max_tokens": new, "quality": quality}
    answers = await asyncio.gather(*(ask(target.host, target.http, target.model, body) for _ in range(batch)))
    assert all(answer.error is None for answer in answers), [answer.error for answer in answers]
    tpot = [(a.ended - a.first) / (a.tokens - 1) for a in answers if a.ended and a.first and a.tokens > 1]
    return statistics.median(tpot)


def overhead(target: Target, artifact: Path, batch: int, rounds: int, new: int, threads: int) -> dict[str, Any]:
    """Time per token of the server over that of `lynx_trt.generate`, in turns so that a busy machine hits both.

    The processor time is that of a whole batch's step, prefill included; the server's is without its clients.
    """
    from lynx_trt.artifact import TOKENIZER, read
    from lynx_trt.runtime.decode import generate
    from lynx_trt.runtime.open import limits_of, open_backend
    from lynx_trt.runtime.sampling import Sampling
    from lynx_trt.runtime.text import Tokenizer

    opened = read(artifact)
    limits, tokenizer = limits_of(opened.manifest), Tokenizer(opened.path(TOKENIZER))
    backend = open_backend(opened, batch, threads=threads)
    prompt = ["def add(a, b):\n"] * batch
    here, served, cpu_here, cpu_served = [], [], 0.0, 0.0
    for _ in range(rounds):
        cpu_here -= time.process_time()
        _, run = generate(
            backend, tokenizer, limits, prompt, budgets=limits.experts, max_new_tokens=new, sampling=Sampling()
        )
        cpu_here += time.process_time()
        here.append(run.decode_seconds / run.decode_steps)
        cpu_served -= cpu_seconds(target.pid)
        served.append(asyncio.run(_burst(target, batch, new, "max")))
        cpu_served += cpu_seconds(target.pid)
    ratios = [s / h for s, h in zip(served, here, strict=True)]
    return {
        "batch": batch,
        "threads": threads,
        "generate_ms": round(statistics.median(here) * 1e3, 3),
        "served_ms": round(statistics.median(served) * 1e3, 3),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_best": round(min(served) / min(here), 3),
        "generate_cpu_ms": round(cpu_here / rounds / new * 1e3, 3),
        "served_cpu_ms": round(cpu_served / rounds / new * 1e3, 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def where() -> dict[str, Any]:
    """What a result was measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S607
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1] for line in lines if line.startswith("model name")), "")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "cpu": cpu.strip() or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "onnxruntime": version("onnxruntime"),
    }


def record(kind: str, results: dict[str, Any], place: dict[str, Any]) -> None:
    """Append a line to the results."""
    RESULTS.mkdir(exist_ok=True)
    with FILE.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"kind": kind, **place, **results}) + "\n")
    print(json.dumps(results))


def plot() -> None:
    """The newest run of each point: throughput, TTFT and TPOT against concurrency, a line a quality."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    newest: dict[tuple[str, int], dict[str, Any]] = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "load":
            newest[row["quality"], row["concurrency"]] = row
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    titles = ("tokens a second", "time to first token, ms (p50, p99 dashed)", "time per token, ms (p50, p99 dashed)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="concurrent requests", xscale="log")
        axis.set_xticks(CONCURRENCY, [str(number) for number in CONCURRENCY])
        axis.grid(alpha=0.3)
    for number, quality in enumerate(QUALITIES):
        rows = [newest[quality, c] for c in CONCURRENCY if (quality, c) in newest]
        x, color = [row["concurrency"] for row in rows], f"C{number}"
        axes[0].plot(x, [row["tokens_per_second"] for row in rows], "o-", color=color, label=quality)
        for axis, key in ((axes[1], "ttft_ms"), (axes[2], "tpot_ms")):
            axis.plot(x, [row[key]["p50"] for row in rows], "o-", color=color)
            axis.plot(x, [row[key]["p99"] for row in rows], "--", color=color, alpha=0.6)
    axes[0].legend()
    row = next(iter(newest.values()))
    figure.suptitle(f"{row['model']}, {row['precision']}, {row['cores']} cores of {row['cpu']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(RESULTS / "serving_load.png", dpi=120)


def main() -> None:
    """Measure, or plot what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="the artifact that is served")
    parser.add_argument("--model", default="lynx-tiny")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--pid", type=int, required="--plot" not in sys.argv, help="the server's process")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each point")
    parser.add_argument("--concurrency", type=int, nargs="*", default=list(CONCURRENCY))
    parser.add_argument("--quality", nargs="*", default=list(QUALITIES))
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16], help="batches of the overhead")
    parser.add_argument("--rounds", type=int, default=7, help="of the overhead")
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1), help="of generate")
    parser.add_argument("--plot", action="store_true", help="only draw what is recorded")
    options = parser.parse_args()
    if options.plot:
        plot()
        return
    target = Target(options.host, options.http_port, options.metrics_port, options.model, options.pid)
    place = where()
    if options.artifact:
        from lynx_trt.artifact import read

        manifest = read(options.artifact).manifest
        place |= {"model": manifest.model.name, "precision": manifest.model.precision}
        place["budgets"] = manifest.selection.budgets
    for quality in options.quality:
        for concurrency in options.concurrency:
            before, cpu = [metric(target, name) for name in COUNTERS], cpu_seconds(target.pid)
            results = asyncio.run(load(target, concurrency, quality, options.seconds))
            time.sleep(1.5)  # counters are handed over once a second
            tokens, steps, seconds = (
                metric(target, name) - early for name, early in zip(COUNTERS, before, strict=True)
            )
            results |= {"mean_batch": round(tokens / steps, 2), "step_ms": round(seconds / steps * 1e3, 2)}
            results["server_cpu_ms_per_token"] = round((cpu_seconds(target.pid) - cpu) / tokens * 1e3, 3)
            record("load", results, place)
    for batch in options.batch if options.artifact else []:
        record("overhead", overhead(target, options.artifact, batch, options.rounds, 120, options.threads), place)


if __name__ == "__main__":
    main()
