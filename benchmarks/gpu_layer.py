"""One MoE layer for the GPU benchmarks: random weights and batches, our kernels on them, times and errors.

Our kernels run as an engine runs them: compiled ahead of time, all at once on all cores, and launched through the CUDA
driver. `--jit` lets the Triton language compile and launch them instead; a dry run on a CPU interprets them.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from gpu_common import Clock, Options, Report
from gpu_timing import Ceilings, Timing, ceilings, measure, reason, sticky
from torch import Tensor

from lynx_trt.errors import LynxError
from lynx_trt.plugins import aot, execute
from lynx_trt.plugins.blob import lookup
from lynx_trt.plugins.cuda_driver import cuda_driver
from lynx_trt.plugins.launch import SMS
from lynx_trt.plugins.launcher import Driver
from lynx_trt.plugins.plan import find_plan
from lynx_trt.plugins.plans import plans
from lynx_trt.plugins.shapes import SHAPES, experts_spec, routers, select_spec
from lynx_trt.plugins.specs import BYTES, ExpertsSpec, Op, SelectSpec, Spec
from lynx_trt.plugins.tune import random_quantized
from lynx_trt.plugins.twins import dequantize_twin, experts_twin, select_twin

MODELS = tuple(SHAPES)
ROUTERS = routers(MODELS)

# Different batches in one graph, so that no call finds its experts in L2 (50 MB on an H100): at one token, the least
# of all, they share none.
SETS = 4
# Tokens whose results are compared with float64.
CHECKED = 64

Run = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Layer:
    """A model's layer: what the two ops are made for, and its weights."""

    name: str
    experts: ExpertsSpec
    select: SelectSpec
    weights: Mapping[str, Tensor]

    def bytes_read(self, active: float) -> float:
        """What has to be read of some active experts, in the form that the layer has them in."""
        spec = self.experts
        return active * (self._matrices * spec.weight_bytes + self._biases * BYTES[spec.dtype])

    def flops(self, pairs: int) -> float:
        """Operations for some (token, expert) pairs."""
        return 2.0 * pairs * (self._matrices + self._biases)

    @functools.cached_property
    def in_full(self) -> Layer:
        """The same with weights that are numbers of the precision, for those who have no others; made once."""
        if not self.experts.form.quantized:
            return self
        dtype = getattr(torch, self.experts.dtype)
        weights = {name: each for name, each in self.weights.items() if name.endswith("_bias")}
        for name in ("gate_up", "down"):
            # An expert at a time: what is made on the way is larger than the weights.
            whole = zip(self.weights[name], self.weights[f"{name}_scale"], strict=True)
            weights[name] = torch.stack(
                [dequantize_twin(self.experts.form.weights, values, scales, dtype) for values, scales in whole]
            )
        form = replace(self.experts.form, weights="float")
        return Layer(self.name, replace(self.experts, form=form), self.select, weights)

    @property
    def _matrices(self) -> int:
        """Values of an expert's matrices."""
        spec = self.experts
        return spec.hidden * spec.inner * (3 if spec.form.gated else 2)

    @property
    def _biases(self) -> int:
        spec = self.experts
        return spec.inner * (2 if spec.form.gated else 1) + spec.hidden if spec.bias else 0


@dataclass(frozen=True)
class Batch:
    """A batch and its routing: the model's own, what the selection made of it, and the inputs of LynxSelect."""

    hidden: Tensor
    choice: Tensor
    topk_index: Tensor
    topk_weight: Tensor
    index: Tensor
    weight: Tensor
    budget: Tensor
    floor: Tensor
    token_mask: Tensor

    @property
    def active(self) -> int:
        """Distinct experts in use."""
        return len(torch.unique(self.index[self.index >= 0]))


def specs_of(name: str, dtype: str, *, dry: bool) -> tuple[ExpertsSpec, SelectSpec]:
    """The ops of a model's layer, each making its own metadata (`ours` hands it over). Dry: the form, in tiny.

    The selection guarantees nothing, so that it keeps as many experts as its budget says.
    """
    experts = experts_spec(name, dtype, dispatch_given=False)
    select = replace(select_spec(name, dispatch_taken=False), guarantee=0)
    if dry:
        # Odd ones, but for blocks that share a scale.
        hidden, inner = (256, 128) if experts.form.quantized else (48, 40)
        experts = replace(experts, experts=8, experts_per_token=2, hidden=hidden, inner=inner)
        select = replace(select, experts=8, experts_per_token=2)
    return experts, select


