"""The copy of a lynx ONNX graph that TensorRT reads, made in memory without touching the weights.

The file that ONNX Runtime runs differs from what TensorRT wants in six points:

- the ops' function bodies are dropped: TensorRT's parser silently prefers a local function to a plugin;
- an Attention in float32, with heads of more than FUSED_HEAD values or a cache of more than FUSED_ROWS rows gets
  `TRT_decomposable = 1`: TensorRT has no fused kernel for it, and ONNX Runtime rejects the attribute;
- the heads of latent attention are folded into one (`_fold_heads`);
- with kernels, one lynx node carries them, and each their id (`contract.KERNELS`);
- a LynxSelect hands the dispatch metadata to the LynxExperts that its `index` goes to, which else makes it once more
  (`hand_over`, once TensorRT has told the shapes);
- with external expert weights, the constant inputs of LynxExperts become inputs of the graph, so that the engine
  holds no copy of them and the runtime binds them from the same data file.

Weights in external files stay where they are: the copy refers to them by the same relative location, so TensorRT
is given the path of the original file to resolve them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lynx_trt.errors import TensorRTError
from lynx_trt.export.ops import DOMAIN, EXPERTS, PLUGIN, SELECT
from lynx_trt.plugins.contract import CONTRACTS, DISPATCH, EXPERTS_CONTRACT, KERNELS, KERNELS_ID, SELECT_CONTRACT

if TYPE_CHECKING:
    import onnx

ExpertWeights = Literal["engine", "external"]
Dims = tuple[int | str, ...]

# Quantized weights lie where the others do, and what comes with them behind.
_SELECT_INPUTS = [tensor.name for tensor in SELECT_CONTRACT.inputs]
_EXPERTS_INPUTS = [tensor.name for tensor in EXPERTS_CONTRACT.inputs]
_FIRST_WEIGHT = _EXPERTS_INPUTS.index("gate_up")
# TensorRT's fused attention takes heads of up to so many values; of latent attention they have more.
FUSED_HEAD = 256
# And caches of up to so many rows: 24,512 were taken and 24,568 refused, by TensorRT for RTX 1.7 without a GPU.
FUSED_ROWS = 24512


@dataclass(frozen=True)
class ExternalInput:
    """An expert weight that is a graph input: what to bind to `name`, and where it lies.

    `file` is relative to the folder of the ONNX file; `offset` and `length` are bytes in it; the elements are
    little-endian and row-major.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Prepared:
    """The copy for TensorRT; `plugins` is (node name -> op) of every lynx node, `external` is in graph order."""

    model: onnx.ModelProto
    plugins: dict[str, str]
    external: tuple[ExternalInput, ...]


def prepare(onnx_path: Path, *, expert_weights: ExpertWeights = "engine", kernels: bytes = b"") -> Prepared:
    """Read a lynx ONNX file and make the copy of its graph for TensorRT; `kernels` is the blob that it is to carry.

    Raises TensorRTError: the file is missing or is no ONNX, a data file is missing or too short, a node of the
    domain lynx is unknown, or expert weights can't become inputs.
    """
    model = read(onnx_path)
    _check_data(model, onnx_path)
    del model.functions[:]
    plugins = _plugin_nodes(model.graph)
    _fold_heads(model.graph)
    _decompose_attention(model)
    if kernels:
        _add_kernels(model.graph, kernels)
    external = _externalize(model.graph, onnx_path) if expert_weights == "external" else ()
    return Prepared(model, plugins, external)


def hand_over(model: onnx.ModelProto, shapes: Mapping[str, Sequence[Sequence[int]]]) -> tuple[str, ...]:
    """Add the output `dispatch` to each LynxSelect that can hand it over, and give it to its LynxExperts.

    It can where its `index` goes to one LynxExperts and nowhere else, both are nodes of the graph itself, and both have
    the same E, which the layout of the metadata depends on (T and K are those of `index`). All others stay as they are.

    Args:
        model: a prepared model; it is changed.
        shapes: of all inputs of each lynx node, by its name, as TensorRT infers them; -1 is a size that it leaves open.

    Returns:
        The names of the LynxSelect nodes that were changed.
    """
    graph = model.graph
    users = Counter(name for node in _nodes(graph) for name in node.input)
    users.update(value.name for each in _graphs(graph) for value in each.output)
    selects = {node.output[0]: node for node in graph.node if node.domain == DOMAIN and node.op_type == SELECT}
    changed = []
    for experts in graph.node:
        if experts.domain != DOMAIN or experts.op_type != EXPERTS:
            continue
        index = experts.input[_EXPERTS_INPUTS.index("index")]
        select = selects.get(index)
        if select is None or users[index] != 1 or "" in experts.input:
            continue
        fields = [a for node in (select, experts) for a in node.attribute if a.name == DISPATCH]
        if any(field.i for field in fields):
            continue
        here = shapes[experts.name][_EXPERTS_INPUTS.index("down")][0]
        there = shapes[select.name][_SELECT_INPUTS.index("choice")][1]
        if here != there or here < 0:
            continue
        select.output.append(f"{select.name}.{DISPATCH}")
        experts.input.append(select.output[-1])
        for field in fields:
            field.i = 1
        changed.append(select.name)
    return tuple(changed)


