"""What the patterns in standard ops share: their blocks are found by `regions.find`, and made into `Block`s here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from lynx_trt.experts import ExpertsForm
from lynx_trt.export.patterns.block import Block, Emitter, RefusedError, Routing, Weight
from lynx_trt.export.patterns.derived import describe
from lynx_trt.export.patterns.rule import BlockRule
from lynx_trt.export.regions.find import Finder, Found
from lynx_trt.export.relayout import Stack, View, row_major, sizes_of


class RegionRule(BlockRule):
    """Rewrites the blocks of one form that a finder has found; `own` tells which those are."""

    @staticmethod
    def own(found: Found) -> bool:
        """Whether a block is of this form."""
        raise NotImplementedError

    def __init__(self, emitter: Emitter, finder: Finder, op_type: str) -> None:
        """A rule for blocks whose output comes from an op of `op_type`."""
        super().__init__(emitter)
        self._finder = finder
        self._op_type = op_type

    @classmethod
    def rules(cls, emitter: Emitter, finder: Finder) -> list[BlockRule]:
        """One rule for each op that gives the output of a block of this form."""
        producers = (output.producer() for output, found in finder.found.items() if cls.own(found))
        op_types = sorted({node.op_type for node in producers if node is not None})
        return [cls(emitter, finder, op_type) for op_type in op_types]

    def pattern(self, op: Any) -> Any:
        """The op that gives the output; the block is whatever lies before it."""
        end = getattr(op, self._op_type)
        return end(_allow_other_inputs=True, _allow_other_attributes=True, _outputs=["block"])

    def candidate(self, node: ir.Node) -> bool:
        """Whether the finder says that this is a block's output; all other nodes of the op are none of our business."""
        found = self._finder.found.get(node.outputs[0])
        return found is not None and self.own(found)

    def recognise(self, node: ir.Node) -> Block:
        """See BlockRule."""
        return region_block(self._finder.found[node.outputs[0]], self.form, self._emitter.graph)


def region_block(found: Found, pattern: str, graph: ir.Graph) -> Block:
    """The block that a found region is.

    Raises:
        RefusedError: nothing says of which type its values are.
    """
    roles, hidden = found.roles, found.hidden
    down = roles.matrices(roles.second)
    width, inner = down[0].shape
    dtype = hidden.dtype or found.output.dtype or down[0].tensor.dtype
    if dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        raise RefusedError(f"its hidden states are {dtype}; known are float32, float16 and bfloat16")
    layout = _Layout(found, dtype, _values(graph))
    gate_up, down_weight, transposed = layout.weights()
    up_bias, down_bias = layout.biases()
    form = ExpertsForm(**{**vars(found.form), "transposed": transposed})
    flat = found.output_rank == 2 and (hidden.shape is None or len(hidden.shape) != 2)
    return Block(
        name=found.anchor.node.name or str(found.output.name),
        pattern=pattern,
        experts=len(down),
        experts_per_token=found.anchor.count,
        hidden_size=width,
        intermediate=inner,
        form=form,
        hidden=hidden,
        dtype=dtype,
        route=partial(_route, found),
        rule=_rule(found),
        gate_up=gate_up,
        down=down_weight,
        gate_up_bias=up_bias,
        down_bias=down_bias,
        flat_output=flat,
        shape_of=found.shape_of,
        output_dtype=found.output.dtype,
    )


def _values(graph: ir.Graph) -> dict[int, ir.Value]:
    """Values by the tensor that they hold."""
    held = {id(value.const_value): value for value in graph.initializers.values()}
    for node in graph:
        if node.op_type == "Constant" and node.domain == "":
            held[id(ir.convenience.get_const_tensor(node.outputs[0]))] = node.outputs[0]
    return held


