"""ONNX Runtime's forms of gelu to ONNX's own Gelu and Swish."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lynx_trt.export.standard.builder import Builder, Rule, input_at, number, required


def gelu(node: ir.Node, op: Builder) -> Sequence[ir.Value | None]:
    """Gelu(x), by erf."""
    return [op.Gelu(required(node, 0))]


def fast_gelu(node: ir.Node, op: Builder) -> Sequence[ir.Value | None]:
    """FastGelu(x, bias), by tanh."""
    return [op.Gelu(_biased(node, op), approximate="tanh")]


def bias_gelu(node: ir.Node, op: Builder) -> Sequence[ir.Value | None]:
    """BiasGelu(x, bias), by erf."""
    return [op.Gelu(_biased(node, op))]


def quick_gelu(node: ir.Node, op: Builder) -> Sequence[ir.Value | None]:
    """QuickGelu(x): x * sigmoid(alpha * x)."""
    return [op.Swish(required(node, 0), alpha=number(node, "alpha", 1.702))]


def _biased(node: ir.Node, op: Builder) -> ir.Value:
    bias = input_at(node, 1)
    x = required(node, 0)
    return x if bias is None else op.Add(x, bias)


RULES = (
    Rule("com.microsoft", "Gelu", gelu),
    Rule("com.microsoft", "FastGelu", fast_gelu),
    Rule("com.microsoft", "BiasGelu", bias_gelu),
    Rule("com.microsoft", "QuickGelu", quick_gelu),
)
