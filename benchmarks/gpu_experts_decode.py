"""The MoE layer in decode: how near to the memory's speed, what does the selection save, and is anything else faster?

Batches of 1 to 128 tokens on the layers of known models, at the natural number of active experts of an even routing
and at 75, 50 and 25 % of it. Contenders, in turn on the same inputs:

    lynx         LynxExperts as in an engine, from the routing given: metadata, gate-up, down, combine
    lynx_layer   LynxSelect and LynxExperts, from the router's scores
    lynx_handed  the same with the metadata handed over from one to the other, which two plugins of an engine can't
    grouped_mm   transformers' experts on PyTorch's grouped matmul
    dense        every expert on every token
    vllm         vLLM's Triton-language kernel, where it can be had

    python benchmarks/gpu_experts_decode.py --output FILE.json [--model NAME] [--seconds N] [--dry-run]
"""

from __future__ import annotations

from typing import Any

import torch
from gpu_common import Clock, Options, Report, benchmark
from gpu_layer import (
    MODELS,
    SETS,
    Batch,
    Kernels,
    Layer,
    Run,
    error_columns,
    errors,
    make_batch,
    make_layer,
    ops_for,
    ours,
    restrict,
)
from gpu_peers import peers
from gpu_timing import Ceilings, Timing, ceilings, measure, reason, sticky

# By what is judged first, for runs that have no time for all.
TOKENS = (16, 1, 32, 8, 2, 4, 64, 128)
FRACTIONS = (1.0, 0.5, 0.75, 0.25)


def main() -> None:
    """Models, then batches, then fractions."""
    with benchmark(__doc__, "experts_decode", 240, MODELS) as (chosen, report, clock):
        tokens = (3,) if chosen.dry else TOKENS
        limits = ceilings(chosen.device)
        report.extra["ceilings"] = {"bandwidth": limits.bandwidth, "matmul": limits.matmul}
        layers = [make_layer(name, chosen) for name in chosen.models]
        kernels = Kernels(ops_for([(each.experts, each.select) for each in layers], tokens, handed=True), chosen)
        report.extra["kernels"] = kernels.how
        report.write()
        for count in tokens:
            for layer in layers:
                point(layer, count, kernels, limits, chosen, report, clock)


def point(
    layer: Layer, tokens: int, kernels: Kernels, limits: Ceilings, chosen: Options, report: Report, clock: Clock
) -> None:
    """One batch size: all fractions of its natural experts, but for those that round to the same number."""
    natural = [make_batch(layer, tokens, seed, chosen.device) for seed in range(2 if chosen.dry else SETS)]
    seen: set[tuple[int, ...]] = set()
    for fraction in FRACTIONS[: 2 if chosen.dry else None]:
        budgets = tuple(max(round(batch.active * fraction), 1) for batch in natural)
        if budgets in seen:
            continue
        seen.add(budgets)
        label = f"{layer.name}, {tokens} tokens, {fraction:.0%}"
        if clock.left() == 0:
            report.left_out.append(label)
            continue
        batches = natural
        if fraction < 1:
            batches = [restrict(layer, batch, budget) for batch, budget in zip(natural, budgets, strict=True)]
        row = {"model": layer.name, "tokens": tokens, "fraction": fraction, "dtype": chosen.dtype}
        row |= {"natural": sum(batch.active for batch in natural) / len(natural), "budgets": budgets}
        rows = measure_point(layer, batches, kernels, limits, chosen, report)
        for each in rows:
            report.add(row | each)
        ours_us = next((each.get("us") for each in rows if each["contender"] == "lynx"), None)
        print(f"{label}: lynx {ours_us} us", flush=True)


def measure_point(
    layer: Layer, batches: list[Batch], kernels: Kernels, limits: Ceilings, chosen: Options, report: Report
) -> list[dict[str, Any]]:
    """A row for each contender."""
    runs, absent = peers(layer, batches, chosen.vllm)
    report.absent |= absent
    for name, form in {
        "lynx": {},
        "lynx_layer": {"whole": True},
        "lynx_handed": {"whole": True, "handed": True},
    }.items():
        runs[name] = ours(kernels, layer, batches, **{"whole": False, **form})
    found, broken = check(layer, batches[0], runs)
    timings: dict[str, Timing | str] = dict(broken)
    timings |= measure({n: run for n, run in runs.items() if n not in broken}, chosen.device, calls=len(batches))
    active = sum(batch.active for batch in batches) / len(batches)
    pairs = sum(int((batch.index >= 0).sum()) for batch in batches) / len(batches)
    needed, flops = layer.bytes_read(active), layer.flops(int(pairs))
    common = {"active": active, "bytes": needed, "flops": flops, "floor_us": round(limits.floor(needed, flops), 3)}
    return [columns(name, timing, common, limits, error_columns(found, name)) for name, timing in timings.items()]


def check(layer: Layer, batch: Batch, runs: dict[str, Run]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Each contender's error on the first of the batches, and why some don't run."""
    outputs, broken = {}, {}
    for name, run in runs.items():
        try:
            outputs[name] = run()[0].clone()
            if batch.hidden.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # of a peer as well as of ours: it is what the row says
            broken[name] = reason(error)
            if sticky(error):
                raise
    return errors(layer, batch, outputs), broken


def columns(
    name: str, timing: Timing | str, common: dict[str, Any], limits: Ceilings, found: dict[str, Any]
) -> dict[str, Any]:
    """One contender's part of a row: times, the share of the bandwidth and of the roofline, errors."""
    if isinstance(timing, str):
        return {"contender": name, **common, "failed": timing}
    times = timing.to_dict()
    return {
        "contender": name,
        **common,
        "us": times.pop("median"),
        **times,
        "bandwidth_share": round(common["bytes"] / limits.bandwidth / (1e-6 * timing.median), 4),
        "matmul_share": round(common["flops"] / limits.matmul / (1e-6 * timing.median), 4),
        "roofline_share": round(common["floor_us"] / timing.median, 4),
        **found,
    }


if __name__ == "__main__":
    main()
