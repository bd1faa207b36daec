"""Random foreign models: forms, routers, types and opsets at random, names and the order of nodes shuffled."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import onnx
from foreign_graphs import FORMS, ROUTINGS, Spec, make_model
from onnx import TensorProto


def random_spec(seed: int) -> Spec:
    """A model that an exporter could have written."""
    choose = random.Random(seed)
    form = choose.choice(FORMS)
    fused_op = form.startswith(("moe", "qmoe"))
    gated = form in ("moe_fc3", "trt_moe") or form.startswith("qmoe") or choose.random() < 0.75
    activation = (
        choose.choice(("silu", "swiglu_oai", "gelu", "relu")) if not fused_op else choose.choice(("silu", "swiglu_oai"))
    )
    if not gated:
        activation = choose.choice(("silu", "relu") if fused_op else ("silu", "gelu", "relu"))
    if form in ("moe_fc3", "trt_moe"):
        activation = "silu"
    experts = choose.choice((4, 6, 8, 16))
    routing = choose.choice(("softmax", "softmax_renormalised") if fused_op else ROUTINGS)
    routing = "sigmoid_bias" if form == "trt_moe" and routing == "groups" else routing
    static = choose.random() < 0.2
    return Spec(
        form=form,
        routing="softmax_renormalised" if form.startswith("qmoe") else routing,
        activation=activation,
        gated=gated,
        fused=choose.random() < 0.6,
        up_first=choose.random() < 0.3 and not fused_op,
        bias=choose.random() < 0.4 and form != "moe_fc3",
        dtype=choose.choice(("fp32", "fp32", "fp16", "bf16")),
        opset=choose.randint(17, 24),
        layers=choose.choice((1, 2, 3)),
        experts=experts,
        count=choose.randint(1, min(4, experts - 1)),
        hidden=choose.choice((16, 20, 32)),
        inner=choose.choice((8, 16)) if form.startswith("qmoe") else choose.choice((5, 8, 16, 20)),
        batch=choose.choice((1, 2)) if static else None,
        length=choose.choice((1, 3)) if static else None,
        folded=choose.random() < 0.5,
        transposed=choose.random() < 0.5,
        scale=choose.choice((1.0, 1.0, 2.5)),
        mask=choose.random() < 0.7,
        seed=seed,
    )


def shuffled(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The same model: other names for everything but inputs and outputs, nodes in another valid order."""
    choose = random.Random(seed)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    kept = {value.name for value in (*graph.input, *graph.output)} | {""}
    names: dict[str, str] = {}

    def renamed(name: str) -> str:
        if name in kept:
            return name
        if name not in names:
            names[name] = choose.choice(
                (f"{len(names)}", f"onnx::{choose.random()}", f"/a/b.{len(names)}/ü {len(names)}")
            )
        return names[name]

    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
    for number, node in enumerate(graph.node):
        node.name = choose.choice(("", f"n{number}"))
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
    nodes = _in_another_order(list(graph.node), kept | {tensor.name for tensor in graph.initializer}, choose)
    del graph.node[:]
    graph.node.extend(nodes)
    tensors = list(graph.initializer)
    choose.shuffle(tensors)
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    return result


def _in_another_order(nodes: list[onnx.NodeProto], known: set[str], choose: random.Random) -> list[onnx.NodeProto]:
    known, left, order = set(known), list(nodes), []
    while left:
        ready = [node for node in left if all(name in known for name in node.input)]
        node = choose.choice(ready[:8])
        left.remove(node)
        order.append(node)
        known |= set(node.output)
    return order


_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model of halves in float32, with the same numbers: rounding plays no part, and ONNX Runtime's CPU runs it."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for graph in (result.graph, *result.functions):
        _widen_nodes(graph.node)
    for tensor in result.graph.initializer:
        _widen(tensor)
    for value in (*result.graph.input, *result.graph.output, *result.graph.value_info):
        if value.type.tensor_type.elem_type in _HALVES:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return result


def _widen_nodes(nodes: object) -> None:
    for node in nodes:  # type: ignore[attr-defined]
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen(attribute.t)
            if attribute.name == "to" and attribute.i in _HALVES:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("g"):
                _widen_nodes(attribute.g.node)


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _HALVES:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def original(spec: Spec, seed: int) -> onnx.ModelProto:
    """The shuffled model of a spec."""
    return shuffled(make_model(spec), seed)


def runnable(spec: Spec) -> Spec:
    """The nearest spec that ONNX Runtime's CPU computes: FC3 as a fused FC1, TRT_MoE as gathered experts."""
    if spec.form == "moe_fc3":
        return replace(spec, form="moe")
    return replace(spec, form="gathered", fused=False) if spec.form == "trt_moe" else spec
