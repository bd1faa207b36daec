"""The matrix products with experts' weights in a region, and which of them an expert consists of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lynx_trt.export.patterns.block import RefusedError
from lynx_trt.export.patterns.rule import label
from lynx_trt.export.regions.operands import Operand, Tracer
from lynx_trt.export.relayout import View

# Ops that move rows and elements, and change none (Mul and Where by a mask apart).
_MOVES_NAMES = """
    Cast Compress Concat Expand Flatten Gather GatherElements GatherND Identity Reshape Slice Split Squeeze Tile
    Transpose Unsqueeze
"""
MOVES = frozenset(_MOVES_NAMES.split())


@dataclass(frozen=True)
class Linear:
    """One product with weights: of one expert, or of all of them at once.

    Attributes:
        node: the MatMul or Gemm.
        data: what the weights are multiplied with.
        matrices: [out,in] of each expert; a single one where the product is one expert's.
        biases: [out] of each, or None; of all experts, where one addition serves several products.
        output: after the bias, if there is one.
        gathered: the weights were gathered by the router's index.
    """

    node: ir.Node
    data: ir.Value
    matrices: tuple[View, ...]
    biases: tuple[View, ...] | None
    output: ir.Value
    gathered: bool


class Linears:
    """Finds linears; the same nodes traced at other sizes give the same linears in the same order."""

    def __init__(self, tracer: Tracer) -> None:
        """Weights are traced by `tracer`."""
        self._tracer = tracer

    def find(self, nodes: Sequence[ir.Node]) -> list[Linear]:
        """Every product with stored weights among `nodes`, in their order."""
        inside = set(nodes)
        found = (self._linear(node, inside) for node in nodes)
        return [linear for linear in found if linear is not None]

    def _linear(self, node: ir.Node, inside: set[ir.Node]) -> Linear | None:
        if node.domain != "":
            return None
        if node.op_type == "MatMul":
            return self._matmul(node, inside)
        if node.op_type == "Gemm":
            return self._gemm(node, inside)
        return None

    def _matmul(self, node: ir.Node, inside: set[ir.Node]) -> Linear | None:
        left, right = node.inputs
        for weight, data, rows, columns in ((right, left, -1, -2), (left, right, -2, -1)):
            operand = self._tracer.trace(weight)
            if operand is None or data is None or len(operand.axes) < 2:
                continue
            matrices = operand.matrices(rows, columns)
            if matrices is not None:
                return self._with_bias(node, data, matrices, operand, inside)
        return None

    def _gemm(self, node: ir.Node, inside: set[ir.Node]) -> Linear | None:
        """Gemm(x, W, c): an expert's linear layer in one node."""
        data, weight = node.inputs[0], node.inputs[1]
        operand = self._tracer.trace(weight)
        plain = node.attributes.get_float("alpha", 1.0) == 1.0 and node.attributes.get_float("beta", 1.0) == 1.0
        if (
            operand is None
            or data is None
            or len(operand.axes) != 2
            or not plain
            or bool(node.attributes.get_int("transA", 0))
        ):
            return None
        rows, columns = (0, 1) if node.attributes.get_int("transB", 0) else (1, 0)
        matrices = operand.matrices(rows, columns)
        if matrices is None:
            return None
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = self._tracer.trace(node.inputs[2])
            vectors = None if bias is None or not bias.axes else bias.vectors(-1)
            if vectors is None or len(vectors) != len(matrices):
                return None
            return Linear(node, data, tuple(matrices), tuple(vectors), node.outputs[0], operand.index is not None)
        return self._with_bias(node, data, matrices, operand, inside)

    def _with_bias(
        self, node: ir.Node, data: ir.Value, matrices: list[View], operand: Operand, inside: set[ir.Node]
    ) -> Linear:
        output, biases = self._bias(node.outputs[0], len(matrices), matrices[0].shape[0], inside)
        return Linear(node, data, tuple(matrices), biases, output, operand.index is not None)

    def _bias(
        self, output: ir.Value, count: int, rows: int, inside: set[ir.Node]
    ) -> tuple[ir.Value, tuple[View, ...] | None]:
        """An Add of stored vectors after the product, with moves between them; they are looked for, not demanded."""
        value = output
        for _ in range(8):
            readers = [node for node, _ in value.uses() if node in inside]
            if len(readers) != 1:
                break
            (reader,) = readers
            if reader.op_type == "Add" and reader.domain == "":
                other = reader.inputs[1] if reader.inputs[0] is value else reader.inputs[0]
                operand = self._tracer.trace(other)
                vectors = _fitting(operand, count, rows)
                return (reader.outputs[0], tuple(vectors)) if vectors else (output, None)
            if reader.op_type not in MOVES or (reader.op_type != "Concat" and reader.inputs[0] is not value):
                break
            value = reader.outputs[0]
        return output, None


def _fitting(operand: Operand | None, count: int, rows: int) -> list[View] | None:
    """Biases along whichever axis of the operand has the size of the outputs."""
    if operand is None:
        return None
    for axis in range(len(operand.axes) - 1, -1, -1):
        if operand.axes[axis] is not None and operand.size(axis) == rows:
            vectors = operand.vectors(axis)
            if vectors is not None and (len(vectors) == count or count == 1):
                return vectors
    return None


