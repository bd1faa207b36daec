"""The two custom ops, domain `lynx`, version 1: names, inputs, outputs and attributes, in one place.

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
"""

from __future__ import annotations

from lynx_trt.experts import ExpertsForm
from lynx_trt.selection import Selection

DOMAIN = "lynx"
VERSION = 1
OPSET = 24
SELECT = "LynxSelect"
EXPERTS = "LynxExperts"

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
