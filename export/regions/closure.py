"""The part of a graph that computes one value from a few others, as a model of its own with neutral names.

Two regions that do the same in the same way come out as the same bytes, whatever their names and weights: so the
layers of a model are understood once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from lynx_trt.export.patterns.block import RefusedError
from lynx_trt.export.patterns.rule import label
from lynx_trt.export.regions.topology import Topology, reads
from lynx_trt.export.relayout import read_tensor, sizes_of

Array = np.ndarray[Any, np.dtype[Any]]

_FLOATS = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
# Bigger than any block: a closure of this size has gone past its inputs into the rest of the model.
MAX_NODES = 60_000
# Ops that make activations: a closure that meets one before its inputs has gone past them.
_LEARNED = frozenset(
    ("Attention", "Conv", "Einsum", "Gemm", "LayerNormalization", "MatMul", "RMSNormalization", "Softmax")
)
# Elements up to which a tensor is looked at to see whether it is filled with one value.
_FILLED = 1 << 20


@dataclass
class Region:
    """A closure, as nodes of the graph and as a model.

    Attributes:
        nodes: in order.
        given: the values it starts from, by the model's input names, in order.
        shapes_of: values of which it needs the shape alone, by input name.
        weights: stored tensors that are inputs of the model, by input name.
        names: the model's name for each value.
        model: in float64, so that what differs is the mathematics and not the rounding.
    """

    nodes: list[ir.Node]
    given: dict[str, ir.Value]
    shapes_of: dict[str, ir.Value]
    weights: dict[str, ir.Value]
    names: dict[ir.Value, str]
    model: onnx.ModelProto
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        """Hash what it computes."""
        self.digest = hashlib.sha256(self.model.SerializeToString(deterministic=True)).hexdigest()

    def value(self, name: str) -> ir.Value:
        """The graph's value behind a name of the model."""
        return next(value for value, other in self.names.items() if other == name)


def closure(
    topology: Topology, outputs: Iterable[ir.Value], given: Iterable[ir.Value]
) -> tuple[list[ir.Node], set[ir.Value]]:
    """The nodes between `given` and `outputs`, and the values of which the shape alone is needed.

    Raises:
        RefusedError: the way back from the outputs leads past `given`, into the rest of the model.
    """
    given = list(given)
    earliest = min(
        (topology.number.get(node, 0) for value in given if (node := value.producer()) is not None), default=0
    )
    start = set(given)
    nodes: set[ir.Node] = set()
    shapes: set[ir.Value] = set()
    pending = [value for value in outputs if value not in start]
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None:
            if value.is_graph_input() and not value.is_initializer():
                raise RefusedError(f"it depends on the graph's input {value.name!r} other than through its tokens")
            continue
        if node in nodes:
            continue
        nodes.add(node)
        if topology.number[node] < earliest and (node.op_type in _LEARNED or node.domain != ""):
            raise RefusedError(f"it depends on {value.name!r}, which is neither its input nor its router's")
        if len(nodes) > MAX_NODES:
            raise RefusedError("it depends on too much of the graph")
        if node.op_type in ("Shape", "Size") and node.domain == "":
            source = node.inputs[0]
            if source is not None and source not in start and _is_outside(source, topology, earliest):
                shapes.add(source)
                continue
        pending.extend(item for item in reads(node) if item not in start)
    # A value whose shape is asked for may be computed here after all.
    shapes -= {output for node in nodes for output in node.outputs}
    return sorted(nodes, key=lambda node: topology.number[node]), shapes


def _is_outside(value: ir.Value, topology: Topology, earliest: int) -> bool:
    """Whether a value whose shape is asked for comes from before the region: its shape is all there is to it."""
    node = value.producer()
    return value.const_value is None if node is None else topology.number[node] < earliest


def extract(
    nodes: list[ir.Node],
    given: list[ir.Value],
    shapes_of: set[ir.Value],
    outputs: list[ir.Value],
    opset: int,
    scale: Callable[[int], int],
    learned: set[int],
) -> Region:
    """The nodes as a model.

    Args:
        nodes: in order.
        given: values it starts from.
        shapes_of: values whose shape it needs.
        outputs: what it has to give.
        opset: of the graph.
        scale: sizes in its small constants are passed through it.
        learned: ids of stored tensors that are inputs whatever they hold.
    """
    return _Extraction(given, shapes_of, scale, learned).run(nodes, outputs, opset)


