"""Small graphs as other exporters write them: one MoE model in each of the forms, with every choice a parameter.

The forms were written down from what the exporters' files look like (onnxruntime-genai 0.18, optimum-onnx 0.1, torch
2.13 with transformers 4.57 and 5.23, TensorRT's parser); the real files are in `foreign_files/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ELEMENT = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FORMS = (
    "moe",
    "moe_fc3",
    "qmoe4",
    "qmoe8",
    "trt_moe",
    "gathered",
    "grouped",
    "loop_scatter",
    "loop_scatternd",
    "dense_batched",
    "dense_unrolled",
)
# Those that ONNX Runtime's CPU runs in their original form.
RUNNABLE = tuple(form for form in FORMS if form not in ("moe_fc3", "trt_moe"))
ROUTINGS = ("softmax", "softmax_renormalised", "topk_softmax", "sigmoid_bias", "groups")


@dataclass(frozen=True)
class Spec:
    """A model: its form, sizes, router, activation, and how the file is written."""

    form: str = "gathered"
    routing: str = "softmax_renormalised"
    activation: str = "silu"  # silu | swiglu_oai (clamped, interleaved, offset) | gelu | relu
    gated: bool = True
    fused: bool = True  # gate and up in one tensor
    up_first: bool = False
    bias: bool = False
    dtype: str = "fp32"
    opset: int = 20
    layers: int = 2
    experts: int = 6
    count: int = 2
    hidden: int = 16
    inner: int = 8
    batch: int | None = None  # None: dynamic
    length: int | None = None
    folded: bool = True  # shapes and transposes as initializers, not nodes
    transposed: bool = False  # stored [in,out]
    scale: float = 1.0
    mask: bool = True
    fragment: int = 0  # rank of the one input of a graph that is a block and nothing else; 0: a whole model
    seed: int = 0
    vocabulary: int = 32
    block: int = 16  # columns that share a scale, of quantized weights whose sizes are multiples of it


@dataclass
class Maker:
    """Nodes and weights of one graph."""

    spec: Spec
    nodes: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.spec.seed)
        self.element = ELEMENT[self.spec.dtype]
        self.opsets = [helper.make_opsetid("", self.spec.opset)]

    def name(self, stem: str) -> str:
        name = stem
        while name in self.names:
            name = f"{stem}_{len(self.names)}"
        self.names.add(name)
        return name

    def op(self, op_type: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        made = [self.name(f"{op_type}_out") for _ in range(outputs)]
        attributes = {key: value for key, value in attributes.items() if value is not None}
        node = helper.make_node(op_type, list(inputs), made, name=self.name(f"/{op_type}"), domain=domain, **attributes)
        self.nodes.append(node)
        return made[0] if outputs == 1 else made

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        tensor = numpy_helper.from_array(np.asarray(value, dtype), self.name("c"))
        if self.spec.folded:
            self.weights.append(tensor)
            return str(tensor.name)
        made = self.name("Constant_out")
        self.nodes.append(helper.make_node("Constant", [], [made], value=tensor))
        return made

    def scalar(self, value: float) -> str:
        """A constant of the model's type."""
        tensor = helper.make_tensor(self.name("s"), self.element, [], [value])
        self.weights.append(tensor)
        return str(tensor.name)

    def weight(self, stem: str, array: Any, element: int | None = None) -> str:
        element = self.element if element is None else element
        tensor = numpy_helper.from_array(
            np.asarray(array).astype(helper.tensor_dtype_to_np_dtype(element)), self.name(stem)
        )
        self.weights.append(tensor)
        return str(tensor.name)

    def normal(self, *shape: int, scale: float | None = None) -> Any:
        return self.random.standard_normal(shape) * (scale if scale is not None else 1.5 / np.sqrt(shape[-1]))

    def cast(self, value: str, element: int) -> str:
        return str(self.op("Cast", value, to=element))

    def reduce_sum(self, value: str, axis: int, keepdims: int = 0) -> str:
        return str(self.op("ReduceSum", value, self.constant([axis]), keepdims=keepdims))


