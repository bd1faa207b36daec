"""`com.microsoft.CausalConvWithState`, the short convolution of hybrid models, to Concat + Conv + Slice."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lynx_trt.export.patterns.rule import attribute_text
from lynx_trt.export.standard.builder import Builder, LeftError, Rule, input_at, required, static_size, whole

_PLAIN = {"ndim": 1, "state_window": 0, "state_update_capacity": 0, "state_length": 0, "input_channels": 0}


def causal_conv(node: ir.Node, op: Builder) -> Sequence[ir.Value | None]:
    """CausalConvWithState(x, weight, bias, past_state) -> y, present_state; [B,C,L], or [B,L,C] with channels_last."""
    other = next((name for name, value in _PLAIN.items() if whole(node, name, value) != value), None)
    if other is not None:
        raise LeftError(f"{other} = {whole(node, other, 0)} is not known here")
    weight, bias, past = required(node, 1), input_at(node, 2), input_at(node, 3)
    channels, taps, dilation = static_size(weight, 0), static_size(weight, 2), whole(node, "dilation", 1)
    if channels is None or taps is None:
        raise LeftError("the shape of its weight is not recorded")
    rows, last = (taps - 1) * dilation, whole(node, "channels_last", 0)
    x = required(node, 0)
    if last and (x.shape is None or len(x.shape) != 3):
        raise LeftError("channels_last with other than 3 axes is not known here")
    if last:
        x, past = op.Transpose(x, perm=[0, 2, 1]), None if past is None else op.Transpose(past, perm=[0, 2, 1])
    if past is None:
        shape = op.Concat(op.Shape(x, start=0, end=2), op.ints(rows), axis=0)
        past = op.CastLike(op.ConstantOfShape(shape), x)
    joined = op.Concat(past, x, axis=2)
    inputs = [joined, weight] if bias is None else [joined, weight, bias]
    made = op.Conv(*inputs, group=channels, dilations=[dilation], kernel_shape=[taps], pads=[0, 0], strides=[1])
    if attribute_text(node, "activation", "none") in ("silu", "swish"):
        made = op.Swish(made)
    present = op.Slice(joined, op.ints(-rows), op.ints((1 << 63) - 1), op.ints(2)) if rows else past
    if last:
        made, present = (op.Transpose(value, perm=[0, 2, 1]) for value in (made, present))
    return [made, present]


RULES = (Rule("com.microsoft", "CausalConvWithState", causal_conv),)
