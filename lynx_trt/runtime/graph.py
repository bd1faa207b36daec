"""Small edits of an ONNX graph: nodes put in another's place, slices of weights that stay in their file."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lynx_trt.runtime.backend import Array

Built = TypeVar("Built")


class GraphEdit:
    """Collects changes to a model's main graph; `finish` applies them."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        """`folder` holds the external data of the initializers."""
        self._model, self._folder = model, folder
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._producers = {name: node for node in model.graph.node for name in node.output if name}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in names_used(node):
                self._consumers.setdefault(name, []).append(node)
        self._types = {value.name: value.type for value in (*model.graph.value_info, *model.graph.input)}
        self._outputs = {value.name for value in model.graph.output}
        self._places = {id(node): place for place, node in enumerate(model.graph.node)}
        self._removed: set[int] = set()
        self._inserted: dict[int, list[onnx.NodeProto]] = {}
        self._place, self._scope = len(model.graph.node), "rest"
        self._known: dict[Hashable, Any] = {}
        self._counter = 0

    def is_constant(self, name: str) -> bool:
        """Whether `name` is an initializer."""
        return name in self._constants

    def shape(self, name: str) -> list[int]:
        """Dimensions of an initializer."""
        return list(self._constants[name].dims)

    def value(self, name: str) -> Array:
        """An initializer that is not in a file."""
        return numpy_helper.to_array(self._constants[name])

    def known_shape(self, name: str) -> list[int]:
        """Dimensions of a value of the original graph, 0 where one varies; empty where the graph doesn't say."""
        if self.is_constant(name):
            return self.shape(name)
        if name not in self._types:
            return []
        return [dimension.dim_value for dimension in self._types[name].tensor_type.shape.dim]

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node of the original graph that makes a value."""
        return self._producers.get(name)

    def only_consumer(self, name: str, op: str) -> onnx.NodeProto | None:
        """The node of the original graph that reads a value, if it is the only one and of this kind."""
        nodes = self._consumers.get(name, [])
        alone = len(nodes) == 1 and nodes[0].op_type == op and name not in self._outputs
        return nodes[0] if alone else None

    def take(self, node: onnx.NodeProto) -> int:
        """Remove a node; returns its place."""
        place = self._places[id(node)]
        self._removed.add(place)
        return place

    @contextmanager
    def inserting(self, place: int, scope: str) -> Iterator[None]:
        """New nodes go to this place of the graph, their names begin with `lowered/` and the scope."""
        before = self._place, self._scope
        self._place, self._scope = place, scope
        yield
        self._place, self._scope = before

    def add(self, op: str, inputs: Sequence[str], *, outputs: Sequence[str] | None = None, **attributes: Any) -> str:
        """A node with one output; returns its name."""
        return self.add_many(op, inputs, 1, outputs=outputs, **attributes)[0]

    def add_many(
        self, op: str, inputs: Sequence[str], count: int, *, outputs: Sequence[str] | None = None, **attributes: Any
    ) -> list[str]:
        """A node with `count` outputs; returns their names."""
        names = list(outputs) if outputs else [self.name(op) for _ in range(count)]
        node = helper.make_node(op, list(inputs), names, name=self.name(op), **attributes)
        self.put(node)
        return names

    def put(self, node: onnx.NodeProto) -> None:
        """A node that was made elsewhere, at the current place."""
        self._inserted.setdefault(self._place, []).append(node)

    def once(self, key: Hashable, build: Callable[[], Built]) -> Built:
        """What several layers share, a value or more: made where it is first asked for."""
        if key not in self._known:
            self._known[key] = build()
        known: Built = self._known[key]
        return known

    def constant(self, value: Array) -> str:
        """An initializer of this value; equal ones are shared."""
        key = (value.dtype.str, value.shape, value.tobytes())
        return self.once(key, lambda: self._add_initializer(numpy_helper.from_array(value, self.name("constant"))))

    def integers(self, value: int | Sequence[int]) -> str:
        """An int64 constant."""
        return self.constant(np.array(value, np.int64))

    def scalar(self, value: float) -> str:
        """A float32 constant."""
        return self.constant(np.array(value, np.float32))

    def part(self, name: str, index: int) -> str:
        """Slice `index` of an initializer along its first dimension; external data is pointed into, not read."""
        part = f"{name}/{index}"
        return self.once((name, index), lambda: self._add_initializer(_slice(self._constants[name], index, part)))

    def viewed(self, name: str, data_type: int, dims: Sequence[int]) -> str:
        """The bytes of an initializer as another type; external data stays in its file."""
        view = f"{name}/{TensorProto.DataType.Name(data_type).lower()}"
        return self.once(
            (name, data_type, *dims),
            lambda: self._add_initializer(_view(self._constants[name], data_type, dims, view)),
        )

    def finish(self) -> None:
        """Apply the changes."""
        nodes: list[onnx.NodeProto] = []
        for place, node in enumerate(self._model.graph.node):
            nodes.extend(self._inserted.get(place, ()))
            if place not in self._removed:
                nodes.append(node)
        nodes.extend(self._inserted.get(len(self._model.graph.node), ()))
        copies = []
        for node in nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copies.append(copy)
        del self._model.graph.node[:]
        self._model.graph.node.extend(copies)
        domains = {entry.domain for entry in self._model.opset_import}
        if "com.microsoft" not in domains and any(node.domain == "com.microsoft" for node in copies):
            self._model.opset_import.append(helper.make_opsetid("com.microsoft", 1))

    def _add_initializer(self, tensor: onnx.TensorProto) -> str:
        self._model.graph.initializer.append(tensor)
        self._constants[tensor.name] = tensor
        return tensor.name

    def name(self, what: str) -> str:
        """A new name."""
        self._counter += 1
        return f"lowered/{self._scope}/{what}_{self._counter}"


def _slice(tensor: onnx.TensorProto, index: int, name: str) -> onnx.TensorProto:
    part = TensorProto(name=name, data_type=tensor.data_type, dims=tensor.dims[1:])
    if tensor.data_location != TensorProto.EXTERNAL:
        whole = numpy_helper.to_array(tensor)
        part.raw_data = whole[index].tobytes()
        return part
    entries = {entry.key: entry.value for entry in tensor.external_data}
    size = int(np.prod(tensor.dims[1:])) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    part.data_location = TensorProto.EXTERNAL
    values = {"location": entries["location"], "offset": int(entries.get("offset", 0)) + index * size, "length": size}
    for key, value in values.items():
        part.external_data.add(key=key, value=str(value))
    return part


def _view(tensor: onnx.TensorProto, data_type: int, dims: Sequence[int], name: str) -> onnx.TensorProto:
    view = TensorProto(name=name, data_type=data_type, dims=dims)
    if tensor.data_location == TensorProto.EXTERNAL:
        view.data_location = TensorProto.EXTERNAL
        view.external_data.extend(tensor.external_data)
    else:
        view.raw_data = numpy_helper.to_array(tensor).tobytes()
    return view


def drop_dead(model: onnx.ModelProto) -> None:
    """Remove nodes and initializers of the main graph that no output needs, and functions that no node calls."""
    graph = model.graph
    needed = {output.name for output in graph.output}
    alive = []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            alive.append(node)
            needed.update(names_used(node))
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(alive)]
    del graph.node[:]
    graph.node.extend(kept)
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    weights = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in weights]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    called = {(node.domain, node.op_type, node.overload) for node in all_nodes(kept)}
    functions = [f for f in model.functions if (f.domain, f.name, f.overload) in called]
    functions = [onnx.FunctionProto.FromString(function.SerializeToString()) for function in functions]
    del model.functions[:]
    model.functions.extend(functions)


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from all_nodes(graph.node)


def names_used(node: onnx.NodeProto) -> Iterator[str]:
    """Values that a node reads, also from within its subgraphs."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (output.name for output in graph.output)
            for inner in graph.node:
                yield from names_used(inner)
