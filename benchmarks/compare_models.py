"""Is the ONNX Runtime path faster than `com.microsoft.MoE`, with the selection off and at half of the active experts?

Two models: the shipped lynx-tiny (experts of 92 kB, nodes dominate) and a made-up one with random weights (E=64, K=4,
H=1024, I=320, 2 layers, float32: 500 MB of experts, memory dominates). One run each of `python -m lynx_trt.compare`
with the runners interleaved, all on the same number of threads; ratios are within a run. Then how fast this machine
reads memory, and what that leaves to be won. Prints the table of docs/compare.md and appends to
benchmarks/results/compare_models.json. Under 10 minutes on two quiet cores.

    python benchmarks/compare_models.py [--threads N] [--work FOLDER] [--model tiny|large] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = Path(__file__).parent / "results" / "compare_models.json"
BATCHES = (1, 4, 16, 32)
# Half of what is active at batch 16 and 32: 41 and 56 of 64 in the large model, 21 and 24 of 32 in lynx-tiny.
HALF = {"large": {16: "20", 32: "28"}, "tiny": {16: "10", 32: "12"}}
READ_BYTES = 400 << 20


def large_checkpoint(folder: Path, positions: int = 128) -> Path:
    """A Qwen3-MoE with random weights."""
    import torch
    import transformers

    if not folder.exists():
        torch.manual_seed(0)
        config = transformers.Qwen3MoeConfig(
            vocab_size=2048,
            hidden_size=1024,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=512,
            moe_intermediate_size=320,
            num_experts=64,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
        )
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def build(arguments: list[str]) -> None:
    """Run the build command."""
    command = [sys.executable, "-m", "lynx_trt.build", *arguments, "--tensorrt", "none", "--json"]
    subprocess.run(command, check=True)  # noqa: S603


def compare(artifact: Path, checkpoint: Path, output: Path, budgets: list[str], options: Any) -> dict[str, Any]:
    """Run the compare command; returns its report."""
    command = [sys.executable, "-m", "lynx_trt.compare", str(artifact), "-o", str(output), "--no-memory"]
    command += ["--checkpoint", str(checkpoint), "--prompt", "16", "--threads", str(options.threads)]
    command += ["--rounds", "1", "--steps", "4"] if options.quick else ["--rounds", "5", "--steps", "16"]
    for batch in BATCHES:
        command += ["--batch", str(batch)]
    for budget in budgets:
        command += ["--budget", budget]
    subprocess.run(command, check=True)  # noqa: S603
    report: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return report


def read_bandwidth(threads: int) -> float:
    """Bytes a second that this machine reads from memory, the best of ten sums."""
    import torch

    torch.set_num_threads(threads)
    values = torch.ones(READ_BYTES // 4)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - start)
    return READ_BYTES / min(times)


def judge(model: str, report: dict[str, Any], bandwidth: float) -> list[dict[str, Any]]:
    """A row for each batch: ratios of the same run's pairs of samples, and what memory alone would take."""
    artifact, decode = report["artifact"], report["samples"]["decode"]
    experts = sum(n * size for n, size in zip(artifact["experts"], artifact["expert_bytes"], strict=True))
    dense = artifact["files"]["weights.safetensors"] - experts
    rows = []
    for batch in BATCHES:
        samples = {name: np.array(batches[str(batch)]) for name, batches in decode.items()}
        half = HALF[model].get(batch)
        eager, off = samples["hf-eager"], samples["lynx@off"]
        active = np.array(report["samples"]["active"]["lynx@off"][str(batch)])
        read = dense + float(active @ np.array(artifact["expert_bytes"]))
        rows.append(
            {
                "model": model,
                "batch": batch,
                "active": float(active.mean()),
                "milliseconds": 1e3 * float(np.median(off)),
                "off": _quantiles(samples["ort-moe"] / off),
                "half": half and _quantiles(samples["ort-moe"] / samples[f"lynx@{half}"]),
                "eager": _quantiles(eager / off),
                "half_eager": half and _quantiles(eager / samples[f"lynx@{half}"]),
                "read_bytes": read,
                "most_against_eager": float(np.median(eager)) / (read / bandwidth),
            }
        )
    return rows


def _quantiles(ratios: Any) -> list[float]:
    """Median, p10, p90."""
    return [float(value) for value in np.percentile(ratios, [50, 10, 90])]


def table(rows: list[dict[str, Any]], bandwidth: float, threads: int) -> str:
    """The table of docs/compare.md."""

    def cell(ratio: list[float] | None) -> str:
        return "{:.2f} ({:.2f} to {:.2f})".format(*ratio) if ratio else ""

    lines = [
        f"{threads} threads; memory is read at {bandwidth / 1e9:.1f} GB/s. Median of pairs (p10 to p90).",
        "",
        "| model | batch | active | ms a step | off against ort-moe | half of them | off against eager | half of them "
        "| GB/s | most against eager |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed = row["read_bytes"] / row["milliseconds"] / 1e6
        lines.append(
            f"| {row['model']} | {row['batch']} | {row['active']:.1f} | {row['milliseconds']:.2f} | {cell(row['off'])} "
            f"| {cell(row['half'])} | {cell(row['eager'])} | {cell(row['half_eager'])} "
            f"| {speed:.1f} | {row['most_against_eager']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Build what isn't there, compare, judge, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lynx-compare")
    parser.add_argument("--model", choices=tuple(HALF), action="append")
    parser.add_argument("--quick", action="store_true", help="see that it runs; nothing is recorded")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    from lynx_trt.build import shipped_model

    reports = {}
    for model in options.model or HALF:
        checkpoint = shipped_model() if model == "tiny" else large_checkpoint(options.work / "large-checkpoint")
        artifact = options.work / model
        if not artifact.exists():
            build([str(checkpoint), "-o", str(artifact), "--precision", "fp32", "--max-length", "128"])
        budgets = ["off", *HALF[model].values()]
        reports[model] = compare(artifact, checkpoint, options.work / f"{model}-report", budgets, options)
    bandwidth = read_bandwidth(options.threads)
    judged = {model: judge(model, report, bandwidth) for model, report in reports.items()}
    print(table([row for rows in judged.values() for row in rows], bandwidth, options.threads))
    if options.quick:
        return
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    for model, report in reports.items():
        kept = ("created", "artifact", "options", "machine", "baseline", "summary", "right", "problems")
        row = {key: report[key] for key in kept}
        rows.append(
            {
                "model": model,
                "commit": _commit(),
                "load": list(os.getloadavg()),
                "read_bytes_a_second": bandwidth,
                "judged": judged[model],
                **row,
            }
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=RESULTS.parent).stdout.strip()  # noqa: S603


if __name__ == "__main__":
    main()
