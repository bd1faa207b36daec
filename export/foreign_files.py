"""The files of a rewritten foreign model: the graph, the data files that it came with, the weights laid out anew.

Data files of the original are copied by the system, without passing through this process. (No hard links: onnx and
onnx-ir refuse to read a file that has several names, and that would go for the original as well.) One new file holds
what had to be laid out anew, written an expert at a time, and expert weights that lay inside the .onnx file.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_ir.passes import common

from lynx_trt.errors import CheckpointError
from lynx_trt.export import functions, ops
from lynx_trt.export.relayout import sizes_of
from lynx_trt.export.weights import EXTERNAL_BYTES, SAFETENSORS_DTYPE

if TYPE_CHECKING:
    import onnx_ir as ir

    from lynx_trt.export.foreign import Foreign
    from lynx_trt.export.relayout import Stack, Table

ONNX_FILE = "model.onnx"
EXPERTS_FILE = "experts.safetensors"
# The graph that TensorRT is given where it differs from `model.onnx`, and weights that only it has.
STANDARD_FILE = "tensorrt.onnx"
STANDARD_DATA = "tensorrt.safetensors"

_OURS = (ONNX_FILE, EXPERTS_FILE, STANDARD_FILE, STANDARD_DATA, "lynx.json", "engine.plan")


@dataclass(frozen=True)
class _Item:
    """A tensor for the new file: its bytes in pieces."""

    value: ir.Value
    dtype: ir.DataType
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterator[Any]]


def write_foreign(foreign: Foreign, folder: Path, *, on_progress: Callable[[int, int], None] | None = None) -> int:
    """Write `model.onnx` and its data files into `folder`; returns the bytes of all weights.

    Raises:
        CheckpointError: a data file can't be read.
    """
    import onnx_ir as ir

    model = foreign.model
    _write_new(list(_items(foreign)), folder, EXPERTS_FILE, on_progress or (lambda done, total: None))
    names = _bring_along(model, foreign.path.parent, folder)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) in names:
            value.const_value = ir.ExternalTensor(
                names[str(tensor.location)], tensor.offset, tensor.length, tensor.dtype,
                shape=tensor.shape, name=str(value.name), base_dir=folder,
            )  # fmt: skip
    nbytes = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    proto = ir.to_proto(model)
    functions.add_functions(proto)
    (folder / ONNX_FILE).write_bytes(proto.SerializeToString())
    return nbytes


def write_standard(folder: Path, *, cache_rows: int) -> tuple[Path, Counter[str], list[str]]:
    """The graph for TensorRT, beside `model.onnx` in `folder`: ops around the MoE blocks rewritten to standard ones.

    Returns its path (that of `model.onnx` where there is nothing to rewrite), what was rewritten by op, and a line for
    each op that stays.

    Raises:
        CheckpointError: a data file can't be read.
    """
    import onnx_ir as ir

    from lynx_trt.export.foreign import infer_shapes
    from lynx_trt.export.onnx_file import open_onnx
    from lynx_trt.export.standard import standardize

    model = open_onnx(folder / ONNX_FILE)
    model.functions.clear()
    for node in model.graph.all_nodes():
        node.overload = "" if node.domain == ops.DOMAIN else node.overload
    done = standardize(model, cache_rows=cache_rows)
    if not done.counts:
        return folder / ONNX_FILE, done.counts, done.left
    common.RemoveUnusedNodesPass()(model)
    infer_shapes(model)
    common.NameFixPass()(model)
    tables = (_item(model.graph.initializers[name], table) for name, table in done.stacks.items())
    _write_new([item for item in tables if item.value.uses()], folder, STANDARD_DATA, lambda done, total: None)
    proto = ir.to_proto(model)
    functions.add_functions(proto)
    (folder / STANDARD_FILE).write_bytes(proto.SerializeToString())
    return folder / STANDARD_FILE, done.counts, done.left


def _items(foreign: Foreign) -> Iterator[_Item]:
    """What goes into the new file: stacks, and expert weights that lie inside the .onnx file (so that an engine can
    leave them outside).
    """
    import onnx_ir as ir

    graph = foreign.model.graph
    inside = {
        value
        for node in graph.all_nodes()
        if node.domain == ops.DOMAIN and node.op_type == ops.EXPERTS
        for value in node.inputs[3:]
        if value is not None and value.is_initializer()
    }
    for name, stack in foreign.stacks.items():
        if name in graph.initializers:
            value = graph.initializers[name]
            inside.discard(value)
            yield _item(value, stack)
    for value in sorted(inside, key=lambda value: str(value.name)):
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < EXTERNAL_BYTES:
            continue
        shape = sizes_of(tensor)
        yield _Item(value, tensor.dtype, shape, tensor.nbytes, lambda tensor=tensor: iter([tensor.tobytes()]))  # type: ignore[misc]


def _item(value: ir.Value, made: Stack | Table) -> _Item:
    return _Item(value, made.dtype, made.shape, made.nbytes, made.pieces)


def _write_new(items: list[_Item], folder: Path, file_name: str, on_progress: Callable[[int, int], None]) -> None:
    """One safetensors file of all items; the graph points into it."""
    import onnx_ir as ir

    if not items:
        return
    # Wider types first, so that every tensor starts at a multiple of its element's size.
    items.sort(key=lambda item: -item.dtype.itemsize)
    header: dict[str, Any] = {}
    offset = 0
    for item in items:
        end = offset + item.nbytes
        header[str(item.value.name)] = {
            "dtype": SAFETENSORS_DTYPE[item.dtype.name],
            "shape": list(item.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)
    written = 0
    with (folder / file_name).open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for item in items:
            for piece in item.pieces():
                written += stream.write(piece)
                on_progress(written, offset)
    start = 8 + len(encoded)
    for item in items:
        begin, end = header[str(item.value.name)]["data_offsets"]
        item.value.const_value = ir.ExternalTensor(
            file_name, start + begin, end - begin, item.dtype,
            shape=ir.Shape(item.shape), name=str(item.value.name), base_dir=folder,
        )  # fmt: skip


def _bring_along(model: ir.Model, source: Path, folder: Path) -> dict[str, str]:
    """Copy every data file that the graph still reads into `folder`; returns the new names by the old locations.

    An artifact is a flat folder, so files of subfolders get their path as a name.
    """
    import onnx_ir as ir

    names: dict[str, str] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or Path(tensor.base_dir) == folder:
                continue
            location = str(tensor.location)
            if location not in names:
                names[location] = _free_name(location, set(names.values()))
                _copy(source / location, folder / names[location])
    return names


def _free_name(location: str, taken: set[str]) -> str:
    name = "_".join(part for part in Path(location).parts if part not in (".", "/"))
    while name in taken or name in _OURS:
        name = f"data_{name}"
    return name


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise CheckpointError(f"can't copy the weights in {source}: {error.strerror or error}") from None