def make_model(spec: Spec) -> onnx.ModelProto:
    """The model as a proto, weights inside."""
    maker = Maker(spec)
    if spec.fragment:
        return _fragment(maker)
    batch, length = spec.batch or "batch", spec.length or "sequence"
    table = maker.weight("embedding", maker.normal(spec.vocabulary, spec.hidden, scale=1.0))
    hidden = maker.op("Gather", table, "input_ids", axis=0)
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [batch, length])]
    if spec.mask:
        inputs.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [batch, length]))
        real = maker.cast(maker.op("Unsqueeze", "attention_mask", maker.constant([2])), maker.element)
        # Padding is halved and not zeroed: routers of zeros tie, and how a kernel breaks a tie is its own affair.
        hidden = maker.op("Mul", hidden, maker.op("Add", real, maker.scalar(1.0)))
    for _ in range(spec.layers):
        normed = _norm(maker, hidden)
        hidden = maker.op("Add", hidden, _block(maker, normed))
    head = maker.weight("head", maker.normal(spec.hidden, spec.vocabulary))
    logits = maker.op("MatMul", hidden, head)
    maker.nodes.append(helper.make_node("Identity", [logits], ["logits"]))
    outputs = [helper.make_tensor_value_info("logits", maker.element, [batch, length, spec.vocabulary])]
    graph = helper.make_graph(maker.nodes, "foreign", inputs, outputs, maker.weights)
    if any(node.domain == "com.microsoft" for node in maker.nodes):
        maker.opsets.append(helper.make_opsetid("com.microsoft", 1))
    return helper.make_model(graph, opset_imports=maker.opsets, ir_version=10, producer_name="tests")


def _fragment(maker: Maker) -> onnx.ModelProto:
    """A block alone: hidden [B,S,H] or [T,H] in, the same out."""
    spec = maker.spec
    axes = ["batch", "sequence"][2 - (spec.fragment - 1) :]
    maker.nodes.append(helper.make_node("Identity", [_block(maker, "hidden")], ["output"]))
    inputs = [helper.make_tensor_value_info("hidden", maker.element, [*axes, spec.hidden])]
    outputs = [helper.make_tensor_value_info("output", maker.element, [*axes, spec.hidden])]
    graph = helper.make_graph(maker.nodes, "fragment", inputs, outputs, maker.weights)
    if any(node.domain == "com.microsoft" for node in maker.nodes):
        maker.opsets.append(helper.make_opsetid("com.microsoft", 1))
    return helper.make_model(graph, opset_imports=maker.opsets, ir_version=10)


def save_model(spec: Spec, folder: Path, *, external: bool = False, name: str = "model.onnx") -> Path:
    """The model in a file, its weights inside or in a data file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    options: dict[str, Any] = {}
    if external:
        options = {"save_as_external_data": True, "location": f"{name}.data", "size_threshold": 64}
    onnx.save(make_model(spec), path, **options)
    return path


def _norm(maker: Maker, hidden: str) -> str:
    """RMSNorm as exporters write it out; in the model's own type, so that every form sees the same rounding."""
    square = maker.op("Mul", hidden, hidden)
    if maker.spec.opset >= 18:
        mean = maker.op("ReduceMean", square, maker.constant([-1]), keepdims=1)
    else:
        mean = maker.op("ReduceMean", square, axes=[-1], keepdims=1)
    root = maker.op("Sqrt", maker.op("Add", mean, maker.scalar(1e-3)))
    scaled = maker.op("Div", hidden, root)
    return str(maker.op("Mul", scaled, maker.weight("norm", np.abs(maker.normal(maker.spec.hidden, scale=0.3)) + 0.7)))


@dataclass(frozen=True)
class Experts:
    """One layer's weights, output rows first: gate [E,I,H] (None: ungated), up [E,I,H], down [E,H,I], biases."""

    gate: Any
    up: Any
    down: Any
    gate_bias: Any
    up_bias: Any
    down_bias: Any


def _experts(maker: Maker) -> Experts:
    spec = maker.spec
    shape = (spec.experts, spec.inner, spec.hidden)

    def bias(rows: int) -> Any:
        return maker.normal(spec.experts, rows, scale=0.3) if spec.bias else None

    return Experts(
        gate=maker.normal(*shape) if spec.gated else None,
        up=maker.normal(*shape),
        down=maker.normal(spec.experts, spec.hidden, spec.inner),
        gate_bias=bias(spec.inner) if spec.gated else None,
        up_bias=bias(spec.inner),
        down_bias=bias(spec.hidden),
    )


