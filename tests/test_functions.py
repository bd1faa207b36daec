"""The ops' function bodies in ONNX Runtime against the NumPy references: indices exactly, weights to rounding."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray
from test_selection import Batch, batches, budgets, floors

from lynx_trt import fp8, int4, mxfp4
from lynx_trt.errors import ExportError
from lynx_trt.experts import ACTIVATIONS, FORMATS, ExpertsForm, experts
from lynx_trt.export.functions import add_functions, experts_function, select_function
from lynx_trt.export.ops import Attributes, experts_attributes, select_attributes
from lynx_trt.selection import PRESETS, Selection

Array = NDArray[Any]

HEADER = '<ir_version: 12, opset_import: ["": 24, "lynx": 1]>'
SELECT_GRAPH = """
select (float[T,E] choice, float[T,E] combine, int64[T,K] topk_index, float[T,K] topk_weight,
        int32 budget, float floor, bool[T] mask)
    => (int64[T,K] index, float[T,K] weight, int32 active)
{ index, weight, active = lynx.LynxSelect (choice, combine, topk_index, topk_weight, budget, floor, mask) }
"""


def _model(graph: str, *attributes: Attributes) -> onnx.ModelProto:
    """The model whose n-th lynx node has the n-th attributes, with its functions."""
    model = onnx.parser.parse_model(HEADER + graph)
    for node, values in zip((n for n in model.graph.node if n.domain == "lynx"), attributes, strict=True):
        node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in values.items())
    assert add_functions(model) == len(attributes)
    onnx.checker.check_model(model)
    return model


def _session(model: onnx.ModelProto, *, optimized: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


# ------------------------------------------------------------------------------------------------- LynxSelect

# Every preset, and for each vote what no preset has: drop, a larger guarantee beside a threshold, other powers, alphas
# and betas, also of 0.
SELECTIONS = {
    **PRESETS,
    "count-drop": Selection("count", guarantee=2, sensitivity=0.5, remap=False),
    "weight-drop": Selection("weight", guarantee=0, sensitivity=0.0, remap=False, power=0.5),
    "weight-sensitive": Selection("weight", guarantee=3, sensitivity=0.3, remap=True),
    "affinity-bins": Selection("affinity", guarantee=0, sensitivity=0.0, remap=True, alpha=1.4426950408889634, beta=7),
    "affinity-flat": Selection("affinity", guarantee=0, sensitivity=0.25, remap=True, beta=0),
    "score-drop": Selection("score", guarantee=0, sensitivity=0.0, remap=False),
    "score-sensitive": Selection("score", guarantee=0, sensitivity=1.0, remap=True),
}


@functools.cache
def _select_session(
    selection: Selection, width: int, renormalize: bool, scale: float, optimized: bool = True
) -> onnxruntime.InferenceSession:
    attributes = select_attributes(selection, experts_per_token=width, renormalize=renormalize, scale=scale)
    return _session(_model(SELECT_GRAPH, attributes), optimized=optimized)


def _check_select(
    selection: Selection,
    batch: Batch,
    budget: int,
    *,
    floor: float = 0.0,
    renormalize: bool = True,
    scale: float = 1.0,
    optimized: bool = True,
) -> None:
    tokens, _, width = batch.sizes
    session = _select_session(selection, width, renormalize, scale, optimized)
    mask = np.ones(tokens, np.bool_) if batch.token_mask is None else batch.token_mask
    feeds = {
        "choice": batch.choice,
        "combine": batch.combine,
        "topk_index": batch.topk_index,
        "topk_weight": batch.topk_weight,
        "budget": np.array(budget, np.int32),
        "floor": np.array(floor, np.float32),
        "mask": mask,
    }
    index, weight, active = session.run(None, feeds)
    expected = batch.select(selection, budget, floor=floor, renormalize=renormalize, scale=scale)
    np.testing.assert_array_equal(index, expected.index)
    # atol: the last bits of float32's denormals.
    np.testing.assert_allclose(weight, expected.weight, rtol=1e-6, atol=1e-44)
    assert active == len(expected.kept)
    assert (index.dtype, weight.dtype, active.dtype, active.shape) == (np.int64, np.float32, np.int32, ())
    if budget >= batch.sizes[1] and floor == 0:  # bit for bit, also where rounding would be within the tolerance
        rows = batch.counts
        np.testing.assert_array_equal(weight[rows].view(np.uint32), batch.topk_weight[rows].view(np.uint32))


@pytest.mark.parametrize("name", SELECTIONS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(batch=batches(), budget=budgets, floor=floors)
def test_select_equals_the_reference(name: str, batch: Batch, budget: int, floor: float) -> None:
    _check_select(SELECTIONS[name], batch, budget, floor=floor)


def _random_batch(tokens: int, experts: int, width: int, seed: int = 0) -> Batch:
    """A softmax router, renormalised, some of its rows padding and one broken."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, experts)).astype(np.float32)
    combine = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    index = np.argsort(-logits, axis=1, kind="stable")[:, :width]
    weight = np.take_along_axis(combine, index, axis=1)
    if tokens > 3:
        combine[tokens // 2, 0] = np.nan
    return Batch(logits, combine, index, weight / weight.sum(axis=1, keepdims=True), np.arange(tokens) % 5 != 3)


@pytest.mark.parametrize(
    ("tokens", "experts", "width"),
    [
        (16, 128, 8),  # Qwen3-MoE in decode
        (32, 8, 2),  # Mixtral: every expert has votes
        (1, 64, 6),  # a single sequence: nothing to share
        (500, 256, 8),  # DeepSeek-V3; many tokens, where ONNX Runtime's TopK takes other ways
        (16, 16, 1),  # K = 1, Llama 4
        (5, 4, 4),  # K = E
    ],
)
@pytest.mark.parametrize("name", SELECTIONS)
def test_select_equals_the_reference_at_real_sizes(name: str, tokens: int, experts: int, width: int) -> None:
    batch = _random_batch(tokens, experts, width)
    for budget in (0, 1, experts // 3, experts - 1, experts):
        _check_select(SELECTIONS[name], batch, budget)
    for floor in (0.01, 0.1):
        for budget in (experts - 1, experts, 3 * experts):
            _check_select(SELECTIONS[name], batch, budget, floor=floor)


@pytest.mark.parametrize(("renormalize", "scale"), [(True, 2.5), (False, 1.0), (False, 0.1)])
def test_select_follows_the_models_rule_of_weights(renormalize: bool, scale: float) -> None:
    for name in ("lynx", "weight-drop"):
        _check_select(SELECTIONS[name], _random_batch(16, 32, 4), 6, renormalize=renormalize, scale=scale)


@pytest.mark.parametrize("name", SELECTIONS)
def test_select_does_not_hang_on_an_optimization(name: str) -> None:
    # As written, node by node: no constant folded, nothing fused.
    _check_select(SELECTIONS[name], _random_batch(16, 32, 4), 6, optimized=False)


def test_select_breaks_ties_as_the_reference() -> None:
    # All experts alike: every vote, choice and affinity ties, at sizes where a TopK may use a heap or a partial sort.
    alike = np.full((64, 128), 1 / 128, np.float32)
    index = np.stack([np.random.default_rng(t).permutation(128)[:8] for t in range(64)])
    batch = Batch(alike, alike, index, np.full((64, 8), 1 / 8, np.float32))
    for name, budget in itertools.product(SELECTIONS, (3, 64, 127)):
        _check_select(SELECTIONS[name], batch, budget)


def test_select_rounds_its_parameters_as_a_node_does() -> None:
    # 3 bins for each factor of 18: ln(1/18) * alpha is -3, but with the float32 that a node holds it is -3.0000002:
    # expert 0 is in bin -4. In bin -3, that of expert 1, it would tie with that one and be kept instead.
    selection = Selection("affinity", guarantee=0, sensitivity=0.0, remap=True, alpha=3 / math.log(18), beta=4)
    combine = np.tile(np.array([1 / 18, math.exp(-2.2 / selection.alpha), 1], np.float32), (8, 1))
    batch = Batch(combine, combine, np.tile([0, 1, 2], (8, 1)), combine)
    np.testing.assert_array_equal(batch.kept_set(selection, 2), [False, True, True])
    _check_select(selection, batch, 2)


def test_select_rounds_where_the_reference_does() -> None:
    # The cases of test_selection that tell a float32 from a float64. A vote that is 0 as a float32 is still one.
    tiny = np.array([[1.0, 1e-30]], np.float32)
    batch = Batch(np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32), np.array([[1, 2]]), tiny)
    _check_select(replace(SELECTIONS["weight-drop"], power=3.0), batch, 2)
    # ln(1/32) * alpha is -1 only as a float32: expert 0 ties, and wins.
    selection = Selection("affinity", guarantee=0, sensitivity=0.0, remap=True, alpha=1 / math.log(32))
    combine = np.array([[1 / 32, 1, 0], [1 / 32, 0, 1]], np.float32)
    _check_select(selection, Batch(combine, combine, np.array([[1, 0], [2, 0]]), np.ones((2, 2), np.float32)), 1)
    # A confidence of 0.1 is not below a float32 of 0.1.
    selection = Selection("count", guarantee=0, sensitivity=0.1, remap=True)
    batch = replace(batch, topk_weight=np.array([[11, 9]], np.float32))
    _check_select(selection, batch, 0)
    # 0.1 + 0.2 + 0.3 in any order: expert 0 ties with expert 1, and wins.
    a, b, c = 0.1, 0.2, 0.3
    weight = np.array([[a, c, 1 - a - c], [b, b, 1 - b - b], [c, a, 1 - c - a]], np.float32)
    zeros = np.zeros((3, 5), np.float32)
    batch = Batch(zeros, zeros, np.array([[1, 0, 2], [1, 0, 3], [1, 0, 4]]), weight)
    _check_select(Selection("weight", guarantee=0, sensitivity=0.0, remap=True), batch, 1)


def test_select_refuses_a_negative_budget() -> None:
    with pytest.raises(Exception, match="must not be negative"):
        _check_select(PRESETS["lynx"], _random_batch(4, 8, 2), -1)


# ------------------------------------------------------------------------------------------------- LynxExperts

TOKENS, EXPERTS, WIDTH, HIDDEN, INNER = 9, 6, 3, 10, 14

FORMS = [
    *(
        ExpertsForm(activation, transposed=transposed, interleaved=interleaved)
        for activation, transposed, interleaved in itertools.product(ACTIVATIONS, (False, True), (False, True))
    ),
    *(
        ExpertsForm(activation, gated=False, transposed=transposed, limit=limit)
        for activation, transposed, limit in itertools.product(ACTIVATIONS, (False, True), (0.0, 0.75))
    ),
    ExpertsForm(transposed=True, interleaved=True, alpha=1.702, limit=0.75, up_offset=1.0),  # gpt-oss
    ExpertsForm(alpha=0.5, up_offset=-0.5),
    ExpertsForm("gelu", limit=0.5),
]


def _experts_graph(form: ExpertsForm, dtype: str, bias: bool) -> str:
    rows = 2 * INNER if form.gated else INNER
    gate_up = f"{HIDDEN},{rows}" if form.transposed else f"{rows},{HIDDEN}"
    down = f"{INNER},{HIDDEN}" if form.transposed else f"{HIDDEN},{INNER}"
    biases = f", {dtype}[{EXPERTS},{rows}] gate_up_bias, {dtype}[{EXPERTS},{HIDDEN}] down_bias" if bias else ""
    added = ", gate_up_bias, down_bias" if bias else ""
    return f"""
        experts ({dtype}[T,{HIDDEN}] hidden, int64[T,K] index, float[T,K] weight,
                 {dtype}[{EXPERTS},{gate_up}] gate_up, {dtype}[{EXPERTS},{down}] down{biases})
            => ({dtype}[T,{HIDDEN}] output)
        {{
            output = lynx.LynxExperts (hidden, index, weight, gate_up, down{added})
        }}
    """


def _experts_inputs(form: ExpertsForm, dtype: type[np.generic], bias: bool) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    rows = 2 * INNER if form.gated else INNER
    gate_up, down = rng.normal(size=(EXPERTS, rows, HIDDEN)), rng.normal(size=(EXPERTS, HIDDEN, INNER))
    if form.transposed:
        gate_up, down = gate_up.swapaxes(1, 2), down.swapaxes(1, 2)
    inputs = {"hidden": rng.normal(size=(TOKENS, HIDDEN)), "gate_up": gate_up, "down": down}
    if bias:
        inputs |= {"gate_up_bias": rng.normal(size=(EXPERTS, rows)), "down_bias": rng.normal(size=(EXPERTS, HIDDEN))}
    # The last expert is nobody's, one slot is empty, and so are all of row 2, which is broken.
    index = np.stack([rng.permutation(EXPERTS - 1)[:WIDTH] for _ in range(TOKENS)])
    index[0, 1], index[2] = -1, -1
    inputs["hidden"][2] = np.nan
    typed = {name: np.ascontiguousarray(values.astype(dtype)) for name, values in inputs.items()}
    return {**typed, "index": index, "weight": rng.random((TOKENS, WIDTH)).astype(np.float32)}


def _reference(form: ExpertsForm, inputs: dict[str, Array]) -> Array:
    """In float64."""
    exact = {name: a if a.dtype == np.int64 else a.astype(np.float64) for name, a in inputs.items()}
    return experts(form, **exact)


def _experts_session(form: ExpertsForm, dtype: str, bias: bool) -> onnxruntime.InferenceSession:
    return _session(_model(_experts_graph(form, dtype, bias), experts_attributes(form)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_experts_equal_the_reference(form: ExpertsForm, dtype: str, bias: bool) -> None:
    numpy_dtype = np.float32 if dtype == "float" else np.float16
    inputs = _experts_inputs(form, numpy_dtype, bias)
    (got,) = _experts_session(form, dtype, bias).run(None, inputs)
    expected = _reference(form, inputs)
    assert got.dtype == numpy_dtype
    assert (got[2] == 0).all()  # nobody's row, though it is NaN
    # Twice the error of NumPy's float32, and for float16 half a unit in the last place: rounded once, at the end.
    wide = {name: a if a.dtype == np.int64 else a.astype(np.float32) for name, a in inputs.items()}
    floor = 2 * np.abs(experts(form, **wide) - expected).max() + np.finfo(np.float32).eps * np.abs(expected).max()
    rounding = np.abs(expected) * (np.finfo(np.float16).eps / 2 if dtype == "float16" else 0)
    np.testing.assert_array_less(np.abs(got - expected), floor + rounding)


def test_experts_that_nobody_uses_do_not_matter() -> None:
    form = ExpertsForm()
    inputs = _experts_inputs(form, np.float32, bias=True)
    session = _experts_session(form, "float", bias=True)
    (expected,) = session.run(None, inputs)
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        inputs[name][EXPERTS - 1] = np.nan
    np.testing.assert_array_equal(session.run(None, inputs)[0], expected)


@pytest.mark.parametrize("tokens", [0, 1, TOKENS])
def test_experts_with_no_slot_in_use_give_zeros(tokens: int) -> None:
    form = ExpertsForm()
    inputs = _experts_inputs(form, np.float32, bias=False)
    inputs |= {name: inputs[name][:tokens] for name in ("hidden", "index", "weight")}
    inputs["index"] = np.full_like(inputs["index"], -1)
    (got,) = _experts_session(form, "float", bias=False).run(None, inputs)
    np.testing.assert_array_equal(got, np.zeros((tokens, HIDDEN)))


@pytest.mark.parametrize("pattern", ["one token", "one expert for all", "all experts"])
def test_experts_of_other_batches(pattern: str) -> None:
    form = ExpertsForm()
    inputs = _experts_inputs(form, np.float32, bias=False)
    inputs["hidden"] = np.nan_to_num(inputs["hidden"])
    if pattern == "one token":
        inputs |= {name: inputs[name][:1] for name in ("hidden", "index", "weight")}
    elif pattern == "one expert for all":  # as with a budget of 1
        inputs["index"][:] = [3, -1, -1]
    else:
        inputs["index"] = np.add.outer(np.arange(TOKENS), [0, 2, 4]) % EXPERTS
    (got,) = _experts_session(form, "float", bias=False).run(None, inputs)
    np.testing.assert_allclose(got, _reference(form, inputs), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- quantized experts

QUANTIZED_FORMS = {
    weights: [
        *(ExpertsForm(activation, weights=weights) for activation in ACTIVATIONS),
        *(ExpertsForm(activation, gated=False, limit=0.75, weights=weights) for activation in ACTIVATIONS),
        ExpertsForm(interleaved=True, alpha=1.702, limit=0.75, up_offset=1.0, weights=weights),  # gpt-oss
        ExpertsForm("gelu", interleaved=True, limit=0.5, weights=weights),
    ]
    for weights in FORMATS
}


def _quantized_session(form: ExpertsForm, dtype: str, bias: bool) -> onnxruntime.InferenceSession:
    biases = f", {dtype}[E,R] gate_up_bias, {dtype}[E,H] down_bias" if bias else ""
    added = ", gate_up_bias, down_bias" if bias else ""
    stored = FORMATS[form.weights]
    gate_up, down = ("P", "Q") if stored.per_byte == 2 else ("H", "I")
    scale = {"int8": "int8", "float32": "float", "float": dtype}[stored.scale_type]
    graph = f"""
        experts ({dtype}[T,H] hidden, int64[T,K] index, float[T,K] weight, int8[E,R,{gate_up}] gate_up,
                 int8[E,H,{down}] down, {scale}[E,R,G] gate_up_scale, {scale}[E,H,J] down_scale{biases})
            => ({dtype}[T,H] output)
        {{
            output = lynx.LynxExperts (hidden, index, weight, gate_up, down, gate_up_scale, down_scale{added})
        }}
    """
    return _session(_model(graph, experts_attributes(form)))


def _quantized_inputs(
    form: ExpertsForm,
    bias: bool,
    *,
    dtype: type[np.generic] = np.float32,
    number: int = EXPERTS,
    tokens: int = TOKENS,
    width: int = WIDTH,
    blocks: tuple[int, int] = (2, 3),
) -> dict[str, Array]:
    """Bytes of every value but NaN; H and I are so many blocks, and the last expert is nobody's."""
    rng = np.random.default_rng(number + tokens)
    stored = FORMATS[form.weights]
    hidden, inner = (count * stored.block for count in blocks)
    rows = 2 * inner if form.gated else inner
    inputs: dict[str, Array] = {"hidden": rng.normal(size=(tokens, hidden)).astype(dtype)}
    for name, (height, depth) in {"gate_up": (rows, hidden), "down": (hidden, inner)}.items():
        shape, scales = (number, height, depth // stored.per_byte), (number, height, depth // stored.block)
        if stored.per_byte == 2:
            inputs[name] = rng.integers(-128, 128, shape).astype(np.int8)
        if form.weights == "mxfp4":
            inputs[f"{name}_scale"] = rng.integers(118, 129, scales).astype(np.uint8).view(np.int8)
        elif stored.scale_type == "float":
            points = [rng.integers(0, int4.LARGEST_ZERO + 1, scales)] if stored.zeros else []
            most = 0.5 if form.weights == "nvfp4" else 0.2  # its values are smaller
            beside = [rng.uniform(-most, most, scales), *points]
            inputs[f"{name}_scale"] = np.concatenate(beside, axis=-1).astype(dtype)
        else:  # 127 is NaN, and with a sign too
            inputs[name] = (rng.integers(0, 127, shape) + rng.choice([0, 128], shape)).astype(np.uint8).view(np.int8)
            inputs[f"{name}_scale"] = rng.uniform(-0.01, 0.01, scales).astype(np.float32)
    if bias:
        inputs["gate_up_bias"] = rng.normal(size=(number, rows)).astype(dtype)
        inputs["down_bias"] = rng.normal(size=(number, hidden)).astype(dtype)
    index = np.stack([rng.permutation(number - 1)[:width] for _ in range(tokens)])
    return {**inputs, "index": index, "weight": rng.random((tokens, width)).astype(np.float32)}


def _check_quantized(form: ExpertsForm, inputs: dict[str, Array], got: Array) -> None:
    def wide(dtype: type[np.generic]) -> dict[str, Array]:
        # The scales of FP8 are float32 in either precision.
        wider = {n: a for n, a in inputs.items() if np.issubdtype(a.dtype, np.floating) and not n.endswith("_scale")}
        return inputs | {name: array.astype(dtype) for name, array in wider.items()}

    expected = experts(form, **wide(np.float64))
    # As of weights in float, but four times NumPy's error: sums are longer, and so differ more by their order.
    floor = 4 * np.abs(experts(form, **wide(np.float32)) - expected).max()
    floor += np.finfo(np.float32).eps * np.abs(expected).max()
    half = got.dtype == np.float16
    rounding = np.abs(expected) * (np.finfo(np.float16).eps / 2 if half else 0)
    np.testing.assert_array_less(np.abs(got - expected), floor + rounding)
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "form",
    [f for kind in ("mxfp4", "fp8", "nvfp4", "int4_g32", "int4_g128_zeros") for f in QUANTIZED_FORMS[kind]],
    ids=str,
)
def test_quantized_experts_equal_the_reference(form: ExpertsForm, bias: bool) -> None:
    inputs = _quantized_inputs(form, bias)
    inputs["index"][0, 1], inputs["index"][2], inputs["hidden"][2] = -1, -1, np.nan
    (got,) = _quantized_session(form, "float", bias).run(None, inputs)
    assert (got[2] == 0).all()
    _check_quantized(form, inputs, got)


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1, "width": 1, "number": 2, "blocks": (1, 1)},
        {"tokens": 1, "width": 4, "number": 33},
        {"tokens": 17, "width": 2, "number": 3, "blocks": (5, 1)},
    ],
)
@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("weights", FORMATS)
def test_quantized_experts_of_other_sizes(sizes: dict[str, Any], dtype: str, weights: str) -> None:
    form = QUANTIZED_FORMS[weights][-2]
    inputs = _quantized_inputs(form, True, dtype=np.float32 if dtype == "float" else np.float16, **sizes)
    (got,) = _quantized_session(form, dtype, True).run(None, inputs)
    _check_quantized(form, inputs, got)


def test_experts_in_mxfp4_have_each_value_and_each_scale() -> None:
    """An expert that copies what it is given, of one row of hidden: the weights themselves come out."""
    form = ExpertsForm("relu", gated=False, weights="mxfp4")
    session = _quantized_session(form, "float", bias=False)
    gate_up = np.zeros((1, 32, 16), np.int8)
    gate_up[0, np.arange(32), np.arange(32) // 2] = np.where(np.arange(32) % 2, 0x20, 0x02)  # 1.0 on the diagonal
    down = np.arange(512).astype(np.uint8).view(np.int8).reshape(1, 32, 16)  # all bytes, twice
    one = np.full((1, 32, 1), 127, np.int8)
    for scale in (np.full(32, 130), np.arange(32), np.arange(96, 128), np.arange(221, 253)):  # to 6 * 2^125
        down_scale = scale.astype(np.uint8).view(np.int8).reshape(1, 32, 1)
        inputs = {"gate_up": gate_up, "down": down, "gate_up_scale": one, "down_scale": down_scale}
        inputs |= {"hidden": np.eye(32, dtype=np.float32), "index": np.zeros((32, 1), np.int64)}
        (got,) = session.run(None, {**inputs, "weight": np.ones((32, 1), np.float32)})
        np.testing.assert_array_equal(got.T, mxfp4.dequantize(down[0], down_scale[0]))


def test_experts_in_fp8_have_each_value() -> None:
    """The same; a row that holds NaN is NaN for every token, and no other row is."""
    form = ExpertsForm("relu", gated=False, weights="fp8")
    session = _quantized_session(form, "float", bias=False)
    gate_up = np.where(np.eye(128), 0x38, 0).astype(np.int8)[None]  # 1.0 on the diagonal
    down = np.arange(128 * 128).astype(np.uint8).reshape(128, 128)  # all bytes, 64 times
    down[down & 127 == 127] = 0
    down[[3, 124], [0, 127]] = 127, 255
    numbers = np.delete(np.arange(128), [3, 124])
    one = np.ones((1, 128, 1), np.float32)
    for scale in (np.full(128, -0.75), np.linspace(0, 3, 128), np.geomspace(1e-42, 7e35, 128)):
        down_scale = scale.astype(np.float32).reshape(1, 128, 1)
        inputs = {"gate_up": gate_up, "down": down.view(np.int8)[None], "gate_up_scale": one, "down_scale": down_scale}
        inputs |= {"hidden": np.eye(128, dtype=np.float32), "index": np.zeros((128, 1), np.int64)}
        (got,) = session.run(None, {**inputs, "weight": np.ones((128, 1), np.float32)})
        expected = fp8.dequantize(down.view(np.int8), down_scale[0])
        np.testing.assert_array_equal(got.T[numbers], expected[numbers])
        assert np.isnan(got.T[[3, 124]]).all()


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("block", int4.BLOCKS)
def test_experts_in_int4_have_each_value_and_each_zero_point(block: int, zeros: bool, dtype: str) -> None:
    """The same; what goes in is cast to the type, what comes out from it."""
    form, number = ExpertsForm("relu", gated=False, weights=int4.name_of(block, zeros=zeros)), block // 2
    kind = onnx.TensorProto.DataType.Value(dtype.upper())
    cast = "\n".join(f"{name}_cast = Cast<to = {kind}> ({name})" for name in ("hidden", "gate_up_scale", "down_scale"))
    graph = f"""
        experts (float[T,H] hidden, int64[T,K] index, float[T,K] weight, int8[E,R,P] gate_up, int8[E,H,Q] down,
                 float[E,R,G] gate_up_scale, float[E,H,J] down_scale) => (float[T,H] output)
        {{
            {cast}
            there = lynx.LynxExperts (hidden_cast, index, weight, gate_up, down, gate_up_scale_cast, down_scale_cast)
            output = Cast<to = 1> (there)
        }}
    """
    session = _session(_model(graph, experts_attributes(form)))
    rows = np.arange(block)
    gate_up = np.full((1, block, number), 0x88, np.uint8)
    gate_up[0, rows, rows // 2] = np.where(rows % 2, 0x98, 0x89)  # 1 on the diagonal, which is 9 less 8
    down = (
        np.arange(block * number).astype(np.uint8).view(np.int8).reshape(1, block, number)
    )  # all bytes, twice or more
    half = onnx.helper.tensor_dtype_to_np_dtype(kind)
    scales = np.geomspace(1e-3, 10, block).astype(half).astype(np.float32)
    scales[::2] *= -1
    for first in range(int4.LARGEST_ZERO + 1 if zeros else 1):
        points = (rows + first) % (int4.LARGEST_ZERO + 1)  # each row has each in turn
        beside = np.stack([scales, points], axis=1).astype(np.float32) if zeros else scales[:, None]
        inputs = {"gate_up": gate_up.view(np.int8), "down": down, "down_scale": beside[None]}
        inputs["gate_up_scale"] = np.tile(np.array([1, int4.ZERO] if zeros else [1], np.float32), (1, block, 1))
        inputs |= {"hidden": np.eye(block, dtype=np.float32), "index": np.zeros((block, 1), np.int64)}
        inputs["weight"] = np.ones((block, 1), np.float32)
        (got,) = session.run(None, inputs)
        np.testing.assert_array_equal(got, experts(form, **inputs).astype(half).astype(np.float32))
        values = np.stack([down[0] & 15, down[0] >> 4 & 15], axis=-1).reshape(block, block)
        expected = (values - (points if zeros else np.full(block, 8))[:, None]) * scales[:, None]
        np.testing.assert_array_equal(got.T, expected.astype(half).astype(np.float32))


@pytest.mark.parametrize("weights", FORMATS)
def test_quantized_experts_that_nobody_uses_do_not_matter(weights: str) -> None:
    form = QUANTIZED_FORMS[weights][0]
    inputs = _quantized_inputs(form, bias=False)
    session = _quantized_session(form, "float", bias=False)
    (expected,) = session.run(None, inputs)
    for name in ("gate_up_scale", "down_scale"):
        inputs[name][EXPERTS - 1] = -1 if weights == "mxfp4" else np.nan  # NaN in both
    np.testing.assert_array_equal(session.run(None, inputs)[0], expected)
    inputs["index"][:] = -1
    np.testing.assert_array_equal(session.run(None, inputs)[0], np.zeros_like(expected))


# ---------------------------------------------------------------------------------------------- both, and add_functions

# Two layers of selection and experts, the second without renormalisation and without biases, then a third selection
# like the first.
LAYERS = """
layers (float[T,E] c, int64[T,K] i, float[T,K] w, int32 b, float f, bool[T] m, float[T,H] x,
        float[E,I2,H] gu, float[E,H,I] d, float[E,I2] gub, float[E,H] db)
    => (int64[T,K] i1, float[T,K] w1, float[T,H] y1, int64[T,K] i2, float[T,K] w2, float[T,H] y2, int64[T,K] i3)
{
    i1, w1, a1 = lynx.LynxSelect (c, c, i, w, b, f, m)
    y1 = lynx.LynxExperts (x, i1, w1, gu, d, gub, db)
    i2, w2, a2 = lynx.LynxSelect (c, c, i, w, b, f, m)
    y2 = lynx.LynxExperts (x, i2, w2, gu, d)
    i3, w3, a3 = lynx.LynxSelect (c, c, i, w, b, f, m)
}
"""


def _routing_feeds(batch: Batch) -> dict[str, Array]:
    """The inputs of a LynxSelect in the graphs here: a budget of 2, and `combine` is `choice`."""
    return {
        "c": batch.choice,
        "i": batch.topk_index,
        "w": batch.topk_weight,
        "b": np.array(2, np.int32),
        "f": np.zeros((), np.float32),
        "m": np.arange(TOKENS) % 5 != 3,
    }


def _layers_attributes(first: Selection, second: Selection) -> list[Attributes]:
    one = select_attributes(first, experts_per_token=WIDTH, renormalize=True, scale=1.0)
    other = select_attributes(second, experts_per_token=WIDTH, renormalize=False, scale=1.0)
    form = experts_attributes(ExpertsForm())
    return [one, form, other, form, one]


def test_each_variant_has_an_overload_that_onnx_runtime_calls() -> None:
    first, second = PRESETS["lynx"], PRESETS["lynx-latency"]
    model = _model(LAYERS, *_layers_attributes(first, second))
    assert [node.overload for node in model.graph.node] == ["", "", "1", "1", ""]
    assert [(f.name, f.overload) for f in model.functions] == [
        ("LynxSelect", ""),
        ("LynxExperts", ""),
        ("LynxSelect", "1"),
        ("LynxExperts", "1"),
    ]
    form, batch = ExpertsForm(), _random_batch(TOKENS, EXPERTS, WIDTH)
    batch = replace(batch, combine=batch.choice)
    inputs = _experts_inputs(form, np.float32, bias=True)
    inputs["hidden"] = np.nan_to_num(inputs["hidden"])
    feeds = _routing_feeds(batch)
    feeds |= {"x": inputs["hidden"], "gu": inputs["gate_up"], "d": inputs["down"]}
    feeds |= {"gub": inputs["gate_up_bias"], "db": inputs["down_bias"]}
    i1, w1, y1, i2, w2, y2, i3 = _session(model).run(None, feeds)
    one, other = batch.select(first, 2), batch.select(second, 2, renormalize=False)
    assert not np.array_equal(one.index, other.index)
    for got, expected in ((i1, one.index), (i2, other.index), (i3, one.index)):
        np.testing.assert_array_equal(got, expected)
    for index, weight, got, names in (
        (i1, w1, y1, ("gate_up", "down", "gate_up_bias", "down_bias")),
        (i2, w2, y2, ("gate_up", "down")),
    ):
        output = experts(form, inputs["hidden"], index, weight, *(inputs[name] for name in names))
        np.testing.assert_allclose(got, output, rtol=1e-4, atol=1e-4)


def test_adding_functions_again_changes_nothing_but_what_was_ours() -> None:
    model = _model(LAYERS, *_layers_attributes(PRESETS["lynx"], PRESETS["oea"]))
    theirs = onnx.parser.parse_function('<domain: "theirs", opset_import: ["": 24]> F (x) => (y) { y = Relu (x) }')
    model.functions.insert(0, theirs)
    before = model.SerializeToString(deterministic=True)
    assert add_functions(model) == 5
    assert model.SerializeToString(deterministic=True) == before
    # Made alike, the second variant is gone.
    model.graph.node[2].CopyFrom(model.graph.node[4])
    assert add_functions(model) == 5
    assert [(f.name, f.overload) for f in model.functions] == [
        ("F", ""),
        ("LynxSelect", ""),
        ("LynxExperts", ""),
        ("LynxExperts", "1"),
    ]


def test_nodes_in_subgraphs_have_their_functions_too() -> None:
    model = onnx.parser.parse_model(
        f"""{HEADER}
        g (bool go, float[T,E] c, int64[T,K] i, float[T,K] w, int32 b, float f, bool[T] m) => (int64[T,K] index)
        {{
            index = If (go) <
                then_branch = yes () => (i1) {{ i1, w1, a1 = lynx.LynxSelect (c, c, i, w, b, f, m) }},
                else_branch = no () => (i2) {{ i2 = Identity (i) }}
            >
        }}"""
    )
    (branch,) = [a.g for a in model.graph.node[0].attribute if a.name == "then_branch"]
    attributes = select_attributes(PRESETS["lynx"], experts_per_token=WIDTH, renormalize=True, scale=1.0)
    branch.node[0].attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())
    assert add_functions(model) == 1
    batch = _random_batch(TOKENS, EXPERTS, WIDTH)
    batch = replace(batch, combine=batch.choice)
    (got,) = _session(model).run(None, _routing_feeds(batch) | {"go": np.array(True)})
    np.testing.assert_array_equal(got, batch.select(PRESETS["lynx"], 2).index)


def test_a_model_without_lynx_nodes_is_left_alone() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[T] x) => (float[T] y) { y = Relu (x) }'
    )
    before = model.SerializeToString(deterministic=True)
    assert add_functions(model) == 0
    assert model.SerializeToString(deterministic=True) == before


