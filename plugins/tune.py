"""Find the fastest launches on this machine's GPU and write the table that ships: `python -m lynx_trt.plugins.tune`.

For each model and number of tokens, the candidates (`candidates.py`) run in CUDA graphs on random weights and routing,
and the fastest goes into `launch_table.py` with its time and the share that it reached of the memory bandwidth measured
in the same run. Entries of other SMs and sizes stay. Candidates are compiled ahead of time, many at once, and launched
as an engine launches them; those that spill or find no room are left out. Compiling takes the longest: `--compile-for`
does that where there is no GPU.

Routing is even: each token's K experts are drawn at random, as a well balanced router's are over many tokens. A graph
has several batches one after another, so that a small one does not find its experts in L2.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lynx_trt import fp8, int4, mxfp4, nvfp4
from lynx_trt.console import Progress, new_app, run
from lynx_trt.errors import UsageError
from lynx_trt.experts import FORMATS
from lynx_trt.plugins.aot import compile_each
from lynx_trt.plugins.blob import Cubin
from lynx_trt.plugins.candidates import PARTS, candidates, estimate, families, select_candidates, with_part
from lynx_trt.plugins.cuda_driver import CudaError
from lynx_trt.plugins.launch import (
    PREFILL_BUCKET,
    SHARED_MEMORY,
    ExpertsLaunch,
    MatmulLaunch,
    SelectKey,
    SelectLaunch,
    experts_estimate,
    power_of_two,
    tokens_bucket,
)
from lynx_trt.plugins.launch_source import render_table
from lynx_trt.plugins.plan import Kernel, Plan
from lynx_trt.plugins.plans import PROGRAMMATIC_SM, experts_plan, select_plan
from lynx_trt.plugins.shapes import SHAPES, experts_spec, routers, select_spec
from lynx_trt.plugins.specs import ExpertsSpec, SelectSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEVICE = "cuda"  # a name, so that the tests can run all but the timing without one
TABLE = Path(__file__).with_name("launch_table.py")

_ROUNDS = 5
# Batches in a graph; of many tokens, whose weights are read for all of them anyway, one.
BATCHES, BATCHES_UP_TO = 4, 512
# Each matmul's candidates are timed alone, in short rounds; the best of both then together, in all combinations.
_SCREENING = {"rounds": 3, "microseconds": 1500.0}
_FINALISTS = {"gate_up": 3, "down": 4}
# Whether gate_up and down may start while the launch before them still runs, and how much of its sum a decode's down
# then has brought to L2 meanwhile: what a program begins with.
_AHEAD = 256
_EARLY = ((True, True, 0), (False, False, 0), (False, True, 0), (True, True, _AHEAD))

# Another launch replaces the estimate only if it is clearly faster: the spread of two runs is about a hundredth.
_CLEARLY = 0.99


@dataclass(frozen=True)
class Machine:
    """The GPU that measures: its SM, its name, and what a large copy moves, in bytes a second, both ways counted."""

    sm: int
    name: str
    bandwidth: float


def machine() -> Machine:
    """Measure the GPU of this machine. Raises UsageError: there is none that kernels are made for."""
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            "the tuner measures on a GPU, and PyTorch finds none here: run it on a machine with one. "
            "Without measurements, launches are the estimates of lynx_trt/plugins/launch.py"
        )
    major, minor = torch.cuda.get_device_capability()
    sm = major * 10 + minor
    if sm not in SHARED_MEMORY:
        raise UsageError(f"this GPU is SM {sm}: launches are tuned for {', '.join(map(str, SHARED_MEMORY))}")
    source = torch.empty(1 << 31, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    # Called, not captured: as a node of a graph this copy is a third slower on an H200.
    seconds = 1e-6 * time_calls(lambda: target.copy_(source))
    return Machine(sm, torch.cuda.get_device_name(), 2 * source.numel() / seconds)


def time_calls(function: Callable[[], Any]) -> float:
    """Microseconds of a call that no graph holds, the median of some; for what takes far longer than its launch."""
    import torch

    times: list[float] = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times[2:])


def time_graph(function: Callable[[], Any], *, rounds: int = _ROUNDS, microseconds: float = 5000.0) -> float:
    """Microseconds of a call, replayed in a CUDA graph: the median of some rounds of about so many microseconds."""
    import torch

    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    replays = 1
    times: list[float] = []
    while len(times) < rounds:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        total = begin.elapsed_time(end) * 1000
        if total < microseconds / 2:
            replays = max(replays * 2, int(replays * microseconds / max(total, 1.0)))
            continue
        times.append(total / replays)
    return statistics.median(times)


def experts_inputs(spec: ExpertsSpec, tokens: int) -> list[dict[str, Tensor]]:
    """Random inputs of a layer on the GPU: BATCHES batches for the same weights, with their metadata.

    Every second batch of decode has half of the experts that it would have, as under a selection: its experts have
    twice the tokens, for which other tiles may be better, and one launch has to do for both.
    """
    import torch

    from lynx_trt.plugins.twins import dispatch_twin

    generator = torch.Generator(DEVICE).manual_seed(0)
    dtype = getattr(torch, spec.dtype)

    def normal(*shape: int) -> Tensor:
        values = torch.empty(shape, dtype=dtype, device=DEVICE)
        return values.normal_(0, shape[-1] ** -0.5, generator=generator)

    rows = spec.inner * (2 if spec.form.gated else 1)
    up, down = (rows, spec.hidden), (spec.hidden, spec.inner)
    if spec.form.transposed:
        up, down = up[::-1], down[::-1]
    weights: dict[str, Tensor] = {}
    for name, shape in (("gate_up", up), ("down", down)):
        if spec.form.quantized:
            weights |= random_quantized(spec.form.weights, name, (spec.experts, *shape), generator, dtype)
        else:
            weights[name] = normal(spec.experts, *shape)
    if spec.bias:
        weights |= {"gate_up_bias": normal(spec.experts, rows), "down_bias": normal(spec.experts, spec.hidden)}
    batches = []
    decode = tokens_bucket(tokens, spec.experts, spec.experts_per_token) < PREFILL_BUCKET
    for number in range(BATCHES if tokens <= BATCHES_UP_TO else 1):
        scores = torch.rand((tokens, spec.experts), device=DEVICE, generator=generator)
        if decode and number % 2:
            left = max(_active(scores.topk(spec.experts_per_token, dim=1).indices) // 2, spec.experts_per_token)
            scores[:, torch.randperm(spec.experts, device=DEVICE, generator=generator)[left:]] -= 1.0
        weight, index = scores.topk(spec.experts_per_token, dim=1)
        batch = {"hidden": normal(tokens, spec.hidden), "index": index, "weight": weight}
        batch["output"] = torch.empty_like(batch["hidden"])
        batches.append({**batch, **weights, "dispatch": dispatch_twin(index, spec.experts)})
    return batches


def random_quantized(
    weights: str, name: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A random matrix of that shape and its scales by name, on the generator's device: of a variance of 1 / D.

    `dtype`, float16 or bfloat16, is the layer's, and of its scales where they are of no type of their own.
    """
    import torch

    *rows, width = shape
    device = generator.device

    def integers(width: int, low: int, high: int) -> Tensor:
        size = (*rows, width)
        return torch.randint(low, high, size, dtype=torch.int8, device=device, generator=generator)

    def factors(block: int, deviation: float) -> Tensor:
        scales = torch.rand((*rows, width // block), device=device, generator=generator)
        return scales.add_(0.5).mul_(width**-0.5 / deviation)

    if weights == "mxfp4":  # E2M1 has a variance of 7 by itself, and a scale is a power of two
        middle = 127 - round(math.log2((7 * width) ** 0.5))
        values, scales = integers(width // 2, -128, 128), integers(width // mxfp4.BLOCK, middle - 1, middle + 2)
    elif weights == "nvfp4":
        values, scales = integers(width // 2, -128, 128), factors(nvfp4.BLOCK, 7**0.5).to(dtype)
    elif weights == "fp8":
        # The upper half of a sign's bytes, of which the last is NaN.
        values = integers(width, 64, 127) | (integers(width, 0, 2) << 7)
        scales = factors(fp8.BLOCK, float((fp8.VALUES[64:127] ** 2).mean() ** 0.5))
    else:  # 16 values in a row have a deviation of 4.6, and zero points add little
        stored = FORMATS[weights]
        values, scales = integers(width // 2, -128, 128), factors(stored.block, 4.6).to(dtype)
        if stored.zeros:
            points = integers(width // stored.block, 5, int4.LARGEST_ZERO - 4).to(dtype)
            scales = torch.cat([scales, points], dim=-1)
    return {name: values, f"{name}_scale": scales}


class Bench:
    """Compiles plans and times them on this machine's GPU."""

    def __init__(self, sm: int) -> None:
        from lynx_trt.plugins.cuda_driver import cuda_driver

        self._sm, self._driver = sm, cuda_driver()
        self._cubins: dict[Kernel, Cubin | None] = {}

    def compile(self, plans: Iterable[Plan[Kernel]]) -> None:
        """Compile what some plans need and is not there yet, all at once."""
        kernels = (step.kernel for plan in plans for step in plan.steps)
        wanted = [kernel for kernel in dict.fromkeys(kernels) if kernel not in self._cubins]
        found = compile_each(wanted, self._sm) if wanted else {}
        self._cubins.update((kernel, found.get(kernel)) for kernel in wanted)

    def time(
        self,
        plan: Plan[Kernel],
        batches: Sequence[Mapping[str, Tensor]],
        tokens: int,
        function: str | None = None,
        **how: Any,
    ) -> float:
        """Microseconds of a plan for a batch, or of the one step of it whose kernel's name begins with `function`.

        Infinite if a kernel does not compile, spills or finds no room on the GPU.
        """
        from lynx_trt.plugins.execute import prepare_compiled

        self.compile([plan])
        compiled = usable(plan, self._cubins, self._sm)
        if compiled is None:
            return float("inf")
        try:
            launches = [prepare_compiled(compiled, batch, tokens, self._driver) for batch in batches]
            for launch in launches:
                launch()  # what a step alone reads has been written once
            if function is not None:
                number = next(n for n, step in enumerate(plan.steps) if step.kernel.function.startswith(function))
                launches = [functools.partial(launch, slice(number, number + 1)) for launch in launches]
            return time_graph(lambda: [launch() for launch in launches], **how) / len(launches)
        except CudaError:
            return float("inf")


def usable(plan: Plan[Kernel], cubins: Mapping[Kernel, Cubin | None], sm: int) -> Plan[Cubin] | None:
    """A plan with its kernels compiled; None if one is missing, spills or wants more shared memory than there is."""
    compiled: dict[Kernel, Cubin] = {}
    for step in plan.steps:
        cubin = cubins.get(step.kernel)
        if cubin is None or cubin.spills > 0 or cubin.shared > SHARED_MEMORY[sm]:
            return None
        compiled[step.kernel] = cubin
    return plan.with_kernels(compiled.__getitem__)


def experts_plans(spec: ExpertsSpec, sm: int, tokens: int) -> Iterator[Plan[Kernel]]:
    """All that is tried of a layer for a batch: each candidate of one matmul beside the estimate of the other.
    Those of down that prefetch too: any may turn out to be one of the best, of which that is tried.
    """
    for prefill in families(spec, tokens):
        start = estimate(spec, sm, tokens, prefill=prefill)
        for part in PARTS:
            for each in candidates(spec, sm, tokens, part, prefill=prefill):
                yield experts_plan(spec, sm, tokens, with_part(start, part, each))
                if part == "down" and _can_prefetch(spec, sm, each, prefill=prefill):
                    yield experts_plan(spec, sm, tokens, with_part(start, part, replace(each, prefetch=_AHEAD)))


def tune_experts(gpu: Machine, bench: Bench, spec: ExpertsSpec, tokens: int) -> ExpertsLaunch:
    """The best launch of a layer for a batch, a power of two.

    It makes its own metadata here, so that what goes before gate_up is one small program, as a selection is.
    """
    spec = replace(spec, dispatch_given=False)
    batches = experts_inputs(spec, tokens)
    bench.compile(experts_plans(spec, gpu.sm, tokens))
    times: dict[ExpertsLaunch, float] = {}
    for prefill in families(spec, tokens):
        start = estimate(spec, gpu.sm, tokens, prefill=prefill)
        finalists = {part: _screened(bench, spec, gpu.sm, batches, start, part) for part in PARTS}
        for gate_up, down, early in itertools.product(finalists["gate_up"], finalists["down"], _EARLY):
            if early[2] and not _can_prefetch(spec, gpu.sm, down, prefill=prefill):
                continue
            launch = replace(
                start,
                gate_up=replace(gate_up, programmatic=early[0]),
                down=replace(down, programmatic=early[1], prefetch=early[2]),
            )
            times[launch] = bench.time(experts_plan(spec, gpu.sm, tokens, launch), batches, tokens)
    bucket = tokens_bucket(tokens, spec.experts, spec.experts_per_token)
    sizes = bucket, spec.hidden, spec.inner, spec.dtype, gpu.sm
    usual = experts_estimate(*sizes, form=spec.form)
    before = bench.time(experts_plan(spec, gpu.sm, tokens, usual), batches, tokens)
    best = min(times, key=lambda launch: times[launch])
    fastest = times[best]
    if fastest > before * _CLEARLY or not _agree(bench, spec, gpu.sm, batches[0], best, usual):
        best, fastest = usual, before
    reason = f"{tokens} tokens: {_share(spec, batches, fastest, gpu)}, the estimate took {before:.1f} us"
    return replace(best, reason=reason, microseconds=round(fastest, 2))


def _can_prefetch(spec: ExpertsSpec, sm: int, down: MatmulLaunch, *, prefill: bool) -> bool:
    """Whether a launch of down may start early at all, and has so much of the sum."""
    return not prefill and sm >= PROGRAMMATIC_SM and spec.inner // down.split >= _AHEAD


def _agree(bench: Bench, spec: ExpertsSpec, sm: int, batch: Mapping[str, Tensor], *launches: ExpertsLaunch) -> bool:
    """Whether two launches give the same output but for rounding: a compiler's mistake may be fast."""
    tokens = len(batch["hidden"])
    outputs = []
    for launch in launches:
        batch["output"].fill_(float("nan"))
        bench.time(experts_plan(spec, sm, tokens, launch), [batch], tokens, rounds=1, microseconds=1.0)
        outputs.append(batch["output"].float())
    return bool((outputs[0] - outputs[1]).norm() <= 0.02 * outputs[1].norm())


def _screened(
    bench: Bench, spec: ExpertsSpec, sm: int, batches: Sequence[Mapping[str, Tensor]], start: ExpertsLaunch, part: str
) -> list[MatmulLaunch]:
    """The fastest candidates of a matmul, each timed alone."""
    tokens = len(batches[0]["hidden"])
    times = {
        each: bench.time(
            experts_plan(spec, sm, tokens, with_part(start, part, each)), batches, tokens, part, **_SCREENING
        )
        for each in candidates(spec, sm, tokens, part, prefill=start.prefill)
    }
    return sorted(times, key=lambda each: times[each])[: _FINALISTS[part]]


def _active(index: Tensor) -> int:
    """Distinct experts in use."""
    import torch

    return int(torch.bincount(index.reshape(-1)).count_nonzero())


def _share(spec: ExpertsSpec, batches: Sequence[Mapping[str, Tensor]], microseconds: float, gpu: Machine) -> str:
    """What of the GPU a layer's time is: of the bandwidth in decode, operations a second in prefill."""
    values = spec.hidden * spec.inner * (3 if spec.form.gated else 2)
    index = batches[0]["index"]
    bucket = tokens_bucket(len(index), spec.experts, spec.experts_per_token)
    if bucket >= PREFILL_BUCKET:
        return f"{2e-6 * values * index.numel() / microseconds:.0f} TFLOP/s"
    active = [_active(batch["index"]) for batch in batches]
    share = statistics.mean(active) * values * spec.weight_bytes / (microseconds * 1e-6) / gpu.bandwidth
    return f"{', '.join(map(str, active))} active experts at {share:.0%} of the copy bandwidth"


def select_plans(spec: SelectSpec, sm: int, tokens: int) -> Iterator[Plan[Kernel]]:
    """All that is tried of a selection for a batch."""
    for launch in select_candidates(tokens, spec.experts, spec.experts_per_token, sm):
        yield select_plan(spec, sm, tokens, launch)


def tune_select(gpu: Machine, bench: Bench, name: str, tokens: int) -> tuple[SelectKey, SelectLaunch]:
    """The best launch of a model's selection for a batch, at a budget of half its experts."""
    import torch

    spec = select_spec(name)
    generator = torch.Generator(DEVICE).manual_seed(0)
    scores = torch.rand((tokens, spec.experts), device=DEVICE, generator=generator)
    weight, index = scores.topk(spec.experts_per_token, dim=1)

    def whole(*shape: int) -> Tensor:
        return torch.full(shape, spec.experts // 2, dtype=torch.int32, device=DEVICE)

    inputs = {
        "choice": scores,
        "combine": scores,
        "topk_index": index,
        "topk_weight": weight,
        "budget": whole(),
        "floor": torch.zeros((), dtype=torch.float32, device=DEVICE),
        "token_mask": torch.ones(tokens, dtype=torch.bool, device=DEVICE),
        "index": torch.empty_like(index),
        "weight": torch.empty_like(weight),
        "active": whole(),
        "dispatch": whole(2 * spec.experts + 2 + index.numel()),
    }

    def measure(launch: SelectLaunch) -> float:
        return bench.time(select_plan(spec, gpu.sm, tokens, launch), [inputs] * BATCHES, tokens)

    bench.compile(select_plans(spec, gpu.sm, tokens))
    best, *others = select_candidates(tokens, spec.experts, spec.experts_per_token, gpu.sm)
    before = measure(best)
    fastest = before
    for launch in others:
        time = measure(launch)
        if time < fastest * _CLEARLY:
            best, fastest = launch, time
    key = (gpu.sm, spec.experts, spec.experts_per_token, tokens)
    reason = f"{tokens} tokens, half the experts kept: the estimate took {before:.1f} us"
    return key, replace(best, reason=reason, microseconds=round(fastest, 2))


# Tokens of the batches that are tuned.
TOKENS = tuple(1 << power for power in range(15))

app = new_app()


@app.command()
def main(
    shape: Annotated[list[str] | None, typer.Option(help="A known model's sizes; repeat for several (all).")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "bfloat16",
    tokens: Annotated[str, typer.Option(help="Batches, in tokens.")] = ",".join(str(each) for each in TOKENS),
    op: Annotated[str, typer.Option(help="experts, select, or both of them.")] = "both",
    compile_for: Annotated[
        int | None, typer.Option("--compile-for", help="Only compile all candidates for this SM, into the cache.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The table to write.")] = TABLE,
) -> None:
    """Measure launches on this machine's GPU and write the table; about half a minute a model.

    With --compile-for no GPU is needed: what it compiles is found in the cache where the measuring is done.
    """
    unknown = sorted(set(shape or ()) - set(SHAPES))
    if unknown:
        raise UsageError(f"unknown shape {', '.join(unknown)}: choose from {', '.join(SHAPES)}")
    if dtype not in ("float16", "bfloat16"):
        raise UsageError(f"--dtype is {dtype!r}: choose float16 or bfloat16")
    if op not in ("both", "experts", "select"):
        raise UsageError(f"--op is {op!r}: choose experts, select or both")
    sizes = sorted({power_of_two(_number(word)) for word in tokens.split(",")})
    names = list(shape or SHAPES)
    if compile_for is not None:
        compile_candidates(names, dtype, sizes, compile_for, op)
    else:
        _measure(names, dtype, sizes, output, op)


def compile_candidates(names: Sequence[str], dtype: str, sizes: Sequence[int], sm: int, op: str = "both") -> None:
    """What would be measured, into the cache. Raises UsageError: an SM that launches can't be tuned for."""
    if sm not in SHARED_MEMORY:
        raise UsageError(f"--compile-for is {sm}: launches are tuned for {', '.join(map(str, SHARED_MEMORY))}")
    plans: list[Plan[Kernel]] = []
    for name, size in itertools.product(names, sizes):
        plans += experts_plans(experts_spec(name, dtype), sm, size) if op != "select" else ()
        plans += select_plans(select_spec(name), sm, size) if op != "experts" and name in routers(names) else ()
    kernels = dict.fromkeys(step.kernel for plan in plans for step in plan.steps)
    with Progress() as bars:
        found = compile_each(kernels, sm, progress=bars.phase(f"Compiling {len(kernels)} kernels for SM {sm}"))
    typer.echo(f"{len(found)} of {len(kernels)} kernels compile")


def _measure(names: Sequence[str], dtype: str, sizes: Sequence[int], output: Path, op: str) -> None:
    from lynx_trt.plugins import launch_table

    gpu = machine()
    bench = Bench(gpu.sm)
    experts = {layer: dict(by_tokens) for layer, by_tokens in launch_table.EXPERTS.items()}
    select = dict(launch_table.SELECT)
    with Progress() as bars:
        for name in names:
            update = bars.phase(f"Tuning {name} on {gpu.name}")
            spec = experts_spec(name, dtype)
            layer = gpu.sm, spec.experts, spec.experts_per_token, spec.hidden, spec.inner, spec.form.weights
            for number, tokens in enumerate(sizes, start=1):
                if op != "select":
                    launch = tune_experts(gpu, bench, spec, tokens)
                    experts.setdefault(layer, {})[tokens] = launch
                    bars.say(f"{name}, {tokens} tokens: {launch.microseconds} us; {launch.reason}")
                if op != "experts" and name in routers(names):
                    chosen, quick = tune_select(gpu, bench, name, tokens)
                    select[chosen] = quick
                    bars.say(f"{name}, {tokens} tokens, selection: {quick.microseconds} us; {quick.reason}")
                # Written as it grows: what has been measured survives an interruption.
                aside = output.with_name(f"{output.name}.part")
                aside.write_text(render_table(gpu.name, experts, select), encoding="utf-8")
                aside.replace(output)
                update(number / len(sizes))


def _number(word: str) -> int:
    if not word.strip().isdigit() or int(word) < 1:
        raise UsageError(f"a number of tokens is {word!r}: give whole numbers from 1, separated by commas")
    return int(word)


if __name__ == "__main__":
    run(app)