def _joined(spec: Spec, gate: Any, up: Any) -> Any:
    """Gate and up rows [E,2I,..] in the spec's order."""
    if gate is None:
        return up
    if spec.activation == "swiglu_oai":
        pair = (up, gate) if spec.up_first else (gate, up)
        return np.stack(pair, axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])
    return np.concatenate([up, gate] if spec.up_first else [gate, up], axis=1)


def _block(maker: Maker, hidden: str) -> str:
    spec = maker.spec
    weights = _experts(maker)
    router = maker.weight("router", maker.normal(spec.hidden, spec.experts))
    if spec.form.startswith(("moe", "qmoe")):
        return _fused(maker, hidden, router, weights)
    if spec.form == "trt_moe":
        logits = maker.op("MatMul", hidden, router)
        index, weight, _ = _route(maker, logits, rank=3)
        return _trt_moe(maker, hidden, index, weight, weights)
    shape = maker.op("Shape", hidden)
    flat = str(maker.op("Reshape", hidden, maker.constant([-1, spec.hidden])))
    logits = maker.op("MatMul", flat, router)
    index, weight, scores = _route(maker, logits, rank=2)
    builders = {
        "gathered": _gathered,
        "grouped": _grouped,
        "loop_scatter": _loop,
        "loop_scatternd": _loop,
        "dense_batched": _dense_batched,
        "dense_unrolled": _dense_unrolled,
    }
    result = builders[spec.form](maker, flat, index, weight, weights)
    del scores
    return str(maker.op("Reshape", result, shape))


def _route(maker: Maker, logits: str, *, rank: int) -> tuple[str, str, str]:
    """index [..,K], weight [..,K] of the model's type, and the scores."""
    spec = maker.spec
    wide = maker.cast(logits, TensorProto.FLOAT) if spec.dtype != "fp32" else logits
    count = maker.constant([spec.count])
    if spec.routing == "topk_softmax":
        best, index = maker.op("TopK", wide, count, outputs=2, axis=-1)
        weight, scores = maker.op("Softmax", best, axis=-1), wide
    elif spec.routing in ("sigmoid_bias", "groups"):
        scores = maker.op("Sigmoid", wide)
        correction = maker.weight("correction", maker.normal(spec.experts, scale=0.3), TensorProto.FLOAT)
        ranked = maker.op("Add", scores, correction)
        if spec.routing == "groups":
            ranked = _only_best_group(maker, ranked)
        _, index = maker.op("TopK", ranked, count, outputs=2, axis=-1)
        weight = maker.op("GatherElements", scores, index, axis=rank - 1)
        weight = maker.op("Div", weight, maker.reduce_sum(weight, -1, keepdims=1))
    else:
        scores = maker.op("Softmax", wide, axis=-1)
        weight, index = maker.op("TopK", scores, count, outputs=2, axis=-1)
        if spec.routing == "softmax_renormalised":
            weight = maker.op("Div", weight, maker.reduce_sum(weight, -1, keepdims=1))
    if spec.scale != 1.0:
        weight = maker.op("Mul", weight, maker.constant(spec.scale, np.float32))
    return str(index), maker.cast(weight, maker.element) if spec.dtype != "fp32" else str(weight), str(scores)


def _only_best_group(maker: Maker, scores: str) -> str:
    """Of two groups of experts the one with the best expert; scores elsewhere are 0, as in DeepSeek-V3."""
    spec = maker.spec
    half = spec.experts // 2
    grouped = maker.op("Reshape", scores, maker.constant([-1, 2, half]))
    best = maker.op("ReduceMax", grouped, axes=[-1], keepdims=0) if spec.opset < 18 else maker.op(
        "ReduceMax", grouped, maker.constant([-1]), keepdims=0
    )  # fmt: skip
    _, chosen = maker.op("TopK", best, maker.constant([1]), outputs=2, axis=-1)
    depth, values = maker.constant(2), maker.constant([0, 1])
    mask = maker.op("OneHot", maker.op("Squeeze", chosen, maker.constant([1])), depth, values, axis=-1)
    spread = maker.op("Expand", maker.op("Unsqueeze", mask, maker.constant([2])), maker.constant([1, 1, half]))
    allowed = maker.cast(maker.op("Reshape", spread, maker.constant([-1, spec.experts])), TensorProto.BOOL)
    return str(maker.op("Where", allowed, scores, maker.constant(0.0, np.float32)))


