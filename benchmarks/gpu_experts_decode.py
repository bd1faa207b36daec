"""The MoE layer in decode: how near to the memory's speed, what does the selection save, and is anything else faster?

Batches of 1 to 128 tokens on the layers of known models, at the natural number of active experts of an even routing
and at 75, 50 and 25 % of it. Contenders, in turn on the same inputs:

    lynx         LynxExperts alone, from the routing given, as its peers: metadata, gate-up, down, combine
    lynx_layer   LynxSelect and LynxExperts as in an engine, from the router's scores: one hands the other the metadata
    lynx_apart   the same without the hand-over, as where an engine can't have it
    grouped_mm   transformers' experts on PyTorch's grouped matmul
    dense        every expert on every token
    vllm         vLLM's Triton-language kernel, where it can be had

Of a quantized layer the peers have the dequantized weights: their own kernels for it are compiled, or other packages'.

    python benchmarks/gpu_experts_decode.py --output FILE.json [--model NAME] [--seconds N] [--dry-run]
"""

from __future__ import annotations

from typing import Any

from gpu_common import benchmark
from gpu_layer import MODELS, SETS, Batch, Bench, Layer, make_batch, make_layer, ops_for, ours, restrict
from gpu_peers import peers

# By what is judged first, for runs that have no time for all.
TOKENS = (16, 1, 32, 8, 2, 4, 64, 128)
FRACTIONS = (1.0, 0.5, 0.75, 0.25)


def main() -> None:
    """Models, then batches, then fractions."""
    with benchmark(__doc__, "experts_decode", 240, MODELS) as (chosen, report, clock):
        tokens = (3,) if chosen.dry else TOKENS
        layers = [make_layer(name, chosen) for name in chosen.models]
        ops = ops_for([(each.experts, each.select) for each in layers], tokens)
        bench = Bench.start(layers, ops, chosen, report, clock)
        for count in tokens:
            for layer in layers:
                point(layer, count, bench)


def point(layer: Layer, tokens: int, bench: Bench) -> None:
    """One batch size: all fractions of its natural experts, but for those that round to the same number."""
    chosen = bench.chosen
    natural = [make_batch(layer, tokens, seed, chosen.device) for seed in range(2 if chosen.dry else SETS)]
    seen: set[tuple[int, ...]] = set()
    for fraction in FRACTIONS[: 2 if chosen.dry else None]:
        budgets = tuple(max(round(batch.active * fraction), 1) for batch in natural)
        if budgets in seen:
            continue
        seen.add(budgets)
        label = f"{layer.name}, {tokens} tokens, {fraction:.0%}"
        if not bench.has_time(label):
            continue
        batches = natural
        if fraction < 1:
            batches = [restrict(layer, batch, budget) for batch, budget in zip(natural, budgets, strict=True)]
        row = {"model": layer.name, "tokens": tokens, "fraction": fraction, "dtype": chosen.dtype}
        row |= {"natural": sum(batch.active for batch in natural) / len(natural), "budgets": budgets}
        rows = measure_point(layer, batches, bench)
        for each in rows:
            bench.report.add(row | each)
        ours_us = next((each.get("us") for each in rows if each["contender"] == "lynx"), None)
        print(f"{label}: lynx {ours_us} us", flush=True)


def measure_point(layer: Layer, batches: list[Batch], bench: Bench) -> list[dict[str, Any]]:
    """A row for each contender."""
    runs, absent = peers(layer, batches, bench.chosen.vllm)
    bench.report.absent |= absent
    runs["lynx"] = ours(bench.kernels, layer, batches, whole=False)
    runs["lynx_layer"] = ours(bench.kernels, layer, batches, whole=True)
    runs["lynx_apart"] = ours(bench.kernels, layer, batches, whole=True, handed=False)
    return bench.measure_layer(layer, batches, runs, seconds=0.5)


if __name__ == "__main__":
    main()