class _Layout:
    """A found block's weights as LynxExperts has them: the stored tensors where they fit, else stacked anew."""

    def __init__(self, found: Found, dtype: ir.DataType, values: dict[int, ir.Value]) -> None:
        self._found, self._dtype, self._values = found, dtype, values
        self._firsts = [self._ordered(found.roles.matrices(group)) for group in found.roles.first]
        self._down = self._ordered(found.roles.matrices(found.roles.second))

    def _ordered(self, views: list[View]) -> list[View]:
        """By the experts' numbers."""
        return [views[number] for number in self._found.order]

    def weights(self) -> tuple[Weight, Weight, bool]:
        """gate_up, down, and whether they are transposed (input rows first): in the way that moves less."""
        as_stored = {}
        for transposed in (False, True):
            gate_up = None
            if len(self._firsts) == 1 and not self._found.swapped:
                gate_up = self._stored(self._firsts[0], transposed)
            as_stored[transposed] = (gate_up, self._stored(self._down, transposed))
        rows = [group[0].strides[-1] == 1 for group in (*self._firsts, self._down)]
        moved = {False: rows.count(False), True: rows.count(True)}  # matrices that would have to be transposed
        transposed = max(
            (False, True), key=lambda way: (sum(weight is not None for weight in as_stored[way]), -moved[way])
        )
        gate_up, down = as_stored[transposed]
        return gate_up or self._gate_up(transposed), down or self._stack([self._down], transposed), transposed

    def biases(self) -> tuple[Weight | None, Weight | None]:
        """Both, zeros in the place of one that is missing, or none."""
        roles = self._found.roles
        firsts = [self._ordered(vectors) for group in roles.first if (vectors := roles.biases(group)) is not None]
        given = roles.biases(roles.second)
        second = None if given is None else self._ordered(given)
        if not firsts and second is None:
            return None, None
        rows = sum(group[0].shape[0] for group in self._firsts)
        experts, width = len(self._down), self._down[0].shape[0]
        up = self._joined(firsts, self._part(firsts)) if firsts else self._zeros(experts, rows)
        return up, self._joined([second], lambda parts: parts[0]) if second is not None else self._zeros(experts, width)

    def _zeros(self, experts: int, rows: int) -> Stack:
        nothing = np.zeros(rows, self._dtype.numpy())
        return Stack((experts, rows), self._dtype, lambda _: nothing)

    def _stored(self, views: list[View], transposed: bool) -> ir.Value | None:
        """The value that already holds these matrices [E,out,in] (transposed: [E,in,out]), one after the other."""
        first = views[0]
        shape = (len(views), *(first.shape[::-1] if transposed else first.shape))
        steps = row_major(shape)
        strides = steps[:0:-1] if transposed else steps[1:]
        whole = all(
            view.tensor is first.tensor and view.offset == number * steps[0] and _same_steps(view, strides)
            for number, view in enumerate(views)
        )
        stored = sizes_of(first.tensor)
        value = self._values.get(id(first.tensor))
        return value if whole and stored == shape and first.tensor.dtype == self._dtype else None

    def _gate_up(self, transposed: bool) -> Stack:
        return self._stack(self._firsts, transposed, self._part(self._firsts))

    def _part(self, groups: Sequence[list[View]]) -> Callable[[list[Any]], Any]:
        """How one expert's gate and up go together, gate first."""
        swapped, interleaved = self._found.swapped, self._found.form.interleaved

        def join(parts: list[Any]) -> Any:
            if len(parts) == 2:
                return np.concatenate(parts[::-1] if swapped else parts)
            (whole,) = parts
            if not swapped:
                return whole
            if interleaved:
                return whole.reshape(-1, 2, *whole.shape[1:])[:, ::-1].reshape(whole.shape)
            half = len(whole) // 2
            return np.concatenate([whole[half:], whole[:half]])

        return join

    def _stack(
        self, groups: Sequence[list[View]], transposed: bool, join: Callable[[list[Any]], Any] | None = None
    ) -> Stack:
        rows, columns = sum(group[0].shape[0] for group in groups), groups[0][0].shape[1]

        def expert(number: int) -> Any:
            parts = [group[number].read() for group in groups]
            whole = join(parts) if join is not None else parts[0]
            return whole.T if transposed else whole

        shape = (len(groups[0]), columns, rows) if transposed else (len(groups[0]), rows, columns)
        return Stack(shape, self._dtype, expert)

    def _joined(self, groups: Sequence[list[View]], join: Callable[[list[Any]], Any]) -> Stack:
        rows = sum(group[0].shape[0] for group in groups)

        def expert(number: int) -> Any:
            return join([group[number].read() for group in groups])

        return Stack((len(groups[0]), rows), self._dtype, expert)


def _same_steps(view: View, strides: Sequence[int]) -> bool:
    """Steps along axes of size 1 don't count."""
    return all(size == 1 or own == other for size, own, other in zip(view.shape, view.strides, strides, strict=True))


def _route(found: Found, op: Any) -> Routing:
    """The graph's own choice and weights; what ranks and weighs the others where the rule is known."""
    anchor, rule = found.anchor, found.rule
    if rule is None or found.source is None:
        assert found.weight is not None
        return Routing(anchor.index, found.weight)
    choice = anchor.scores if anchor.largest else op.Neg(anchor.scores)
    source = op.Cast(found.source, to=int(ir.DataType.FLOAT))
    if rule.transform == "softmax":
        source = op.Softmax(source, axis=-1)
    elif rule.transform == "sigmoid":
        source = op.Sigmoid(source)
    weight = found.weight
    if weight is None:
        weight = _weigh(op, found, source)
    return Routing(anchor.index, weight, choice, source, rule.renormalize, rule.scale)


def _weigh(op: Any, found: Found, scores: ir.Value) -> ir.Value:
    """The rule's weights of the graph's own choice, where no value holds them."""
    rule, anchor = found.rule, found.anchor
    assert rule is not None
    experts = len(found.roles.matrices(found.roles.second))
    rows = op.Reshape(scores, op.Constant(value=ir.tensor(np.array([-1, experts], np.int64))))
    index = op.Cast(anchor.index, to=int(ir.DataType.INT64))
    flat = op.Reshape(index, op.Constant(value=ir.tensor(np.array([-1, anchor.count], np.int64))))
    weight = op.GatherElements(rows, flat, axis=1)
    if rule.renormalize:
        last = op.Constant(value=ir.tensor(np.array([-1], np.int64)))
        weight = op.Div(weight, op.ReduceSum(weight, last, keepdims=1))
    scaled: ir.Value = op.Mul(weight, op.Constant(value=ir.tensor(np.array(rule.scale, np.float32))))
    return scaled


def _rule(found: Found) -> str | None:
    """The rule in a few words."""
    if found.rule is None or found.source is None:
        return None
    return describe(found.rule, found.source, found.anchor.scores)