def _activate(maker: Maker, spec: Spec, gate: str | None, up: str) -> str:
    if gate is None:
        return _act(maker, spec, up)
    if spec.activation == "swiglu_oai":
        limit, lowest = maker.scalar(1.5), maker.scalar(-1.5)
        gate = maker.op("Clip", gate, "", limit)
        up = maker.op("Add", maker.op("Clip", up, lowest, limit), maker.scalar(1.0))
        inner = maker.op("Mul", gate, maker.op("Sigmoid", maker.op("Mul", gate, maker.scalar(1.702))))
        return str(maker.op("Mul", inner, up))
    return str(maker.op("Mul", _act(maker, spec, gate), up))


def _act(maker: Maker, spec: Spec, value: str) -> str:
    if spec.activation == "relu":
        return str(maker.op("Relu", value))
    if spec.activation == "gelu":
        half = maker.op("Mul", value, maker.scalar(0.5))
        error = maker.op("Erf", maker.op("Mul", value, maker.scalar(0.7071067811865476)))
        return str(maker.op("Mul", half, maker.op("Add", error, maker.scalar(1.0))))
    return str(maker.op("Mul", value, maker.op("Sigmoid", value)))


def _split(maker: Maker, spec: Spec, value: str, axis: int) -> tuple[str | None, str]:
    """Gate and up out of one product along its last axis."""
    if not spec.gated:
        return None, value
    if spec.activation == "swiglu_oai":
        end, two = maker.constant([np.iinfo(np.int64).max]), maker.constant([2])
        parts = [maker.op("Slice", value, maker.constant([at]), end, maker.constant([axis]), two) for at in (0, 1)]
    elif spec.opset >= 18:
        parts = maker.op("Split", value, outputs=2, axis=axis, num_outputs=2)
    else:
        parts = maker.op("Split", value, outputs=2, axis=axis)
    gate, up = (parts[1], parts[0]) if spec.up_first else (parts[0], parts[1])
    return str(gate), str(up)


# ---- fused ops -----------------------------------------------------------------------------------------------------


def _fused(maker: Maker, hidden: str, router: str, weights: Experts) -> str:
    """com.microsoft.MoE or QMoE: logits in, routing inside."""
    spec = maker.spec
    logits = maker.op("Reshape", maker.op("MatMul", hidden, router), maker.constant([-1, spec.experts]))
    normalize = int(spec.routing != "softmax")
    attributes: dict[str, Any] = {"k": spec.count, "normalize_routing_weights": normalize}
    first, second = _joined(replace(spec, activation="swiglu_oai"), weights.gate, weights.up), weights.down
    biases = ["", "", ""]
    if spec.bias:
        joined = _joined(replace(spec, activation="swiglu_oai"), weights.gate_bias, weights.up_bias)
        biases = [maker.weight("fc1_bias", joined), maker.weight("fc2_bias", weights.down_bias), ""]
    if spec.gated:
        attributes |= {"activation_type": "swiglu", "swiglu_fusion": 1}
        if spec.activation == "swiglu_oai":
            attributes |= {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 1.5}
    else:
        attributes |= {"activation_type": spec.activation}
    if spec.form == "moe_fc3":
        inputs = [hidden, logits, maker.weight("fc1", weights.gate), "", maker.weight("fc2", second), "", maker.weight("fc3", weights.up)]  # fmt: skip  # noqa: E501
        attributes = {"k": spec.count, "normalize_routing_weights": normalize, "activation_type": "silu"}
        return str(maker.op("MoE", *inputs, domain="com.microsoft", **attributes))
    if spec.form == "moe":
        inputs = [hidden, logits, maker.weight("fc1", first), biases[0], maker.weight("fc2", second), biases[1]]
        return str(maker.op("MoE", *inputs, domain="com.microsoft", **attributes))
    bits = int(spec.form[-1])
    packed = [_quantize(maker, array, bits) for array in (first, second)]
    inputs = [hidden, logits, *packed[0], biases[0], *packed[1], biases[1]]
    attributes |= {"expert_weight_bits": bits, "block_size": spec.block if _blocked(spec) else None}
    return str(maker.op("QMoE", *inputs, domain="com.microsoft", **attributes))


