"""A traced graph to files: optimized, given its function bodies, its weights streamed in beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from lynx_trt.errors import CheckpointError
from lynx_trt.export import functions
from lynx_trt.export.hf import PREFIX, Exported, is_fake
from lynx_trt.export.weights import EXTERNAL_BYTES, CheckpointWeights, write_weights

ONNX_FILE = "model.onnx"


def write_onnx(
    exported: Exported,
    folder: Path,
    *,
    data: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write `model.onnx` and `weights.safetensors` into `folder`; returns the bytes of weights.

    Without `data` the weights file is a header and a hole: the graph of a model whose weights nobody has, to measure
    its speed.

    Raises:
        CheckpointError: a parameter comes out of the conversion in another shape than the model's.
    """
    graph = exported.graph
    # The exporter notes the source of each node, with the paths of this machine: four fifths of the file.
    ClearMetadataAndDocStringPass()(graph)
    _optimize(graph)
    _name_like_the_checkpoint(exported)
    weights = exported.source.weights
    _load_small(exported, weights)
    load = (lambda value: _bytes(value, weights)) if data else None
    nbytes = write_weights(graph, folder, load, on_progress=on_progress)
    proto = ir.to_proto(graph)
    functions.add_functions(proto)
    (folder / ONNX_FILE).write_bytes(proto.SerializeToString())
    return nbytes


def _optimize(graph: ir.Model) -> None:
    """Fold constants and drop dead nodes.

    Weights that have no data yet pass as graph inputs meanwhile, so that no pass wants to fold or compare them.
    """
    from onnxscript import optimizer

    main = graph.graph
    pending = {name: value for name, value in main.initializers.items() if is_fake(value)}
    data = {name: value.const_value for name, value in pending.items()}
    for name, value in pending.items():
        del main.initializers[name]
        value.const_value = None
        main.inputs.append(value)
    optimizer.optimize_ir(graph, onnx_shape_inference=False)
    for name, value in pending.items():
        main.inputs.remove(value)
        if value.uses():
            value.const_value = data[name]
            main.initializers[name] = value


def _name_like_the_checkpoint(exported: Exported) -> None:
    """Initializers get their parameter's own name; a parameter that is tied to another one gets that one's."""
    graph = exported.graph.graph
    for value in list(graph.initializers.values()):
        name = value.name or ""
        if name.startswith(PREFIX) and is_fake(value):
            value.name = name.removeprefix(PREFIX)
    for name, original in (getattr(exported.source.model, "all_tied_weights_keys", None) or {}).items():
        if name in graph.initializers and original in graph.initializers:
            ir.convenience.replace_all_uses_with(graph.initializers[name], graph.initializers[original])
            del graph.initializers[name]


def _stored_name(value: ir.Value, weights: CheckpointWeights) -> str:
    name = weights.resolve(value.name or "")
    if name is None:
        raise CheckpointError(f"the checkpoint has nothing for {value.name!r}, which the graph needs")
    return name


def _load_small(exported: Exported, weights: CheckpointWeights) -> None:
    for value in exported.graph.graph.initializers.values():
        if is_fake(value) and value.const_value is not None and value.const_value.nbytes < EXTERNAL_BYTES:
            tensor = weights.load(_stored_name(value, weights))
            value.const_value = ir.tensor_adapters.TorchTensor(tensor.contiguous(), name=value.name)


def _bytes(value: ir.Value, weights: CheckpointWeights) -> Iterator[Any]:
    if not is_fake(value):
        assert value.const_value is not None
        yield value.const_value.tobytes()
        return
    for tensor in weights.pieces(_stored_name(value, weights)):
        # As bytes, since NumPy has no bfloat16; reshaped first, since a scalar has no dimension to view anew.
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