def test_versions_are_declared() -> None:
    # Overloads need IR version 10; a graph of a rewrite may not know our domain yet.
    model = _model(SELECT_GRAPH, select_attributes(PRESETS["lynx"], experts_per_token=2, renormalize=True, scale=1.0))
    model.ir_version = 8
    del model.opset_import[1]
    add_functions(model)
    assert model.ir_version == 10
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 24, "lynx": 1}


def _set(node: onnx.NodeProto, name: str, value: str | None) -> None:
    """Give a node's attribute another value, or remove it."""
    place = [attribute.name for attribute in node.attribute].index(name)
    node.attribute.pop(place)
    if value is not None:
        node.attribute.append(onnx.helper.make_attribute(name, value))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: setattr(m.graph.node[0], "op_type", "LynxOther"), "lynx.LynxOther: known are LynxSelect"),
        (lambda m: m.graph.node[1].input.pop(), r"\(LynxExperts\) has the inputs .*'gub'\]: it has to have 5 or 7"),
        (lambda m: m.graph.node[0].input.pop(), r"\(LynxSelect\) has the inputs .* it has to have 7"),
        (lambda m: m.graph.node[3].input.extend(["gub", ""]), r"'gub', ''\]: it has to have 5 or 7"),
        (lambda m: m.graph.node[0].attribute.pop(0), "LynxSelect lacks vote"),
        (lambda m: m.graph.node[1].attribute.pop(0), "LynxExperts lacks activation"),
        (lambda m: _set(m.graph.node[1], "weights", None), "LynxExperts lacks weights"),
        (lambda m: _set(m.graph.node[3], "weights", "mxfp4"), "'d'\\]: it has to have 7 or 9 with mxfp4 weights"),
        (lambda m: _set(m.graph.node[3], "weights", "fp8"), "'d'\\]: it has to have 7 or 9 with fp8 weights"),
        (lambda m: _set(m.graph.node[3], "weights", "fp3"), "weights = 'fp3': it has to be one of float, mxfp4, fp8"),
        # ONNX Runtime takes a body for one of the model's opset, and fails on it or not.
        (lambda m: setattr(m.opset_import[0], "version", 21), "opset 21, the bodies of the lynx ops need 24"),
    ],
)
def test_a_model_that_is_refused_is_named_and_left_alone(edit: Any, message: str) -> None:
    model = _model(LAYERS, *_layers_attributes(PRESETS["lynx"], PRESETS["oea"]))
    edit(model)
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(ExportError, match=message):
        add_functions(model)
    assert model.SerializeToString(deterministic=True) == before


def test_values_that_no_body_knows_are_refused() -> None:
    attributes = select_attributes(PRESETS["lynx"], experts_per_token=2, renormalize=True, scale=1.0)
    with pytest.raises(ExportError, match="vote = 'votes': it has to be count, weight"):
        select_function({**attributes, "vote": "votes"})
    with pytest.raises(ExportError, match="activation = 'mish': it has to be silu"):
        experts_function({**experts_attributes(ExpertsForm()), "activation": "mish"}, bias=False)
    for weights in FORMATS:
        with pytest.raises(ExportError, match=f"transposed weights in {weights}"):
            experts_function({**experts_attributes(ExpertsForm(weights=weights)), "transposed": 1}, bias=False)
