"""Quantized weights as float32: nodes on constants, which ONNX Runtime computes once, as it loads the graph.

So there is no second copy of the weights but the one that it computes with, its bytes come from the artifact's file,
and nothing has to outlive the session. FP8 is what DequantizeLinear takes. For MXFP4 onnxruntime 1.32 has no op on the
CPU. It keeps what each of these nodes gives until all constants are computed, so there are few, and narrow ones: four
values at a time are looked up as int8, twice what they are, and DequantizeLinear, with its blocks, is the only one that
gives float32.

107 MB of MXFP4 (E=32, H=2048, I=1024; 805 MB in float32) on two shared cores, seconds to load, most resident memory
meanwhile, and after it: these nodes 1.6 to 1.9 s, 1430 to 1560 MB, 790 to 810; pairs looked up as float32, times their
scales 2.8 to 4.1 s, 3700 to 4050 MB, 800 to 3200; made by NumPy as int8, which has to stay for as long as the session
1.3 s, 1390 to 1460 MB, 1110 to 1390; by NumPy as float32 3.3 s, 1660 to 2420 MB, twice the float32 where weights are
packed. Half precision, of which a Cast makes float32: 0.5 to 0.8 s, 900 to 1030 MB, 790.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from lynx_trt import fp8, mxfp4
from lynx_trt.runtime.graph import GraphEdit


def dequantized(edit: GraphEdit, kind: str, values: str, scales: str) -> str:
    """[...,D] of two initializers of a `kind`, as mxfp4.py and fp8.py have them; both stay in the file they are in."""
    *rows, width = edit.shape(values)
    if kind == "fp8":
        numbers = edit.viewed(values, TensorProto.FLOAT8E4M3FN, [*rows, width])
        return edit.add("DequantizeLinear", [numbers, scales], axis=len(rows), block_size=fp8.BLOCK)
    # A negative place counts from the end of a table, so two bytes are an int16 and index as many values as there are.
    fours = edit.viewed(values, TensorProto.INT16, [*rows, width // 2])
    looked_up = edit.add("Gather", [_fours(edit), _place(edit, fours)], axis=0)
    doubled = edit.add("Reshape", [looked_up, edit.integers([*rows, 2 * width])])
    halved_scales = edit.add("Gather", [edit.constant(mxfp4.SCALES / 2), _place(edit, scales)], axis=0)
    return edit.add("DequantizeLinear", [doubled, halved_scales], axis=len(rows), block_size=mxfp4.BLOCK)


def _place(edit: GraphEdit, name: str) -> str:
    return edit.add("Cast", [name], to=TensorProto.INT32)


def _fours(edit: GraphEdit) -> str:
    """Twice the four values of each two bytes, the first in the lower one: int8 [65536,4]."""

    def build() -> str:
        doubled = (2 * mxfp4.PAIRS).astype(np.int8)
        both = np.arange(1 << 16)
        return edit.constant(np.concatenate([doubled[both & 255], doubled[both >> 8]], axis=1))

    return edit.once("fours", build)
