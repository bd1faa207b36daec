"""Decoding with a whole model: how fast is a batch, what does the selection save, what do other experts' kernels reach?

TensorRT for RTX has no SM 90, so on an H100 or H200 this is asked of PyTorch: transformers' own model of the shape of
Qwen3-30B-A3B (`gpu_qwen3_moe.py`), 256 tokens in each sequence's cache, in which nothing but the experts' module
differs from contender to contender. Weights are random, so the routing is even and the text means nothing. A step is a
CUDA graph:

    lynx         LynxSelect and LynxExperts, as in an engine, at all active experts (switched off) and at 75, 50, 25 %
    grouped_mm   transformers' own experts on PyTorch's grouped matmul
    vllm         vLLM's Triton-language kernel, where it can be had, on routing written down and sorted ahead
    nothing      the experts' module gives its input back: what all have in common

    python benchmarks/gpu_decode_model.py --output FILE.json [--seconds N] [--vllm FOLDER] [--dry-run]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gpu_vllm
import torch
from gpu_common import benchmark
from gpu_layer import Batch, Bench, Kernels, Layer, relative, selection_tensors, specs_of, times
from gpu_qwen3_moe import CONTEXT, MODEL, Decoder, Place, blocks, build, layers_of, rest_bytes
from gpu_timing import AbsentError, Timing, measure
from torch import Tensor

from lynx_trt.plugins.specs import Op

# By what is asked first, for runs that have no time for all.
BATCHES = (16, 1, 64, 4, 32)
FRACTIONS = (0.5, 0.75, 0.25)
# A batch's share of the time: 25 rounds of 7 steps of up to 20 ms.
SECONDS = 3.5

Experts = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """What runs the experts: an implementation that transformers knows, and for `prepared` a function for each layer.

    `active` [] int32 of each layer is how many experts it used, where it counts them.
    """

    name: str
    implementation: str
    prepared: Sequence[Experts] = ()
    fraction: float = 1.0
    budgets: Sequence[int] = ()
    active: Sequence[Tensor] = ()

    @property
    def label(self) -> str:
        """Its name among those of a batch."""
        return f"{self.name}, {self.fraction:.0%}"


@dataclass
class Point:
    """A batch: its decoder, who takes part, and the last logits of each."""

    decoder: Decoder
    layers: Sequence[Layer]
    bench: Bench
    logits: dict[str, Tensor]

    @property
    def batch(self) -> int:
        """Sequences, each with one token."""
        return len(self.decoder.places[0].hidden)

    def run(self, contender: Contender) -> Tensor:
        """One step; keeps its logits [B,V], which are those of a graph's last replay if this was captured."""
        model = self.decoder.model
        model.set_experts_implementation(contender.implementation)
        if contender.prepared:
            for block, experts in zip(blocks(model), contender.prepared, strict=True):
                block.experts.prepared = experts
        self.logits[contender.label] = self.decoder.step()
        return self.logits[contender.label]


def main() -> None:
    """The ceilings, the kernels, the model; then a batch after another."""
    with benchmark(__doc__, "decode_model", 110, (MODEL,)) as (chosen, report, clock):
        batches = (3,) if chosen.dry else BATCHES
        experts, select = specs_of(MODEL, chosen.dtype, dry=chosen.dry)
        experts, select = replace(experts, dispatch_given=True), replace(select, dispatch_taken=True)
        ranges = tuple((each, each) for each in batches)
        bench = Bench.start([], [Op(experts, ranges), Op(select, ranges)], chosen, report, clock)
        if not chosen.dry:
            torch.cuda.empty_cache()
        started = time.perf_counter()
        model = build(experts, chosen)
        report.extra |= {
            "weights": "random: an even routing, and text that means nothing",
            "context": CONTEXT,
            "layers": len(blocks(model)),
            "weight_bytes": sum(each.numel() * each.element_size() for each in model.parameters()),
            "build_seconds": round(time.perf_counter() - started, 1),
        }
        print(f"model: {report.extra['weight_bytes'] / 1e9:.1f} GB in {report.extra['build_seconds']} s", flush=True)
        layers = layers_of(model, experts, select)
        for batch in batches:
            if bench.has_time(f"batch {batch}"):
                measure_batch(Point(Decoder(model, batch), layers, bench, {}))


