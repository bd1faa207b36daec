"""TensorRT's own MoE layer under the name that its ONNX parser knows, `TRT_MoE`.

Read from TensorRT for RTX 1.7's parser by experiment: hidden [B,S,H], the chosen experts and their weights [B,S,K],
gate and up [E,H,I], down [E,I,H], then the three biases or none; `activation_type` 1 is silu; `swiglu_limit`,
`swiglu_alpha` and `swiglu_beta` are infinity, 1 and 0 where absent.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from lynx_trt.experts import ExpertsForm
from lynx_trt.export.patterns.block import Block, RefusedError
from lynx_trt.export.patterns.derived import given_routing
from lynx_trt.export.patterns.fused import constant_tensor, input_at, known_dtype
from lynx_trt.export.patterns.rule import BlockRule
from lynx_trt.export.relayout import Stack, View

_SILU = 1
_SCALE = 9


class TrtMoe(BlockRule):
    """Rewrites each `TRT_MoE`."""

    form = "TRT_MoE"

    def pattern(self, op: Any, hidden: ir.Value) -> Any:
        """The op, whatever its optional inputs and attributes."""
        return op.TRT_MoE(hidden, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["block"])

    def recognise(self, node: ir.Node) -> Block:
        """See BlockRule."""
        hidden, index, weight = (input_at(node, at) for at in range(3))
        if hidden is None or index is None or weight is None:
            raise RefusedError("it lacks its input, the chosen experts or their weights")
        if input_at(node, _SCALE) is not None:
            raise RefusedError("its quantized form is not known here")
        gate, up, down = (_weight(node, at) for at in (3, 4, 5))
        experts, width, inner = gate.shape
        if up.shape != gate.shape or down.shape != (experts, inner, width):
            raise RefusedError(f"its weights are {gate.shape}, {up.shape} and {down.shape}, which don't fit each other")
        dtype = known_dtype((hidden, node.outputs[0], node.inputs[3], weight))
        count = next((size for size in (_last(index), _last(weight), self.routers.count(index)) if size), 0)
        if not 1 <= count <= experts:
            raise RefusedError("how many experts a token uses is not recorded")
        biases = _biases(node, experts, inner, width, dtype)
        routing, rule = given_routing(self.routers, index, weight, experts, count)
        return Block(
            name=node.name or str(node.outputs[0].name),
            pattern=self.form,
            experts=experts,
            experts_per_token=count,
            hidden_size=width,
            intermediate=inner,
            form=_form(node),
            hidden=hidden,
            dtype=dtype,
            route=routing,
            rule=rule,
            gate_up=Stack((experts, width, 2 * inner), dtype, partial(_side_by_side, gate, up)),
            down=_as_it_is(node.inputs[5], dtype) or Stack(down.shape, dtype, lambda e: down.select(0, e).read()),
            gate_up_bias=biases[0],
            down_bias=biases[1],
        )


def _weight(node: ir.Node, at: int) -> View:
    value = input_at(node, at)
    if value is None:
        raise RefusedError(f"it lacks weights (input {at})")
    view = View.whole(constant_tensor(value, "weight"))
    if len(view.shape) != 3:
        raise RefusedError(f"its weight {value.name!r} is {list(view.shape)}, not [experts, in, out]")
    return view


def _as_it_is(value: ir.Value | None, dtype: ir.DataType) -> ir.Value | None:
    return value if value is not None and value.dtype == dtype else None


def _last(value: ir.Value) -> int:
    """The size of the last axis, 0 where it isn't recorded."""
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else 0


def _form(node: ir.Node) -> ExpertsForm:
    kind = node.attributes.get_int("activation_type", -1)
    if kind != _SILU:
        raise RefusedError(f"its activation_type is {kind}; 1 (silu) is known")
    limit = node.attributes.get_float("swiglu_limit", float("inf"))
    alpha, beta = node.attributes.get_float("swiglu_alpha", 1.0), node.attributes.get_float("swiglu_beta", 0.0)
    if not limit > 0 or not 0 < alpha < float("inf"):
        raise RefusedError(f"swiglu_limit = {limit} or swiglu_alpha = {alpha} is out of the range that the ops have")
    finite = 0.0 if limit == float("inf") else limit
    return ExpertsForm("silu", transposed=True, alpha=alpha, limit=finite, up_offset=beta)


def _side_by_side(gate: View, up: View, expert: int) -> Any:
    return np.concatenate([gate.select(0, expert).read(), up.select(0, expert).read()], axis=1)


def _biases(
    node: ir.Node, experts: int, inner: int, width: int, dtype: ir.DataType
) -> tuple[Stack | None, Stack | None]:
    values = [input_at(node, at) for at in (6, 7, 8)]
    if all(value is None for value in values):
        return None, None
    views = [View.whole(constant_tensor(value, "bias")) for value in values if value is not None]
    shapes = [view.shape for view in views]
    if shapes != [(experts, inner), (experts, inner), (experts, width)]:
        raise RefusedError(f"its biases are {shapes}, and have to be of gate, up and down")
    gate, up, down = views
    both = Stack(
        (experts, 2 * inner),
        dtype,
        lambda e: np.concatenate([gate.select(0, e).read(), up.select(0, e).read()]),
    )
    return both, Stack((experts, width), dtype, lambda e: down.select(0, e).read())
