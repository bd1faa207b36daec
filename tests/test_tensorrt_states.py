"""Engines with layers that keep states, built with the real TensorRT for RTX on a CPU."""

from __future__ import annotations

import importlib.metadata
import re

import onnx
import pytest
from onnx import helper
from test_tensorrt_build import build, edit, node_of, profiles_of, set_attribute
from trt_graphs import KEY_HEADS, KEYS, VALUE_HEADS, VALUES, WIDTH, make_state_graph

from lynx_trt.errors import TensorRTError, UsageError
from lynx_trt.export.ops import CAUSAL_CONV, EXPERTS, LINEAR_ATTENTION, SELECT
from lynx_trt.plugins import aot
from lynx_trt.plugins.specs import CausalConvSpec, LinearAttentionSpec
from lynx_trt.tensorrt import loader

try:
    for wheel in loader.RTX_WHEELS:
        importlib.metadata.version(wheel)
except importlib.metadata.PackageNotFoundError as missing:
    pytest.skip(f"{missing.name} is not installed: {loader.INSTALL_CPU}", allow_module_level=True)

CHANNELS = 2 * KEY_HEADS * KEYS + VALUE_HEADS * VALUES
PRECISION = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def test_profiles_give_states_batches(tmp_path):
    """As they do a cache: one for each sequence, and of the sizes that the graph has."""
    decode, prefill = profiles_of(make_state_graph(tmp_path / "model.onnx"))
    for profile, batches in ((decode, (1, 8, 64)), (prefill, (1, 2, 4))):
        assert profile.shapes["past_states.0.conv"] == tuple((batch, WIDTH - 1, CHANNELS) for batch in batches)
        assert profile.shapes["past_states.0.recurrent"] == tuple(
            (batch, VALUE_HEADS, KEYS, VALUES) for batch in batches
        )


@pytest.mark.parametrize(
    ("dtype", "bias", "per_key"), [("fp32", False, False), ("fp16", True, True), ("bf16", True, False)]
)
def test_build(tmp_path, dtype, bias, per_key):
    path = make_state_graph(tmp_path / "model.onnx", dtype, bias=bias, per_key=per_key)
    report = build(path)
    assert report.plugin_layers == {SELECT: 0, EXPERTS: 0, CAUSAL_CONV: 1, LINEAR_ATTENTION: 1}
    assert report.messages == ()
    io = {tensor.name: (tensor.mode, tensor.dtype, tensor.shape) for tensor in report.io}
    for mode, end in (("input", "past"), ("output", "present")):
        assert io[f"{end}_states.0.conv"] == (mode, PRECISION[dtype], (-1, WIDTH - 1, CHANNELS))
        assert io[f"{end}_states.0.recurrent"] == (mode, "float32", (-1, VALUE_HEADS, KEYS, VALUES))
    assert io["hidden"] == ("output", PRECISION[dtype], (-1, VALUE_HEADS * VALUES))
    plan = path.with_suffix(".plan").read_bytes()
    assert len(re.findall(rb"update_rule\0.{8}gated_delta", plan, re.DOTALL)) == 2  # one layer, two profiles
    assert b"dispatch\0" not in plan


def test_real_kernels(tmp_path, monkeypatch):
    """For SM 89, in the engine: made for what TensorRT says of the layers."""
    pytest.importorskip("triton")
    asked, made = [], []

    def compile_for(ops, sms, **options):
        asked.extend(ops)
        made.append(real(ops, sms, **options))
        return made[-1]

    real = aot.compile_for
    monkeypatch.setattr(aot, "compile_for", compile_for)
    path = make_state_graph(tmp_path / "model.onnx", "bf16", per_key=True)
    report = build(path, sms=(89,))
    assert report.messages == ()
    scale, decays = KEYS**-0.5, VALUE_HEADS * KEYS
    heads = KEY_HEADS, VALUE_HEADS
    assert [op.spec for op in asked] == [
        CausalConvSpec(CHANNELS, WIDTH, "bfloat16", True, "silu"),
        LinearAttentionSpec(KEYS, VALUES, "bfloat16", decays, *heads, "gated_delta", scale, 1e-6),
    ]
    # One token of a sequence in decode; more of them, in chunks, in a prefill.
    assert {op.ranges[0] for op in asked} == {(1, 1)}
    assert {cubin.function for cubin in made[0].cubins} == {
        "causal_conv_kernel",
        "linear_attention_kernel",
        "linear_attention_key_chunks_kernel",
        "linear_attention_prefill_kernel",
    }
    assert made[0].to_bytes() in path.with_suffix(".plan").read_bytes()


@pytest.mark.parametrize(
    ("op", "name", "value", "message"),
    [
        (CAUSAL_CONV, "activation", "gelu", "LynxCausalConv: activation is 'gelu'; allowed: none, silu"),
        (LINEAR_ATTENTION, "key_heads", 3, "query has A = 32, and A has to be 3 F, which is 48"),
        (LINEAR_ATTENTION, "value_heads", 2, "beta has N = 4, and N has to be 2, which is 2"),
        (LINEAR_ATTENTION, "update_rule", None, "LynxLinearAttention needs the attribute update_rule"),
    ],
)
def test_nodes_that_are_wrong(tmp_path, op, name, value, message):
    path = edit(make_state_graph(tmp_path / "model.onnx"), set_attribute(op, name, value))
    with pytest.raises(TensorRTError, match=message):
        build(path)


def test_a_decay_of_another_width(tmp_path):
    """Neither one for each head nor one for each key: no kernel is made for it."""

    def change(model):
        node = node_of(model, LINEAR_ATTENTION)
        node.input[3] = "query32"
        cast = helper.make_node("Cast", ["query"], ["query32"], name="cast", to=onnx.TensorProto.FLOAT)
        model.graph.node.insert(list(model.graph.node).index(node), cast)

    path = edit(make_state_graph(tmp_path / "model.onnx"), change)
    with pytest.raises(
        UsageError, match="a token has 32 decays: it has to be 4, one for each head, or 64, one for each key"
    ):
        build(path, sms=(89,))
