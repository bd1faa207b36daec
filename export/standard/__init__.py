"""Ops of ONNX Runtime around the MoE blocks, rewritten to standard ones of opset 23 and 24.

TensorRT's parsers know few of ONNX Runtime's own ops, and not the same ones in every version; the standard ones they
all know. One op a file; an op in a form that has no standard one stays as it is, and the count says so.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from lynx_trt.export.relayout import Stack, Table


@dataclass
class Standardized:
    """What was rewritten, by op; what stays, in a line each; weights that have yet to be made, by name."""

    counts: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)
    stacks: dict[str, Stack | Table] = field(default_factory=dict)


def standardize(model: ir.Model, *, cache_rows: int | None = None, simple: bool = False) -> Standardized:
    """Rewrite every op that has a rule, in the main graph and in subgraphs, in place.

    Args:
        model: any model of opset 24.
        cache_rows: give the caches of GroupQueryAttention this many rows, once and for all.
        simple: activations and products alone, which are the same to the last bits; they may be part of an expert.
    """
    from lynx_trt.export.standard import activations, attention, convolution, norms, products, quantized, rotary
    from lynx_trt.export.standard.builder import LeftError, apply

    done = Standardized()
    rules = [*activations.RULES, *products.RULES]
    if not simple:
        rules += [
            *norms.RULES,
            *rotary.RULES,
            *convolution.RULES,
            *attention.rules(cache_rows),
            *quantized.rules(done.stacks),
        ]
    by_op = {(rule.domain, rule.op_type): rule for rule in rules}
    for node in list(model.graph.all_nodes()):
        rule = by_op.get((node.domain, node.op_type))
        if rule is None:
            continue
        try:
            apply(node, rule)
            done.counts[rule.op_type] += 1
        except LeftError as reason:
            done.left.append(f"node {node.name!r} stays a {node.domain}.{node.op_type}: {reason}")
    return done
