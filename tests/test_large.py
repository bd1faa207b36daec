"""A model of 2 GB: memory and time of the whole build, with the expert weights inside the engine and outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GB = 1e9


@pytest.fixture(scope="module")
def checkpoint_of_2gb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral-shaped, bf16, in shards of the hub's layout; the numbers don't matter, so each tensor is one number."""
    import torch
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2560,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=32,
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for number, parameter in enumerate(model.parameters(), 1):
        parameter.data.fill_(number / 1024)  # unlike each other: TensorRT stores equal constants once
    folder = tmp_path_factory.mktemp("large") / "checkpoint"
    model.save_pretrained(folder, max_shard_size="500MB", save_original_format=True)
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 2 * GB
    return folder


def build(folder: Path, output: Path, *options: str) -> dict[str, Any]:
    """`build` in a process of its own, so that the peak is that of the build alone."""
    command = [sys.executable, "-m", "lynx_trt.build", str(folder), "-o", str(output), "--precision", "bf16", "--json"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@pytest.mark.slow
def test_two_gigabytes(checkpoint_of_2gb: Path, tmp_path: Path) -> None:
    inside = build(checkpoint_of_2gb, tmp_path / "inside", "--expert-weights", "engine")
    outside = build(checkpoint_of_2gb, tmp_path / "outside")  # as for every model of that size
    weights = inside["weight_bytes"]
    print(json.dumps({"inside": inside, "outside": outside}, indent=1))
    for report in (inside, outside):
        assert max(report["peak_bytes"], report["engine"]["peak_bytes"]) <= 3 * weights + 1.5 * GB
        # The export streams: it never holds what the largest parameter does not ask for.
        assert report["peak_bytes"] <= 1.5 * GB, report["peak_bytes"]
    assert inside["engine"]["plan_bytes"] > weights
    assert outside["engine"]["plan_bytes"] < weights / 4
    assert outside["engine"]["peak_bytes"] < inside["engine"]["peak_bytes"] / 4
    assert outside["engine"]["seconds"] < inside["engine"]["seconds"] / 4
