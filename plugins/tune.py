"""Find the fastest launches on this machine's GPU and write the table that ships: `python -m lynx_trt.plugins.tune`.

For each model and number of tokens, the estimate and its neighbours run in CUDA graphs on random weights and routing,
and the fastest goes into `launch_table.py` with its time and the share that it reached of the memory bandwidth measured
in the same run. Entries of other SMs and sizes stay. Candidates are compiled ahead of time, many at once, and launched
as an engine launches them; those that spill or find no room are left out.

Routing is even: each token's K experts are drawn at random, as a well balanced router's are over many tokens. A graph
has several batches one after another, so that a small one does not find its experts in L2.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lynx_trt.console import Progress, new_app, run
from lynx_trt.errors import UsageError
from lynx_trt.plugins.blob import Cubin
from lynx_trt.plugins.cuda_driver import CudaError
from lynx_trt.plugins.launch import (
    PREFILL_BUCKET,
    SHARED_MEMORY,
    ExpertsLaunch,
    MatmulLaunch,
    SelectLaunch,
    experts_estimate,
    power_of_two,
    select_estimate,
    shared_bytes,
    tokens_bucket,
)
from lynx_trt.plugins.launch_source import ExpertsKey, SelectKey, render_table
from lynx_trt.plugins.plan import Kernel, Plan, Step
from lynx_trt.plugins.plans import experts_plan, select_plan
from lynx_trt.plugins.shapes import SHAPES, experts_spec, select_spec
from lynx_trt.plugins.specs import BYTES, ExpertsSpec

if TYPE_CHECKING:
    from torch import Tensor

DEVICE = "cuda"  # a name, so that the tests can run all but the timing without one
TABLE = Path(__file__).with_name("launch_table.py")

_ROUNDS = 5
# Batches in a graph.
BATCHES = 4
# Long enough that the clock's resolution and a graph's start are below a hundredth.
_MICROSECONDS_A_ROUND = 5000.0

# A neighbour replaces the estimate only if it is clearly faster: the spread of two runs is about a hundredth.
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
    seconds = 1e-6 * time_graph(lambda: target.copy_(source))
    return Machine(sm, torch.cuda.get_device_name(), 2 * source.numel() / seconds)


def time_graph(function: Callable[[], Any]) -> float:
    """Microseconds of a call, replayed in a CUDA graph: the median of some rounds."""
    import torch

    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    replays = 1
    rounds: list[float] = []
    while len(rounds) < _ROUNDS:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        total = begin.elapsed_time(end) * 1000
        if total < _MICROSECONDS_A_ROUND / 2:
            replays = max(replays * 2, int(replays * _MICROSECONDS_A_ROUND / max(total, 1.0)))
            continue
        rounds.append(total / replays)
    return statistics.median(rounds)


def matmul_choices(launch: MatmulLaunch) -> dict[str, tuple[int | bool, ...]]:
    """What is tried for each field of a launch, the most telling field first."""
    prefill = launch.per_multiprocessor > 0
    choices: dict[str, tuple[int | bool, ...]] = {
        "block_n": (launch.block_n // 2, launch.block_n * 2),
        "stages": (2, 3, 4, 5, 6),
        "warps": (4, 8),
        "block_d": (launch.block_d // 2, launch.block_d * 2),
    }
    return choices | ({"per_multiprocessor": (1, 2)} if prefill else {"swap": (False, True)})


def fits(launch: MatmulLaunch, dtype: str, sm: int, *, rows_a_value: int) -> bool:
    """Whether a launch can run: tiles that the matrix units take, in an SM's shared memory."""
    room = SHARED_MEMORY[sm] // max(launch.per_multiprocessor, 1)
    # The copy engine's boxes have at most 256 rows.
    return (
        launch.block_n >= 16
        and launch.block_d >= 32
        and rows_a_value * launch.block_n <= 256
        and shared_bytes(launch, dtype, sm, rows_a_value=rows_a_value) <= room
    )


def improve(
    best: ExpertsLaunch,
    part: str,
    measure: Callable[[ExpertsLaunch], float],
    allowed: Callable[[MatmulLaunch], bool],
) -> ExpertsLaunch:
    """Change one field of a part ("gate_up" or "down") after the other, and keep what is clearly faster.

    One at a time, because each candidate costs a compilation: all together would be 100 times as many.
    """
    fastest = measure(best)
    for name in matmul_choices(getattr(best, part)):
        for launch in neighbours(best, part, allowed, name):
            time = measure(launch)
            if time < fastest * _CLEARLY:
                best, fastest = launch, time
    return best


