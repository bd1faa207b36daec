"""Each op of ONNX Runtime around the blocks, rewritten to standard ones: the same numbers from one node alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from foreign_run import session
from onnx import TensorProto, helper, numpy_helper

from lynx_trt.export.standard import standardize

TOLERANCE = 2e-5
B, S, H = 2, 3, 16
RANDOM = np.random.default_rng(0)


def _normal(*shape: int) -> Any:
    return RANDOM.standard_normal(shape).astype(np.float32)


def _model(op: str, given: dict[str, Any], stored: dict[str, Any], inputs: list[str], outputs: int, domain: str, attributes: dict[str, Any]) -> onnx.ModelProto:  # fmt: skip  # noqa: E501
    names = [f"out{number}" for number in range(outputs)]
    node = helper.make_node(op, inputs, names, name="it", domain=domain, **attributes)
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in given.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=11)


def _same(op: str, given: dict[str, Any], stored: dict[str, Any], inputs: list[str], *, outputs: int = 1, domain: str = "com.microsoft", **attributes: Any) -> None:  # fmt: skip  # noqa: E501
    model = _model(op, given, stored, inputs, outputs, domain, attributes)
    expected = session(model).run(None, given)
    made = ir.from_proto(model)
    done = standardize(made)
    assert done.counts == {op: 1}, done.left
    assert not any(node.domain for node in made.graph)
    for got, wanted in zip(session(ir.to_proto(made)).run(None, given), expected, strict=True):
        assert np.abs(got - wanted).max() <= TOLERANCE * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("op", ["Gelu", "FastGelu", "QuickGelu", "BiasGelu"])
def test_activations(op: str) -> None:
    bias = {"bias": _normal(H)} if op in ("FastGelu", "BiasGelu") else {}
    _same(op, {"x": _normal(B, S, H)}, bias, ["x", *bias])


def test_norms() -> None:
    x, scale = {"x": _normal(B, S, H)}, {"scale": np.abs(_normal(H))}
    _same("SimplifiedLayerNormalization", x, scale, ["x", "scale"], domain="", axis=-1, epsilon=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("op", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
def test_norms_with_a_residual(op: str, bias: bool) -> None:
    given = {"x": _normal(B, S, H), "skip": _normal(B, S, H)}
    stored = {"gamma": np.abs(_normal(H))}
    stored |= {"beta": _normal(H)} if op == "SkipLayerNormalization" else {}
    stored |= {"bias": _normal(H)} if bias else {}
    _same(op, given, stored, [*given, *stored], epsilon=1e-6)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rank", [3, 4])
def test_rotary_embedding(interleaved: int, rank: int) -> None:
    x = _normal(B, S, 2 * 8) if rank == 3 else _normal(B, 2, S, 8)
    angle = np.arange(12)[:, None] * np.linspace(0.1, 1.0, 4)[None]
    stored = {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    ids = np.array([[0, 1, 2], [4, 5, 6]], np.int64)
    _same("RotaryEmbedding", {"x": x, "ids": ids}, stored, ["x", "ids", "cos", "sin"], interleaved=interleaved)


@pytest.mark.parametrize("attributes", [{}, {"alpha": 0.5}, {"transA": 1}, {"transB": 1, "alpha": 2.0}], ids=str)
def test_fused_matmul(attributes: dict[str, Any]) -> None:
    given = {"a": _normal(2, 4, 4), "b": _normal(2, 4, 4)}
    _same("FusedMatMul", given, {}, ["a", "b"], **attributes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_products_with_quantized_weights(bits: int, zero_points: bool) -> None:
    columns, rows, block = 64, 6, 32
    blocks = columns // block
    stored = {
        "b": RANDOM.integers(0, 256, (rows, blocks, block * bits // 8)).astype(np.uint8),
        "scales": np.abs(_normal(rows, blocks)) / 2**bits,
    }
    if zero_points:
        stored["zeros"] = RANDOM.integers(0, 256, (rows, -(-blocks * bits // 8))).astype(np.uint8)
    # accuracy_level 1: the kernel computes in float32, as the standard form does.
    attributes = {"N": rows, "K": columns, "bits": bits, "block_size": block, "accuracy_level": 1}
    _same("MatMulNBits", {"a": _normal(B, S, columns)}, stored, ["a", *stored], **attributes)


ATTENTION = {
    "plain": {},
    "rotary": {"do_rotary": 1},
    "window": {"local_window_size": 3},
    "softcap": {"softcap": 5.0},
    "smooth": {"smooth_softmax": 1},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("kind", ATTENTION)
def test_group_query_attention(kind: str, past: int) -> None:
    """A prompt, and a step of one token with a cache that grows; 4 heads of 16 share 2."""
    length = 1 if past else S
    given = {
        "q": _normal(B, length, 64),
        "k": _normal(B, length, 32),
        "v": _normal(B, length, 32),
        "past_k": _normal(B, 2, past, 16),
        "past_v": _normal(B, 2, past, 16),
        "last": np.full(B, past + length - 1, np.int32),
        "total": np.array(past + length, np.int32),
    }
    angle = np.arange(16)[:, None] * np.linspace(0.1, 1.0, 8)[None]
    stored = {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    stored = stored if kind == "rotary" else {}
    attributes = {"num_heads": 4, "kv_num_heads": 2, **ATTENTION[kind]}
    _same("GroupQueryAttention", given, stored, [*given, *stored], outputs=3, **attributes)


def test_what_has_no_standard_form_stays_and_is_named() -> None:
    given = {"a": _normal(2, 4, 4), "b": _normal(2, 4, 4)}
    made = ir.from_proto(_model("FusedMatMul", given, {}, ["a", "b"], 1, "com.microsoft", {"transBatchA": 1}))
    done = standardize(made)
    assert not done.counts
    assert done.left == ["node 'it' stays a com.microsoft.FusedMatMul: transBatchA and transBatchB are not known here"]
    assert [node.op_type for node in made.graph] == ["FusedMatMul"]
