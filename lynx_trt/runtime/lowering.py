"""The lynx ops for ONNX Runtime on the CPU: what measured fastest, made from the artifact's graph as it is loaded.

The function bodies in `model.onnx` say what the ops mean and run anywhere, but a Loop with a copy of each expert's
weights a step is slow. `lower` rewrites the graph in memory and leaves the artifact's files alone: initializers of
the new graph point into the same weights file, so there is no second copy on the disk and no cache to go stale.

What a MoE layer becomes, chosen by the bytes of an expert (onnxruntime 1.32 on 2 shared cores with AVX-512, float32,
median of interleaved runs of one layer, `com.microsoft.MoE` in brackets):

- *grouped*: rows are sorted by expert, split into E parts, and each part goes through its own Gemm with constant
  weights, which ONNX Runtime packs once, at load. A Gemm of no rows returns at once, about a microsecond, so time
  falls with the active experts without an If or a Loop. The fused op packs an expert's weights again at every call
  with more than one row. E=64, K=4, H=1024, I=512, one thread, ms: T=1 1.9 (2.0), T=4 8.9 (10.9), T=16 25 (36) at 44
  active and 16 (26) at 21, T=32 33 (57) at 57 and 18 (35) at 26.
- *fused*: `com.microsoft.MoE`, fed with the logarithm of our weights (and -inf elsewhere), so that its own softmax
  and top-k reproduce them; it skips experts of weight 0. Where experts are small one node beats 2 E of them:
  E=32, H=160, I=48, fastest us: T=1 36 against 82 grouped, T=16 120 and 171, T=32 216 and 265, T=128 659 and 600.
- *unrestricted*: beside *fused*, for steps that restrict nothing, without the selection's nodes (about 70 a layer,
  0.2 ms: more than lynx-tiny's experts take). An If inside the graph was tried: 50 us a layer; two sessions cost
  nothing, and a second copy of small weights.

Half precision is computed in float32: the CPU has no fp16 matrix product, so ONNX Runtime would convert every
weight at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lynx_trt.artifact import Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.errors import ArtifactError
from lynx_trt.runtime.attention import lower_attention
from lynx_trt.runtime.backend import Array
from lynx_trt.runtime.float32 import widen
from lynx_trt.runtime.graph import GraphEdit, drop_dead

Form = Literal["auto", "grouped", "fused", "unrestricted", "baseline", "body"]

ONNX_FILE = "model.onnx"
ACTIVE, ROUTER_LOGITS = "active_experts", "router_logits"
LYNX = "lynx"
MICROSOFT = "com.microsoft"
# Below this many bytes of float32 an expert counts as small: what its layer costs is nodes, not memory. lynx-tiny has
# 92 kB; the next size that was measured, 6 MB, is far on the other side.
SMALL_EXPERT = 256 << 10


@dataclass(frozen=True)
class Lowered:
    """A graph to be loaded from memory.

    Attributes:
        model: the graph, its weights in `folder`.
        folder: the artifact's.
        forms: what each MoE layer became.
        small: whether the experts of every layer are small.
    """

    model: onnx.ModelProto
    folder: Path
    forms: tuple[str, ...]
    small: bool


class Unrestricted:
    """Tells the steps that are the model's own routing: no padding, and a restriction that all of its experts pass.

    T tokens have at most T K experts. (An expert of weight exactly 0 has no vote and could still lose its place;
    what it adds is 0 either way.) Where votes go to all experts, a token's own can lose against others.
    """

    def __init__(self, artifact: Artifact) -> None:
        """For the steps of one artifact."""
        model = artifact.manifest.model
        self._longest_decode = model.decode_max_length
        self._experts = np.array([layer.experts for layer in model.moe_layers])
        self._k = np.array([layer.experts_per_token for layer in model.moe_layers])
        self._votes_for_own = artifact.manifest.selection.parameters["vote"] != "score"

    def holds(self, lengths: Array, width: int, restriction: Restriction) -> bool:
        """Whether a step of rows of `width` tokens, `lengths` [B] of them real, is one under this restriction."""
        if not (lengths == width).all():
            return False
        if width > self._longest_decode:
            return True
        own = np.minimum(self._experts, len(lengths) * width * self._k) if self._votes_for_own else self._experts
        budgets, floors = restriction.arrays
        return bool(((budgets >= own) & (floors == 0)).all())


class NoFitError(Exception):
    """A layer can't be computed in a form; the text is the reason, a clause."""


