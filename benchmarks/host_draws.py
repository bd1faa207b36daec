"""How long does drawing the next token take on the host, by size of vocabulary and by way? One command, half a minute:

    python benchmarks/host_draws.py

Random normal logits of standard deviation 3, 16 rows at a time, one core; milliseconds a row, the median of rounds in
which all ways take turns. Everything goes to benchmarks/results/host_draws.json, and is printed as a table.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from serving_common import RESULTS, where

from lynx_trt.runtime.sampling import Sampling, draw, draws_of

VOCABULARIES = (4096, 32_000, 151_936)
BATCH = 16
WAYS = {
    "greedy": Sampling(),
    "temperature 0.7": Sampling(0.7),
    "temperature 0.7, top-k 20, top-p 0.95": Sampling(0.7, 0.95, top_k=20),
    "temperature 0.7, top-p 0.95": Sampling(0.7, 0.95),
}


def measure(vocabulary: int, rounds: int) -> dict[str, float]:
    """Milliseconds a row of each way."""
    logits = (np.random.default_rng(0).standard_normal((BATCH, vocabulary)) * 3).astype(np.float32)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way, sampling in WAYS.items():
            how = [(row, sampling, np.random.default_rng([number, row])) for row in range(BATCH)]
            started = time.perf_counter()
            draw(logits, draws_of(BATCH, how))
            seconds[way].append(time.perf_counter() - started)
    return {way: round(float(np.median(times)) * 1e3 / BATCH, 4) for way, times in seconds.items()}


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS / "host_draws.json")
    options = parser.parse_args()
    record: dict[str, Any] = where() | {"batch": BATCH}
    record["ms_a_row"] = {str(vocabulary): measure(vocabulary, options.rounds) for vocabulary in VOCABULARIES}
    options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("| tokens of vocabulary | " + " | ".join(WAYS) + " |\n|---|" + "---|" * len(WAYS))
    for vocabulary, times in record["ms_a_row"].items():
        print(f"| {vocabulary} | " + " | ".join(f"{times[way]:.3f} ms" for way in WAYS) + " |")


if __name__ == "__main__":
    main()