def _blocked(spec: Spec) -> bool:
    return spec.inner % spec.block == 0 and spec.hidden % spec.block == 0


def _quantize(maker: Maker, array: Any, bits: int) -> list[str]:
    """Packed weights and scales; by blocks of columns where the sizes allow, else by row."""
    block = maker.spec.block if _blocked(maker.spec) else array.shape[-1]
    blocked = array.reshape(*array.shape[:2], -1, block)
    scale = np.abs(blocked).max(axis=-1) / (2 ** (bits - 1) - 1)
    scale = scale.astype(helper.tensor_dtype_to_np_dtype(maker.element)).astype(np.float64)
    zero = 2 ** (bits - 1)
    values = np.clip(np.round(blocked / scale[..., None]) + zero, 0, 2**bits - 1).astype(np.uint8).reshape(array.shape)
    packed = values if bits == 8 else (values[..., 0::2] | (values[..., 1::2] << 4)).astype(np.uint8)
    scale = scale if _blocked(maker.spec) else scale[..., 0]
    return [maker.weight("packed", packed, TensorProto.UINT8), maker.weight("scales", scale)]


def _trt_moe(maker: Maker, hidden: str, index: str, weight: str, weights: Experts) -> str:
    arrays = [weights.gate.transpose(0, 2, 1), weights.up.transpose(0, 2, 1), weights.down.transpose(0, 2, 1)]
    inputs = [hidden, maker.cast(index, TensorProto.INT32), weight, *(maker.weight("w", array) for array in arrays)]
    if maker.spec.bias:
        inputs += [maker.weight("b", b) for b in (weights.gate_bias, weights.up_bias, weights.down_bias)]
    return str(maker.op("TRT_MoE", *inputs, activation_type=1))


# ---- standard ops --------------------------------------------------------------------------------------------------


def _stored(maker: Maker, stem: str, array: Any, *, transpose: bool) -> str:
    """A stack of matrices for use as [E,in,out] (transpose) or [E,out,in], stored as the spec has it."""
    spec = maker.spec
    stored_in_first = spec.transposed
    value = maker.weight(stem, array.transpose(0, 2, 1) if stored_in_first else array)
    if stored_in_first == transpose:
        return value
    return str(maker.op("Transpose", value, perm=[0, 2, 1]))


def _gathered(maker: Maker, flat: str, index: str, weight: str, weights: Experts) -> str:
    """transformers' batched_mm: each slot's own matrices, gathered."""
    spec = maker.spec
    one, last, k = maker.constant([1]), maker.constant([-1]), spec.count
    repeated = maker.op("Expand", maker.op("Unsqueeze", flat, one), maker.constant([1, k, 1]))
    rows = maker.op("Reshape", repeated, maker.constant([-1, spec.hidden]))
    ids = maker.op("Reshape", index, last)

    def linear(x: str, stem: str, array: Any, bias: Any) -> str:
        chosen = maker.op("Gather", _stored(maker, stem, array, transpose=False), ids, axis=0)
        made = maker.op("Squeeze", maker.op("MatMul", chosen, maker.op("Unsqueeze", x, last)), last)
        if bias is not None:
            made = maker.op("Add", made, maker.op("Gather", maker.weight(f"{stem}_bias", bias), ids, axis=0))
        return str(made)

    inner = _inner(maker, weights, lambda stem, array, bias: linear(rows, stem, array, bias))
    outputs = linear(inner, "down", weights.down, weights.down_bias)
    weighed = maker.op("Mul", outputs, maker.op("Unsqueeze", maker.op("Reshape", weight, last), last))
    grouped = maker.op("Reshape", weighed, maker.constant([-1, k, spec.hidden]))
    return maker.reduce_sum(grouped, 1)


def _inner(maker: Maker, weights: Experts, linear: Any) -> str:
    """The activation's result from `linear(stem, matrices, biases)`."""
    spec = maker.spec
    if spec.fused or not spec.gated:
        biases = _joined(spec, weights.gate_bias, weights.up_bias) if spec.bias else None
        both = linear("gate_up", _joined(spec, weights.gate, weights.up), biases)
        gate, up = _split(maker, spec, both, -1 if spec.opset >= 18 else 1)
        return _activate(maker, spec, gate, up)
    gate = linear("gate", weights.gate, weights.gate_bias)
    up = linear("up", weights.up, weights.up_bias)
    return _activate(maker, spec, gate, up)


