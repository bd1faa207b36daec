"""The MoE layer in prefill: how near to the matrix units' speed, and is anything else faster?

256 to 16,384 tokens on the layers of known models, all experts in use. Contenders, in turn on the same inputs: those of
gpu_experts_decode.py without a selection, since a prefill keeps the model's own routing; the dense layer while its
buffers are below 8 GB.

    python benchmarks/gpu_experts_prefill.py --output FILE.json [--model NAME] [--seconds N] [--dry-run]
"""

from __future__ import annotations

import torch
from gpu_common import Clock, Options, Report, benchmark
from gpu_experts_decode import check, columns
from gpu_layer import MODELS, Kernels, Layer, error_columns, make_batch, make_layer, ops_for, ours
from gpu_peers import peers
from gpu_timing import Ceilings, Timing, ceilings, measure

# By what is judged first.
TOKENS = (4096, 16384, 8192, 2048, 1024, 512, 256)


def main() -> None:
    """Batches, then models."""
    with benchmark(__doc__, "experts_prefill", 180, MODELS) as (chosen, report, clock):
        tokens = (5,) if chosen.dry else TOKENS
        limits = ceilings(chosen.device)
        report.extra["ceilings"] = {"bandwidth": limits.bandwidth, "matmul": limits.matmul}
        layers = [make_layer(name, chosen) for name in chosen.models]
        kernels = Kernels(ops_for([(each.experts, each.select) for each in layers], tokens, handed=False), chosen)
        report.extra["kernels"] = kernels.how
        report.write()
        for count in tokens:
            for layer in layers:
                point(layer, count, kernels, limits, chosen, report, clock)


def point(
    layer: Layer, tokens: int, kernels: Kernels, limits: Ceilings, chosen: Options, report: Report, clock: Clock
) -> None:
    """One batch on one layer: a row for each contender."""
    label = f"{layer.name}, {tokens} tokens"
    if clock.left() == 0:
        report.left_out.append(label)
        return
    batch = make_batch(layer, tokens, 0, chosen.device)
    runs, absent = peers(layer, [batch], chosen.vllm)
    report.absent |= {f"{name} at {tokens} tokens of {layer.name}": why for name, why in absent.items()}
    runs["lynx"] = ours(kernels, layer, [batch], whole=False)
    runs["lynx_layer"] = ours(kernels, layer, [batch], whole=True)
    found, broken = check(layer, batch, runs)
    timings: dict[str, Timing | str] = dict(broken)
    timings |= measure({n: run for n, run in runs.items() if n not in broken}, chosen.device, seconds=1.0)
    needed, flops = layer.bytes_read(batch.active), layer.flops(batch.index.numel())
    common = {"active": batch.active, "bytes": needed, "flops": flops}
    common["floor_us"] = round(limits.floor(needed, flops), 3)
    row = {"model": layer.name, "tokens": tokens, "dtype": chosen.dtype}
    for name, timing in timings.items():
        report.add(row | columns(name, timing, common, limits, error_columns(found, name)))
    print(f"{label}: {timings.get('lynx')}", flush=True)
    if chosen.device.type == "cuda":
        torch.cuda.empty_cache()  # the graphs' pools, gigabytes each at the largest sizes


if __name__ == "__main__":
    main()
