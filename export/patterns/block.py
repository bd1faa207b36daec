"""An MoE block that was found in a foreign graph, and the two ops that take its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from lynx_trt.experts import FORMATS, ExpertsForm
from lynx_trt.export import ops
from lynx_trt.export.relayout import Stack
from lynx_trt.export.step_inputs import Step
from lynx_trt.selection import Selection

# A weight that is in the graph as LynxExperts wants it, one whose bytes a data file has so, or one that has yet to be
# laid out.
Weight = ir.Value | ir.ExternalTensor | Stack


class RefusedError(Exception):
    """A node looks like an MoE block but can't be rewritten; the message is the reason, in a sentence for a user."""


@dataclass(frozen=True)
class Routing:
    """Where every token goes, as values of the graph.

    index [..,K] int, weight [..,K] float: the model's own routing. choice, combine [..,E]: what ranks and what weighs
    all experts (None: only the chosen weights can be known, so tokens can lose experts but not be sent to others).
    """

    index: ir.Value
    weight: ir.Value
    choice: ir.Value | None = None
    combine: ir.Value | None = None
    renormalize: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Block:
    """One MoE block. T tokens, E experts, K a token, H hidden, I intermediate; `[..]` is whatever stands for T.

    Attributes:
        name: of the node that gives the block's output.
        pattern: what it was recognised as.
        hidden: [..,H], what the experts are given.
        route: makes the routing, with nodes of a builder where the graph doesn't have it as values.
        rule: how the router ranks and weighs, in words; None where no rule is known.
        gate_up, down, gate_up_bias, down_bias: in the layout of `form`; both biases or none.
        gate_up_scale, down_scale: of quantized weights alone.
        flat_output: the output is [T,H], whatever the shape of `hidden`.
        shape_of: a value whose shape the output has, where it has more axes than `hidden`.
        output_dtype: of the output, where it is another than `dtype`.
        notes: what a user should know about this block.
        packed: where the quantized weights lie that were dequantized, for readers of the packed form.
    """

    name: str
    pattern: str
    experts: int
    experts_per_token: int
    hidden_size: int
    intermediate: int
    form: ExpertsForm
    hidden: ir.Value
    dtype: ir.DataType
    route: Callable[[Any], Routing]
    rule: str | None
    gate_up: Weight
    down: Weight
    gate_up_bias: Weight | None = None
    down_bias: Weight | None = None
    gate_up_scale: Weight | None = None
    down_scale: Weight | None = None
    flat_output: bool = False
    shape_of: ir.Value | None = None
    output_dtype: ir.DataType | None = None
    notes: tuple[str, ...] = ()
    packed: dict[str, Any] = field(default_factory=dict)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert, biases included."""
        return self._matrices + self._biases

    @property
    def expert_bytes(self) -> int:
        """What one expert takes, biases included."""
        size = int(self.dtype.itemsize)
        stored = FORMATS.get(self.form.weights)
        return int(self._matrices * (stored.bytes_a_value if stored else size)) + self._biases * size

    @property
    def _rows(self) -> int:
        return self.intermediate * (2 if self.form.gated else 1)

    @property
    def _matrices(self) -> int:
        return (self._rows + self.intermediate) * self.hidden_size

    @property
    def _biases(self) -> int:
        return self._rows + self.hidden_size if self.gate_up_bias is not None else 0


class Emitter:
    """Writes blocks as LynxSelect and LynxExperts; keeps what has yet to be laid out, by initializer name."""

    def __init__(self, graph: ir.Graph, selection: Selection, *, dequantize: bool = False) -> None:
        """Ready `graph` for blocks under `selection`; `dequantize`: also weights that could stay quantized."""
        self.dequantize = dequantize
        self.graph = graph
        self.selection = selection
        self.blocks: list[Block] = []
        self.selects: list[tuple[ir.Node, int]] = []
        self.stacks: dict[str, Stack] = {}
        self._step: Step | None = None

    @property
    def step(self) -> Step:
        """The shared values, made when the first block is written."""
        if self._step is None:
            self._step = Step(self.graph)
        return self._step

    def emit(self, op: Any, block: Block) -> ir.Value:
        """The two ops for `block`, as nodes of `op`; the block's new output [..,H] (or [T,H])."""
        number = len(self.blocks)
        routing = block.route(op)
        selected, weight, active = self._select(op, block, routing, number)
        flat = block.hidden.shape is not None and len(block.hidden.shape) == 2
        given = block.hidden
        if given.dtype not in (None, block.dtype):
            given = op.Cast(given, to=int(block.dtype))
        hidden = given if flat else op.Reshape(given, _ints(op, [-1, block.hidden_size]))
        weights = {
            role: getattr(block, role)
            for role in ("gate_up", "down", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias")
        }
        stored = [
            self._store(op, f"lynx.moe.{number}.{role}", item) for role, item in weights.items() if item is not None
        ]
        attributes = ops.experts_attributes(block.form)
        output = op.LynxExperts(
            hidden, selected, weight, *stored, **attributes, _domain=ops.DOMAIN, _version=ops.VERSION
        )
        self.blocks.append(block)
        select = active.producer()
        assert select is not None
        self.selects.append((select, block.experts_per_token))
        self.step.active.append(active)
        if block.output_dtype not in (None, block.dtype):
            output = op.Cast(output, to=int(block.output_dtype))
        shape_of = block.shape_of or (None if flat or block.flat_output else block.hidden)
        shaped: ir.Value = output if shape_of is None else op.Reshape(output, op.Shape(shape_of))
        return shaped

    def _select(self, op: Any, block: Block, routing: Routing, number: int) -> Sequence[ir.Value]:
        index = _flat(op, op.Cast(routing.index, to=int(ir.DataType.INT64)), block.experts_per_token)
        weight = _flat(op, _float32(op, routing.weight), block.experts_per_token)
        selection, renormalize, scale = self.selection, routing.renormalize, routing.scale
        if routing.choice is not None and routing.combine is not None:
            choice = _flat(op, _finite(op, _float32(op, routing.choice)), block.experts)
            combine = choice
            if routing.combine is not routing.choice:
                combine = _flat(op, _finite(op, _float32(op, routing.combine)), block.experts)
        else:
            # Only the chosen experts' weights are known: they rank and weigh, and the selection only drops.
            rows = op.Shape(index, start=0, end=1)
            table = op.Concat(rows, _ints(op, [block.experts]), axis=0)
            nothing = op.ConstantOfShape(table, value=ir.tensor(np.zeros(1, np.float32)))
            choice = combine = op.ScatterElements(nothing, index, weight, axis=1)
            selection, renormalize, scale = without_remap(selection), False, 1.0
        budget, floor, mask = self.step.layer(op, number, block.experts)
        attributes = ops.select_attributes(
            selection, experts_per_token=block.experts_per_token, renormalize=renormalize, scale=scale
        )
        outputs: Sequence[ir.Value] = op.LynxSelect(
            choice, combine, index, weight, budget, floor, mask,
            **attributes, _domain=ops.DOMAIN, _version=ops.VERSION, _outputs=3,
        )  # fmt: skip
        return outputs

    def _store(self, op: Any, name: str, weight: Weight) -> ir.Value:
        if isinstance(weight, ir.Value):
            return weight
        if isinstance(weight, ir.ExternalTensor):
            weight.name = name
            known: ir.Value = op.initializer(weight, name)
            return known
        self.stacks[name] = weight
        # Its bytes are made when they are written, an expert at a time; whoever asks for them earlier gets them all.
        tensor = ir.LazyTensor(
            lambda: ir.Tensor(weight.numpy(), dtype=weight.dtype, name=name),
            dtype=weight.dtype,
            shape=ir.Shape(weight.shape),
            name=name,
        )
        value: ir.Value = op.initializer(tensor, name)
        return value


def without_remap(selection: Selection) -> Selection:
    """The same selection, where tokens only lose experts."""
    from dataclasses import replace

    return replace(selection, remap=False)


def _flat(op: Any, value: ir.Value, columns: int) -> ir.Value:
    """[..,columns] -> [T,columns]."""
    if value.shape is not None and len(value.shape) == 2:
        return value
    flat: ir.Value = op.Reshape(value, _ints(op, [-1, columns]))
    return flat


def _float32(op: Any, value: ir.Value) -> ir.Value:
    cast: ir.Value = value if value.dtype == ir.DataType.FLOAT else op.Cast(value, to=int(ir.DataType.FLOAT))
    return cast


def _finite(op: Any, value: ir.Value) -> ir.Value:
    """Routers write -inf for "never"; a row that isn't finite would count as broken, and be masked."""
    lowest = op.Constant(value=ir.tensor(np.array(np.finfo(np.float32).min, np.float32)))
    finite: ir.Value = op.Max(value, lowest)
    return finite


def _ints(op: Any, values: list[int]) -> ir.Value:
    constant: ir.Value = op.Constant(value=ir.tensor(np.array(values, np.int64)))
    return constant
