"""Values of a graph that don't depend on its inputs: shapes, axes, bounds, scalars, folded by the exporter or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from lynx_trt.export.relayout import read_tensor

# What indexes and shapes is small; a weight is not, and is never read to find out.
LIMIT = 4096

Array = np.ndarray[Any, np.dtype[Any]]


class Constants:
    """Small constant values by need, each computed once."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._known: dict[ir.Value, Array | None] = {}

    def get(self, value: ir.Value | None) -> Array | None:
        """The value, or None if it depends on an input, is large, or can't be computed."""
        if value is None:
            return None
        if value not in self._known:
            self._known[value] = None  # a value on its way to itself is none
            self._known[value] = self._compute(value)
        return self._known[value]

    def ints(self, value: ir.Value | None) -> list[int] | None:
        """A constant vector or scalar of whole numbers, as a list."""
        array = self.get(value)
        if array is None or array.dtype.kind not in "iu":
            return None
        return [int(number) for number in array.reshape(-1)]

    def _compute(self, value: ir.Value) -> Array | None:
        tensor = value.const_value
        node = value.producer()
        if tensor is None and node is not None and node.op_type == "Constant" and node.domain == "":
            tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            small = tensor.dtype != ir.DataType.STRING and tensor.size <= LIMIT
            return read_tensor(tensor) if small else None
        if node is None or node.domain != "" or value.is_graph_input():
            return None
        if node.op_type == "Shape":
            return _static_shape(node)
        if node.op_type in _FOLDED:
            return self._evaluate(node, value)
        return None

    def _evaluate(self, node: ir.Node, value: ir.Value) -> Array | None:
        inputs = [self.get(item) for item in node.inputs]
        if any(array is None and item is not None for array, item in zip(inputs, node.inputs, strict=True)):
            return None
        result = evaluate_node(node, inputs)
        if result is None:
            return None
        index = value.index()
        assert index is not None
        array = result[index]
        return array if array.size <= LIMIT else None


def _static_shape(node: ir.Node) -> Array | None:
    source = node.inputs[0]
    if source is None or source.shape is None or not all(isinstance(size, int) for size in source.shape):
        return None
    sizes = [size for size in source.shape if isinstance(size, int)]
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(sizes))
    return np.array(sizes[start:end], np.int64)


def evaluate_node(node: ir.Node, inputs: list[Array | None]) -> list[Array] | None:
    """The node's outputs for given inputs, by ONNX's reference implementation; None where it has none."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(node)
    names = [f"i{number}" if array is not None else "" for number, array in enumerate(inputs)]
    del proto.input[:], proto.output[:]
    proto.input.extend(names)
    proto.output.extend(f"o{number}" for number in range(len(node.outputs)))
    given = [onnx.helper.make_empty_tensor_value_info(name) for name in names if name]
    made = [onnx.helper.make_empty_tensor_value_info(name) for name in proto.output]
    graph = onnx.helper.make_graph([proto], "one", given, made)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    feeds = {name: array for name, array in zip(names, inputs, strict=True) if name}
    try:
        return [np.asarray(output) for output in ReferenceEvaluator(model).run(None, feeds)]
    except Exception:  # whatever a foreign node makes it raise: then it is no constant
        return None


_FOLDED_NAMES = """
    Add And Cast CastLike Ceil Concat ConstantOfShape Div Equal Expand Flatten Floor Gather GatherElements GatherND
    Greater GreaterOrEqual Identity Less LessOrEqual Max Min Mod Mul Neg Not Or Range ReduceMax ReduceMin ReduceProd
    ReduceSum Reshape ScatterElements ScatterND Size Slice Split Sqrt Squeeze Sub Tile Transpose Trilu Unsqueeze Where
"""
_FOLDED = frozenset(_FOLDED_NAMES.split())