def plugin_attributes(model: onnx.ModelProto) -> dict[str, dict[str, Any]]:
    """The op and the attributes of each lynx node of a prepared model, by its name; not the kernels."""
    return {
        node.name: {"op": node.op_type, "attributes": _attributes(node)}
        for node in _nodes(model.graph)
        if node.domain == DOMAIN
    }


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    import onnx

    def value(attribute: onnx.AttributeProto) -> Any:
        found = onnx.helper.get_attribute_value(attribute)
        return found.decode() if isinstance(found, bytes) else found

    return {each.name: value(each) for each in node.attribute if each.type != onnx.AttributeProto.TENSOR}


def read(onnx_path: Path) -> onnx.ModelProto:
    """Read the graph of an ONNX file, without its external data. Raises TensorRTError."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(onnx_path, load_external_data=False)
    except OSError as error:
        raise TensorRTError(f"can't read the ONNX file {onnx_path}: {error.strerror}") from error
    except DecodeError as error:
        raise TensorRTError(f"{onnx_path} is not an ONNX file, or is damaged: export it again") from error
    if not model.graph.node:  # an empty file parses
        raise TensorRTError(f"{onnx_path} holds no graph: export it again")
    return model


def input_dims(model: onnx.ModelProto) -> dict[str, Dims]:
    """Dimensions of each graph input: an int, or the name of a dynamic one ("?" if it has none)."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
            for dim in value.type.tensor_type.shape.dim
        )
        for value in model.graph.input
        if value.name not in constants
    }


def _check_data(model: onnx.ModelProto, onnx_path: Path) -> None:
    """Every external tensor lies inside its file. TensorRT's own message for one that doesn't names no tensor."""
    sizes: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if not _is_external(tensor):
            continue
        where = _location(tensor)
        path = onnx_path.parent / where.file
        if where.file not in sizes:
            try:
                sizes[where.file] = path.stat().st_size
            except OSError as error:
                raise TensorRTError(
                    f"the weights of {onnx_path} are not complete: {path}: {error.strerror} (tensor {tensor.name}). "
                    "Keep the data files beside the ONNX file, or export again"
                ) from error
        end = where.offset + where.length
        if end > sizes[where.file]:
            raise TensorRTError(
                f"the weights of {onnx_path} are not complete: {path} has {sizes[where.file]} bytes, and tensor "
                f"{tensor.name} ends at byte {end}. The file was cut off: export again"
            )


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all its subgraphs."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _graphs(subgraph)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of subgraphs too."""
    for each in _graphs(graph):
        yield from each.node


def _plugin_nodes(graph: onnx.GraphProto) -> dict[str, str]:
    """Make every lynx node one that TensorRT's parser finds the plugin for; return (name -> op).

    Each gets a name of its own, by which its layer is found after parsing, the attributes by which the parser looks
    a plugin up, and all outputs: the parser refuses a plugin node that leaves one out.
    """
    import onnx

    taken = Counter(node.name for node in _nodes(graph))
    plugins: dict[str, str] = {}
    for number, node in enumerate(_nodes(graph)):
        if node.domain != DOMAIN:
            continue
        contract = CONTRACTS.get(node.op_type)
        if contract is None:
            raise TensorRTError(
                f"node {node.name or number} is {DOMAIN}.{node.op_type}, which this version does not know "
                f"(it knows {' and '.join(CONTRACTS)}): build with the version of lynx-trt that exported it"
            )
        node.ClearField("overload")  # it chooses among the function bodies, which are gone
        if not node.name or taken[node.name] > 1:
            node.name = f"{DOMAIN}.{node.op_type}.{number}"
        given = {attribute.name: attribute.s.decode() for attribute in node.attribute if attribute.name in PLUGIN}
        # A field that a node lacks is one that the parser warns of.
        if contract.has_dispatch and not any(attribute.name == DISPATCH for attribute in node.attribute):
            node.attribute.append(onnx.helper.make_attribute(DISPATCH, 0))
        for name, value in PLUGIN.items():
            if given.get(name, value) != value:
                raise TensorRTError(
                    f"node {node.name} ({node.op_type}) asks for {name} {given[name]!r}; this version has {value!r}: "
                    "build with the version of lynx-trt that exported it"
                )
            if name not in given:
                node.attribute.append(onnx.helper.make_attribute(name, value))
        for output in range(len(contract.outputs)):
            if output >= len(node.output):
                node.output.append("")
            node.output[output] = node.output[output] or f"{node.name}.{contract.outputs[output].name}"
        plugins[node.name] = node.op_type
    return plugins