def lower(artifact: Artifact, *, form: Form = "auto", attention: bool = True) -> Lowered:
    """Rewrite the lynx ops of an artifact's graph, and compute in float32 whatever its precision.

    Args:
        artifact: the artifact; its files are only read.
        form: how every MoE layer is computed. `auto` chooses by shape; `baseline` is what a user would have without
            us, `com.microsoft.MoE` straight from the router's logits and no selection; `unrestricted` is the same
            with the routers' logits for `count_active`, right where `Unrestricted` holds; `body` keeps the functions.
        attention: lower attention and the cache as well. Not for CUDA, whose GroupQueryAttention has no float32: on
            the CPU instead, it would fetch the whole cache at every step.

    Raises:
        ArtifactError: the graph can't be read, or a layer can't be computed in the form that was asked for; the
            message says which and why.
    """
    path = artifact.path(ONNX_FILE)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ArtifactError(f"{path} can't be read as ONNX: {str(error).splitlines()[0]}") from None
    edit = GraphEdit(model, artifact.folder)
    pairs = _pairs(model.graph)
    records = artifact.manifest.model.moe_layers
    if len(pairs) != len(records):
        raise ArtifactError(f"{path} has {len(pairs)} MoE layers, the manifest says {len(records)}; build it again")
    forms, logits, small = [], [], True
    for (select, experts), record in zip(pairs, records, strict=True):
        layer = _Layer(edit, select, experts, record.experts_per_token)
        try:
            forms.append(layer.lower(form))
        except NoFitError as reason:
            raise ArtifactError(f"{record.name} can't be computed as {form}: {reason}") from None
        logits.append(layer.logits)
        small = small and layer.small
    if form == "unrestricted":
        if len({(record.experts, record.experts_per_token) for record in records}) > 1:
            raise ArtifactError(f"{artifact.folder} has layers of different sizes, which have no unrestricted form")
        _give_router_logits(edit, model.graph, logits)
    if attention:
        lower_attention(edit, model.graph)
    edit.finish()
    drop_dead(model)
    widen(model)
    return Lowered(model, artifact.folder, tuple(forms), small)


def _pairs(graph: onnx.GraphProto) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Each LynxSelect with the LynxExperts that it feeds, in the graph's order."""
    selects = {node.output[0]: node for node in graph.node if node.domain == LYNX and node.op_type == "LynxSelect"}
    experts = [node for node in graph.node if node.domain == LYNX and node.op_type == "LynxExperts"]
    return [(selects[node.input[1]], node) for node in experts if node.input[1] in selects]


def _give_router_logits(edit: GraphEdit, graph: onnx.GraphProto, logits: Sequence[str]) -> None:
    """All layers' logits [N T,E] instead of `active_experts`: NumPy counts in less time than eight nodes take."""
    last = edit.producer(ACTIVE)
    assert last is not None
    with edit.inserting(edit.take(last), "experts"):
        edit.add("Concat", list(logits), axis=0, outputs=[ROUTER_LOGITS])
    place = [value.name for value in graph.output].index(ACTIVE)
    graph.output[place].CopyFrom(helper.make_tensor_value_info(ROUTER_LOGITS, TensorProto.FLOAT, None))


