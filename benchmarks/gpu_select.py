"""The selection alone: how long does one step of one layer take, with and without the dispatch metadata?

Batches of 1 to 512 tokens on the routers of known models, at half of the natural number of active experts, once by a
budget and once by a floor of votes, and with the selection off (a budget of all experts). Contenders:

    lynx           LynxSelect that hands nothing over
    lynx_metadata  LynxSelect as in an engine, with complete metadata: the list of active experts, the tokens of each
    sort           PyTorch's sort, histogram and running sum, as transformers' experts use them: metadata, no selection

The inputs are in L2, as a router has just left them there.

    python benchmarks/gpu_select.py --output FILE.json [--model NAME] [--seconds N] [--dry-run]
"""

from __future__ import annotations

from dataclasses import replace

import torch
from gpu_common import benchmark
from gpu_layer import (
    ROUTERS,
    Batch,
    Bench,
    Kernels,
    Layer,
    Run,
    as_run,
    floored,
    make_batch,
    ops_for,
    restrict,
    selection_tensors,
    specs_of,
    times,
)
from gpu_timing import measure, reason, sticky
from torch import Tensor

from lynx_trt.plugins.specs import SelectSpec

TOKENS = (16, 128, 1, 512, 32, 64, 8, 256, 2, 4)
# The share of the natural experts, and by what the others are left out.
SETTINGS = ((0.5, "budget"), (0.5, "floor"), (1.0, "budget"))
# Calls in a graph: a call is shorter than a graph's start.
CALLS = 20


def main() -> None:
    """Batches, then models."""
    with benchmark(__doc__, "select", 60, ROUTERS) as (chosen, report, clock):
        tokens = (3,) if chosen.dry else TOKENS
        layers = [Layer(name, *specs_of(name, chosen.dtype, dry=chosen.dry), {}) for name in chosen.models]
        ops = ops_for([(each.experts, each.select) for each in layers], tokens)
        bench = Bench.start(layers, [op for op in ops if isinstance(op.spec, SelectSpec)], chosen, report, clock)
        for count in tokens:
            for layer in layers:
                for fraction, by in SETTINGS:
                    point(layer, count, fraction, by, bench)


def point(layer: Layer, tokens: int, fraction: float, by: str, bench: Bench) -> None:
    """One batch on one router."""
    label = f"{layer.name}, {tokens} tokens, {fraction:.0%} by {by}"
    if not bench.has_time(label):
        return
    device, dry = bench.chosen.device, bench.chosen.dry
    batch = make_batch(layer, tokens, 0, device)
    natural = batch.active
    if by == "floor":
        batch = floored(layer, batch, natural * fraction)
    elif fraction < 1:
        batch = restrict(layer, batch, max(round(natural * fraction), 1))
    runs, right = contenders(layer, batch, bench.kernels)
    calls = 1 if dry else CALLS
    timings = measure({name: repeated(run, calls) for name, run in runs.items()}, device, calls=calls, seconds=0.2)
    needed = 8 * batch.choice.numel() + 24 * batch.topk_index.numel()
    row = {"model": layer.name, "tokens": tokens, "fraction": fraction, "by": by, "vote_floor": float(batch.floor)}
    row |= {"budget": int(batch.budget), "natural": natural, "active": batch.active}
    row |= {"bytes": needed, "floor_us": round(bench.limits.floor(needed, 0), 4)}
    for name, timing in timings.items():
        columns = {"contender": name, **times(timing)} | ({"right": right[name]} if name in right else {})
        bench.report.add(row | columns)
    print(f"{label}: {timings.get('lynx_metadata')}", flush=True)


def repeated(run: Run, calls: int) -> Run:
    """So many calls."""

    def every() -> list[Tensor]:
        for _ in range(calls):
            result = run()
        return result

    return every


def contenders(layer: Layer, batch: Batch, kernels: Kernels) -> tuple[dict[str, Run], dict[str, bool | str]]:
    """What is timed, and whether ours give the twin's choice of experts (or why they don't run)."""
    runs: dict[str, Run] = {"sort": lambda: sort_metadata(layer, batch)}
    right: dict[str, bool | str] = {}
    for name, taken in (("lynx", False), ("lynx_metadata", True)):
        spec = replace(layer.select, dispatch_taken=taken)
        tensors = selection_tensors(batch, spec)
        try:
            launch = kernels.prepare(spec, tensors, len(batch.hidden))
            runs[name] = as_run(launch, tensors["index"])
            launch()
            right[name] = torch.equal(tensors["index"], batch.index) and int(tensors["active"]) == batch.active
        except Exception as error:
            right[name] = reason(error)
            if sticky(error):
                raise
    return runs, right


def sort_metadata(layer: Layer, batch: Batch) -> list[Tensor]:
    """The order of pairs by expert and where each expert's end."""
    experts = batch.index.reshape(-1)
    ordered, pairs = torch.sort(experts)
    values = ordered.int() if experts.is_cuda else ordered.float()
    counts = torch.histc(values, bins=layer.experts.experts, min=0, max=layer.experts.experts - 1)
    return [pairs, torch.cumsum(counts, dim=0, dtype=torch.int32)]


if __name__ == "__main__":
    main()