def _add_kernels(graph: onnx.GraphProto, kernels: bytes) -> None:
    """The kernels on the first lynx node, and their id on all of them."""
    import hashlib

    import onnx

    kernels_id = hashlib.sha256(kernels).hexdigest()
    carried = False
    for node in _nodes(graph):
        if node.domain == DOMAIN:
            node.attribute.append(onnx.helper.make_attribute(KERNELS_ID, kernels_id))
            if not carried:
                # A tensor, because TensorRT's parser gives it its length; a string would end at its first NUL.
                tensor = onnx.helper.make_tensor(KERNELS, onnx.TensorProto.INT8, [len(kernels)], kernels, raw=True)
                node.attribute.append(onnx.helper.make_attribute(KERNELS, tensor))
                carried = True


def _fold_heads(graph: onnx.GraphProto) -> int:
    """Make the heads of each latent attention one head of as many more tokens; return how many were.

    All its heads read one key, which is the value too. TensorRT decomposes it (such heads are larger than FUSED_HEAD),
    and then writes that key once for each head, twice: for DeepSeek-V2-Lite at 16 sequences of 2048 rows 1.2 GB of
    scratch memory, written and read again in each layer of each step. Folded it is 0.09 GB.
    """
    values = (*graph.input, *graph.value_info, *graph.output)
    shapes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in values}
    nodes: list[onnx.NodeProto] = []
    masks: dict[tuple[str, int], str] = {}
    count = 0
    for node in graph.node:
        if not (node.op_type == "Attention" and node.domain in ("", "ai.onnx") and _is_latent(node, shapes)):
            nodes.append(node)
            continue
        _, heads, _, size = shapes[node.input[0]]
        mask = node.input[3]
        if (mask, heads) not in masks:
            nodes += _widened(graph, mask, heads, shapes[mask][3])
            masks[mask, heads] = nodes[-1].output[0]
        nodes += _folded(graph, node, heads, size, masks[mask, heads])
        count += 1
    del graph.node[:]
    graph.node.extend(nodes)
    return count


def _widened(graph: onnx.GraphProto, mask: str, heads: int, rows: int) -> list[onnx.NodeProto]:
    """Nodes of a mask [B,1,S,L] once for each head: [B,1,hS,L]."""
    import onnx

    name = f"{mask}.{heads}"
    apart = _integers(graph, f"{name}.axis", [2])
    each = _integers(graph, f"{name}.each", [1, 1, heads, 1, 1])
    shape = _integers(graph, f"{name}.shape", [0, 1, -1, rows])
    return [
        onnx.helper.make_node("Unsqueeze", [mask, apart], [f"{name}.apart"]),
        onnx.helper.make_node("Expand", [f"{name}.apart", each], [f"{name}.wide"]),
        onnx.helper.make_node("Reshape", [f"{name}.wide", shape], [f"{name}.folded"]),
    ]


def _folded(graph: onnx.GraphProto, node: onnx.NodeProto, heads: int, size: int, mask: str) -> list[onnx.NodeProto]:
    """Nodes of an Attention with queries [B,1,hS,d] in place of [B,h,S,d]."""
    import onnx

    query, output = node.input[0], node.output[0]
    joined = _integers(graph, f"{output}.joined", [0, 1, -1, size])
    apart = _integers(graph, f"{output}.apart", [0, heads, -1, size])
    folded = onnx.NodeProto()
    folded.CopyFrom(node)
    folded.input[0], folded.input[3], folded.output[0] = f"{output}.query", mask, f"{output}.folded"
    return [
        onnx.helper.make_node("Reshape", [query, joined], [folded.input[0]]),
        folded,
        onnx.helper.make_node("Reshape", [folded.output[0], apart], [output]),
    ]


