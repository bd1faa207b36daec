"""ONNX Runtime's norms with a residual, and its RMS norm, to Add + RMSNormalization or LayerNormalization."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lynx_trt.export.standard.builder import Builder, Rule, input_at, number, required, whole

# ONNX Runtime's default for the norms with a residual.
_SKIP_EPSILON = 1e-12


def simplified_layer_normalization(node: ir.Node, op: Builder) -> Sequence[ir.Value | None]:
    """SimplifiedLayerNormalization(x, scale), which exporters put into ONNX's own domain."""
    return [
        op.RMSNormalization(
            required(node, 0),
            required(node, 1),
            axis=whole(node, "axis", -1),
            epsilon=number(node, "epsilon", 1e-5),
            stash_type=whole(node, "stash_type", 1),
        )
    ]


def skip_simplified_layer_normalization(node: ir.Node, op: Builder) -> Sequence[ir.Value | None]:
    """SkipSimplifiedLayerNormalization(x, skip, gamma, bias) -> y, -, -, the sum."""
    total = _sum(node, op, bias=3)
    scaled = op.RMSNormalization(total, required(node, 2), axis=-1, epsilon=number(node, "epsilon", _SKIP_EPSILON))
    return [scaled, None, None, total]


def skip_layer_normalization(node: ir.Node, op: Builder) -> Sequence[ir.Value | None]:
    """SkipLayerNormalization(x, skip, gamma, beta, bias) -> y, -, -, the sum."""
    total = _sum(node, op, bias=4)
    inputs = [total, required(node, 2), input_at(node, 3)]
    normed = op.LayerNormalization(*inputs, axis=-1, epsilon=number(node, "epsilon", _SKIP_EPSILON))
    return [normed, None, None, total]


def _sum(node: ir.Node, op: Builder, *, bias: int) -> ir.Value:
    total: ir.Value = op.Add(required(node, 0), required(node, 1))
    added = input_at(node, bias)
    return total if added is None else op.Add(total, added)


RULES = (
    Rule("", "SimplifiedLayerNormalization", simplified_layer_normalization),
    Rule("com.microsoft", "SimplifiedLayerNormalization", simplified_layer_normalization),
    Rule("com.microsoft", "SkipSimplifiedLayerNormalization", skip_simplified_layer_normalization),
    Rule("com.microsoft", "SkipLayerNormalization", skip_layer_normalization),
)