def measure_batch(point: Point) -> None:
    """All contenders of a batch in turn, a row for each."""
    whole, noise, layer_error = checked(point)
    natural = [int(each) for each in whole.active]
    restricted = [
        lynx(point, fraction, [max(round(fraction * each), 1) for each in natural])
        for fraction in FRACTIONS[: 1 if point.bench.chosen.dry else None]
    ]
    everyone = [whole, *restricted, Contender("grouped_mm", "grouped_mm"), Contender("nothing", "nothing")]
    try:
        everyone.append(vllm(point, point.bench.chosen.vllm))
    except (ImportError, AbsentError) as error:
        point.bench.report.absent["vllm"] = str(error)
    runs = {each.label: lambda each=each: point.run(each) for each in everyone}
    timings = measure(runs, point.bench.chosen.device, seconds=SECONDS)
    common = {
        "model": MODEL,
        "dtype": point.bench.chosen.dtype,
        "batch": point.batch,
        "natural": mean(natural),
        "natural_if_even": round(even(point.layers[0], point.batch), 2),
        "noise": noise["error"],
        "noise_same_tokens": noise["same_tokens"],
        "layer_error": layer_error,
        "cache_bytes": point.decoder.cache_bytes,
    }
    for each in everyone:
        point.bench.report.add({**common, **row(point, each, timings, natural)})
    print(summary(point), flush=True)


def checked(point: Point) -> tuple[Contender, dict[str, float], float]:
    """LynxSelect switched off and LynxExperts, after a step; and what its error is to be held against.

    That is how far PyTorch's own two ways, grouped matmuls and an expert at a time, are from each other in this
    precision: over all layers a near-tie of the router goes the other way now and then. The third value has no such
    thing in it: the worst layer's error against grouped matmuls on that layer's own input.
    """
    whole = lynx(point, 1.0, [layer.experts.experts for layer in point.layers])
    point.run(whole)
    worst = 0.0
    point.decoder.model.set_experts_implementation("grouped_mm")
    for block, place, experts in zip(blocks(point.decoder.model), point.decoder.places, whole.prepared, strict=True):
        got = experts(place.hidden)
        want = block.experts(place.hidden, place.index, place.weight.to(place.hidden.dtype))
        worst = max(worst, relative(got, want.double())["error"])
    # The last of these leaves its routing in the places, for vLLM's kernel to be prepared on.
    each_alone = point.run(Contender("eager", "eager")).clone()
    return whole, compared(each_alone, point.run(Contender("grouped_mm", "grouped_mm"))), worst


def compared(got: Tensor, want: Tensor) -> dict[str, float]:
    """The relative error of logits [B,V] by norm, and the share of sequences whose greedy token is the same."""
    same = (got.argmax(dim=-1) == want.argmax(dim=-1)).double().mean()
    return {"error": relative(got, want.double())["error"], "same_tokens": float(same)}


def lynx(point: Point, fraction: float, budgets: Sequence[int]) -> Contender:
    """Our kernels under a budget a layer."""
    made = [
        prepared(point.bench.kernels, layer, place, budget)
        for layer, place, budget in zip(point.layers, point.decoder.places, budgets, strict=True)
    ]
    experts, active = zip(*made, strict=True)
    return Contender("lynx", "prepared", experts, fraction, budgets, active)


