"""The ops on PyTorch tensors: what the tests, the tuner and the benchmarks run. Engines don't use this.

Runs the same plans as the TensorRT plugins, with kernels compiled when they are first met: on a GPU's tensors, or on a
CPU's with the Triton language's interpreter, for which TRITON_INTERPRET=1 has to be in the environment before anything
imports `triton`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lynx_trt.plugins.blob import Cubin
from lynx_trt.plugins.launch import ExpertsLaunch, SelectLaunch, power_of_two
from lynx_trt.plugins.launcher import Driver, Launch, launches_of
from lynx_trt.plugins.plan import MODULES, Kernel, Plan, Step
from lynx_trt.plugins.plans import causal_conv_plan, draw_plan, experts_plan, linear_attention_plan, select_plan
from lynx_trt.plugins.specs import CausalConvSpec, DrawSpec, ExpertsSpec, LinearAttentionSpec, SelectSpec

_TYPES = {
    "*fp64": torch.float64,
    "*fp32": torch.float32,
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*i64": torch.int64,
    "*i32": torch.int32,
    "*i8": torch.int8,
    "*u8": torch.uint8,
}

# What the interpreter plans for; it runs the programs one after another.
_CPU_SM, _CPU_MULTIPROCESSORS = 90, 4


class Selected(NamedTuple):
    """The outputs of LynxSelect: [T,K] int64, [T,K] float32, [] int32, and the metadata int32 [2 E + 2 + T K]."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    weight: Tensor
    active: Tensor
    dispatch: Tensor


def select(
    spec: SelectSpec,
    choice: Tensor,
    combine: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    budget: Tensor,
    floor: Tensor,
    token_mask: Tensor,
    *,
    launch: SelectLaunch | None = None,
) -> Selected:
    """LynxSelect: the arguments are the op's inputs, [T,E], [T,E], [T,K], [T,K], [] int32, [] float32, [T] bool."""
    tokens = len(choice)
    outputs = Selected(
        torch.empty_like(topk_index),
        torch.empty_like(topk_weight),
        torch.empty((), dtype=torch.int32, device=choice.device),
        torch.empty(2 * spec.experts + 2 + topk_index.numel(), dtype=torch.int32, device=choice.device),
    )
    tensors = {
        "choice": choice,
        "combine": combine,
        "topk_index": topk_index,
        "topk_weight": topk_weight,
        "budget": budget,
        "floor": floor,
        "token_mask": token_mask,
        **outputs._asdict(),
    }
    run(select_plan(spec, sm_of(choice), power_of_two(tokens), launch), tensors, tokens)
    return outputs


def experts(
    spec: ExpertsSpec,
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    dispatch: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    *,
    launch: ExpertsLaunch | None = None,
) -> Tensor:
    """LynxExperts: the arguments are the op's inputs, and `dispatch` if the spec says that it is given; [T,H].

    The scales are those of quantized weights.
    """
    output = torch.empty_like(hidden)
    tensors = {
        "hidden": hidden,
        "index": index,
        "weight": weight,
        "gate_up": gate_up,
        "down": down,
        "output": output,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
        "gate_up_scale": gate_up_scale,
        "down_scale": down_scale,
        "dispatch": dispatch,
    }
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    run(experts_plan(spec, sm_of(hidden), power_of_two(len(hidden)), launch), given, len(hidden))
    return output


def draw(
    spec: DrawSpec,
    logits: Tensor,
    scale: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    uniform: Tensor,
    *,
    block: int | None = None,
) -> Tensor:
    """The next tokens [T] int32; the arguments are the inputs of `draw_kernel`."""
    token = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    tensors = {"logits": logits, "scale": scale, "top_p": top_p, "top_k": top_k, "uniform": uniform, "token": token}
    run(draw_plan(spec, power_of_two(len(logits)), block), tensors, len(logits))
    return token


