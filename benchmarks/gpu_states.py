"""Layers that keep a state: how long do the convolution and the recurrence of one layer take?

Decode of 1 to 128 sequences and prompts of 128 to 2048 tokens at the sizes of known hybrid models, the states in
place. A decode step has to read and write each sequence's state, whatever its length: that is the floor, and the bytes
that `bandwidth_share` is of. Contenders:

    lynx           LynxLinearAttention
    lynx_conv      LynxCausalConv
    pytorch        the recurrence in eager PyTorch as transformers has it without a package of kernels; decode alone

    python benchmarks/gpu_states.py --output FILE.json [--model NAME] [--seconds N] [--dry-run]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_common import benchmark
from gpu_layer import Bench, Run, as_run, relative, times
from gpu_timing import Timing, measure, reason, sticky
from torch import Tensor

from lynx_trt.plugins.shapes import STATES, state_specs
from lynx_trt.plugins.specs import CausalConvSpec, LinearAttentionSpec, Op
from lynx_trt.plugins.twins import causal_conv_twin, linear_attention_twin

# Sequences, and tokens of each.
STEPS = ((16, 1), (1, 1), (64, 1), (1, 512), (128, 1), (4, 1), (1, 128), (8, 128), (1, 2048))
# Token after token in float64, and the same on all: more would take the twin longer than the rest.
CHECKED = 128
MODELS = tuple(STATES)


@dataclass(frozen=True)
class Sizes:
    """A model's two ops."""

    name: str
    conv: CausalConvSpec
    attention: LinearAttentionSpec


def main() -> None:
    """Steps, then models."""
    with benchmark(__doc__, "states", 60, MODELS) as (chosen, report, clock):
        steps = ((2, 1), (1, 5)) if chosen.dry else STEPS
        models = [sizes(name, chosen.dtype, dry=chosen.dry) for name in chosen.models]
        ranges = tuple((length, length) for _, length in steps)
        ops = [Op(spec, ranges) for each in models for spec in (each.conv, each.attention)]
        bench = Bench.start((), ops, chosen, report, clock)
        for rows, length in steps:
            for each in models:
                point(each, rows, length, bench)


def sizes(name: str, dtype: str, *, dry: bool) -> Sizes:
    """Those of a known model; in a dry run small ones of the same form."""
    conv, attention = state_specs(name, dtype)
    if dry:
        per_key = attention.decays > attention.value_heads
        attention = replace(attention, keys=16, values=8, key_heads=1, value_heads=2, decays=32 if per_key else 2)
        conv = replace(conv, channels=24)
    return Sizes(name, conv, attention)


def point(model: Sizes, rows: int, length: int, bench: Bench) -> None:
    """One step of one model's layer."""
    label = f"{model.name}, {rows} x {length} tokens"
    if not bench.has_time(label):
        return
    device = bench.chosen.device
    generator = torch.Generator(device=device).manual_seed(0)
    inputs = {
        "lynx": attention_inputs(model.attention, rows, length, device, generator),
        "lynx_conv": conv_inputs(model.conv, rows, length, device, generator),
    }
    specs = {"lynx": model.attention, "lynx_conv": model.conv}
    runs: dict[str, Run] = {}
    errors: dict[str, dict[str, Any]] = {}
    for name, tensors in inputs.items():
        try:
            launch = bench.kernels.prepare(specs[name], tensors, rows * length, rows)
            errors[name] = check(name, specs[name], tensors, launch, length)
            runs[name] = as_run(launch, tensors["output"])
        except Exception as error:  # it is what the row says
            errors[name] = {"failed": reason(error)}
            if sticky(error):
                raise
    if length == 1:
        runs["pytorch"] = eager(model.attention, inputs["lynx"])
    timings = measure(runs, device, seconds=0.2)
    common = {"model": model.name, "tokens": rows * length, "batch": rows, "length": length}
    for name in (*inputs, *(["pytorch"] if length == 1 else [])):
        needed = moved(inputs.get(name, inputs["lynx"]))
        row = {**common, "contender": name, "bytes": needed, "floor_us": round(bench.limits.floor(needed, 0), 4)}
        row |= errors.get(name, {})
        if (timing := timings.get(name)) is not None:
            row |= times(timing)
        if isinstance(timing, Timing):
            row["bandwidth_share"] = round(1e6 * needed / timing.median / bench.limits.bandwidth, 4)
        bench.report.add(row)
    print(f"{label}: {timings.get('lynx')}", flush=True)


