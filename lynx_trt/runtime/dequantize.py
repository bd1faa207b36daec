"""Quantized weights as float32: nodes on constants, which ONNX Runtime computes once, as it loads the graph.

So there is no second copy of the weights but the one that it computes with, its bytes come from the artifact's file,
and nothing has to outlive the session. FP8 is what DequantizeLinear takes, and so is int4 without zero points; those
that are stored go to 16, so they are int8, and with them the values. For MXFP4 onnxruntime 1.32 has no op on the CPU.
It keeps what each of these nodes gives until all constants are computed, so there are few, and narrow ones: four values
at a time are looked up as int8, twice what they are, and DequantizeLinear, with its blocks, is the only one that gives
float32.

107 MB of MXFP4 (E=32, H=2048, I=1024; 805 MB in float32) on two shared cores, seconds to load, most resident memory
meanwhile, and after it: these nodes 1.6 to 1.9 s, 1430 to 1560 MB, 790 to 810; pairs looked up as float32, times their
scales 2.8 to 4.1 s, 3700 to 4050 MB, 800 to 3200; made by NumPy as int8, which has to stay for as long as the session
1.3 s, 1390 to 1460 MB, 1110 to 1390; by NumPy as float32 3.3 s, 1660 to 2420 MB, twice the float32 where weights are
packed. Half precision, of which a Cast makes float32: 0.5 to 0.8 s, 900 to 1030 MB, 790. The same layer in int4, 104 to
126 MB, beside MXFP4's 1.5 to 3.3 s and 1490 MB: 1.0 to 1.3 s and 850 to 880 MB, 0.4 to 0.7 of its time; with zero
points 1.0 to 1.6 s and 1090 to 1200 MB, 0.4 to 0.7; looked up as MXFP4 is 1.8 to 2.2 s and 1600 MB; with zero points
times scales subtracted in float32 7.2 s and 3420 MB. A step takes as long as with float32 weights.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from lynx_trt import int4, mxfp4
from lynx_trt.experts import FORMATS
from lynx_trt.runtime.graph import GraphEdit


def dequantized(edit: GraphEdit, kind: str, values: str, scales: str) -> str:
    """[...,D] of two initializers of a `kind`, one of FORMATS; both stay in the file they are in."""
    stored, rows = FORMATS[kind], edit.shape(values)[:-1]
    dims = [*rows, edit.shape(values)[-1] * stored.per_byte]
    if kind == "fp8":
        inputs = [edit.viewed(values, TensorProto.FLOAT8E4M3FN, dims), scales]
    elif kind == "mxfp4":
        halved = edit.add("Gather", [edit.constant(mxfp4.SCALES / 2), _place(edit, scales)], axis=0)
        inputs = [_doubled(edit, values, dims), halved]
    elif kind == "nvfp4":
        inputs = [_doubled(edit, values, dims), edit.add("Mul", [scales, edit.constant(np.array(0.5, np.float32))])]
    else:
        inputs = _int4(edit, edit.viewed(values, TensorProto.UINT4, dims), scales, stored.zeros)
    return edit.add("DequantizeLinear", inputs, axis=len(rows), block_size=stored.block)


def _doubled(edit: GraphEdit, values: str, dims: list[int]) -> str:
    """Twice the values of 4-bit floats, as int8."""
    # A negative place counts from the end of a table, so two bytes are an int16 and index as many values as there are.
    fours = edit.viewed(values, TensorProto.INT16, [*dims[:-1], dims[-1] // 4])
    looked_up = edit.add("Gather", [_fours(edit), _place(edit, fours)], axis=0)
    return edit.add("Reshape", [looked_up, edit.integers(dims)])


def _int4(edit: GraphEdit, values: str, scales: str, zeros: bool) -> list[str]:
    """Values, scales and zero points; `scales` are float32 when the graph is (float32.py)."""
    if not zeros:
        dtype = helper.tensor_dtype_to_np_dtype(TensorProto.UINT4)
        return [values, scales, edit.constant(np.full(edit.shape(scales), int4.ZERO, dtype))]
    factors, points = edit.add_many("Split", [scales], 2, axis=-1, num_outputs=2)
    return [
        edit.add("Cast", [values], to=TensorProto.INT8),
        factors,
        edit.add("Cast", [points], to=TensorProto.INT8),
    ]


def _place(edit: GraphEdit, name: str) -> str:
    return edit.add("Cast", [name], to=TensorProto.INT32)


def _fours(edit: GraphEdit) -> str:
    """Twice the four values of each two bytes, the first in the lower one: int8 [65536,4]."""

    def build() -> str:
        doubled = (2 * mxfp4.PAIRS).astype(np.int8)
        both = np.arange(1 << 16)
        return edit.constant(np.concatenate([doubled[both & 255], doubled[both >> 8]], axis=1))

    return edit.once("fours", build)