class _Extraction:
    def __init__(
        self, given: list[ir.Value], shapes_of: set[ir.Value], scale: Callable[[int], int], learned: set[int]
    ) -> None:
        self.names: dict[ir.Value, str] = {}
        self.scale = scale
        self.inputs: dict[str, ir.Value] = {}
        self.shapes: dict[str, ir.Value] = {}
        self.weights: dict[str, ir.Value] = {}
        self.constants: list[onnx.TensorProto] = []
        self._shapes_of = shapes_of
        self._learned = learned
        for value in given:
            self.inputs[self._name(value, "given")] = value

    def run(self, nodes: list[ir.Node], outputs: list[ir.Value], opset: int) -> Region:
        protos = [self._node(node) for node in nodes]
        names = [*self.inputs, *self.shapes, *self.weights]
        graph = onnx.helper.make_graph(
            protos,
            "region",
            [onnx.helper.make_empty_tensor_value_info(name) for name in names],
            [onnx.helper.make_empty_tensor_value_info(self.names[output]) for output in outputs],
            self.constants,
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
        return Region(nodes, self.inputs, self.shapes, self.weights, self.names, model)

    def _name(self, value: ir.Value, kind: str) -> str:
        return self.names.setdefault(value, f"{kind}{len(self.names)}")

    def _node(self, node: ir.Node) -> onnx.NodeProto:
        if node.domain != "":
            raise RefusedError(f"it contains {label(node)}, which can't be computed here to see what the block does")
        if any(True for _ in _graphs(node)):
            raise RefusedError(f"it contains {label(node)}, whose subgraph can't be understood")
        proto = onnx.NodeProto(op_type=node.op_type)
        proto.input.extend("" if value is None else self._read(value) for value in node.inputs)
        proto.output.extend(self._name(output, "v") for output in node.outputs)
        attributes = sorted(node.attributes.values(), key=lambda attribute: attribute.name)
        proto.attribute.extend(self._attribute(node, ir.to_proto(attribute)) for attribute in attributes)
        return proto

    def _read(self, value: ir.Value) -> str:
        if value in self.names:
            return self.names[value]
        if value in self._shapes_of:
            name = self._name(value, "shape")
            self.shapes[name] = value
            return name
        tensor = value.const_value
        if tensor is None:
            raise RefusedError(f"it reads {value.name!r} before it is made")
        fill = None if id(tensor) in self._learned else _fill(tensor)
        if fill is None and tensor.dtype.is_floating_point() and tensor.size > 1:
            name = self._name(value, "weight")
            self.weights[name] = value
            return name
        name = self._name(value, "constant")
        shape = [self.scale(size) for size in sizes_of(tensor)]
        array = self._widened(read_tensor(tensor)) if fill is None else np.full(shape, fill, np.float64)
        self.constants.append(onnx.numpy_helper.from_array(array, name))
        return name

    def _attribute(self, node: ir.Node, attribute: onnx.AttributeProto) -> onnx.AttributeProto:
        """Types of floats become float64, sizes are scaled, names that say nothing go."""
        if node.op_type in ("Cast", "EyeLike", "RandomNormalLike") and attribute.name in ("to", "dtype"):
            if attribute.i in _FLOATS:
                attribute.i = onnx.TensorProto.DOUBLE
        elif attribute.HasField("t"):
            array = self._widened(onnx.numpy_helper.to_array(attribute.t))
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(array, ""))
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            floats = [attribute.f] if attribute.name == "value_float" else list(attribute.floats)
            array = np.array(floats if attribute.name == "value_floats" else floats[0], np.float32).astype(np.float64)
            return onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(array, ""))
        elif node.op_type == "Constant" and attribute.name in ("value_int", "value_ints"):
            ints = attribute.i if attribute.name == "value_int" else list(attribute.ints)
            array = self._widened(np.array(ints, np.int64))
            return onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(array, ""))
        attribute.doc_string = ""
        return attribute

    def _widened(self, array: Array) -> Array:
        if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
            return array.astype(np.float64)
        if array.dtype.kind == "i" and array.size <= 8:
            return np.array([self.scale(int(number)) for number in array.reshape(-1)], array.dtype).reshape(array.shape)
        return array


def _fill(tensor: ir.TensorProtocol) -> float | None:
    """The one value that a tensor of floats is filled with (a zero accumulator, say), if it is."""
    if not tensor.dtype.is_floating_point() or not 1 < tensor.size <= _FILLED:
        return None
    array = read_tensor(tensor).reshape(-1)
    return float(array[0]) if (array == array[0]).all() else None


def _graphs(node: ir.Node) -> Iterable[object]:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return (attribute for attribute in node.attributes.values() if attribute.type in kinds)
