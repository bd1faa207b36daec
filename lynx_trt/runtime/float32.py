"""A half-precision graph to be computed in float32, its weights converted once, at load."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lynx_trt.runtime.graph import all_nodes

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def widen(model: onnx.ModelProto) -> None:
    """Make every half-precision value of the main graph float32, inputs and outputs too.

    External weights stay as they are in their file; a Cast behind each is folded by ONNX Runtime at load.
    """
    graph = model.graph
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in HALVES:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.value_info[:]
    for node in all_nodes(graph.node):
        _widen_attributes(node)
    casts = [cast for tensor in graph.initializer if (cast := _widen_initializer(tensor))]
    nodes = [*casts, *(onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node)]
    del graph.node[:]
    graph.node.extend(nodes)


def _widen_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name in ("to", "softmax_precision", "dtype", "output_dtype") and attribute.i in HALVES:
            attribute.i = TensorProto.FLOAT
        if attribute.HasField("t") and attribute.t.data_type in HALVES:
            attribute.t.CopyFrom(_as_float(attribute.t))


def _as_float(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _widen_initializer(tensor: onnx.TensorProto) -> onnx.NodeProto | None:
    """Convert an inline one in place; an external one gets another name, and the Cast that is returned its own."""
    if tensor.data_type not in HALVES:
        return None
    if tensor.data_location != TensorProto.EXTERNAL:
        tensor.CopyFrom(_as_float(tensor))
        return None
    name = tensor.name
    tensor.name = f"{name}/half"
    return helper.make_node("Cast", [tensor.name], [name], name=f"{name}/widen", to=TensorProto.FLOAT)