def _grouped(maker: Maker, flat: str, index: str, weight: str, weights: Experts) -> str:
    """transformers' grouped_mm: slots sorted by expert, one product an expert on its stretch."""
    spec = maker.spec
    last, zero, one = maker.constant([-1]), maker.constant(0), maker.constant(1)
    ids = maker.op("Reshape", index, last)
    every = maker.op("Shape", ids)
    ordered, order = maker.op("TopK", ids, every, outputs=2, axis=-1, largest=0)
    tokens = maker.op("Div", order, maker.constant(spec.count))
    rows = maker.op("Gather", flat, tokens, axis=0)
    hits = maker.op("OneHot", ordered, maker.constant(spec.experts), maker.constant([0, 1]), axis=-1)
    ends = maker.op("CumSum", maker.reduce_sum(hits, 0), zero)
    parts = maker.op(
        "Split", ends, outputs=spec.experts, axis=0, num_outputs=spec.experts if spec.opset >= 18 else None
    )
    stretches, start = [], zero
    for part in parts:
        end = maker.op("Squeeze", part, maker.constant([0]))
        stretches.append(maker.op("Range", start, end, one))
        start = end

    def linear(x: str, stem: str, array: Any, bias: Any) -> str:
        split = maker.op(
            "Split",
            _stored(maker, stem, array, transpose=True),
            outputs=spec.experts,
            axis=0,
            num_outputs=spec.experts if spec.opset >= 18 else None,
        )
        made = [
            maker.op("MatMul", maker.op("Gather", x, stretch, axis=0), maker.op("Squeeze", matrix, maker.constant([0])))
            for stretch, matrix in zip(stretches, split, strict=True)
        ]
        joined = maker.op("Concat", *made, axis=0)
        if bias is not None:
            joined = maker.op("Add", joined, maker.op("Gather", maker.weight(f"{stem}_bias", bias), ordered, axis=0))
        return str(joined)

    inner = _inner(maker, weights, lambda stem, array, bias: linear(rows, stem, array, bias))
    outputs = linear(inner, "down", weights.down, weights.down_bias)
    flat_weight = maker.op("Gather", maker.op("Reshape", weight, last), order, axis=0)
    weighed = maker.op("Mul", outputs, maker.op("Unsqueeze", flat_weight, last))
    inverse = maker.op("TopK", order, every, outputs=2, axis=-1, largest=0)[1]
    back = maker.op("Gather", weighed, inverse, axis=0)
    return maker.reduce_sum(maker.op("Reshape", back, maker.constant([-1, spec.count, spec.hidden])), 1)


def _loop(maker: Maker, flat: str, index: str, weight: str, weights: Experts) -> str:
    """Optimum's and Mixtral's loop: each expert on the tokens that chose it, added to the result."""
    spec = maker.spec
    hot = maker.op("OneHot", index, maker.constant(spec.experts), maker.constant([0, 1]), axis=-1)
    mask = maker.op("Transpose", hot, perm=[2, 1, 0])
    total = maker.op(
        "ConstantOfShape", maker.op("Shape", flat), value=helper.make_tensor("z", maker.element, [1], [0.0])
    )
    for expert in range(spec.experts):
        hits = maker.op("NonZero", maker.op("Gather", mask, maker.constant(expert), axis=0))
        slots, tokens = (maker.op("Gather", hits, maker.constant(row), axis=0) for row in (0, 1))
        rows = maker.op("Gather", flat, tokens, axis=0)
        outputs = _one_expert(maker, str(rows), weights, expert)
        pairs = maker.op("Concat", *(maker.op("Unsqueeze", x, maker.constant([1])) for x in (tokens, slots)), axis=1)
        share = maker.op("Unsqueeze", maker.op("GatherND", weight, pairs), maker.constant([1]))
        weighed = maker.op("Mul", outputs, share)
        if spec.form == "loop_scatternd" and spec.opset >= 16:
            where = maker.op("Unsqueeze", tokens, maker.constant([1]))
            total = maker.op("ScatterND", total, where, weighed, reduction="add")
        else:
            where = maker.op("Expand", maker.op("Unsqueeze", tokens, maker.constant([1])), maker.op("Shape", weighed))
            empty = maker.op("Mul", total, maker.scalar(0.0))
            total = maker.op("Add", total, maker.op("ScatterElements", empty, where, weighed, axis=0))
    return str(total)


