"""What does a calibration of many experts and layers cost? A made-up model of 128 experts with skewed routing.

The shape is Qwen3-30B-A3B's (E = 128, K = 8), with fewer layers and far narrower, so that it runs anywhere: what is
measured is the cost of calibrating and the experts that batches use, never the quality, since the weights are random.
Routers prefer some experts: their rows are scaled by a log-normal factor. Times are predicted for experts of the real
model's size (9.4 MB in bf16, 48 layers).

    python benchmarks/calibration_scale.py
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import numpy as np
import torch
import typer
from calibration_common import record

from lynx_trt.budgets import Restriction
from lynx_trt.calibration.cost import cost_model
from lynx_trt.calibration.measure import Meter
from lynx_trt.calibration.model import Probed, Setting
from lynx_trt.calibration.text import Sequences
from lynx_trt.selection import PRESETS

REAL_EXPERT_BYTES, REAL_LAYERS = 9_437_184, 48
SKEW = 0.6


def made_up(layers: int, hidden: int) -> Any:
    """A random model of Qwen3-MoE form whose routers prefer some experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=hidden,
        moe_intermediate_size=hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=512,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.08)
            if name.endswith("mlp.gate.weight"):
                parameter.mul_(torch.exp(SKEW * torch.randn(128, 1)))
    return model


def main(
    layers: Annotated[int, typer.Option(help="Layers of the made-up model.")] = 12,
    hidden: Annotated[int, typer.Option(help="Its hidden size.")] = 128,
    sequences: Annotated[int, typer.Option(help="Sequences of 256 tokens.")] = 64,
) -> None:
    """Measure experts a batch uses, seconds a setting, and memory."""
    from resource import RUSAGE_SELF, getrusage

    probed = Probed(made_up(layers, hidden))
    ids = np.random.default_rng(0).zipf(1.3, size=(sequences, 256)) % 2048
    meter = Meter(
        probed,
        Sequences(ids.astype(np.int64), np.ones_like(ids)),
        prompt=64,
        cost=cost_model("h100", [REAL_EXPERT_BYTES] * layers, 0),
    )
    started = time.perf_counter()
    meter.reference()
    rows: list[dict[str, Any]] = [{"what": "unrestricted run", "seconds": time.perf_counter() - started}]
    per_layer = {name: cost_model(name, [REAL_EXPERT_BYTES], 0) for name in ("h100", "h200", "b200")}
    for batch in (4, 16, 64):
        natural = float(meter.natural(batch).mean())
        started = time.perf_counter()
        (item,) = meter.measure([Setting(PRESETS["lynx"], Restriction((round(natural / 2),) * layers))], batch)
        rows.append(
            {
                "what": "one setting, uniform budget of half",
                "batch": batch,
                "natural_active": natural,
                "active": item.active.mean,
                "seconds": time.perf_counter() - started,
                "predicted_ms_natural": {
                    name: 1e3 * REAL_LAYERS * cost.step_seconds([natural]) for name, cost in per_layer.items()
                },
                "predicted_ms_half": {
                    name: 1e3 * REAL_LAYERS * cost.step_seconds([item.active.mean]) for name, cost in per_layer.items()
                },
            }
        )
    started = time.perf_counter()
    alone = [
        Setting(PRESETS["lynx"], Restriction(tuple(32 if n == layer else 128 for n in range(layers))))
        for layer in range(layers)
    ]
    meter.measure(alone, 16)
    rows.append({"what": "each layer alone, one budget", "settings": layers, "seconds": time.perf_counter() - started})
    rows.append({"what": "memory", "peak_bytes": getrusage(RUSAGE_SELF).ru_maxrss * 1024})
    for row in rows:
        typer.echo(row)
    about = {
        "layers": layers,
        "hidden": hidden,
        "sequences": sequences,
        "length": 256,
        "parameters": sum(p.numel() for p in probed.model.parameters()),
    }
    typer.echo(record("calibration_scale", {"model": about, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
