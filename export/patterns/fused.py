"""What `com.microsoft.MoE` and `com.microsoft.QMoE` share: activations, biases, and the routing inside the op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from lynx_trt import int4
from lynx_trt.experts import FORMATS, ExpertsForm
from lynx_trt.export.patterns.block import Block, RefusedError, Routing, Weight
from lynx_trt.export.patterns.derived import masked_routing
from lynx_trt.export.patterns.rule import attribute_text, label
from lynx_trt.export.patterns.sparse_mixer import JITTER, sparse_mixer
from lynx_trt.export.regions.router import Routers
from lynx_trt.export.relayout import Stack, View, read_tensor, sizes_of

_UNGATED = {"relu": "relu", "gelu": "gelu_tanh", "silu": "silu", "relu2": "relu2", "identity": "identity"}
_GATED = {"swiglu": "silu", "geglu": "gelu_tanh"}


@dataclass(frozen=True)
class Int4:
    """A linear layer's weights in int4, whose rows LynxExperts can be given as they are stored (int4.py).

    stored: the bytes [E,rows,columns/2], the first value in the lower half. scales(e), zeros(e): an expert's, floats
    [rows,columns/block]; zeros None: all are 8.
    """

    block: int
    stored: ir.TensorProtocol
    scales: Callable[[int], Any]
    zeros: Callable[[int], Any] | None

    def values(self, expert: int) -> Any:
        """An expert's bytes."""
        return View.whole(self.stored).select(0, expert).read().view(np.int8)

    def signed(self) -> ir.ExternalTensor | None:
        """All of them where they lie in a data file, as the type that LynxExperts wants for their bits."""
        stored = self.stored
        if not isinstance(stored, ir.ExternalTensor):
            return None
        return ir.ExternalTensor(
            stored.location, stored.offset, stored.length, ir.DataType.INT8,
            shape=stored.shape, name=str(stored.name), base_dir=stored.base_dir,
        )  # fmt: skip

    def beside(self, block: int, with_zeros: bool, expert: int) -> Any:
        """What is beside an expert's values where blocks are `block` wide, which divides those here."""
        scales = self.scales(expert)
        parts = [scales]
        if with_zeros:
            parts.append(np.full_like(scales, int4.ZERO) if self.zeros is None else self.zeros(expert))
        return np.concatenate([np.repeat(part, self.block // block, axis=1) for part in parts], axis=1)


@dataclass(frozen=True)
class Projection:
    """One linear layer of all experts [E,rows,columns]: `read(e)` gives an expert's matrix, `value` is it whole."""

    experts: int
    rows: int
    columns: int
    read: Callable[[int], Any]
    value: ir.Value | None = None
    kept: Int4 | None = None  # where it may stay in int4


@dataclass(frozen=True)
class Projections:
    """The op's weights: FC1 (gate, or gate and up), FC2 (down), FC3 (up), and their biases [E,rows]."""

    fc1: Projection
    fc2: Projection
    fc3: Projection | None
    fc1_bias: ir.Value | None
    fc2_bias: ir.Value | None
    fc3_bias: ir.Value | None
    packed: dict[str, Any] = field(default_factory=dict)


def input_at(node: ir.Node, number: int) -> ir.Value | None:
    """An optional input."""
    return node.inputs[number] if number < len(node.inputs) else None


def constant_tensor(value: ir.Value, role: str) -> ir.TensorProtocol:
    """The stored tensor behind a value.

    Raises:
        RefusedError: it is computed, or given at run time.
    """
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise RefusedError(f"its {role} {value.name!r} is not stored in the model, so it can't be laid out")
    return tensor


def stored(node: ir.Node, number: int, role: str) -> Projection:
    """Input `number` of the op, a stored tensor [E,rows,columns].

    Raises:
        RefusedError: it is missing, not stored, or of another rank.
    """
    value = input_at(node, number)
    if value is None:
        raise RefusedError(f"it lacks {role}")
    view = View.whole(constant_tensor(value, role))
    if len(view.shape) != 3:
        raise RefusedError(f"its {role} {value.name!r} has the shape {list(view.shape)}, not [experts, rows, columns]")
    return Projection(*view.shape, read=lambda expert: view.select(0, expert).read(), value=value)


def fused_block(
    node: ir.Node,
    pattern: str,
    weights: Projections,
    routers: Routers,
    *,
    router_weights: ir.Value | None = None,
    always_renormalize: bool = False,
) -> Block:
    """The block that a MoE or QMoE node is.

    Args:
        node: the op.
        pattern: its name.
        weights: its projections.
        routers: derives the rule where the logits were masked before the op.
        router_weights: [T,E], where what weighs the experts is not what ranks them.
        always_renormalize: the weights are divided by their sum whatever the attribute says.

    Raises:
        RefusedError: shapes that don't fit, or an attribute that the ops can't express.
    """
    hidden, logits = input_at(node, 0), input_at(node, 1)
    if hidden is None or logits is None:
        raise RefusedError("it lacks its input or router_probs")
    experts, width, inner = weights.fc2.experts, weights.fc2.rows, weights.fc2.columns
    count = node.attributes.get_int("k", 1)
    if not 1 <= count <= experts:
        raise RefusedError(f"it uses k = {count} of {experts} experts a token")
    form, doubled = _form(node, weights)
    _check_shapes(form, weights)
    dtype = _dtype(node, weights)
    layout = _Layout(weights, dtype, doubled=doubled)
    notes: list[str] = []
    kept = None if doubled else _kept(weights, dtype, notes)
    route, rule = _routing(node, logits, router_weights, count, always_renormalize, notes)
    masked = None if rule is None else masked_routing(routers, logits, experts, count, route)
    if masked is not None:
        route, rule = masked
    up_bias, down_bias = layout.biases()
    matrices = layout.matrices() if kept is None else _int4(weights, dtype, kept)
    return Block(
        name=node.name or str(node.outputs[0].name),
        pattern=pattern,
        experts=experts,
        experts_per_token=count,
        hidden_size=width,
        intermediate=inner * (2 if doubled else 1),
        form=form if kept is None else replace(form, weights=kept),
        hidden=hidden,
        dtype=dtype,
        route=route,
        rule=rule,
        gate_up=matrices["gate_up"],
        down=matrices["down"],
        gate_up_scale=matrices.get("gate_up_scale"),
        down_scale=matrices.get("down_scale"),
        gate_up_bias=up_bias,
        down_bias=down_bias,
        notes=tuple(notes),
        packed={} if kept else weights.packed,
    )


def _kept(weights: Projections, dtype: ir.DataType, notes: list[str]) -> str | None:
    """What LynxExperts calls the weights where all of them can stay in int4; a note where they are, and can't."""
    linears = [weights.fc1.kept, weights.fc2.kept] + ([weights.fc3.kept] if weights.fc3 else [])
    found = [linear for linear in linears if linear is not None]
    if len(found) < len(linears):
        return None
    if dtype == ir.DataType.FLOAT:
        notes.append(
            "the experts' int4 weights are dequantized: LynxExperts has them in fp16 and bf16 alone, and the graph "
            "computes in fp32"
        )
        return None
    block = next((b for b in reversed(int4.BLOCKS) if all(linear.block % b == 0 for linear in found)), None)
    if block is None:
        blocks = " and ".join(map(str, sorted({linear.block for linear in found})))
        notes.append(
            f"the experts' int4 weights are dequantized: a scale is for {blocks} columns, and LynxExperts has one for "
            f"each {int4.BLOCKS[0]} or {int4.BLOCKS[1]}"
        )
        return None
    return int4.name_of(block, zeros=any(linear.zeros is not None for linear in found))


def _int4(weights: Projections, dtype: ir.DataType, kind: str) -> dict[str, Weight]:
    """The block's weights and scales by name, as they are stored; of a separate up projection below the gate's rows."""
    stored = FORMATS[kind]
    made: dict[str, Weight] = {}
    ups = [] if weights.fc3 is None else [weights.fc3]
    for name, linears in (("gate_up", [weights.fc1, *ups]), ("down", [weights.fc2])):
        first, rows = linears[0], sum(linear.rows for linear in linears)
        kept = [linear.kept for linear in linears if linear.kept is not None]
        values = [linear.values for linear in kept]
        beside = [partial(linear.beside, stored.block, stored.zeros) for linear in kept]
        shape = (first.experts, rows, first.columns // stored.per_byte)
        as_it_is = kept[0].signed() if len(kept) == 1 else None
        made[name] = as_it_is or Stack(shape, ir.DataType.INT8, partial(_below, values))
        made[f"{name}_scale"] = Stack((*shape[:2], stored.scales(first.columns)), dtype, partial(_below, beside))
    return made


def _below(parts: Sequence[Callable[[int], Any]], expert: int) -> Any:
    return np.concatenate([part(expert) for part in parts])


def _form(node: ir.Node, weights: Projections) -> tuple[ExpertsForm, bool]:
    """The form, and whether the intermediate rows are doubled: identity is relu(z) - relu(-z)."""
    kind = attribute_text(node, "activation_type", "relu")
    fusion = node.attributes.get_int("swiglu_fusion", 0)
    if node.attributes.get_int("swiglu_limit_after_activation", 0):
        raise RefusedError("swiglu_limit_after_activation = 1 clamps what the ops have no form for")
    if kind in _UNGATED:
        doubled = kind == "identity"
        activation = "relu" if doubled else _UNGATED[kind]
        return ExpertsForm(activation, gated=weights.fc3 is not None), doubled
    if kind not in _GATED:
        allowed = ", ".join((*_UNGATED, *_GATED))
        raise RefusedError(f"its activation_type is {kind!r}; known are {allowed}")
    if fusion not in (0, 1, 2) or (fusion == 0) != (weights.fc3 is not None) or (fusion == 0 and kind == "geglu"):
        where = "with" if weights.fc3 is not None else "without"
        raise RefusedError(
            f"its activation is {kind} with swiglu_fusion = {fusion} {where} FC3, which is no known layout"
        )
    if kind == "geglu":
        return ExpertsForm("gelu_tanh", interleaved=fusion == 1), False
    limit = node.attributes.get_float("swiglu_limit", float("inf"))
    alpha = node.attributes.get_float("activation_alpha", 1.0)
    beta = node.attributes.get_float("activation_beta", 0.0)
    if not limit > 0 or not 0 < alpha < float("inf"):
        raise RefusedError(
            f"swiglu_limit = {limit} or activation_alpha = {alpha} is out of the range that the ops have"
        )
    finite = 0.0 if limit == float("inf") else limit
    return ExpertsForm("silu", interleaved=fusion == 1, alpha=alpha, limit=finite, up_offset=beta), False


def _check_shapes(form: ExpertsForm, weights: Projections) -> None:
    experts, width, inner = weights.fc2.experts, weights.fc2.rows, weights.fc2.columns
    fused = form.gated and weights.fc3 is None
    wanted = {"FC1": (weights.fc1, inner * (2 if fused else 1)), "FC3": (weights.fc3, inner)}
    for name, (got, rows) in wanted.items():
        if got is not None and (got.experts, got.rows, got.columns) != (experts, rows, width):
            raise RefusedError(
                f"its {name} is [{got.experts},{got.rows},{got.columns}]; with FC2 of [{experts},{width},{inner}] it "
                f"has to be [{experts},{rows},{width}]"
            )
    for name, bias, rows in (
        ("FC1", weights.fc1_bias, weights.fc1.rows),
        ("FC2", weights.fc2_bias, width),
        ("FC3", weights.fc3_bias, inner),
    ):
        shape = None if bias is None else list(sizes_of(constant_tensor(bias, f"{name} bias")))
        if shape is not None and shape != [experts, rows]:
            raise RefusedError(f"its {name} bias is {shape}, and has to be [{experts},{rows}]")


def _dtype(node: ir.Node, weights: Projections) -> ir.DataType:
    """Of the op's input and output: whichever of them, the biases or the weights is recorded."""
    direct = (weights.fc1.value, weights.fc1_bias, weights.fc2_bias)
    return known_dtype((node.inputs[0], node.outputs[0], node.inputs[1], *direct))


def known_dtype(values: Sequence[ir.Value | None]) -> ir.DataType:
    """The first type that is recorded.

    Raises:
        RefusedError: none is, or it is none that the experts can have.
    """
    found = (value.dtype for value in values if value is not None)
    dtype = next((dtype for dtype in found if dtype is not None), None)
    if dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        raise RefusedError(f"its input is {dtype}; known are float32, float16 and bfloat16")
    return dtype


class _Layout:
    """The op's weights as LynxExperts has them: as they are, or stacked anew."""

    def __init__(self, weights: Projections, dtype: ir.DataType, *, doubled: bool) -> None:
        self._weights, self._dtype, self._doubled = weights, dtype, doubled

    def matrices(self) -> dict[str, Weight]:
        """gate_up and down."""
        return {"gate_up": self._gate_up(), "down": self._down()}

    def _gate_up(self) -> Weight:
        fc1, fc3 = self._weights.fc1, self._weights.fc3
        if fc3 is None and not self._doubled and self._fits(fc1):
            assert fc1.value is not None
            return fc1.value
        rows = (fc1.rows + (fc3.rows if fc3 else 0)) * (2 if self._doubled else 1)
        ups = [] if fc3 is None else [fc3.read]
        return Stack((fc1.experts, rows, fc1.columns), self._dtype, partial(self._rows, fc1.read, ups))

    def _down(self) -> Weight:
        fc2 = self._weights.fc2
        if not self._doubled and self._fits(fc2):
            assert fc2.value is not None
            return fc2.value
        columns = fc2.columns * (2 if self._doubled else 1)
        return Stack((fc2.experts, fc2.rows, columns), self._dtype, self._columns)

    def biases(self) -> tuple[Weight | None, Weight | None]:
        """Both, or none where all are absent or 0 (exporters write zeros)."""
        weights = self._weights
        given = (weights.fc1_bias, weights.fc2_bias, weights.fc3_bias)
        if not any(bias is not None and np.any(read_tensor(constant_tensor(bias, "bias"))) for bias in given):
            return None, None
        experts, fc1 = weights.fc1.experts, weights.fc1
        ups = [self._vector(weights.fc3_bias, weights.fc3.rows)] if weights.fc3 else []
        gate = self._vector(weights.fc1_bias, fc1.rows)
        rows = (fc1.rows + (weights.fc3.rows if weights.fc3 else 0)) * (2 if self._doubled else 1)
        up_bias: Weight = Stack((experts, rows), self._dtype, partial(self._rows, gate, ups))
        down_bias: Weight = Stack(
            (experts, weights.fc2.rows), self._dtype, self._vector(weights.fc2_bias, weights.fc2.rows)
        )
        if weights.fc1_bias is not None and weights.fc3 is None and not self._doubled:
            up_bias = weights.fc1_bias if weights.fc1_bias.dtype == self._dtype else up_bias
        if weights.fc2_bias is not None and weights.fc2_bias.dtype == self._dtype:
            down_bias = weights.fc2_bias
        return up_bias, down_bias

    def _fits(self, projection: Projection) -> bool:
        return projection.value is not None and projection.value.dtype == self._dtype

    def _rows(self, gate: Callable[[int], Any], ups: list[Callable[[int], Any]], expert: int) -> Any:
        """Gate above up; doubled, the negated gate after the gate, and up twice."""
        parts = [gate(expert)]
        if self._doubled:
            parts.append(-parts[0])
        for up in ups:
            parts += [up(expert)] * (2 if self._doubled else 1)
        return np.concatenate(parts)

    def _columns(self, expert: int) -> Any:
        down = self._weights.fc2.read(expert)
        return np.concatenate([down, -down], axis=1) if self._doubled else down

    def _vector(self, bias: ir.Value | None, rows: int) -> Callable[[int], Any]:
        if bias is None:
            zeros = np.zeros(rows, self._dtype.numpy())
            return lambda _: zeros
        view = View.whole(constant_tensor(bias, "bias"))
        return lambda expert: view.select(0, expert).read()


def _routing(
    node: ir.Node,
    logits: ir.Value,
    router_weights: ir.Value | None,
    count: int,
    always_renormalize: bool,
    notes: list[str],
) -> tuple[Callable[[Any], Routing], str | None]:
    normalize = bool(node.attributes.get_int("normalize_routing_weights", 0))
    if node.attributes.get_int("use_sparse_mixer", 0):
        if count != 2:
            raise RefusedError(f"use_sparse_mixer goes with k = 2, not {count}")
        notes.append(
            f"{label(node)}: use_sparse_mixer is computed as on CUDA (jitter {JITTER}); ONNX Runtime's CPU kernel "
            "ignores it, so the original gives other numbers there"
        )
        return partial(sparse_mixer, logits=logits), None
    if router_weights is not None:
        rule = "router_weights" + (", renormalised" if normalize else "")
        return partial(_given_weights, logits, router_weights, count, normalize), rule
    renormalize = normalize or always_renormalize
    if renormalize and not normalize:
        notes.append(
            f"{label(node)}: the weights are divided by their sum, as ONNX Runtime's CPU kernel does, although "
            "normalize_routing_weights is 0"
        )
    return partial(_softmax, logits, count, renormalize), "softmax" + (", renormalised" if renormalize else "")


def _softmax(logits: ir.Value, count: int, renormalize: bool, op: Any) -> Routing:
    logits = op.Cast(logits, to=int(ir.DataType.FLOAT))
    scores = op.Softmax(logits, axis=-1)
    number = op.Constant(value=ir.tensor(np.array([count], np.int64)))
    # Ranked by the logits: far below the best, the softmax of several is 0 and their order lost.
    best, index = op.TopK(logits, number, axis=-1, _outputs=2)
    weight = op.Softmax(best, axis=-1) if renormalize else op.GatherElements(scores, index, axis=-1)
    return Routing(index, weight, logits, scores, renormalize)


def _given_weights(logits: ir.Value, weights: ir.Value, count: int, normalize: bool, op: Any) -> Routing:
    logits, weights = (op.Cast(value, to=int(ir.DataType.FLOAT)) for value in (logits, weights))
    number = op.Constant(value=ir.tensor(np.array([count], np.int64)))
    _, index = op.TopK(logits, number, axis=-1, _outputs=2)
    weight = op.GatherElements(weights, index, axis=-1)
    if normalize:
        last = op.Constant(value=ir.tensor(np.array([-1], np.int64)))
        weight = op.Div(weight, op.ReduceSum(weight, last, keepdims=1))
    return Routing(index, weight, logits, weights, normalize)