def prepared(kernels: Kernels, layer: Layer, place: Place, budget: int) -> tuple[Experts, Tensor]:
    """One layer: LynxSelect on what the router wrote, its metadata handed to LynxExperts; and its count [] int32."""
    tokens = len(place.hidden)
    tensors = selection_tensors(batch_of(place, budget), layer.select)
    given = {name: tensors[name] for name in ("index", "weight", "dispatch")}
    output = torch.empty_like(place.hidden)
    select = kernels.prepare(layer.select, tensors, tokens)
    run = kernels.prepare(layer.experts, {"hidden": place.hidden, "output": output, **given, **layer.weights}, tokens)

    def experts(hidden: Tensor) -> Tensor:
        place.hidden.copy_(hidden)
        select()
        run()
        return output

    return experts, tensors["active"]


def batch_of(place: Place, budget: int) -> Batch:
    """What a router wrote as a batch of the layer benchmarks."""
    device = place.hidden.device
    return Batch(
        *(place.hidden, place.choice, place.index, place.weight, place.index, place.weight),
        budget=torch.tensor(budget, dtype=torch.int32, device=device),
        floor=torch.zeros((), dtype=torch.float32, device=device),
        token_mask=torch.ones(len(place.hidden), dtype=torch.bool, device=device),
    )


def vllm(point: Point, folder: Path | None) -> Contender:
    """The kernel of vLLM on the routing that is in the places, sorted ahead: each layer's input is its own, its experts
    are those of the step before.
    """
    made = []
    for layer, place in zip(point.layers, point.decoder.places, strict=True):
        written = replace(place, index=place.index.clone(), weight=place.weight.clone())
        call = gpu_vllm.fused_moe(layer, [batch_of(written, layer.experts.experts)], folder)
        made.append(_into(place.hidden, call))
    return Contender("vllm", "prepared", made)


def _into(place: Tensor, call: Callable[[], list[Tensor]]) -> Experts:
    def experts(hidden: Tensor) -> Tensor:
        place.copy_(hidden)
        return call()[0]

    return experts


def row(point: Point, contender: Contender, timings: dict[str, Timing | str], natural: Sequence[int]) -> dict[str, Any]:
    """A contender's time, what it read, and how its logits compare with those of grouped matmuls."""
    timing = timings[contender.label]
    used = [int(each) for each in contender.active] or natural
    active = 0.0 if contender.implementation == "nothing" else mean(used)
    read = len(point.layers) * point.layers[0].bytes_read(active) + rest_bytes(point.decoder.model, point.batch)
    floor = point.bench.limits.floor(read, 0.0)
    columns = {
        "contender": contender.name,
        "fraction": contender.fraction,
        "active": active,
        "bytes": read,
        "floor_us": round(floor, 3),
        **times(timing),
    }
    if contender.budgets and contender.fraction < 1:
        columns |= {"budget": mean(contender.budgets), "budgets_kept": list(contender.budgets) == used}
    if isinstance(timing, str):
        return columns
    columns |= {
        "tokens_per_second": round(1e6 * point.batch / timing.median, 1),
        "floor_share": round(floor / timing.median, 4),
    }
    bare = timings["nothing, 100%"]
    if not isinstance(bare, str):
        columns["experts_share"] = round(1 - bare.median / timing.median, 4)
    if contender.fraction == 1 and contender.name != "nothing":  # of random weights the others would say nothing
        columns |= compared(point.logits[contender.label], point.logits["grouped_mm, 100%"])
    return columns


def even(layer: Layer, tokens: int) -> float:
    """The expected number of active experts of an even routing."""
    spec = layer.experts
    return spec.experts * (1 - (1 - spec.experts_per_token / spec.experts) ** tokens)


def mean(values: Sequence[int]) -> float:
    """The mean over layers."""
    return sum(values) / len(values)


def summary(point: Point) -> str:
    """A line for the log."""
    rows = [each for each in point.bench.report.rows if each["batch"] == point.batch]
    words = [
        f"{each['contender']} {each['fraction']:.0%} {each['us'] / 1000:.2f} ms"
        if "us" in each
        else f"{each['contender']} {each['failed']}"
        for each in rows
    ]
    return f"batch {point.batch}, {rows[0]['natural']:.1f} active: {'; '.join(words)}"


if __name__ == "__main__":
    main()