def make_layer(name: str, chosen: Options) -> Layer:
    """Random weights of the size that keeps activations near 1."""
    experts, select = specs_of(name, chosen.dtype, dry=chosen.dry)
    generator = torch.Generator(chosen.device).manual_seed(0)
    dtype = getattr(torch, chosen.dtype)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=chosen.device).normal_(0, scale, generator=generator)

    rows = experts.inner * (2 if experts.form.gated else 1)
    up, down = (rows, experts.hidden), (experts.hidden, experts.inner)
    if experts.form.transposed:
        up, down = up[::-1], down[::-1]
    weights: dict[str, Tensor] = {}
    for part, shape, summed in (("gate_up", up, experts.hidden), ("down", down, experts.inner)):
        if experts.form.quantized:
            weights |= random_quantized(experts.form.weights, part, (experts.experts, *shape), generator, dtype)
        else:
            weights[part] = normal(experts.experts, *shape, scale=summed**-0.5)
    if experts.bias:
        weights["gate_up_bias"] = normal(experts.experts, rows, scale=0.1)
        weights["down_bias"] = normal(experts.experts, experts.hidden, scale=0.1)
    return Layer(name, experts, select, weights)


def make_batch(layer: Layer, tokens: int, seed: int, device: torch.device) -> Batch:
    """A batch whose tokens choose their experts evenly and independently, as a well balanced router's do."""
    spec = layer.experts
    generator = torch.Generator(device).manual_seed(1000 + seed)
    logits = torch.randn((tokens, spec.experts), device=device, generator=generator)
    if tokens == 1 and spec.experts >= SETS * spec.experts_per_token:
        logits[:, torch.arange(spec.experts, device=device) % SETS != seed % SETS] -= 20.0
    choice = logits.softmax(dim=1)
    weight, index = choice.topk(spec.experts_per_token, dim=1)
    weight = weight / weight.sum(dim=1, keepdim=True)
    hidden = torch.randn((tokens, spec.hidden), device=device, generator=generator).to(getattr(torch, spec.dtype))
    budget = torch.tensor(spec.experts, dtype=torch.int32, device=device)
    floor = torch.zeros((), dtype=torch.float32, device=device)
    mask = torch.ones(tokens, dtype=torch.bool, device=device)
    return Batch(hidden, choice, index, weight, index, weight, budget, floor, mask)


def restrict(layer: Layer, batch: Batch, budget: int, floor: float = 0.0) -> Batch:
    """The same under a budget and a floor; the routing by the selection's twin."""
    routing = (batch.choice, batch.choice, batch.topk_index, batch.topk_weight)
    kept = select_twin(layer.select, *routing, budget, floor, batch.token_mask)
    limits = {"budget": torch.full_like(batch.budget, budget), "floor": torch.full_like(batch.floor, floor)}
    return replace(batch, index=kept.index, weight=kept.weight, **limits)


def floored(layer: Layer, batch: Batch, wanted: float) -> Batch:
    """The same with no cap, under the highest floor of powers of two that leaves as many experts as are wanted."""
    floors = (2.0**-n for n in range(31))
    tried = (restrict(layer, batch, layer.experts.experts, floor) for floor in floors)
    return next(each for each in tried if each.active >= wanted)


class Kernels:
    """Our kernels for some ops, compiled all at once; `prepare` makes a launch of one op on tensors."""

    def __init__(self, ops: Sequence[Op], chosen: Options) -> None:
        self.how = "interpreted" if chosen.dry else "the Triton language" if chosen.jit else "cubins"
        self._sm = 90 if chosen.dry else supported_sm()
        self._kernels: aot.Kernels | None = None
        if self.how == "cubins":
            torch.zeros(1, device=chosen.device)  # makes PyTorch's context the current one
            try:
                self._kernels = aot.compile_for(ops, [self._sm], jobs=os.cpu_count())
                self._driver: Driver = cuda_driver()
            except (LynxError, RuntimeError) as error:  # better measured in the other way than not at all
                self._kernels, self.how = None, f"the Triton language, since cubins failed: {reason(error)}"
                print(self.how, flush=True)

    def prepare(self, spec: Spec, tensors: Mapping[str, Tensor], tokens: int, sequences: int = 0) -> Callable[[], None]:
        """A function that launches an op, without an allocation."""
        if self._kernels is None:
            plan = find_plan(plans(spec, self._sm, tokens), tokens, sequences)
            return execute.prepare(plan, tensors, tokens, sequences)[0]
        compiled = find_plan(lookup(self._kernels, self._sm, spec.key), tokens, sequences)
        return execute.prepare_compiled(compiled, tensors, tokens, self._driver, sequences)


