"""A MoE layer as one Gemm for each expert, over the rows that chose it: the form for large experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import numpy_helper

from lynx_trt.runtime.moe_layer import MICROSOFT, Layer


class Grouped:
    """The nodes of one layer, at the current place of its graph."""

    def __init__(self, layer: Layer) -> None:
        """Of this layer, whose weights are constants."""
        self.layer, self.edit = layer, layer.edit

    def output(self) -> str:
        """[T,H] from `hidden`, `index` and `weight`."""
        add, number = self.edit.add, self.edit.integers
        flat = add("Reshape", [self.layer.index, number([-1])])
        empty = add("Less", [flat, number(0)])
        # Empty slots form one part more, behind the others, that nobody reads.
        keys = add("Where", [empty, number(self.layer.e), flat])
        count = add("Shape", [keys])
        _, order = self.edit.add_many("TopK", [keys, count], 2, axis=0, largest=0, sorted=1)
        ones = add("ConstantOfShape", [count], value=numpy_helper.from_array(np.ones(1, np.int64)))
        sizes = add("ScatterElements", [number([0] * (self.layer.e + 1)), keys, ones], reduction="add")
        tokens = add("Div", [order, number(self.layer.k)])
        rows = add("Gather", [self.layer.hidden, tokens], axis=0)
        parts = self.edit.add_many("Split", [rows, sizes], self.layer.e + 1, axis=0)[: self.layer.e]
        inner = self._activate(add("Concat", self._linear(parts, 0), axis=0))
        filled_sizes = add("Slice", [sizes, number([0]), number([self.layer.e])])
        inner_parts = self.edit.add_many("Split", [inner, filled_sizes], self.layer.e, axis=0)
        # The last row is what empty slots read.
        nothing = self.edit.constant(np.zeros((1, self.layer.h), np.float32))
        outputs = add("Concat", [*self._linear(inner_parts, 1), nothing], axis=0)
        return self._combine(outputs, order, count, add("Shape", [inner], start=0, end=1))

    def _linear(self, parts: Sequence[str], which: int) -> list[str]:
        """Each part times its expert's matrix, of `gate_up` (0) or `down` (1)."""
        names = []
        for expert, part in enumerate(parts):
            inputs = [part, self.layer.matrix(which, expert)]
            if self.layer.biases:
                inputs.append(self.edit.part(self.layer.biases[which], expert))
            names.append(self.edit.add("Gemm", inputs, transB=0 if self.layer.form["transposed"] else 1))
        return names

    def _combine(self, outputs: str, order: str, count: str, filled: str) -> str:
        """[T,H]: each token's rows of `outputs`, times their weights, summed."""
        add, number = self.edit.add, self.edit.integers
        positions = add("Range", [number(0), add("Squeeze", [count]), number(1)])
        place = add("ScatterElements", [order, order, positions])
        place = add("Min", [place, filled])
        place = add("Reshape", [place, add("Shape", [self.layer.index])])
        chosen = add("Gather", [outputs, place], axis=0)
        weight = add("Unsqueeze", [self.layer.weight, number([1])])
        return add("Squeeze", [add("MatMul", [weight, chosen]), number([1])])

    def _activate(self, values: str) -> str:
        """[R,I] of [R,2I] (ungated: [R,I]), as `ExpertsForm` says."""
        add, number, limit = self.edit.add, self.edit.integers, float(self.layer.form["limit"])

        def clip(name: str, low: bool) -> str:
            if not limit:
                return name
            bounds = [self.edit.scalar(-limit) if low else "", self.edit.scalar(limit)]
            return add("Clip", [name, *bounds])

        if not self.layer.form["gated"]:
            return self._activation(clip(values, True))
        if self.layer.form["interleaved"]:
            end = number([np.iinfo(np.int64).max])
            gate, up = (add("Slice", [values, number([start]), end, number([1]), number([2])]) for start in (0, 1))
        else:
            gate, up = self.edit.add_many("Split", [values], 2, axis=1, num_outputs=2)
        up = clip(up, True)
        if offset := float(self.layer.form["up_offset"]):
            up = add("Add", [up, self.edit.scalar(offset)])
        return add("Mul", [self._activation(clip(gate, False)), up])

    def _activation(self, values: str) -> str:
        add, kind = self.edit.add, self.layer.form["activation"].decode()
        if kind == "silu":
            return add("QuickGelu", [values], domain=MICROSOFT, alpha=float(self.layer.form["alpha"]))
        if kind == "gelu_tanh":
            return add("Gelu", [values], approximate="tanh")
        if kind == "gelu":
            return add("Gelu", [values])
        positive = add("Relu", [values])
        return positive if kind == "relu" else add("Mul", [positive, positive])
