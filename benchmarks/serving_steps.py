"""Where does a decode step of the shipped model spend its time, at batch 1 and 16? One command, two minutes:

    python benchmarks/serving_steps.py
    python benchmarks/serving_steps.py --show     # only the tables of what is recorded

What sixteen sequences at once can give over one is decided here, below scheduler and server. *Steps*: the same decode
on one core, on all cores with ONNX Runtime's own threads, and in pieces of the batch, in turn. *Dial*: the same with
what each quality may load, as it is served, in turn. *Nodes*: the time of each kind of node on one core, by ONNX
Runtime's profiler, which adds a microsecond or two to each node. Everything goes to
benchmarks/results/serving_steps.json; the tables in docs/serving.md come from that file alone.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from serving_common import RESULTS, recorded, where
from serving_load import PAGE, prompts, shipped
from serving_report import insert, steps_tables

STEPS = 120  # a prompt of about 12 tokens and 128 new ones
KINDS = {"MoE": "MoE", "GroupQueryAttention": "GroupQueryAttention", "MatMul": "MatMul", "Gemm": "MatMul"}


class Model:
    """The artifact, and what its decode steps are fed."""

    def __init__(self, folder: Path) -> None:
        from lynx_trt.artifact import TOKENIZER, read
        from lynx_trt.runtime.quality import QUALITIES, Dial
        from lynx_trt.runtime.text import Tokenizer

        self.artifact = read(folder)
        self.tokenizer = Tokenizer(self.artifact.path(TOKENIZER))
        dial = Dial.of(self.artifact.manifest)
        self.restrictions = {quality: dial.restriction(quality) for quality in QUALITIES}

    def backend(self, batch: int, **options: Any) -> Any:
        """What `generate` and the server run, with so many slots."""
        from lynx_trt.runtime.ort import OrtBackend

        return OrtBackend(self.artifact, batch, form="auto", **options)

    def decode(self, backend: Any, quality: str = "max") -> tuple[list[float], list[float]]:
        """Seconds and mean active experts of each decode step, greedy."""
        batch = backend.slots
        tokens = [self.tokenizer.encode(text) for text in prompts(batch, batch, most=60)]
        lengths, one = np.array([len(row) for row in tokens]), np.ones(batch, np.int64)
        ids = np.zeros((batch, lengths.max()), np.int64)
        for row, piece in zip(ids, tokens, strict=True):
            row[: len(piece)] = piece
        result = backend.step(ids, np.zeros(batch, np.int64), lengths, self.restrictions["max"])
        past, seconds, active = lengths.copy(), [], []
        for _ in range(STEPS):
            latest = result.logits.argmax(1)[:, None].astype(np.int64)
            started = time.perf_counter()
            result = backend.step(latest, past, one, self.restrictions[quality])
            seconds.append(time.perf_counter() - started)
            active.append(float(result.active.mean()))
            past += 1
        return seconds, active


def steps(model: Model, rounds: int) -> list[dict[str, Any]]:
    """Median milliseconds of a decode step: one core, all cores, all cores in pieces."""
    cores = len(os.sched_getaffinity(0))
    ways = {"one core": (1, 1), f"{cores} cores, ONNX Runtime's threads": (cores, 1), f"{cores} pieces": (cores, cores)}
    backends = {
        (way, batch): model.backend(batch, threads=threads, pieces=pieces)
        for way, (threads, pieces) in ways.items()
        for batch in (1, 16)
    }
    found: dict[tuple[str, int], list[float]] = {key: [] for key in backends}
    for turn in range(rounds + 1):
        for key, backend in backends.items():
            seconds, _ = model.decode(backend)
            found[key] += seconds if turn else []
    rows = []
    for way in ways:
        one, many = (float(np.median(found[way, batch])) * 1e3 for batch in (1, 16))
        rows.append(
            {"way": way, "one_ms": round(one, 3), "many_ms": round(many, 3), "ratio": round(16 * one / many, 2)}
        )
    return rows


def dial(model: Model, rounds: int) -> list[dict[str, Any]]:
    """Of each quality median milliseconds of a decode step, mean active experts, and tokens/s over those of `max`."""
    rows = []
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        for batch in (1, 4, 16):
            backend = model.backend(batch, threads=threads)
            medians: dict[str, list[float]] = {quality: [] for quality in model.restrictions}
            active = {}
            for turn in range(rounds + 1):
                for quality, found in medians.items():
                    seconds, experts = model.decode(backend, quality)
                    active[quality] = round(float(np.mean(experts)), 2)
                    found += [float(np.median(seconds))] if turn else []
            most = np.array(medians["max"])
            rows.append(
                {
                    "threads": threads,
                    "batch": batch,
                    "ms": {quality: round(float(np.median(found)) * 1e3, 3) for quality, found in medians.items()},
                    "active": active,
                    "ratio": {q: round(float(np.median(most / np.array(found))), 2) for q, found in medians.items()},
                }
            )
    return rows


def nodes(model: Model, batch: int, quality: str, folder: Path) -> dict[str, Any]:
    """Microseconds a decode step spends in each kind of node, on one core."""
    plain = model.backend(batch, threads=1, pieces=1)
    seconds, active = [], []
    for _ in range(4):
        more, active = model.decode(plain, quality)
        seconds += more
    profiled = model.backend(batch, threads=1, profile=folder / f"{batch}-{quality}")
    model.decode(profiled, quality)
    files = [json.loads(Path(name).read_text(encoding="utf-8")) for name in profiled.end_profile()]
    # Of the graphs, the one that all steps ran.
    events = max(files, key=lambda file: sum(event.get("name") == "model_run" for event in file))
    runs = sorted((e for e in events if e.get("name") == "model_run"), key=lambda event: event["ts"])[-STEPS:]
    # An If's own time is that of the nodes in it.
    kernels = [e for e in events if str(e.get("name")).endswith("_kernel_time") and e["args"]["op_name"] != "If"]
    kernels = [event for event in kernels if event["ts"] >= runs[0]["ts"]]
    starts = [event["ts"] for event in runs]
    count, spent = Counter[str](), {kind: np.zeros(STEPS) for kind in (*KINDS.values(), "others")}
    for event in kernels:
        kind = KINDS.get(event["args"]["op_name"], "others")
        count[kind] += 1
        spent[kind][np.searchsorted(starts, event["ts"], side="right") - 1] += event["dur"]
    return {
        "batch": batch,
        "quality": quality,
        "step_us": round(float(np.median(seconds)) * 1e6, 1),
        "active_experts": round(float(np.mean(active)), 1),
        "nodes": {kind: round(count[kind] / STEPS) for kind in spent},
        "us": {kind: round(float(np.median(values)), 1) for kind, values in spent.items()},
    }


def measure(artifact: Path | None, rounds: int, folder: Path) -> dict[str, Any]:
    """Everything, as one record."""
    record: dict[str, Any] = where()
    model = Model(artifact or shipped(folder))
    record |= {"model": model.artifact.manifest.model.name, "steps": steps(model, rounds), "dial": dial(model, rounds)}
    record["nodes"] = [nodes(model, batch, quality, folder) for batch in (1, 4, 16) for quality in ("max", "balanced")]
    return record


def main() -> None:
    """Measure, record, and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="instead of the shipped model")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS / "serving_steps.json")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the tables go")
    parser.add_argument("--show", action="store_true", help="only what is recorded")
    options = parser.parse_args()
    record = recorded(options, lambda folder: measure(options.artifact, options.rounds, folder))
    insert(steps_tables(record), options.page, "serving_steps")
    print(steps_tables(record))


if __name__ == "__main__":
    main()