def supported_sm() -> int:
    """The SM of this GPU. Exits: there are no kernels for it."""
    major, minor = torch.cuda.get_device_capability()
    if (sm := 10 * major + minor) not in SMS:
        raise SystemExit(f"error: this GPU is SM {sm}: kernels are made for SM {', '.join(map(str, SMS))}")
    return sm


def ours(kernels: Kernels, layer: Layer, batches: Sequence[Batch], *, whole: bool, handed: bool = True) -> Run:
    """Our layer on some batches in turn: LynxExperts, before it (`whole`) LynxSelect.

    A selection hands its metadata over, as in an engine, unless `handed` is false; LynxExperts alone makes its own.
    """
    handed = whole and handed
    select = replace(layer.select, dispatch_taken=handed)
    experts = replace(layer.experts, dispatch_given=handed)
    launches: list[Callable[[], None]] = []
    outputs: list[Tensor] = []
    for batch in batches:
        tokens = len(batch.hidden)
        index, weight = batch.index.contiguous(), batch.weight.contiguous()
        given = {}
        if whole:
            made = selection_tensors(batch, select)
            launches.append(kernels.prepare(select, made, tokens))
            index, weight = made["index"], made["weight"]
            given = {"dispatch": made["dispatch"]} if handed else {}
        outputs.append(torch.empty_like(batch.hidden))
        tensors = {"hidden": batch.hidden, "index": index, "weight": weight, "output": outputs[-1]}
        launches.append(kernels.prepare(experts, {**tensors, **layer.weights, **given}, tokens))

    def run() -> list[Tensor]:
        for launch in launches:
            launch()
        return outputs

    return run


def selection_tensors(batch: Batch, spec: SelectSpec) -> dict[str, Tensor]:
    """Inputs and outputs of LynxSelect, by name."""
    tensors = {
        "choice": batch.choice,
        "combine": batch.choice,
        "topk_index": batch.topk_index.contiguous(),
        "topk_weight": batch.topk_weight.contiguous(),
        "budget": batch.budget,
        "floor": batch.floor,
        "token_mask": batch.token_mask,
        "index": torch.empty_like(batch.topk_index),
        "weight": torch.empty_like(batch.topk_weight),
        "active": torch.zeros_like(batch.budget),
    }
    if spec.dispatch_taken:
        size = 2 * spec.experts + 2 + batch.topk_index.numel()
        tensors["dispatch"] = torch.zeros(size, dtype=torch.int32, device=batch.hidden.device)
    return tensors


def ops_for(layers: Sequence[tuple[ExpertsSpec, SelectSpec]], tokens: Sequence[int]) -> list[Op]:
    """What has to be compiled for some layers and numbers of tokens: each op with and without the hand-over."""
    ranges = tuple((each, each) for each in tokens)
    ops = [Op(replace(experts, dispatch_given=given), ranges) for experts, _ in layers for given in (False, True)]
    return ops + [Op(replace(select, dispatch_taken=taken), ranges) for _, select in layers for taken in (False, True)]