def count_active(pieces: Sequence[Array], layers: int, k: int) -> Array:
    """Experts [N] i32 that at least one token has among its K best.

    Args:
        pieces: logits [N T,E] of the unrestricted form, for each piece of the batch.
        layers: N.
        k: K, experts a token.
    """
    if len(pieces) == 1 and len(pieces[0]) == layers:
        return np.full(layers, k, np.int32)
    logits = np.concatenate([piece.reshape(layers, -1, piece.shape[1]) for piece in pieces], axis=1)
    chosen = np.argpartition(logits, -k, axis=2)[:, :, -k:].reshape(layers, -1)
    marks = np.zeros((layers, logits.shape[2]), bool)
    marks[np.arange(layers)[:, None], chosen] = True
    return np.asarray(marks.sum(1), np.int32)


class _Layer:
    """One MoE layer: its two nodes, and the nodes that take their place."""

    def __init__(self, edit: GraphEdit, select: onnx.NodeProto, experts: onnx.NodeProto, k: int) -> None:
        self.edit, self.select, self.experts, self.k = edit, select, experts, k
        self.form = {a.name: helper.get_attribute_value(a) for a in experts.attribute}
        self.hidden, self.index, self.weight, self.gate_up, self.down = experts.input[:5]
        self.biases = list(experts.input[5:])
        self.rule = {a.name: helper.get_attribute_value(a) for a in select.attribute}
        self.logits = ""
        self.e = self.h = self.i = 0

    def lower(self, form: Form) -> str:
        """Replace the nodes; returns the form that was used.

        Raises:
            NoFitError: this layer has no such form.
        """
        if form == "auto":
            form = self._choose()
        if form == "body":
            return form
        missing = [name for name in (self.gate_up, self.down, *self.biases) if not self.edit.is_constant(name)]
        if missing:
            raise NoFitError(f"{missing[0]} is no constant of the graph")
        shape = self.edit.shape(self.down)
        self.e, self.h, self.i = (shape[0], shape[2], shape[1]) if self.form["transposed"] else shape
        at = self.edit.take(self.experts)
        with self.edit.inserting(at, "experts"):
            if form in ("baseline", "unrestricted"):
                self._baseline()
            elif form == "fused":
                self._name_result(self._fused())
            else:
                self._name_result(self._grouped())
        return form

    def _choose(self) -> Form:
        if not all(self.edit.is_constant(name) for name in (self.gate_up, self.down, *self.biases)):
            return "body"
        return "fused" if self.small and self._misfit() is None else "grouped"

    @property
    def small(self) -> bool:
        """Whether an expert of constant weights is small."""
        if not self.edit.is_constant(self.down):
            return False
        shape = self.edit.shape(self.down)
        return 4 * (3 if self.form["gated"] else 2) * shape[1] * shape[2] <= SMALL_EXPERT

    def _name_result(self, name: str) -> None:
        self.edit.add("Identity", [name], outputs=[self.experts.output[0]])

    # --- grouped: a Gemm for each expert, over the rows that chose it.

    def _grouped(self) -> str:
        """[T,H] from `hidden`, `index` and `weight`."""
        add, number = self.edit.add, self.edit.integers
        flat = add("Reshape", [self.index, number([-1])])
        empty = add("Less", [flat, number(0)])
        # Empty slots form one part more, behind the others, that nobody reads.
        keys = add("Where", [empty, number(self.e), flat])
        count = add("Shape", [keys])
        _, order = self.edit.add_many("TopK", [keys, count], 2, axis=0, largest=0, sorted=1)
        ones = add("ConstantOfShape", [count], value=numpy_helper.from_array(np.ones(1, np.int64)))
        sizes = add("ScatterElements", [number([0] * (self.e + 1)), keys, ones], reduction="add")
        tokens = add("Div", [order, number(self.k)])
        rows = add("Gather", [self.hidden, tokens], axis=0)
        parts = self.edit.add_many("Split", [rows, sizes], self.e + 1, axis=0)[: self.e]
        inner = self._activate(add("Concat", self._linear(parts, self.gate_up, 0), axis=0))
        filled_sizes = add("Slice", [sizes, number([0]), number([self.e])])
        inner_parts = self.edit.add_many("Split", [inner, filled_sizes], self.e, axis=0)
        # The last row is what empty slots read.
        nothing = self.edit.constant(np.zeros((1, self.h), np.float32))
        outputs = add("Concat", [*self._linear(inner_parts, self.down, 1), nothing], axis=0)
        return self._combine(outputs, order, count, add("Shape", [inner], start=0, end=1))

    def _linear(self, parts: Sequence[str], weights: str, which: int) -> list[str]:
        """Each part times its expert's matrix."""
        names = []
        for expert, part in enumerate(parts):
            inputs = [part, self.edit.part(weights, expert)]
            if self.biases:
                inputs.append(self.edit.part(self.biases[which], expert))
            names.append(self.edit.add("Gemm", inputs, transB=0 if self.form["transposed"] else 1))
        return names

    def _combine(self, outputs: str, order: str, count: str, filled: str) -> str:
        """[T,H]: each token's rows of `outputs`, times their weights, summed."""
        add, number = self.edit.add, self.edit.integers
        positions = add("Range", [number(0), add("Squeeze", [count]), number(1)])
        place = add("ScatterElements", [order, order, positions])
        place = add("Min", [place, filled])
        place = add("Reshape", [place, add("Shape", [self.index])])
        chosen = add("Gather", [outputs, place], axis=0)
        weight = add("Unsqueeze", [self.weight, number([1])])
        return add("Squeeze", [add("MatMul", [weight, chosen]), number([1])])

    def _activate(self, values: str) -> str:
        """[R,I] of [R,2I] (ungated: [R,I]), as `ExpertsForm` says."""
        add, number, limit = self.edit.add, self.edit.integers, float(self.form["limit"])

        def clip(name: str, low: bool) -> str:
            if not limit:
                return name
            bounds = [self.edit.scalar(-limit) if low else "", self.edit.scalar(limit)]
            return add("Clip", [name, *bounds])

        if not self.form["gated"]:
            return self._activation(clip(values, True))
        if self.form["interleaved"]:
            end = number([np.iinfo(np.int64).max])
            gate, up = (add("Slice", [values, number([start]), end, number([1]), number([2])]) for start in (0, 1))
        else:
            gate, up = self.edit.add_many("Split", [values], 2, axis=1, num_outputs=2)
        up = clip(up, True)
        if offset := float(self.form["up_offset"]):
            up = add("Add", [up, self.edit.scalar(offset)])
        return add("Mul", [self._activation(clip(gate, False)), up])

    def _activation(self, values: str) -> str:
        add, kind = self.edit.add, self.form["activation"].decode()
        if kind == "silu":
            return add("QuickGelu", [values], domain=MICROSOFT, alpha=float(self.form["alpha"]))
        if kind == "gelu_tanh":
            return add("Gelu", [values], approximate="tanh")
        if kind == "gelu":
            return add("Gelu", [values])
        positive = add("Relu", [values])
        return positive if kind == "relu" else add("Mul", [positive, positive])

    # --- fused: com.microsoft.MoE.

    def _misfit(self) -> str | None:
        """Why `com.microsoft.MoE` on the CPU can't compute these experts; None if it can."""
        kind, limit = self.form["activation"].decode(), float(self.form["limit"])
        if self.form["gated"]:
            return None if kind == "silu" else f"its gated activation is silu, the model's is {kind}"
        plain = kind in ("relu", "gelu_tanh") or (kind == "silu" and float(self.form["alpha"]) == 1)
        return None if plain and not limit else f"it has no ungated {kind} with limit {limit:g}"

    def _masked_logits(self) -> str:
        """[T,E]: ln(weight) of the chosen experts and -inf elsewhere, so that a softmax gives weight / sum."""
        add = self.edit.add
        safe = add("Max", [self.index, self.edit.integers(0)])
        table = add("Concat", [add("Shape", [self.index], start=0, end=1), self.edit.integers([self.e])], axis=0)
        nothing = add("ConstantOfShape", [table], value=numpy_helper.from_array(np.array([-np.inf], np.float32)))
        # An empty slot has ln(0) = -inf and may point anywhere: the maximum with it changes nothing.
        return add("ScatterElements", [nothing, safe, add("Log", [self.weight])], axis=1, reduction="max")

    def _fused(self) -> str:
        weights = self._fused_weights()
        total = self.edit.add("ReduceSum", [self.weight, self.edit.integers([1])], keepdims=1)
        return self.edit.add("Mul", [self._moe(self._masked_logits(), weights, normalize=True), total])

    def _softmax_of(self) -> str:
        """The logits whose softmax ranks and weighs the experts.

        Raises:
            NoFitError: the routing rule is another.
        """
        softmax = self.edit.producer(self.select.input[0])
        same = self.select.input[0] == self.select.input[1]
        if not same or softmax is None or softmax.op_type != "Softmax":
            raise NoFitError("com.microsoft.MoE has softmax and top-k only, and this router ranks experts otherwise")
        return str(softmax.input[0])

    def _moe(self, logits: str, weights: Sequence[str], *, normalize: bool) -> str:
        attributes: dict[str, Any] = {"k": self.k, "normalize_routing_weights": int(normalize)}
        kind = self.form["activation"].decode()
        attributes["activation_type"] = {"gelu_tanh": "gelu"}.get(kind, kind)
        if self.form["gated"]:
            attributes.update(activation_type="swiglu", swiglu_fusion=1)
            attributes["activation_alpha"] = float(self.form["alpha"])
            attributes["activation_beta"] = float(self.form["up_offset"])
            if limit := float(self.form["limit"]):
                attributes["swiglu_limit"] = limit
        return self.edit.add("MoE", [self.hidden, logits, *weights], domain=MICROSOFT, **attributes)

    def _fused_weights(self) -> list[str]:
        """The op's weights and biases; interleaved where the op wants that.

        Raises:
            NoFitError: these experts are none that it computes.
        """
        if misfit := self._misfit():
            raise NoFitError(f"com.microsoft.MoE does not fit: {misfit}")
        first, second = self._rows_first(self.gate_up), self._rows_first(self.down)
        if self.form["gated"] and not self.form["interleaved"]:
            first = self._interleave(first, [self.e, 2, self.i, self.h])
        if not self.biases:
            return [first, "", second]
        bias = self.biases[0]
        if self.form["gated"] and not self.form["interleaved"]:
            bias = self._interleave(bias, [self.e, 2, self.i])
        return [first, bias, second, self.biases[1]]

    def _rows_first(self, weights: str) -> str:
        """Weights with an output row at a time; ONNX Runtime folds this at load, as all that follows on weights."""
        if not self.form["transposed"]:
            return weights
        return self.edit.add("Transpose", [weights], perm=[0, 2, 1])

    def _interleave(self, name: str, shape: list[int]) -> str:
        add, number = self.edit.add, self.edit.integers
        halves = add("Reshape", [name, number(shape)])
        pairs = add("Transpose", [halves], perm=[0, 2, 1, *range(3, len(shape))])
        return add("Reshape", [pairs, number([self.e, 2 * self.i, *shape[3:]])])

    # --- baseline: what a user would have without us.

    def _baseline(self) -> None:
        """`com.microsoft.MoE` on the router's logits; no selection, and no count of active experts."""
        logits = self._softmax_of()
        output = self._moe(logits, self._fused_weights(), normalize=bool(self.rule["renormalize"]))
        if self.rule["scale"] != 1:
            output = self.edit.add("Mul", [output, self.edit.scalar(float(self.rule["scale"]))])
        self._name_result(output)
        self.edit.take(self.select)
        unknown = self.edit.constant(np.array(-1, np.int32))
        self.edit.add("Identity", [unknown], outputs=[self.select.output[2]])
        self.logits = logits
