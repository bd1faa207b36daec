"""ONNX files that others wrote: opened without their weights, and refused in one line where they are damaged.

External data stays where it is: a tensor of the model knows its file, offset and length, and nothing is read. So a
graph of 100 GB opens in the time that its own file takes.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from lynx_trt.errors import CheckpointError, first_line

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def open_onnx(path: Path) -> ir.Model:
    """The model in `path`, its nodes in a valid order, its external tensors unread.

    Raises:
        CheckpointError: the file is missing, damaged, cyclic, refers to values that nothing makes, or its data files
            are missing or too short; the message names the file and the node or tensor.
    """
    import onnx_ir as ir

    proto = _parse(path)
    _check_data(proto, path)
    _sort(proto.graph, path)
    try:
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent.absolute())
    except Exception as error:
        raise CheckpointError(f"{path} can't be read: {_innermost(error)}; export it again") from error
    return model


def _innermost(error: BaseException) -> str:
    """The innermost message: onnx-ir wraps it in a chain of 'Error calling serde...'."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _parse(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name the .onnx file in it")
    try:
        # Named, since onnx takes it from the file's name: .json and .textproto are formats of its own.
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise CheckpointError(f"can't read the ONNX file {path}: {error.strerror or error}") from None
    except (DecodeError, ValueError) as error:
        raise CheckpointError(_not_onnx(path, "")) from error
    if not proto.graph.node:  # an empty file parses, and so do some files that are no ONNX
        raise CheckpointError(_not_onnx(path, ": it holds no graph"))
    if not any(entry.domain in ("", "ai.onnx") for entry in proto.opset_import):
        raise CheckpointError(f"{path} doesn't say which opset it is of (opset_import is missing); export it again")
    return proto