def _integers(graph: onnx.GraphProto, name: str, values: list[int]) -> str:
    import onnx

    graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [len(values)], values))
    return name


def _is_latent(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Keys and values are one tensor [B,1,L,d], queries are [B,h,S,d], and there is a mask for all heads."""
    if len(node.input) != 4 or node.input[1] != node.input[2]:
        return False
    query, key, mask = (shapes.get(name, ()) for name in (node.input[0], *node.input[2:]))
    return len(query) == len(key) == len(mask) == 4 and query[1] > 1 == key[1] == mask[1] and mask[3] * query[3] > 0


def _decompose_attention(model: onnx.ModelProto) -> int:
    """Allow TensorRT to decompose each Attention that is float32, has large heads or many rows; return how many.

    What nothing says the type or size of is taken to be so: the attribute permits and does not force.
    """
    import onnx

    attention = [node for node in _nodes(model.graph) if node.op_type == "Attention" and node.domain in ("", "ai.onnx")]
    if not attention:
        return 0
    graph = model.graph
    known = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
    changed = 0
    for node in attention:
        query = known.get(node.input[0])
        fused = query is not None and query.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.UNDEFINED)
        sizes = [] if query is None else query.shape.dim
        # In three dimensions the heads are side by side; the attributes say how many.
        count = next((each.i for each in node.attribute if each.name == "q_num_heads"), 1) or 1
        fused = fused and len(sizes) > 0 and 0 < sizes[-1].dim_value <= FUSED_HEAD * count
        keys = known.get(node.input[1])
        rows = [] if keys is None else keys.shape.dim
        fused = fused and not (len(rows) == 4 and rows[2].dim_value > FUSED_ROWS)
        if not fused and not any(attribute.name == "TRT_decomposable" for attribute in node.attribute):
            node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))
            changed += 1
    return changed


def _externalize(graph: onnx.GraphProto, onnx_path: Path) -> tuple[ExternalInput, ...]:
    """Turn the experts' weights, scales and biases that lie in data files into graph inputs of the same names.

    Tensors inside the ONNX file itself (exporters keep small ones there) stay constants.
    """
    import onnx

    constants = {tensor.name: tensor for tensor in graph.initializer}
    moved: dict[str, ExternalInput] = {}
    nodes = [node for node in _nodes(graph) if node.domain == DOMAIN and node.op_type == EXPERTS]
    for node in nodes:
        for role, name in list(zip(_roles(node), node.input, strict=False))[_FIRST_WEIGHT:]:
            if role == DISPATCH:
                continue
            if name not in constants:
                raise TensorRTError(
                    f"{role} of {node.name} is {name!r}, which is not a constant of {onnx_path}, so it can't stay "
                    "outside the engine: export again, or put the expert weights into the engine"
                )
            if _is_external(constants[name]):
                moved[name] = _location(constants[name])
    if nodes and not moved:
        raise TensorRTError(
            f"{onnx_path} has all its expert weights inside the ONNX file, so they can't stay outside the engine: "
            "export with a data file, or put the expert weights into the engine"
        )
    kept = [tensor for tensor in graph.initializer if tensor.name not in moved]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    declared = {value.name for value in graph.input}  # files of old IR versions declare constants as inputs too
    for name, where in moved.items():
        if name not in declared:
            graph.input.append(onnx.helper.make_tensor_value_info(name, constants[name].data_type, where.shape))
    return tuple(moved.values())


def _roles(node: onnx.NodeProto) -> list[str]:
    """What the inputs of a LynxExperts are; of a node with a number of inputs that it can't have, as far as it goes."""
    contract = EXPERTS_CONTRACT.of_node(_attributes(node))
    whole = len(node.input) not in contract.input_counts
    return [tensor.name for tensor in (contract.inputs if whole else contract.inputs_of(len(node.input)))]


def _is_external(tensor: onnx.TensorProto) -> bool:
    import onnx

    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _location(tensor: onnx.TensorProto) -> ExternalInput:
    """Where an external tensor lies; the length may be absent, then the shape and type give it."""
    import numpy as np
    import onnx

    entries = {entry.key: entry.value for entry in tensor.external_data}
    shape = tuple(tensor.dims)
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        length = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return ExternalInput(
            name=tensor.name,
            dtype=str(dtype),
            shape=shape,
            file=os.path.normpath(entries["location"]),
            offset=int(entries.get("offset", 0)),
            length=int(entries.get("length", length)),
        )
    except (KeyError, ValueError) as error:
        raise TensorRTError(
            f"tensor {tensor.name} does not say where its data lies ({entries}): export again"
        ) from error