def moved(tensors: dict[str, Tensor]) -> int:
    """Bytes that a step has to read and write: everything once, the state both ways."""
    return sum(each.nbytes for each in {**tensors, "again": tensors["past_state"]}.values())


def attention_inputs(
    spec: LinearAttentionSpec, rows: int, length: int, device: torch.device, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random ones of the op's types: keys of length 1 or less, so that a state doesn't grow. The state in place."""
    tokens, dtype = rows * length, getattr(torch, spec.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    state = normal(rows, spec.value_heads, spec.keys, spec.values)
    return {
        "query": normal(tokens, spec.key_heads * spec.keys).to(dtype),
        "key": (normal(tokens, spec.key_heads * spec.keys) * spec.keys**-0.5).to(dtype),
        "value": normal(tokens, spec.value_heads * spec.values).to(dtype),
        "decay": -torch.nn.functional.softplus(normal(tokens, spec.decays)),
        "beta": normal(tokens, spec.value_heads).sigmoid(),
        "past_state": state,
        "lengths": torch.full((rows,), length, dtype=torch.int64, device=device),
        "output": torch.empty(tokens, spec.value_heads * spec.values, dtype=dtype, device=device),
        "present_state": state,
    }


def conv_inputs(
    spec: CausalConvSpec, rows: int, length: int, device: torch.device, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random ones of the op's types; the state in place."""
    dtype = getattr(torch, spec.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    state = normal(rows, spec.width - 1, spec.channels)
    return {
        "values": normal(rows * length, spec.channels),
        "weight": normal(spec.channels, spec.width),
        "past_state": state,
        "lengths": torch.full((rows,), length, dtype=torch.int64, device=device),
        **({"bias": normal(spec.channels)} if spec.bias else {}),
        "output": torch.empty(rows * length, spec.channels, dtype=dtype, device=device),
        "present_state": state,
    }


def check(
    name: str, spec: LinearAttentionSpec | CausalConvSpec, tensors: dict[str, Tensor], launch: Run | Any, length: int
) -> dict[str, Any]:
    """The error against float64, and whether it is at most twice the twin's in the same precision."""
    if length > CHECKED:
        launch()
        return {}
    given = {key: each.clone() for key, each in tensors.items() if key not in ("output", "present_state")}
    double = {key: each.double() if each.is_floating_point() else each for key, each in given.items()}
    twin: Any = linear_attention_twin if name == "lynx" else causal_conv_twin
    want, usual = twin(spec, **double)[0], twin(spec, **given)[0]
    launch()
    got, common = relative(tensors["output"], want), relative(usual, want)
    found = {"error": got["error"], "worst": got["worst"], "error_pytorch": common["error"]}
    epsilon = torch.finfo(tensors["output"].dtype).eps
    return {
        **{key: float(f"{value:.4g}") for key, value in found.items()},
        "right": got["error"] <= 2 * common["error"] + epsilon,
    }


def eager(spec: LinearAttentionSpec, tensors: dict[str, Tensor]) -> Run:
    """A step of one token in PyTorch: what transformers does where no package of kernels is installed."""
    state = tensors["past_state"].clone()
    given = {key: each for key, each in tensors.items() if key not in ("output", "present_state", "past_state")}

    def run() -> list[Tensor]:
        output, after = linear_attention_twin(spec, past_state=state, **given)
        state.copy_(after)
        return [output]

    return run


if __name__ == "__main__":
    main()