@dataclass(frozen=True)
class Bench:
    """What a script measures with: layers, their kernels, the machine's ceilings, and where the rows go."""

    layers: Sequence[Layer]
    kernels: Kernels
    limits: Ceilings
    chosen: Options
    report: Report
    clock: Clock

    @classmethod
    def start(cls, layers: Sequence[Layer], ops: Sequence[Op], chosen: Options, report: Report, clock: Clock) -> Bench:
        """Measure the ceilings and compile the kernels; the record says so."""
        limits = ceilings(chosen.device)
        report.extra["ceilings"] = asdict(limits)
        kernels = Kernels(ops, chosen)
        report.extra["kernels"] = kernels.how
        report.write()
        return cls(layers, kernels, limits, chosen, report, clock)

    def has_time(self, label: str) -> bool:
        """Whether a point can still be measured; the record names those that can't."""
        if self.clock.left() == 0:
            self.report.left_out.append(label)
            return False
        return True

    def measure_layer(
        self, layer: Layer, batches: Sequence[Batch], runs: Mapping[str, Run], seconds: float
    ) -> list[dict[str, Any]]:
        """A row for each contender: errors on the first of the batches, then times on all, in turn."""
        found, broken = check(layer, batches[0], runs)
        timings: dict[str, Timing | str] = dict(broken)
        works = {name: run for name, run in runs.items() if name not in broken}
        timings |= measure(works, self.chosen.device, calls=len(batches), seconds=seconds)
        active = sum(batch.active for batch in batches) / len(batches)
        pairs = sum(int((batch.index >= 0).sum()) for batch in batches) / len(batches)
        common = {"active": active, "bytes": layer.bytes_read(active), "flops": layer.flops(int(pairs))}
        common["floor_us"] = round(self.limits.floor(common["bytes"], common["flops"]), 3)
        rows = []
        for name, timing in timings.items():
            row = {"contender": name, **common, **times(timing)}
            if not isinstance(timing, str):
                row |= {**self._shares(timing, common), **error_columns(found, name)}
            rows.append(row)
        return rows

    def _shares(self, timing: Timing, common: Mapping[str, float]) -> dict[str, float]:
        """What a time is of the bandwidth, of the matmul rate and of the roofline."""
        seconds = 1e-6 * timing.median
        return {
            "bandwidth_share": round(common["bytes"] / self.limits.bandwidth / seconds, 4),
            "matmul_share": round(common["flops"] / self.limits.matmul / seconds, 4),
            "roofline_share": round(common["floor_us"] / timing.median, 4),
        }


def as_run(launch: Any, output: Tensor) -> Run:
    """A launch with its output."""

    def run() -> list[Tensor]:
        launch()
        return [output]

    return run


def times(timing: Timing | str) -> dict[str, Any]:
    """The columns of a time, or why there is none."""
    if isinstance(timing, str):
        return {"failed": timing}
    columns = timing.to_dict()
    return {"us": columns.pop("median"), **columns}


def check(layer: Layer, batch: Batch, runs: Mapping[str, Run]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Each contender's error on the first of its batches, and why some don't run."""
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


def errors(layer: Layer, batch: Batch, outputs: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Each result's relative error (by norm, and at the worst place) against float64, on some of the tokens.

    "pytorch" is eager PyTorch in the same precision: ours may have twice its error.
    """
    tokens = len(batch.hidden)
    rows = torch.linspace(0, tokens - 1, min(tokens, CHECKED), device=batch.hidden.device).round().long().unique()
    some = replace(batch, hidden=batch.hidden[rows], index=batch.index[rows], weight=batch.weight[rows])
    want = reference(layer, some)
    full = layer.in_full
    usual = experts_twin(full.experts.form, some.hidden, some.index, some.weight, **full.weights)
    results = {"pytorch": usual, **{name: output[rows] for name, output in outputs.items()}}
    return {name: relative(got, want) for name, got in results.items()}


def relative(got: Tensor, want: Tensor) -> dict[str, float]:
    """Norm of the error over that of what is wanted, and the worst error over the largest value; NaN stays NaN."""
    difference = got.double() - want
    return {
        "error": float(difference.norm() / want.norm()),
        "worst": float(difference.abs().max() / want.abs().max()),
    }


def reference(layer: Layer, batch: Batch) -> Tensor:
    """The layer in float64, an expert at a time: all of them at once would be four times the weights."""
    want = torch.zeros(batch.hidden.shape, dtype=torch.float64, device=batch.hidden.device)
    for expert in torch.unique(batch.index[batch.index >= 0]).tolist():
        rows, slots = (batch.index == expert).nonzero(as_tuple=True)
        own = {name: each[expert : expert + 1] for name, each in layer.weights.items()}
        alone = {name: each.double() if each.dtype.is_floating_point else each for name, each in own.items()}
        part = experts_twin(
            layer.experts.form,
            batch.hidden[rows].double(),
            torch.zeros((len(rows), 1), dtype=torch.int64, device=rows.device),
            batch.weight[rows, slots, None].double(),
            **alone,
        )
        want.index_add_(0, rows, part)
    return want


def error_columns(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The columns of a row: a result's error, PyTorch's, and whether it is at most twice that. NaN, which JSON has not
    and which is never right, is None.
    """
    if name not in found:
        return {}
    error, usual = found[name]["error"], found["pytorch"]["error"]
    columns = {"error": error, "worst": found[name]["worst"], "error_pytorch": usual}
    shown = {key: float(f"{value:.4g}") if math.isfinite(value) else None for key, value in columns.items()}
    return {**shown, "right": bool(error <= 2 * usual)}