def causal_conv(
    spec: CausalConvSpec,
    values: Tensor,
    weight: Tensor,
    past_state: Tensor,
    lengths: Tensor,
    bias: Tensor | None = None,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """LynxCausalConv: the arguments are the op's inputs; [T,C] and [B,W-1,C]. in_place: into `past_state`."""
    output, state = torch.empty_like(values), past_state if in_place else torch.empty_like(past_state)
    tensors = {"values": values, "weight": weight, "past_state": past_state, "lengths": lengths}
    tensors |= {"output": output, "present_state": state} | ({} if bias is None else {"bias": bias})
    longest = power_of_two(len(values) // len(lengths))
    run(causal_conv_plan(spec, longest), tensors, len(values), len(lengths))
    return output, state


def linear_attention(
    spec: LinearAttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    past_state: Tensor,
    lengths: Tensor,
    *,
    in_place: bool = False,
    chunks: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """LynxLinearAttention: the arguments are the op's inputs; [T,N M] and [B,N,D,M]. in_place: into `past_state`.

    chunks: whether in chunks of tokens (`linear_attention_plan`).
    """
    output, state = torch.empty_like(value), past_state if in_place else torch.empty_like(past_state)
    tensors = {"query": query, "key": key, "value": value, "decay": decay, "beta": beta, "past_state": past_state}
    tensors |= {"lengths": lengths, "output": output, "present_state": state}
    longest = power_of_two(len(value) // len(lengths))
    run(linear_attention_plan(spec, longest, chunks=chunks), tensors, len(value), len(lengths))
    return output, state


def run(plan: Plan[Kernel], tensors: Mapping[str, Tensor], tokens: int, sequences: int = 0) -> dict[str, Tensor]:
    """Launch a plan's steps on tensors by name; returns the regions of its workspace, as bytes."""
    launch, regions = prepare(plan, tensors, tokens, sequences)
    launch()
    return regions


def prepare(
    plan: Plan[Kernel], tensors: Mapping[str, Tensor], tokens: int, sequences: int = 0
) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """A function that launches a plan's steps, for timing or a CUDA graph, and the regions of its workspace.

    The workspace starts as NaN (bytes of 255), so that a read of what nothing wrote is seen.
    """
    device = next(iter(tensors.values())).device
    workspace = torch.full((plan.workspace_bytes(tokens),), 255, dtype=torch.uint8, device=device)
    offsets = plan.offsets(tokens)
    regions = {
        region.name: workspace[offsets[region.name] : offsets[region.name] + region.size(tokens)]
        for region in plan.regions
    }
    everything = {**regions, **{name: tensor.contiguous() for name, tensor in tensors.items()}}
    numbers = {"T": tokens, "B": sequences}
    launches: list[Callable[[], None]] = []
    for step in plan.steps:
        programs = step.grid.programs(tokens, _multiprocessors(device), sequences)
        if programs and step.cluster and device.type == "cuda":
            launches.append(_prepare_cluster(step, everything, tokens))
        elif programs:
            arguments = [
                _argument(everything, name, kind, numbers)
                for name, (_, kind) in zip(step.arguments, step.kernel.parameters, strict=True)
            ]
            launches.append(functools.partial(_launch, step, programs, arguments, device))

    def launch() -> None:
        for each in launches:
            each()

    return launch, regions


def prepare_compiled(
    plan: Plan[Cubin], tensors: Mapping[str, Tensor], tokens: int, driver: Driver, sequences: int = 0
) -> Callable[..., None]:
    """The same as `prepare`, of kernels compiled ahead of time: launched by the CUDA driver, on the current stream.

    The function takes a slice of the launches, by default all.
    """
    device = driver.device()
    where = next(iter(tensors.values())).device
    workspace = torch.full((plan.workspace_bytes(tokens),), 255, dtype=torch.uint8, device=where)
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in held.items()}
    addresses |= {name: workspace.data_ptr() + offset for name, offset in plan.offsets(tokens).items()}
    launches = launches_of(plan, tokens, device, driver, addresses, sequences)
    return functools.partial(_launch_compiled, driver, launches, (workspace, held))


def _launch_compiled(driver: Driver, launches: Sequence[Launch], _alive: object, chosen: slice = slice(None)) -> None:
    """Launch; `_alive` are the tensors, which have to live as long as their addresses are used."""
    stream = torch.cuda.current_stream().cuda_stream
    for each in launches[chosen]:
        driver.launch(each, stream)


def _prepare_cluster(step: Step[Kernel], tensors: Mapping[str, Tensor], tokens: int) -> Callable[[], None]:
    """A step that is a cluster, which the Triton language launches otherwise: compiled, for the CUDA driver."""
    from lynx_trt.plugins.aot import compile_each
    from lynx_trt.plugins.cuda_driver import cuda_driver

    driver = cuda_driver()
    device = driver.device()
    plan = Plan(tokens, (step,), ()).with_kernels(compile_each([step.kernel], device.sm).__getitem__)
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    launches = launches_of(plan, tokens, device, driver, addresses)
    return functools.partial(_launch_compiled, driver, launches, tensors)


def _argument(tensors: Mapping[str, Tensor], name: str, kind: str, numbers: Mapping[str, int]) -> Tensor | int:
    if name in numbers:
        return numbers[name]
    if name == "null":  # never read, but a tensor has to be there
        return torch.empty(1, dtype=_TYPES[kind], device=next(iter(tensors.values())).device)
    return tensors[name].view(_TYPES[kind])


def _launch(step: Step[Kernel], programs: int, arguments: list[Tensor | int], device: torch.device) -> None:
    import triton

    kernel = step.kernel
    function = getattr(importlib.import_module(f"lynx_trt.plugins.{MODULES[kernel.function]}"), kernel.function)
    constants: dict[str, Any] = dict(kernel.constants)
    if device.type == "cpu":
        from lynx_trt.plugins import interpreter

        interpreter.prepare()
        if kernel.waits:  # the interpreter runs one launch after another, and knows no other way
            constants["PROGRAMMATIC"] = False
        if step.cluster:
            interpreter.as_cluster(function, programs)(*arguments, **constants)
            return
    if constants.get("DESCRIPTORS"):
        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))
    options: dict[str, Any] = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    options |= {"enable_fp_fusion": kernel.fuses, "maxnreg": kernel.most_registers}
    function[(programs,)](*arguments, **constants, **options)


def sm_of(tensor: Tensor) -> int:
    """The SM that plans for a tensor's device are made for."""
    if tensor.device.type == "cpu":
        return _CPU_SM
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return major * 10 + minor


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return _CPU_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
