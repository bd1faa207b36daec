"""One MoE layer of an artifact's graph, as the forms that replace it see it."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from lynx_trt.experts import values_an_element
from lynx_trt.runtime.dequantize import dequantized
from lynx_trt.runtime.graph import GraphEdit

# Below this many bytes of float32 an expert counts as small: what its layer costs is nodes, not memory. lynx-tiny has
# 92 kB; the next size that was measured, 6 MB, is far on the other side.
SMALL_EXPERT = 256 << 10
MICROSOFT = "com.microsoft"
SCALED = "it weighs by softmax alone, and this model multiplies each expert's weight by a number of its own"


class NoFitError(Exception):
    """A layer can't be computed in a form; the text is the reason, a clause."""


class Layer:
    """One MoE layer: its two nodes, LynxSelect and LynxExperts, and what they are given.

    Attributes:
        form: attributes of LynxExperts.
        rule: attributes of LynxSelect.
        kind: in what the weights are (`ExpertsForm.weights`); quantized: whether they have scales beside them.
        hidden, index, weight, gate_up, down, scales, biases: inputs of LynxExperts; scales of quantized weights alone.
        k: K.
        e, h, i: E, H and I; 0 where the weights are no constants.
    """

    def __init__(self, edit: GraphEdit, select: onnx.NodeProto, experts: onnx.NodeProto, k: int) -> None:
        self.edit, self.select, self.experts, self.k = edit, select, experts, k
        self.form = _attributes(experts)
        self.rule = _attributes(select)
        self.hidden, self.index, self.weight, self.gate_up, self.down = experts.input[:5]
        self.kind = self.form["weights"].decode()
        self.quantized = self.kind != "float"
        others = list(experts.input[5:])
        self.scales, self.biases = (others[:2], others[2:]) if self.quantized else ([], others)
        self.e = self.h = self.i = 0
        if edit.is_constant(self.down):
            shape = edit.shape(self.down)
            self.e, self.h, self.i = (shape[0], shape[2], shape[1]) if self.form["transposed"] else shape
            self.i *= values_an_element(self.kind)

    def varying(self) -> str | None:
        """The name of a weight that is no constant of the graph, if there is one."""
        weights = (self.gate_up, self.down, *self.scales, *self.biases)
        return next((name for name in weights if not self.edit.is_constant(name)), None)

    def matrices(self, which: int) -> str:
        """All experts' constant `gate_up` (0) or `down` (1), as `form` has it but for bytes: dequantized."""
        values = (self.gate_up, self.down)[which]
        return dequantized(self.edit, self.kind, values, self.scales[which]) if self.quantized else values

    def matrix(self, which: int, expert: int) -> str:
        """One expert's."""
        values = self.edit.part((self.gate_up, self.down)[which], expert)
        if not self.quantized:
            return values
        return dequantized(self.edit, self.kind, values, self.edit.part(self.scales[which], expert))

    @property
    def small(self) -> bool:
        """Whether an expert of constant weights is small."""
        matrices = 3 if self.form["gated"] else 2
        return 0 < 4 * matrices * self.h * self.i <= SMALL_EXPERT

    @property
    def scaled(self) -> bool:
        """Whether weights are multiplied behind the selection (Gemma 4's numbers of experts)."""
        return bool(self.weight != self.select.output[1])

    def router_logits(self) -> str:
        """The logits [T,E] whose softmax ranks and weighs the experts.

        Raises:
            NoFitError: the routing rule is another.
        """
        if self.scaled:
            raise NoFitError(f"{MICROSOFT}.MoE does not fit: {SCALED}")
        softmax = self.edit.producer(self.select.input[0])
        same = self.select.input[0] == self.select.input[1]
        if not same or softmax is None or softmax.op_type != "Softmax":
            raise NoFitError("com.microsoft.MoE has softmax and top-k only, and this router ranks experts otherwise")
        return self._unchanged(softmax.input[0])

    def _unchanged(self, name: str) -> str:
        """What a value [T,E] is before casts, all of them to float32 in the end, and a Reshape to what it was."""
        node = self.edit.producer(name)
        if node is None or node.op_type not in ("Cast", "Reshape"):
            return name
        shape = self.edit.known_shape(node.input[0])
        same = len(shape) == 2 and shape[1] == self.e
        return self._unchanged(node.input[0]) if node.op_type == "Cast" or same else name


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
