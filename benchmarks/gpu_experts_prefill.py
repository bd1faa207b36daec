"""The MoE layer in prefill: how near to the matrix units' speed, and is anything else faster?

256 to 16,384 tokens on the layers of known models, all experts in use. Contenders, in turn on the same inputs: those of
gpu_experts_decode.py without a selection, since a prefill keeps the model's own routing; the dense layer while its
buffers are below 8 GB.

    python benchmarks/gpu_experts_prefill.py --output FILE.json [--model NAME] [--seconds N] [--dry-run]
"""

from __future__ import annotations

import torch
from gpu_common import benchmark
from gpu_layer import MODELS, Bench, Layer, make_batch, make_layer, ops_for, ours
from gpu_peers import peers

# By what is judged first.
TOKENS = (4096, 16384, 8192, 2048, 1024, 512, 256)


def main() -> None:
    """Batches, then models."""
    with benchmark(__doc__, "experts_prefill", 180, MODELS) as (chosen, report, clock):
        tokens = (5,) if chosen.dry else TOKENS
        layers = [make_layer(name, chosen) for name in chosen.models]
        ops = ops_for([(each.experts, each.select) for each in layers], tokens)
        bench = Bench.start(layers, ops, chosen, report, clock)
        for count in tokens:
            for layer in layers:
                point(layer, count, bench)


def point(layer: Layer, tokens: int, bench: Bench) -> None:
    """One batch on one layer: a row for each contender."""
    chosen = bench.chosen
    label = f"{layer.name}, {tokens} tokens"
    if not bench.has_time(label):
        return
    batch = make_batch(layer, tokens, 0, chosen.device)
    runs, absent = peers(layer, [batch], chosen.vllm)
    bench.report.absent |= {f"{name} at {tokens} tokens of {layer.name}": why for name, why in absent.items()}
    runs["lynx"] = ours(bench.kernels, layer, [batch], whole=False)
    runs["lynx_layer"] = ours(bench.kernels, layer, [batch], whole=True)
    rows = bench.measure_layer(layer, [batch], runs, seconds=1.0)
    for each in rows:
        bench.report.add({"model": layer.name, "tokens": tokens, "dtype": chosen.dtype, **each})
    ours_us = next((each.get("us") for each in rows if each["contender"] == "lynx"), None)
    print(f"{label}: lynx {ours_us} us", flush=True)
    if chosen.device.type == "cuda":
        torch.cuda.empty_cache()  # the graphs' pools, gigabytes each at the largest sizes


if __name__ == "__main__":
    main()
