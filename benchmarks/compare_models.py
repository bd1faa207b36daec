"""Is the ONNX Runtime path faster than `com.microsoft.MoE`, with the selection off and at half of the active experts?

Two models: the shipped lynx-tiny (experts of 92 kB, nodes dominate) and a made-up one with random weights (E=64, K=4,
H=1024, I=320, 2 layers, float32: 500 MB of experts, memory dominates). One run each of `python -m lynx_trt.compare`
with the runners interleaved; ratios are within a run. Appends a row to benchmarks/results/compare_models.json.

    python benchmarks/compare_models.py [--threads N] [--work FOLDER] [--model tiny|large]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = Path(__file__).parent / "results" / "compare_models.json"
BATCHES = (1, 4, 16, 32)


def large_checkpoint(folder: Path) -> Path:
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
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def build(arguments: list[str]) -> None:
    """Run the build command."""
    command = [sys.executable, "-m", "lynx_trt.build", *arguments, "--tensorrt", "none", "--json"]
    subprocess.run(command, check=True)  # noqa: S603


def compare(artifact: Path, checkpoint: Path, output: Path, budgets: list[str], threads: int | None) -> dict[str, Any]:
    """Run the compare command; returns its report."""
    command = [sys.executable, "-m", "lynx_trt.compare", str(artifact), "-o", str(output), "--no-memory"]
    command += ["--checkpoint", str(checkpoint), "--rounds", "5", "--steps", "8", "--prompt", "16"]
    for batch in BATCHES:
        command += ["--batch", str(batch)]
    for budget in budgets:
        command += ["--budget", budget]
    if threads:
        command += ["--threads", str(threads)]
    subprocess.run(command, check=True)  # noqa: S603
    report: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return report


def main() -> None:
    """Build what isn't there, compare, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lynx-compare")
    parser.add_argument("--model", choices=("tiny", "large"), action="append")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    from lynx_trt.build import shipped_model

    for model in options.model or ("tiny", "large"):
        checkpoint = shipped_model() if model == "tiny" else large_checkpoint(options.work / "large-checkpoint")
        artifact = options.work / model
        if not artifact.exists():
            build([str(checkpoint), "-o", str(artifact), "--precision", "fp32", "--max-length", "128"])
        # Half of what is active: 4, 15, 41 and 56 of 64 at batch 1, 4, 16 and 32 (tiny: 4, 10, 20, 24 of 32).
        budgets = ["off", "20"] if model == "large" else ["off", "10"]
        report = compare(artifact, checkpoint, options.work / f"{model}-report", budgets, options.threads)
        row = {
            key: report[key] for key in ("created", "artifact", "options", "machine", "baseline", "summary", "right")
        }
        rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
        RESULTS.parent.mkdir(exist_ok=True)
        load = list(os.getloadavg())
        RESULTS.write_text(
            json.dumps([*rows, {"model": model, "load": load, **row}], indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
