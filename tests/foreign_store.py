"""Real exporters' files in small: the graph as the exporter wrote it, its large weights left out.

The weights were random to begin with; `load` fills in others, drawn by a seed. `foreign_files/README.md` says how each
file was made; `python tests/foreign_store.py model.onnx tests/foreign_files/NAME.onnx.xz` stores one.
"""

from __future__ import annotations

import lzma
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FOLDER = Path(__file__).parent / "foreign_files"
# Tensors up to this many elements stay: norms, biases, scalars and shapes.
KEPT = 128
_LEFT_OUT = "left out"


def store(source: Path, target: Path) -> None:
    """Write `source` without its large tensors, its metadata and its notes."""
    model = onnx.load(source)
    for tensor in _tensors(model):
        if int(np.prod(tensor.dims)) > KEPT and tensor.data_type != TensorProto.INT64:
            bare = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, doc_string=_LEFT_OUT)
            tensor.CopyFrom(bare)
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    del model.metadata_props[:], model.graph.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    target.write_bytes(lzma.compress(model.SerializeToString(), preset=9 | lzma.PRESET_EXTREME))


def load(name: str, *, seed: int = 0) -> onnx.ModelProto:
    """The stored model, whole again."""
    model = onnx.load_from_string(lzma.decompress((FOLDER / f"{name}.onnx.xz").read_bytes()))
    generator = np.random.default_rng(seed)
    for tensor in _tensors(model):
        if tensor.doc_string != _LEFT_OUT:
            continue
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if np.issubdtype(dtype, np.integer):
            array = generator.integers(0, 256, tuple(tensor.dims)).astype(dtype)
        else:
            scales = "scale" in tensor.name  # of quantized weights: positive, and small as 8-bit numbers are large
            array = generator.standard_normal(tuple(tensor.dims)) * 0.15
            array = (np.abs(array) / 16 if scales else array).astype(dtype)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


def _tensors(model: onnx.ModelProto) -> list[TensorProto]:
    tensors = list(model.graph.initializer)
    tensors += [attribute.t for node in model.graph.node for attribute in node.attribute if attribute.HasField("t")]
    return tensors


if __name__ == "__main__":
    store(Path(sys.argv[1]), Path(sys.argv[2]))
