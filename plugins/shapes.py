"""The MoE layers of known models, by name: what the report, the tuner and the benchmarks run on.

And layers of known models that keep a state, for the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lynx_trt.experts import ExpertsForm
from lynx_trt.plugins.specs import CausalConvSpec, ExpertsSpec, LinearAttentionSpec, Op, SelectSpec, StateSpec
from lynx_trt.selection import DEFAULT_PRESET, PRESETS


@dataclass(frozen=True)
class Shape:
    """E, K, H, I of a layer, and its experts' form."""

    experts: int
    experts_per_token: int
    hidden: int
    inner: int
    form: ExpertsForm = ExpertsForm()  # noqa: RUF009 -- frozen
    bias: bool = False


_GPT_OSS = ExpertsForm(transposed=True, interleaved=True, alpha=1.702, limit=7.0, up_offset=1.0)

# From each model's config.json; gpt-oss' form as its modelling code has it, and as its checkpoint does.
SHAPES = {
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "gpt-oss-120b": Shape(128, 4, 2880, 2880, _GPT_OSS, bias=True),
    "gpt-oss-120b-mxfp4": Shape(128, 4, 2880, 2880, replace(_GPT_OSS, transposed=False, weights="mxfp4"), bias=True),
    "qwen3-30b-a3b-fp8": Shape(128, 8, 2048, 768, ExpertsForm(weights="fp8")),
    "qwen3-30b-a3b-int4": Shape(128, 8, 2048, 768, ExpertsForm(weights="int4_g128")),
    "deepseek-v2-lite": Shape(64, 6, 2048, 1408),
}


@dataclass(frozen=True)
class State:
    """G, N, D and M of a layer with a state, C and W of its convolution, and what else the kernels differ by."""

    key_heads: int
    value_heads: int
    keys: int
    values: int
    channels: int
    width: int = 4
    update_rule: str = "gated_delta"
    epsilon: float = 1e-6
    per_key: bool = False
    bias: bool = False


# Qwen3-Next-80B and Kimi-Linear-48B as transformers' configurations have them; 128 heads as the larger Nemotron 3 has,
# 48 as Granite 4 H-Tiny; and with twice the keys, which no model has.
STATES = {
    "qwen3-next": State(16, 32, 128, 128, 8192),
    "kimi-linear": State(32, 32, 128, 128, 12288, per_key=True),
    "nemotron-h": State(8, 128, 128, 64, 10240, update_rule="gated", epsilon=0.0, bias=True),
    "granite-4.0-h": State(1, 48, 128, 64, 3328, update_rule="gated", epsilon=0.0, bias=True),
    "granite-4.0-h-256": State(1, 48, 256, 64, 3584, update_rule="gated", epsilon=0.0, bias=True),
}

# Decode batches and prefills that the reports and benchmarks cover.
DECODE_TOKENS = (1, 128)
PREFILL_TOKENS = (256, 16384)


def routers(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the models whose routers are all different: one of several that differ in their weights alone."""
    found = {(SHAPES[name].experts, SHAPES[name].experts_per_token): name for name in reversed(names)}
    return tuple(name for name in names if name in found.values())


def experts_spec(name: str, dtype: str, *, dispatch_given: bool = True) -> ExpertsSpec:
    """The LynxExperts of a known model."""
    shape = SHAPES[name]
    sizes = (shape.experts, shape.experts_per_token, shape.hidden, shape.inner)
    return ExpertsSpec(*sizes, dtype, shape.form, shape.bias, dispatch_given)


def select_spec(name: str, preset: str = DEFAULT_PRESET, *, dispatch_taken: bool = True) -> SelectSpec:
    """The LynxSelect of a known model under a preset."""
    shape, selection = SHAPES[name], PRESETS[preset]
    return SelectSpec(
        shape.experts,
        shape.experts_per_token,
        selection.vote,
        selection.guaranteed(shape.experts_per_token),
        selection.sensitivity,
        selection.remap,
        selection.power,
        selection.alpha,
        selection.beta,
        dispatch_taken=dispatch_taken,
    )


def state_specs(name: str, dtype: str) -> tuple[StateSpec, StateSpec]:
    """The LynxCausalConv and the LynxLinearAttention of a known model."""
    it = STATES[name]
    decays = it.value_heads * it.keys if it.per_key else it.value_heads
    scale = it.keys**-0.5 if it.update_rule == "gated_delta" else 1.0
    heads = it.key_heads, it.value_heads
    return (
        CausalConvSpec(it.channels, it.width, dtype, it.bias, "silu"),
        LinearAttentionSpec(it.keys, it.values, dtype, decays, *heads, it.update_rule, scale, it.epsilon),
    )


def ops_of(name: str, dtype: str) -> list[Op]:
    """Both ops of a known model's layer, for decode and prefill; the experts without and with the metadata given."""
    ranges = (DECODE_TOKENS, PREFILL_TOKENS)
    if name in STATES:
        return [Op(spec, ((1, 1), PREFILL_TOKENS)) for spec in state_specs(name, dtype)]
    return [
        Op(select_spec(name), ranges),
        *(Op(experts_spec(name, dtype, dispatch_given=given), ranges) for given in (True, False)),
    ]
