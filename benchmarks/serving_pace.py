"""Does `serve --tpot` keep its target when load comes, and what does it give up for it? One command, 6 minutes:

    python benchmarks/serving_pace.py
    python benchmarks/serving_pace.py --show     # only table and plot of what is recorded

A model whose steps are its experts' (random weights, 500 MB of them; benchmarks/compare_models.py has it) is served
once. Clients come and go, 1, 4, 16, 4, 1 of them for 20 seconds each, and the same again for each way in turn: all
experts (`max`), a quarter of them (0.25), and between both by itself (`paced`). The target is a share of the
time that a token takes at `max` with the most clients, measured just before. Times of tokens are the server's, in the
last response of each request (a client can't tell those that come as one piece). Everything goes to
benchmarks/results/serving_pace.json; table and plot in docs/serving.md come from that file alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from compare_models import large_checkpoint
from http_stream import Answer, ask
from serving_common import RESULTS, Target, recorded, where
from serving_load import DOCS, PAGE, crowd, percentiles, prompts, serving, told
from serving_report import insert, pace_tables, plot_pace

CLIENTS = (1, 4, 16, 4, 1)
SHARE = 0.8
LOWEST = "0.25"
WAYS = {"max": ("max", False), LOWEST: (LOWEST, False), "paced": ("max", True)}  # quality, with the target
TAKEN_SECONDS = 2.5  # the server looks at the dial file every second, and ends what it has begun


def built(folder: Path) -> Path:
    """The model, for ONNX Runtime, with lynx-tiny's tokenizer."""
    checkpoint = large_checkpoint(folder / "checkpoint", positions=512)
    command = [sys.executable, "-m", "lynx_trt.build", str(checkpoint), "-o", str(folder / "artifact")]
    command += ["--tensorrt", "none", "--tokenizer", str(DOCS.parent / "models" / "lynx-tiny")]
    subprocess.run(command, check=True)  # noqa: S603
    return folder / "artifact"


def turn(repository: Path, quality: str, milliseconds: float) -> None:
    """As an operator does it, and wait until it is taken."""
    from lynx_trt.serving.repository import set_dial

    set_dial(repository, quality=quality, tpot=milliseconds)
    time.sleep(TAKEN_SECONDS)


def bodies(seed: int) -> list[dict[str, Any]]:
    """Short prompts and 32 to 96 new tokens, whatever the model would end: its weights are random."""
    chance = random.Random(seed)
    return [
        {"text_input": text, "max_tokens": chance.randint(32, 96), "ignore_eos": True}
        for text in prompts(seed, 64, most=60)
    ]


async def profile(target: Target, clients: tuple[int, ...], length: float, seed: int) -> list[list[Answer]]:
    """The answers of each phase. A client that has begun an answer when its phase ends waits for it."""
    return [await crowd(target, many, length, bodies(seed + number)) for number, many in enumerate(clients)]


def phases(way: str, clients: tuple[int, ...], found: list[list[Answer]], milliseconds: float) -> list[dict[str, Any]]:
    """One row for each number of clients, of all the answers that it had."""
    rows = []
    for many in dict.fromkeys(clients):
        answers = [one for count, phase in zip(clients, found, strict=True) if count == many for one in phase]
        good = [one for one in answers if not one.error]
        times = [token_seconds(one) for one in good]
        wall = sum(
            max(one.ended or 0 for one in phase) - min(one.started for one in phase)
            for count, phase in zip(clients, found, strict=True)
            if count == many
        )
        rows.append(
            {
                "clients": many,
                "way": way,
                "requests": len(good),
                "failed": [one.error for one in answers if one.error][:3],
                "tokens_per_second": round(sum(one.tokens for one in good) / wall, 1),
                "tpot_ms": percentiles(times),
                "kept": round(float(np.mean([value * 1e3 <= milliseconds for value in times])), 3),
                "active_experts": round(float(np.mean([active(one) for one in good])), 2),
            }
        )
    return rows


def token_seconds(answer: Answer) -> float:
    """Of each token after the first."""
    return float(answer.last["token_seconds"])


def active(answer: Answer) -> float:
    """Experts that a layer loaded, mean over an answer's steps and the layers."""
    return float(np.mean(answer.last["active_experts"]))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything, as one record."""
    artifact, repository = built(folder), folder / "repository"
    most, clients = max(options.clients), tuple(options.clients)
    record: dict[str, Any] = {
        **where(),
        "model": "a Qwen3-MoE of random weights (2 layers, 64 experts of which a token uses 4, 500 MB of experts)",
        "precision": "fp32",
        "threads": 0,
        "clients": clients,
        "seconds": options.seconds,
        "share": options.share,
        "lowest": LOWEST,
        "ways": list(WAYS),
        "phases": [],
        "answers": [],
    }
    with serving(artifact, folder, 0, "--slots", str(most), "--quality", "max", "--lowest", LOWEST) as target:
        asyncio.run(ask(target.host, target.http, target.model, bodies(0)[0]))
        first = asyncio.run(crowd(target, most, options.seconds / 2, bodies(99)))
        record["tpot_ms"] = round(
            options.share * 1e3 * float(np.median([token_seconds(one) for one in first if not one.error])), 1
        )
        for way, (quality, aimed) in WAYS.items():
            turn(repository, quality, record["tpot_ms"] if aimed else 0)
            found = asyncio.run(profile(target, clients, options.seconds, seed=7))
            record["phases"] += [told(row) for row in phases(way, clients, found, record["tpot_ms"])]
            for number, phase in enumerate(found):
                begun = min(one.started for one in phase) - number * options.seconds
                record["answers"] += [
                    {
                        "way": way,
                        "ended": round(one.ended - begun, 2),
                        "tpot_ms": round(token_seconds(one) * 1e3, 2),
                        "active": round(active(one), 2),
                    }
                    for one in phase
                    if not one.error and one.ended is not None
                ]
    record["phases"].sort(key=lambda row: row["clients"])
    return record


def as_text(record: dict[str, Any]) -> str:
    """JSON with a line for each answer: the file stays small and its changes readable."""
    lines = ",\n  ".join(json.dumps(answer) for answer in record["answers"])
    text = json.dumps({**record, "answers": []}, indent=1)
    return text.replace('"answers": []', f'"answers": [\n  {lines}\n ]')


def main() -> None:
    """Measure, record, and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    parser.add_argument("--clients", type=int, nargs="*", default=list(CLIENTS))
    parser.add_argument("--share", type=float, default=SHARE, help="the target, of the time of a token at max")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving_pace.json")
    parser.add_argument("--show", action="store_true", help="only what is recorded")
    options = parser.parse_args()
    record = recorded(options, lambda folder: measure(options, folder), as_text)
    plot_pace(record, DOCS / "images" / "serving_pace.png")
    insert(pace_tables(record), PAGE, "serving_pace")
    print(pace_tables(record))


if __name__ == "__main__":
    main()