@dataclass(frozen=True)
class Roles:
    """What each expert consists of.

    first: one list of linears (gate and up together, or up alone), or two (gate and up in either order); second: the
    down projections. A list has one linear for all experts, or one for each. together: one activation serves all
    experts, although each has a product of its own.
    """

    first: tuple[tuple[Linear, ...], ...]
    second: tuple[Linear, ...]
    together: bool = False

    def matrices(self, linears: tuple[Linear, ...]) -> list[View]:
        """[out,in] of every expert."""
        return [view for linear in linears for view in linear.matrices]

    def biases(self, linears: tuple[Linear, ...]) -> list[View] | None:
        """[out] of every expert, or None."""
        vectors = [linear.biases for linear in linears if linear.biases is not None]
        if len(vectors) != len(linears):
            return None
        if len(vectors[0]) == self.experts:  # one for all, or added to all at once
            return list(vectors[0])
        return [view for item in vectors for view in item]

    @property
    def experts(self) -> int:
        """How many there are."""
        return len(self.matrices(self.second))

    @property
    def gathered(self) -> bool:
        """Whether the weights are gathered by the router's index."""
        return all(linear.gathered for linear in self.second)


def origin(value: ir.Value, inside: set[ir.Node] | None = None) -> ir.Value:
    """Where a value's elements come from: back through ops that only move them."""
    node = value.producer()
    while node is not None and node.domain == "" and node.op_type in MOVES and (inside is None or node in inside):
        value_ = node.inputs[0]
        if value_ is None:
            break
        value, node = value_, value_.producer()
    return value


def assign(linears: Sequence[Linear], nodes: Iterable[ir.Node]) -> Roles:
    """Which linear is which, told by what depends on what.

    Raises:
        RefusedError: they are no two layers of one kind.
    """
    below = _dependencies(linears, nodes)
    first = [linear for linear in linears if not below[linear.node]]
    second = [linear for linear in linears if below[linear.node]]
    if not first or not second:
        raise RefusedError("its experts are not two linear layers with stored weights, one after the other")
    deeper = [linear for linear in second if any(below[node] for node in below[linear.node])]
    if deeper:
        raise RefusedError(f"its experts have a third layer, {label(deeper[0].node)}")
    if len(second) == 1:
        return Roles(tuple((linear,) for linear in first), (second[0],))
    if len(first) not in (len(second), 2 * len(second)):
        raise RefusedError(f"it has {len(first)} products before the activation and {len(second)} after it")
    return _per_expert(first, second, below)


def _per_expert(first: list[Linear], second: list[Linear], below: dict[ir.Node, set[ir.Node]]) -> Roles:
    """One product an expert: by their stored tensors where all are slices of one, else by what feeds what."""
    second = _ordered(second)
    by_node = {linear.node: linear for linear in first}
    width = len(first) // len(second)
    own = [sorted((by_node[n] for n in below[linear.node]), key=_readers) for linear in second]
    if all(len(linears) == width for linears in own):
        return Roles(tuple(tuple(linears[role] for linears in own) for role in range(width)), tuple(second))
    # Grouped: every product of the second layer depends on all of the first, through one activation for all.
    groups: dict[int, list[Linear]] = {}
    for linear in first:
        groups.setdefault(_stored(linear.matrices[0]), []).append(linear)
    if width == 1:
        parts = [_ordered(first)]
    elif len(groups) == width and all(len(group) == len(second) for group in groups.values()):
        parts = [_ordered(group) for group in groups.values()]
    else:
        parts = [first[: len(second)], first[len(second) :]]
    return Roles(tuple(tuple(part) for part in parts), tuple(second), together=True)


def _readers(linear: Linear) -> str:
    """What tells gate from up in the same way for every expert: what becomes of the product, moves left out."""
    return _fate(linear.output, 5)


def _fate(value: ir.Value, depth: int) -> str:
    if depth == 0:
        return ""
    fates = []
    for node, at in value.uses():
        after = "".join(_fate(output, depth - (node.op_type not in MOVES)) for output in node.outputs)
        # The places of a product's or a sum's terms say nothing.
        place = "" if node.op_type in ("Add", "Mul") else str(at)
        fates.append(after if node.op_type in MOVES else f"{node.op_type}{place}({after})")
    return ",".join(sorted(fates))


def _ordered(linears: list[Linear]) -> list[Linear]:
    """By their place in the stored tensor, where they share one: that is the experts' number."""
    tensors = {_stored(linear.matrices[0]) for linear in linears}
    return sorted(linears, key=lambda linear: linear.matrices[0].offset) if len(tensors) == 1 else linears


def _stored(view: View) -> int:
    """The stored tensor's identity, also at the probe's sizes."""
    return id(getattr(view.tensor, "tensor", view.tensor))


def _dependencies(linears: Sequence[Linear], nodes: Iterable[ir.Node]) -> dict[ir.Node, set[ir.Node]]:
    """For each linear's node those of other linears that its data depends on."""
    marked = {linear.node for linear in linears}
    reach: dict[ir.Node, frozenset[ir.Node]] = {}
    below: dict[ir.Node, set[ir.Node]] = {}
    for node in nodes:
        above: frozenset[ir.Node] = frozenset()
        for value in node.inputs:
            producer = None if value is None else value.producer()
            found = reach.get(producer, frozenset()) if producer is not None else frozenset()
            above = above | found if found and not found <= above else above
        if node in marked:
            below[node] = set(above)
            above = frozenset({node}) | above
        reach[node] = above
    return below