def _one_expert(maker: Maker, rows: str, weights: Experts, expert: int) -> str:
    """A ModuleList expert: tensors of its own."""
    spec = maker.spec

    def linear(x: str, stem: str, matrix: Any, bias: Any) -> str:
        name = f"experts.{expert}.{stem}"
        if spec.folded:
            value = maker.weight(name, matrix.T)
        else:
            value = maker.op("Transpose", maker.weight(name, matrix), perm=[1, 0])
        made = maker.op("MatMul", x, value)
        return str(made if bias is None else maker.op("Add", maker.weight(f"{name}.bias", bias), made))

    def of(array: Any) -> Any:
        return None if array is None else array[expert]

    if spec.gated:
        gate = linear(rows, "gate_proj", of(weights.gate), of(weights.gate_bias))
        up = linear(rows, "up_proj", of(weights.up), of(weights.up_bias))
        inner = _activate(maker, spec, gate, up)
    else:
        inner = _activate(maker, spec, None, linear(rows, "up_proj", of(weights.up), of(weights.up_bias)))
    return linear(inner, "down_proj", of(weights.down), of(weights.down_bias))


def _dense_weights(maker: Maker, index: str, weight: str) -> str:
    """[T,E], 0 for all but the chosen."""
    spec = maker.spec
    rows = maker.op("Gather", maker.op("Shape", index), maker.constant([0]), axis=0)
    shape = maker.op("Concat", rows, maker.constant([spec.experts]), axis=0)
    empty = maker.op("ConstantOfShape", shape, value=helper.make_tensor("z", maker.element, [1], [0.0]))
    return str(maker.op("ScatterElements", empty, index, weight, axis=1))


def _dense_batched(maker: Maker, flat: str, index: str, weight: str, weights: Experts) -> str:
    """All experts for all tokens in one batched product, masked and summed."""
    spec = maker.spec
    tiled = maker.op("Unsqueeze", flat, maker.constant([0]))

    def linear(x: str, stem: str, array: Any, bias: Any) -> str:
        made = maker.op("MatMul", x, _stored(maker, stem, array, transpose=True))
        if bias is not None:
            made = maker.op("Add", made, maker.op("Unsqueeze", maker.weight(f"{stem}_bias", bias), maker.constant([1])))
        return str(made)

    def first(stem: str, array: Any, bias: Any) -> str:
        return linear(tiled, stem, array, bias)

    spec_axis = replace(spec, opset=spec.opset)
    if spec.fused or not spec.gated:
        biases = _joined(spec, weights.gate_bias, weights.up_bias) if spec.bias else None
        gate, up = _split(maker, spec_axis, first("gate_up", _joined(spec, weights.gate, weights.up), biases), 2)
        inner = _activate(maker, spec, gate, up)
    else:
        gate, up = first("gate", weights.gate, weights.gate_bias), first("up", weights.up, weights.up_bias)
        inner = _activate(maker, spec, gate, up)
    outputs = linear(inner, "down", weights.down, weights.down_bias)
    dense = maker.op("Transpose", _dense_weights(maker, index, weight), perm=[1, 0])
    weighed = maker.op("Mul", outputs, maker.op("Unsqueeze", dense, maker.constant([2])))
    return maker.reduce_sum(weighed, 0)


def _dense_unrolled(maker: Maker, flat: str, index: str, weight: str, weights: Experts) -> str:
    """All experts for all tokens, a product each, weighted by a column of the dense weights and added up."""
    spec = maker.spec
    dense = _dense_weights(maker, index, weight)
    total: str | None = None
    for expert in range(spec.experts):
        outputs = _one_expert(maker, flat, weights, expert)
        column = maker.op("Gather", dense, maker.constant([expert]), axis=1)
        weighed = maker.op("Mul", column, outputs)
        total = weighed if total is None else maker.op("Add", weighed, total)
    assert total is not None
    return str(total)
