"""ONNX Runtime's matrix product with transposes and a factor, to MatMul."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lynx_trt.export.standard.builder import Builder, LeftError, Rule, number, required, whole


def fused_matmul(node: ir.Node, op: Builder) -> Sequence[ir.Value | None]:
    """FusedMatMul(a, b): alpha * a^T @ b^T, each transposed or not."""
    if whole(node, "transBatchA", 0) or whole(node, "transBatchB", 0):
        raise LeftError("transBatchA and transBatchB are not known here")
    a, b = (_transposed(op, required(node, at), whole(node, name, 0)) for at, name in enumerate(("transA", "transB")))
    product = op.MatMul(a, b)
    alpha = number(node, "alpha", 1.0)
    if alpha == 1.0:
        return [product]
    dtype = node.outputs[0].dtype or required(node, 0).dtype or required(node, 1).dtype
    if dtype is None:
        raise LeftError("the type of its result is not recorded")
    return [op.Mul(product, op.number(alpha, dtype))]


def _transposed(op: Builder, value: ir.Value, wanted: int) -> ir.Value:
    if not wanted:
        return value
    if value.shape is None or len(value.shape) < 2:
        raise LeftError("the number of axes of what it transposes is not recorded")
    axes = list(range(len(value.shape)))
    swapped: ir.Value = op.Transpose(value, perm=[*axes[:-2], axes[-1], axes[-2]])
    return swapped


RULES = (Rule("com.microsoft", "FusedMatMul", fused_matmul), Rule("com.microsoft", "TransposeMatMul", fused_matmul))