def neighbours(
    launch: ExpertsLaunch, part: str, allowed: Callable[[MatmulLaunch], bool], field: str | None = None
) -> list[ExpertsLaunch]:
    """What is one change of a part away (of one field, if it is named) and can run."""
    found = []
    for name, values in matmul_choices(getattr(launch, part)).items():
        for value in values:
            matmul = replace(getattr(launch, part), **{name: value})
            if field in (None, name) and matmul != getattr(launch, part) and allowed(matmul):
                found.append(replace(launch, **{part: matmul}))
    return found


def experts_inputs(spec: ExpertsSpec, tokens: int) -> list[dict[str, Tensor]]:
    """Random inputs of a layer on the GPU: BATCHES batches for the same weights, with their metadata."""
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
    weights = {"gate_up": normal(spec.experts, *up), "down": normal(spec.experts, *down)}
    if spec.bias:
        weights |= {"gate_up_bias": normal(spec.experts, rows), "down_bias": normal(spec.experts, spec.hidden)}
    batches = []
    for _ in range(BATCHES):
        scores = torch.rand((tokens, spec.experts), device=DEVICE, generator=generator)
        weight, index = scores.topk(spec.experts_per_token, dim=1)
        batch = {"hidden": normal(tokens, spec.hidden), "index": index, "weight": weight}
        batch["output"] = torch.empty_like(batch["hidden"])
        batches.append({**batch, **weights, "dispatch": dispatch_twin(index, spec.experts)})
    return batches


class Bench:
    """Compiles plans and times them on this machine's GPU."""

    def __init__(self, sm: int) -> None:
        from lynx_trt.plugins.cuda_driver import cuda_driver

        self._sm, self._driver = sm, cuda_driver()
        self._cubins: dict[Kernel, Cubin | None] = {}

    def compile(self, plans: Iterable[Plan[Kernel]]) -> None:
        """Compile what some plans need and is not there yet, all at once."""
        from lynx_trt.plugins.aot import compile_each

        wanted = [step.kernel for plan in plans for step in plan.steps if step.kernel not in self._cubins]
        found = compile_each(wanted, self._sm) if wanted else {}
        self._cubins.update((kernel, found.get(kernel)) for kernel in wanted)

    def time(self, plan: Plan[Kernel], batches: Sequence[Mapping[str, Tensor]], tokens: int) -> float:
        """Microseconds for a batch; infinite if a kernel does not compile, spills or finds no room on the GPU."""
        from lynx_trt.plugins.execute import prepare_compiled

        self.compile([plan])
        compiled = usable(plan, self._cubins, self._sm)
        if compiled is None:
            return float("inf")
        try:
            launches = [prepare_compiled(compiled, batch, tokens, self._driver) for batch in batches]
            return time_graph(lambda: [launch() for launch in launches]) / len(launches)
        except CudaError:
            return float("inf")


def usable(plan: Plan[Kernel], cubins: Mapping[Kernel, Cubin | None], sm: int) -> Plan[Cubin] | None:
    """A plan with its kernels compiled; None if one is missing, spills or wants more shared memory than there is."""
    steps = []
    for step in plan.steps:
        cubin = cubins.get(step.kernel)
        if cubin is None or cubin.spills > 0 or cubin.shared > SHARED_MEMORY[sm]:
            return None
        steps.append(Step(cubin, step.grid, step.arguments))
    return Plan(plan.max_tokens, tuple(steps), plan.regions)


def tune_experts(gpu: Machine, bench: Bench, spec: ExpertsSpec, tokens: int) -> tuple[ExpertsKey, ExpertsLaunch]:
    """The best launch of a layer for a batch: gate_up's tiles first, then down's."""
    spec = replace(spec, dispatch_given=True)
    bucket = tokens_bucket(tokens, spec.experts, spec.experts_per_token)
    batches = experts_inputs(spec, tokens)
    start = experts_estimate(bucket, spec.hidden, spec.inner, spec.dtype, gpu.sm)
    allowed = {
        part: functools.partial(fits, dtype=spec.dtype, sm=gpu.sm, rows_a_value=rows)
        for part, rows in (("gate_up", 2 if spec.form.gated else 1), ("down", 1))
    }

    def plan(launch: ExpertsLaunch) -> Plan[Kernel]:
        return experts_plan(spec, gpu.sm, power_of_two(tokens), launch)

    def measure(launch: ExpertsLaunch) -> float:
        return bench.time(plan(launch), batches, tokens)

    # All that is one change away, at once on all cores; what is further comes one by one.
    bench.compile(plan(each) for part in allowed for each in [start, *neighbours(start, part, allowed[part])])
    best = start
    for part, check in allowed.items():
        best = improve(best, part, measure, check)
    estimate, fastest = measure(start), measure(best)
    reason = f"{tokens} tokens: {_share(spec, batches[0]['index'], fastest, gpu)}, the estimate took {estimate:.1f} us"
    key = (gpu.sm, spec.dtype, spec.experts, spec.hidden, spec.inner, bucket)
    return key, replace(best, reason=reason, microseconds=round(fastest, 2))