def _not_onnx(path: Path, why: str) -> str:
    """What to say of a file that holds no graph; those of a folder that is one thing get the folder named."""
    for name, what in (("config.json", "checkpoint"), ("lynx.json", "artifact")):
        if path.suffix != ".onnx" and (path.parent / name).is_file():
            return f"{path} is not an ONNX file, but one of a {what}'s; name the folder: {path.parent}"
    return f"{path} is not an ONNX file, or is damaged{why}; export it again"


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all its subgraphs."""
    yield graph
    for node in graph.node:
        for subgraph in _subgraphs(node):
            yield from graphs(subgraph)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    import onnx

    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def _check_data(proto: onnx.ModelProto, path: Path) -> None:
    """Every external tensor lies inside a data file beside the ONNX file."""
    import onnx

    sizes: dict[str, int] = {}
    for tensor in _tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            if _bytes(tensor, path) is not None and tensor.HasField("raw_data"):
                _check_length(tensor, path, len(tensor.raw_data))
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location not in sizes:
            sizes[location] = _data_size(path, location, tensor.name)
        wanted = _bytes(tensor, path)
        offset, length = _whole(entries, "offset", 0, tensor, path), _whole(entries, "length", wanted, tensor, path)
        if wanted is not None and length != wanted:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} of {list(tensor.dims)} needs {wanted} bytes, but its data has "
                f"{length}; export it again"
            )
        if offset + length > sizes[location]:
            raise CheckpointError(
                f"the weights of {path} are not complete: {location} has {sizes[location]} bytes, and tensor "
                f"{tensor.name!r} ends at byte {offset + length}; copy the data file again, or export again"
            )


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in graphs(proto.graph):
        yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t


def _data_size(path: Path, location: str, name: str) -> int:
    """Bytes of a data file, which has to lie in the folder of the ONNX file or below."""
    parts = PurePosixPath(location).parts
    if not location or PurePosixPath(location).is_absolute() or ".." in parts:
        raise CheckpointError(
            f"{path}: tensor {name!r} has its data at {location!r}, which is outside of the folder of the file; "
            "keep data files beside the ONNX file"
        )
    try:
        return (path.parent / location).stat().st_size
    except OSError as error:
        raise CheckpointError(
            f"the weights of {path} are not complete: {path.parent / location}: {error.strerror} (tensor {name!r}); "
            "keep the data files beside the ONNX file"
        ) from None


def _bytes(tensor: onnx.TensorProto, path: Path) -> int | None:
    """Bytes that the tensor's shape and type ask for; None for strings."""
    import onnx_ir as ir

    elements = 1
    for size in tensor.dims:
        if size < 0:
            raise CheckpointError(f"{path}: tensor {tensor.name!r} has the shape {list(tensor.dims)}; export it again")
        elements *= size
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        raise CheckpointError(
            f"{path}: tensor {tensor.name!r} has the unknown type {tensor.data_type}; export it again"
        ) from None
    if dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return None
    return -(-elements * dtype.bitwidth // 8)


def _check_length(tensor: onnx.TensorProto, path: Path, got: int) -> None:
    wanted = _bytes(tensor, path)
    if got != wanted:
        raise CheckpointError(
            f"{path}: tensor {tensor.name!r} of {list(tensor.dims)} needs {wanted} bytes, but the file has {got} of "
            "it; export it again"
        )


def _whole(entries: dict[str, str], key: str, default: int | None, tensor: onnx.TensorProto, path: Path) -> int:
    text = entries.get(key)
    if text is None:
        return default or 0
    if not text.isascii() or not text.isdigit():
        raise CheckpointError(f"{path}: tensor {tensor.name!r} has the {key} {text!r}; export it again")
    return int(text)


def _sort(graph: onnx.GraphProto, path: Path, outer: frozenset[str] = frozenset()) -> None:
    """Put the nodes in an order in which each value is made before it is used; the order stays where it is one.

    Raises:
        CheckpointError: a value that nothing makes, one that two nodes make, or a cycle; a node is named.
    """
    known = outer | {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    maker = _makers(graph, path, known - outer)
    needs = [_needs(node, number, maker, known, path) for number, node in enumerate(graph.node)]
    order = _order(needs)
    if len(order) < len(needs):
        stuck = min(set(range(len(needs))) - set(order))
        raise CheckpointError(
            f"{path}: the graph has a cycle: node {label(graph.node[stuck], stuck)} needs its own result; "
            "export it again"
        )
    if order != sorted(order):
        nodes = [graph.node[number] for number in order]
        del graph.node[:]
        graph.node.extend(nodes)
    for value in graph.output:
        if value.name not in known and value.name not in maker:
            raise CheckpointError(f"{path}: nothing makes the output {value.name!r}; export it again")
    inner = frozenset(known | set(maker))
    for node in graph.node:
        for subgraph in _subgraphs(node):
            _sort(subgraph, path, inner)


def label(node: onnx.NodeProto, number: int) -> str:
    """A node for a message: its name, or its place and output where it has none."""
    op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return f"{node.name!r} ({op})" if node.name else f"number {number} ({op}, output {next(iter(node.output), '')!r})"


def _makers(graph: onnx.GraphProto, path: Path, given: Iterable[str]) -> dict[str, int]:
    maker: dict[str, int] = {}
    given = set(given)
    for number, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in maker or name in given:
                raise CheckpointError(f"{path}: node {label(node, number)} makes {name!r}, which already exists")
            maker[name] = number
    return maker


def _needs(node: onnx.NodeProto, number: int, maker: dict[str, int], known: Collection[str], path: Path) -> set[int]:
    """The nodes that have to run before this one; subgraphs count with what they take from outside."""
    needs = set()
    for name in _reads(node):
        if name in maker:
            needs.add(maker[name])
        elif name not in known:
            raise CheckpointError(f"{path}: node {label(node, number)} reads {name!r}, which nothing makes")
    return needs


def _reads(node: onnx.NodeProto) -> set[str]:
    names = {name for name in node.input if name}
    for graph in _subgraphs(node):
        inside = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        inside |= {name for inner in graph.node for name in inner.output}
        for inner in graph.node:
            names |= _reads(inner) - inside
        names |= {value.name for value in graph.output} - inside
    return names


def _order(needs: list[set[int]]) -> list[int]:
    """Kahn's algorithm, the earliest node that is ready first."""
    users: dict[int, list[int]] = {}
    for number, wanted in enumerate(needs):
        for other in wanted:
            users.setdefault(other, []).append(number)
    missing = [len(wanted) for wanted in needs]
    ready = [number for number, count in enumerate(missing) if count == 0]
    order = []
    while ready:
        number = heapq.heappop(ready)
        order.append(number)
        for user in users.get(number, ()):
            missing[user] -= 1
            if missing[user] == 0:
                heapq.heappush(ready, user)
    return order
