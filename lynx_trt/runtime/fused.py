"""A MoE layer as one `com.microsoft.MoE`: the form for small experts, fed with logits of our making or the router's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import numpy_helper

from lynx_trt.runtime.moe_layer import MICROSOFT, SCALED, Layer, NoFitError
from lynx_trt.runtime.selected import masked_log_probabilities, masked_log_probabilities_of_one


def misfit(layer: Layer) -> str | None:
    """Why `com.microsoft.MoE` on the CPU can't compute these experts, a clause; None if it can."""
    if layer.scaled:
        return SCALED
    kind, limit = layer.form["activation"].decode(), float(layer.form["limit"])
    if layer.form["gated"]:
        return None if kind == "silu" else f"its gated activation is silu, the model's is {kind}"
    plain = kind in ("relu", "gelu_tanh") or (kind == "silu" and float(layer.form["alpha"]) == 1)
    return None if plain and not limit else f"it has no ungated {kind} with limit {limit:g}"


class Fused:
    """The nodes of one layer, at the current place of its graph.

    Raises:
        NoFitError: the op can't compute these experts; from every method.
    """

    def __init__(self, layer: Layer) -> None:
        """Of this layer, whose weights are constants."""
        self.layer, self.edit = layer, layer.edit

    def selected(self) -> str:
        """[T,H] of what LynxSelect chose."""
        add = self.edit.add
        total = add("ReduceSum", [self.layer.weight, self.edit.integers([1])], keepdims=1)
        return add("Mul", [self._moe(self._logarithms(), normalize=True), total])

    def routed(self) -> tuple[str, str]:
        """[T,H] as the router alone has it, no selection; and the router's logits [T,E]."""
        logits = self.layer.router_logits()
        output = self._moe(logits, normalize=bool(self.layer.rule["renormalize"]))
        return self._scaled(output), logits

    def masked(self, *, single: bool = False) -> tuple[str, str]:
        """[T,H] of the router's best experts among those that the selection allows.

        Also what the op chooses by, [T,E]: logarithms of probabilities, -inf where a token may not use an expert.
        `single`: T is 1.
        """
        renormalize = bool(self.layer.rule["renormalize"])
        select = masked_log_probabilities_of_one if single else masked_log_probabilities
        logits = select(self.layer, self.layer.router_logits())
        output = self._moe(logits, normalize=renormalize)
        if not renormalize:
            # The op's softmax is over the allowed experts, the model's over all: this is their share. A row that
            # does not count has none, and NaN here (Shrink makes that 0).
            share = self.edit.add("ReduceSum", [self.edit.add("Exp", [logits]), self.edit.integers([1])], keepdims=1)
            output = self.edit.add("Mul", [output, self.edit.add("Shrink", [share], lambd=0.0, bias=0.0)])
        return self._scaled(output), logits

    def _scaled(self, output: str) -> str:
        scale = float(self.layer.rule["scale"])
        return output if scale == 1 else self.edit.add("Mul", [output, self.edit.scalar(scale)])

    def _logarithms(self) -> str:
        """[T,E]: ln(weight) of the chosen experts and -inf elsewhere, so that a softmax gives weight / sum."""
        add, index = self.edit.add, self.layer.index
        safe = add("Max", [index, self.edit.integers(0)])
        table = add("Concat", [add("Shape", [index], start=0, end=1), self.edit.integers([self.layer.e])], axis=0)
        nothing = add("ConstantOfShape", [table], value=numpy_helper.from_array(np.array([-np.inf], np.float32)))
        # An empty slot has ln(0) = -inf and may point anywhere: the maximum with it changes nothing.
        return add("ScatterElements", [nothing, safe, add("Log", [self.layer.weight])], axis=1, reduction="max")

    def _moe(self, logits: str, *, normalize: bool) -> str:
        form = self.layer.form
        attributes: dict[str, Any] = {"k": self.layer.k, "normalize_routing_weights": int(normalize)}
        kind = form["activation"].decode()
        attributes["activation_type"] = {"gelu_tanh": "gelu"}.get(kind, kind)
        if form["gated"]:
            attributes.update(activation_type="swiglu", swiglu_fusion=1)
            attributes["activation_alpha"] = float(form["alpha"])
            attributes["activation_beta"] = float(form["up_offset"])
            if limit := float(form["limit"]):
                attributes["swiglu_limit"] = limit
        inputs = [self.layer.hidden, logits, *self._weights()]
        return self.edit.add("MoE", inputs, domain=MICROSOFT, **attributes)

    def _weights(self) -> Sequence[str]:
        """The op's weights and biases; interleaved where the op wants that."""
        if reason := misfit(self.layer):
            raise NoFitError(f"com.microsoft.MoE does not fit: {reason}")
        e, h, i = self.layer.e, self.layer.h, self.layer.i
        first, second = (self._rows_first(self.layer.matrices(which)) for which in (0, 1))
        apart = self.layer.form["gated"] and not self.layer.form["interleaved"]
        if apart:
            first = self._interleave(first, [e, 2, i, h])
        if not self.layer.biases:
            return [first, "", second]
        bias, second_bias = self.layer.biases
        return [first, self._interleave(bias, [e, 2, i]) if apart else bias, second, second_bias]

    def _rows_first(self, weights: str) -> str:
        """Weights with an output row at a time; ONNX Runtime folds this at load, as all that follows on weights."""
        if not self.layer.form["transposed"]:
            return weights
        return self.edit.add("Transpose", [weights], perm=[0, 2, 1])

    def _interleave(self, name: str, shape: list[int]) -> str:
        add, number = self.edit.add, self.edit.integers
        halves = add("Reshape", [name, number(shape)])
        pairs = add("Transpose", [halves], perm=[0, 2, 1, *range(3, len(shape))])
        return add("Reshape", [pairs, number([shape[0], 2 * shape[2], *shape[3:]])])