def _share(spec: ExpertsSpec, index: Tensor, microseconds: float, gpu: Machine) -> str:
    """What of the GPU a layer's time is: of the bandwidth in decode, operations a second in prefill."""
    import torch

    values = spec.hidden * spec.inner * (3 if spec.form.gated else 2)
    bucket = tokens_bucket(len(index), spec.experts, spec.experts_per_token)
    if bucket >= PREFILL_BUCKET:
        return f"{2e-6 * values * index.numel() / microseconds:.0f} TFLOP/s"
    active = int(torch.bincount(index.reshape(-1)).count_nonzero())
    share = active * values * BYTES[spec.dtype] / (microseconds * 1e-6) / gpu.bandwidth
    return f"{active} active experts at {share:.0%} of the copy bandwidth"


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

    best = select_estimate(tokens, spec.experts, spec.experts_per_token)
    others = list(select_neighbours(best, tokens))
    bench.compile(select_plan(spec, gpu.sm, tokens, launch) for launch in [best, *others])
    estimate = measure(best)
    fastest = estimate
    for launch in others:
        time = measure(launch)
        if time < fastest * _CLEARLY:
            best, fastest = launch, time
    key = (gpu.sm, spec.experts, spec.experts_per_token, tokens)
    reason = f"{tokens} tokens, half the experts kept: the estimate took {estimate:.1f} us"
    return key, replace(best, reason=reason, microseconds=round(fastest, 2))


def select_neighbours(launch: SelectLaunch, tokens: int) -> Iterable[SelectLaunch]:
    """One program and blocks, with other tiles and warps."""
    for one_program, block_t, warps in itertools.product(
        (True, False), (launch.block_t // 2, launch.block_t, launch.block_t * 2), (4, 8, 16)
    ):
        if block_t >= 1 and not (one_program and tokens > 512):
            block = max(launch.tokens, block_t)
            yield replace(launch, one_program=one_program, block_t=block_t, warps=warps, tokens=block)


app = new_app()


@app.command()
def main(
    shape: Annotated[list[str] | None, typer.Option(help="A known model's sizes; repeat for several (all).")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "bfloat16",
    decode: Annotated[str, typer.Option(help="Decode batches, in tokens.")] = "1,2,4,8,16,32,64,128",
    prefill: Annotated[str, typer.Option(help="Prefills, in tokens.")] = "512,2048,8192",
    output: Annotated[Path, typer.Option("--output", "-o", help="The table to write.")] = TABLE,
) -> None:
    """Measure launches on this machine's GPU and write the table; some minutes a model."""
    from lynx_trt.plugins import launch_table

    unknown = sorted(set(shape or ()) - set(SHAPES))
    if unknown:
        raise UsageError(f"unknown shape {', '.join(unknown)}: choose from {', '.join(SHAPES)}")
    if dtype not in BYTES:
        raise UsageError(f"--dtype is {dtype!r}: choose float16 or bfloat16")
    sizes = sorted({power_of_two(_number(word)) for word in (*decode.split(","), *prefill.split(","))})
    gpu = machine()
    bench = Bench(gpu.sm)
    experts, select = dict(launch_table.EXPERTS), dict(launch_table.SELECT)
    with Progress() as bars:
        for name in shape or SHAPES:
            update = bars.phase(f"Tuning {name} on {gpu.name}")
            for number, tokens in enumerate(sizes, start=1):
                bucket = _bucket(name, tokens)
                if bucket not in [_bucket(name, later) for later in sizes[number:]]:
                    key, launch = tune_experts(gpu, bench, experts_spec(name, dtype), tokens)
                    experts[key] = launch
                    bars.say(f"{name}, {tokens} tokens: {launch.microseconds} us; {launch.reason}")
                chosen, selection = tune_select(gpu, bench, name, tokens)
                select[chosen] = selection
                bars.say(f"{name}, {tokens} tokens, selection: {selection.microseconds} us; {selection.reason}")
                # Written as it grows: what has been measured survives an interruption.
                aside = output.with_name(f"{output.name}.part")
                aside.write_text(render_table(gpu.name, experts, select), encoding="utf-8")
                aside.replace(output)
                update(number / len(sizes))


def _bucket(name: str, tokens: int) -> int:
    return tokens_bucket(tokens, SHAPES[name].experts, SHAPES[name].experts_per_token)


def _number(word: str) -> int:
    if not word.strip().isdigit() or int(word) < 1:
        raise UsageError(f"a number of tokens is {word!r}: give whole numbers from 1, separated by commas")
    return int(word)


if __name__ == "__main__":
    run(app)
