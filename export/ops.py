"""The custom ops, domain `lynx`, version 1: names, inputs, outputs and attributes, in one place.

Two for each MoE block:

    LynxSelect(choice[T,E] f32, combine[T,E] f32, topk_index[T,K] i64, topk_weight[T,K] f32,
               budget[] i32, floor[] f32, token_mask[T] bool)
        -> (index[T,K] i64, weight[T,K] f32, active[] i32)

    LynxExperts(hidden[T,H], index[T,K] i64, weight[T,K] f32, gate_up, down
                [, gate_up_scale, down_scale] [, gate_up_bias[E,2I], down_bias[E,H]]) -> [T,H]

The exporter writes these nodes, the function bodies define what they mean for ONNX Runtime, and the
TensorRT plugins read the same attributes as their fields. An index of -1 is an empty slot. With
`transposed = 0` the weights are `gate_up[E,2I,H]`, `down[E,H,I]` (an output row at a time); with 1 they are
`gate_up[E,H,2I]`, `down[E,I,H]`. Ungated experts (`gated = 0`) have `gate_up` of I rows instead of 2I. Quantized
weights, never transposed, have scales: with `weights = "mxfp4"` `gate_up[E,2I,H/2]`, `down[E,H,I/2]`,
`gate_up_scale[E,2I,H/32]`, `down_scale[E,H,I/32]`, all int8 (mxfp4.py); with "fp8" `gate_up[E,2I,H]` and `down[E,H,I]`
int8, `gate_up_scale[E,2I,H/128]` and `down_scale[E,H,I/128]` float32 (fp8.py); with "int4_g32" `gate_up[E,2I,H/2]` and
`down[E,H,I/2]` int8, `gate_up_scale[E,2I,H/32]` and `down_scale[E,H,I/32]` of the type of `hidden`; with "int4_g128" as
many as H/128 and I/128; with "int4_g32_zeros" and "int4_g128_zeros" twice as many, zero points behind scales (int4.py);
with "nvfp4" as in "int4_g32" with H/16 and I/16 (nvfp4.py).

Two more for layers that keep a state of fixed size in place of keys and values (Gated DeltaNet, Kimi Delta Attention,
Mamba-2, short convolutions); T = B S tokens, those of a sequence one behind the other, of which `lengths` are real:

    LynxCausalConv(values[T,C], weight[C,W], past_state[B,W-1,C], lengths[B] i64 [, bias[C]])
        -> (output[T,C], present_state[B,W-1,C])

    LynxLinearAttention(query[T,G D], key[T,G D], value[T,N M], decay[T,N or N D] f32, beta[T,N] f32,
                        past_state[B,N,D,M] f32, lengths[B] i64)
        -> (output[T,N M], present_state[B,N,D,M] f32)

LynxCausalConv is a convolution along each sequence, a channel at a time: the last of the W weights is the token's own,
what lies before the sequence's first token here is the past state's rows, and `activation` (none or silu) comes after
the bias. The present state is the last W-1 of the past state's rows and the real tokens' values.

LynxLinearAttention has N = `value_heads` states of D keys by M values; G = `key_heads` heads of queries and keys are
shared by N / G of them each, in a row. Queries and keys are divided by sqrt(sum of squares + `epsilon`) unless it is 0.
Token after token S = exp(decay) S, a factor for each key where there are N D; then with `update_rule` "gated"
S = S + k (beta v)^T, with "gated_delta" S = S + k (beta (v - S^T k))^T; the output is `scale` S^T q. All in float32.
Tokens that are not real change no state; their output is 0. (Names are those of ONNX' LinearAttention, opset 27, which
has no lengths.)
"""

from __future__ import annotations

from lynx_trt.experts import ExpertsForm
from lynx_trt.selection import Selection

DOMAIN = "lynx"
VERSION = 1
OPSET = 24
SELECT = "LynxSelect"
EXPERTS = "LynxExperts"
CAUSAL_CONV = "LynxCausalConv"
LINEAR_ATTENTION = "LynxLinearAttention"
UPDATE_RULES = ("gated", "gated_delta")
CONV_ACTIVATIONS = ("none", "silu")

Attributes = dict[str, str | int | float]

# TensorRT's ONNX parser looks a plugin up by these two attributes of the node.
PLUGIN: Attributes = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}


def select_attributes(selection: Selection, *, experts_per_token: int, renormalize: bool, scale: float) -> Attributes:
    """Node attributes of a LynxSelect; `guarantee` is resolved to a number of experts (K is known here)."""
    return {
        "vote": selection.vote,
        "guarantee": selection.guaranteed(experts_per_token),
        "sensitivity": float(selection.sensitivity),
        "remap": int(selection.remap),
        "power": float(selection.power),
        "alpha": float(selection.alpha),
        "beta": int(selection.beta),
        "renormalize": int(renormalize),
        "scale": float(scale),
        **PLUGIN,
    }


def experts_attributes(form: ExpertsForm) -> Attributes:
    """Node attributes of a LynxExperts."""
    return {
        "activation": form.activation,
        "gated": int(form.gated),
        "transposed": int(form.transposed),
        "interleaved": int(form.interleaved),
        "alpha": float(form.alpha),
        "limit": float(form.limit),
        "up_offset": float(form.up_offset),
        "weights": form.weights,
        **PLUGIN,
    }


def causal_conv_attributes(activation: str) -> Attributes:
    """Node attributes of a LynxCausalConv."""
    return {"activation": activation, **PLUGIN}


def linear_attention_attributes(
    *, key_heads: int, value_heads: int, update_rule: str, scale: float, epsilon: float
) -> Attributes:
    """Node attributes of a LynxLinearAttention."""
    return {
        "key_heads": key_heads,
        "value_heads": value_heads,
        "update_rule": update_rule,
        "scale": float(scale),
        "epsilon": float(epsilon),
        **PLUGIN,
    }
