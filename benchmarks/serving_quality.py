"""What does a served model say of its quality, and does `--max-kl` keep it? One command, 3 minutes:

    python benchmarks/serving_quality.py
    python benchmarks/serving_quality.py --show     # only the table of what is recorded

The shipped model is served to 16 clients at each quality, looked at every tenth step: KL and agreement with all
experts, from the server's metrics. Then two of them with a limit, from when it had found its place on. Everything goes
to benchmarks/results/serving_quality.json; the table in docs/serving.md comes from that file alone.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

from serving_common import RESULTS, Target, metric, recorded, where
from serving_load import FLUSH_SECONDS, PAGE, crowd, prompts, serving, shipped, told
from serving_report import insert, quality_table

CLIENTS = 16
EVERY = 10
LIMIT = 0.02
QUALITIES = ("balanced", "fast", "0.25")
LAYERS = 6
COUNTERS = ("checked_tokens", "kl", "agreed_tokens", "decode_steps", "active_experts")


def counted(target: Target) -> dict[str, float]:
    """The counters, after all that was noted has been handed over."""
    time.sleep(FLUSH_SECONDS)
    return {name: metric(target, f"lynx_{name}_total") for name in COUNTERS}


def observe(target: Target, seconds: float, seed: int) -> dict[str, Any]:
    """Load for so long, and what the server found meanwhile."""
    bodies = [
        {"text_input": text, "max_tokens": 128, "temperature": 0.8, "seed": number}
        for number, text in enumerate(prompts(seed, 64))
    ]
    before = counted(target)
    answers = asyncio.run(crowd(target, CLIENTS, seconds, bodies))
    new = {name: value - before[name] for name, value in counted(target).items()}
    return {
        "failed": [answer.error for answer in answers if answer.error][:3],
        "tokens": int(new["checked_tokens"]),
        "kl": round(new["kl"] / new["checked_tokens"], 5),
        "agreement": round(new["agreed_tokens"] / new["checked_tokens"], 4),
        "active_experts": round(new["active_experts"] / new["decode_steps"] / LAYERS, 2),
        "guard": round(metric(target, "lynx_guard"), 3),
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything, as one record."""
    artifact = shipped(folder)
    record: dict[str, Any] = {
        **where(),
        "model": "lynx-tiny",
        "precision": "fp16",
        "threads": 0,
        "clients": CLIENTS,
        "every": EVERY,
        "seconds": options.seconds,
        "rows": [],
    }
    lowest = QUALITIES[-1]
    ways = [(quality, 0.0) for quality in QUALITIES] + [(QUALITIES[1], LIMIT), (lowest, LIMIT)]
    for number, (quality, limit) in enumerate(ways):
        place = folder / str(number)
        place.mkdir()
        more = ("--slots", str(CLIENTS), "--quality", quality, "--check", str(EVERY), "--max-kl", str(limit))
        with serving(artifact, place, 0, *more) as target:
            if limit:
                observe(target, options.seconds, seed=5)
            row = {"quality": quality, "max_kl": limit, **observe(target, options.seconds, seed=3)}
        record["rows"].append(told(row))
    return record


def main() -> None:
    """Measure, record, and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving_quality.json")
    parser.add_argument("--show", action="store_true", help="only what is recorded")
    options = parser.parse_args()
    record = recorded(options, lambda folder: measure(options, folder))
    insert(quality_table(record), PAGE, "serving_quality")
    print(quality_table(record))


if __name__ == "__main__":
    main()
