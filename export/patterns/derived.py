"""Routings of fused ops that are given the choice ready: the rule behind it, so that tokens can be sent elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from lynx_trt.export.patterns.block import Routing
from lynx_trt.export.regions.fit import RuleFit
from lynx_trt.export.regions.probe import Array
from lynx_trt.export.regions.router import Derived, Routers

Route = Callable[[Any], Routing]


def given_routing(
    routers: Routers, index: ir.Value, weight: ir.Value, experts: int, count: int
) -> tuple[Route, str | None]:
    """The routing of an op that takes index and weight [..,K]; its rule in words (None: they can only be dropped)."""
    derived = routers.derive(
        index, [weight], experts, count, lambda _, value: np.asarray(value(weight)).reshape(-1, count)
    )
    return partial(_given, index, weight, derived), _words(derived)


def masked_routing(
    routers: Routers, logits: ir.Value, experts: int, count: int, route: Route
) -> tuple[Route, str | None] | None:
    """The routing of an op whose logits were set to "never" for all but the chosen; None if they weren't.

    What the op itself chooses and weighs (`route`) stays; what ranks and weighs the others is what the choice
    was made by.
    """
    scatter = _scattered(logits)
    if scatter is None or len(scatter.inputs) < 3 or scatter.inputs[1] is None:
        return None

    def softmax_of_chosen(index: Array, value: Callable[[ir.Value], Array]) -> Array:
        chosen = np.take_along_axis(value(logits).reshape(-1, experts), index, axis=1)
        powers = np.exp(chosen - chosen.max(axis=1, keepdims=True))
        weights: Array = powers / powers.sum(axis=1, keepdims=True)
        return weights

    derived = routers.derive(scatter.inputs[1], [logits], experts, count, softmax_of_chosen)
    return partial(_masked, route, derived), _words(derived)


def _scattered(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    while node is not None and node.op_type in ("Cast", "Identity", "Reshape"):
        source = node.inputs[0]
        node = None if source is None else source.producer()
    return node if node is not None and node.op_type == "ScatterElements" else None


def _given(index: ir.Value, weight: ir.Value, derived: Derived | None, op: Any) -> Routing:
    if derived is None:
        return Routing(index, weight)
    choice, combine = _tables(op, derived)
    return Routing(index, weight, choice, combine, derived.rule.renormalize, derived.rule.scale)


def _masked(route: Route, derived: Derived | None, op: Any) -> Routing:
    own = route(op)
    if derived is None:
        return Routing(own.index, own.weight)
    choice, combine = _tables(op, derived)
    return Routing(own.index, own.weight, choice, combine, derived.rule.renormalize, derived.rule.scale)


def _tables(op: Any, derived: Derived) -> tuple[ir.Value, ir.Value]:
    choice = derived.choice if derived.largest else op.Neg(derived.choice)
    combine = op.Cast(derived.source, to=int(ir.DataType.FLOAT))
    if derived.rule.transform == "softmax":
        combine = op.Softmax(combine, axis=-1)
    elif derived.rule.transform == "sigmoid":
        combine = op.Sigmoid(combine)
    return choice, combine


def _words(derived: Derived | None) -> str | None:
    return None if derived is None else describe(derived.rule, derived.source, derived.choice)


def describe(rule: RuleFit, source: ir.Value, choice: ir.Value) -> str:
    """A rule in a few words; `source` is what it weighs by, `choice` what ranks."""
    producer = _uncast(source).producer()
    made_by = {"Softmax": "softmax", "Sigmoid": "sigmoid"}.get(producer.op_type if producer else "", "scores")
    parts = [made_by if rule.transform == "identity" else rule.transform]
    if rule.transform == "identity" and _uncast(source) is not _uncast(choice):
        parts.append("ranked by other scores")
    parts += ["renormalised"] if rule.renormalize else []
    parts += [f"x {rule.scale:g}"] if rule.scale != 1.0 else []
    return ", ".join(parts)


def _uncast(value: ir.Value) -> ir.Value:
    node = value.producer()
    while node is not None and node.op_type in ("Cast", "Identity", "Reshape") and node.inputs[0] is not None:
        value, node = node.inputs[0], node.inputs[0].producer()
    return value
