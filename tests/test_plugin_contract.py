"""The contract, and that the Python plugins keep it (against the real TensorRT API, without building)."""

from __future__ import annotations

import gc
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fake_kernels import FakeDriver, fake_kernels

from lynx_trt.errors import ArtifactError, TensorRTError
from lynx_trt.experts import FORMATS, ExpertsForm
from lynx_trt.export.ops import (
    PLUGIN,
    causal_conv_attributes,
    experts_attributes,
    linear_attention_attributes,
    select_attributes,
)
from lynx_trt.plugins import launcher, python_plugin
from lynx_trt.plugins.contract import (
    CAUSAL_CONV_CONTRACT,
    CONTRACTS,
    EXPERTS_CONTRACT,
    FLOAT_TYPES,
    LINEAR_ATTENTION_CONTRACT,
    SELECT_CONTRACT,
)
from lynx_trt.plugins.plans import plans
from lynx_trt.plugins.specs import ExpertsSpec, SelectSpec
from lynx_trt.selection import PRESETS

HANDED = {"dispatch": 1}
SELECT_ATTRIBUTES = select_attributes(PRESETS["lynx"], experts_per_token=2, renormalize=True, scale=1.0)
EXPERTS_ATTRIBUTES = experts_attributes(ExpertsForm(activation="gelu_tanh", limit=7.0))
ATTRIBUTES = {
    "LynxSelect": SELECT_ATTRIBUTES,
    "LynxExperts": EXPERTS_ATTRIBUTES,
    "LynxCausalConv": causal_conv_attributes("silu"),
    "LynxLinearAttention": linear_attention_attributes(
        key_heads=2, value_heads=4, update_rule="gated_delta", scale=0.25, epsilon=1e-6
    ),
}
MOE, STATEFUL = ("LynxSelect", "LynxExperts"), ("LynxCausalConv", "LynxLinearAttention")


# ---- the contract


@pytest.mark.parametrize("name", CONTRACTS)
def test_fields_are_the_attributes_that_the_exporter_writes(name):
    contract = CONTRACTS[name]
    attributes = list(contract.fields)
    assert contract.has_dispatch == (name in MOE)
    if contract.has_dispatch:
        dispatch = attributes.pop()  # written by `prepare` alone
        assert (dispatch.name, dispatch.default, dispatch.choices) == ("dispatch", 0, (0, 1))
    assert {field.name for field in attributes} == ATTRIBUTES[name].keys() - PLUGIN.keys()
    kinds = {"char": str, "int32": int, "float32": float}
    for field in attributes:
        assert type(ATTRIBUTES[name][field.name]) is kinds[field.type], field.name
    assert {"plugin_namespace": contract.namespace, "plugin_version": contract.version} == PLUGIN


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_allowed(preset):
    attributes = select_attributes(PRESETS[preset], experts_per_token=8, renormalize=False, scale=2.5)
    values = SELECT_CONTRACT.parse_fields(dict(attributes))
    assert values == {name: value for name, value in attributes.items() if name not in PLUGIN} | {"dispatch": 0}


def test_defaults_are_the_ops_defaults():
    assert EXPERTS_CONTRACT.parse_fields({}) == EXPERTS_CONTRACT.parse_fields(dict(experts_attributes(ExpertsForm())))


def test_required_and_forbidden_values():
    with pytest.raises(ValueError, match="LynxSelect needs the attribute vote"):
        SELECT_CONTRACT.parse_fields({})
    with pytest.raises(ValueError, match="activation is 'swish'; allowed: silu"):
        EXPERTS_CONTRACT.parse_fields({"activation": "swish"})
    with pytest.raises(ValueError, match="LynxExperts: dispatch is 2; allowed: 0, 1"):
        EXPERTS_CONTRACT.parse_fields({"dispatch": 2})


def test_output_shapes():
    t, e, k, h, i = 5, 8, 2, 16, 32  # all different, so that no axis can be mistaken for another
    shapes = [(t, e), (t, e), (t, k), (t, k), (), (), (t,)]
    assert SELECT_CONTRACT.output_shapes(shapes) == [(t, k), (t, k), ()]
    assert SELECT_CONTRACT.of_node(HANDED).output_shapes(shapes) == [(t, k), (t, k), (), (10 + 16 + 2,)]
    shapes = [(t, h), (t, k), (t, k), (e, 2 * i, h), (e, h, i)]
    assert EXPERTS_CONTRACT.output_shapes(shapes) == [(t, h)]
    transposed = [(t, h), (t, k), (t, k), (e, h, 2 * i), (e, i, h), (e, 2 * i), (e, h)]
    assert EXPERTS_CONTRACT.output_shapes(transposed) == [(t, h)]
    for inputs in (shapes, transposed):
        assert EXPERTS_CONTRACT.of_node(HANDED).output_shapes([*inputs, (28,)]) == [(t, h)]


def test_the_size_of_the_metadata():
    """It says what a LynxExperts may read of it; one of other T, K or E would be read past its end, or wrongly."""
    node = EXPERTS_CONTRACT.of_node(HANDED)
    shapes = [(5, 16), (5, 2), (5, 2), (8, 64, 16), (8, 16, 32)]
    for biases in ([], [(8, 64), (8, 16)]):
        node.check_sizes([*shapes, *biases, (28,)])
        message = r"LynxExperts: dispatch has D = 26, and D has to be T K \+ 2 E \+ 2, which is 28"
        with pytest.raises(ValueError, match=message):
            node.check_sizes([*shapes, *biases, (26,)])
    EXPERTS_CONTRACT.check_sizes(shapes)


# T, K and E are 5, 2 and 8 in all nodes below, H and I are 64 and 96, and 256 and 384 in FP8.
FLOAT = {"gate_up": (8, 192, 64), "down": (8, 64, 96)}
MXFP4 = {"gate_up": (8, 192, 32), "down": (8, 64, 48), "gate_up_scale": (8, 192, 2), "down_scale": (8, 64, 3)}
BIASES = {"gate_up_bias": (8, 192), "down_bias": (8, 64)}
FP8 = {
    "hidden": (5, 256),
    "gate_up": (8, 768, 256),
    "down": (8, 256, 384),
    "gate_up_scale": (8, 768, 2),
    "down_scale": (8, 256, 3),
}
FP8_BIASES = {"gate_up_bias": (8, 768), "down_bias": (8, 256)}
# Of int4 blocks of 32, in the sizes of MXFP4, with zero points and without.
INT4 = {**MXFP4, "gate_up_scale": (8, 192, 2), "down_scale": (8, 64, 3)}
ZEROS = {**MXFP4, "gate_up_scale": (8, 192, 4), "down_scale": (8, 64, 6)}
IN_MXFP4, IN_FP8 = {"weights": "mxfp4"}, {"weights": "fp8"}
IN_INT4, IN_ZEROS, IN_WIDE = ({"weights": f"int4_g{kind}"} for kind in ("32", "32_zeros", "128"))
# The types of weights in two kinds; the scales of int4 are of the graph's own.
QUANTIZED_TYPES = {"mxfp4": ["int8"] * 4, "fp8": ["int8", "int8", "float32", "float32"]}


def shapes_of(weights, **changes):
    """A node's inputs' shapes, with those that differ; of `hidden` too where H is another."""
    sizes = {"hidden": (5, 64), "index": (5, 2), "weight": (5, 2), **weights}
    assert not changes.keys() - sizes
    return list((sizes | changes).values())


def test_sizes_that_fit():
    """Whatever is not known before the engine runs is not looked at."""
    forms = [
        ({}, FLOAT),
        ({"gated": 0}, {**FLOAT, "gate_up": (8, 96, 64)}),
        ({"transposed": 1}, {"gate_up": (8, 64, 192), "down": (8, 96, 64)}),
        (IN_MXFP4, MXFP4),
        (IN_MXFP4 | {"gated": 0}, {**MXFP4, "gate_up": (8, 96, 32), "gate_up_scale": (8, 96, 2)}),
        (IN_FP8, FP8),
        (IN_FP8 | {"gated": 0}, {**FP8, "gate_up": (8, 384, 256), "gate_up_scale": (8, 384, 2)}),
        (IN_INT4, INT4),
        (IN_ZEROS, ZEROS),
        (IN_ZEROS | {"gated": 0}, {**ZEROS, "gate_up": (8, 96, 32), "gate_up_scale": (8, 96, 4)}),
    ]
    for values, weights in forms:
        width = shapes_of(weights)[0][1]
        node = EXPERTS_CONTRACT.of_node({"dispatch": 0, **values})
        node.check_sizes(shapes_of(weights))
        node.check_sizes(shapes_of(weights, hidden=(-1, width), index=(-1, 2), weight=(-1, -1)))
        node.check_sizes(shapes_of(weights, hidden=(-1, -1)))
        if "gated" not in values:
            node.check_sizes(shapes_of(weights | (FP8_BIASES if weights is FP8 else BIASES)))
    SELECT_CONTRACT.check_sizes([(-1, 8), (5, 8), (5, 2), (-1, 2), (), (), (5,)])


# What is wrong with a node: its fields, its weights, what is changed in its inputs, and the message. The C++ plugin is
# asked for the same by its own tests.
WRONG_SIZES = [
    ({}, FLOAT, {"weight": (5, 3)}, "weight has K = 3, and index has 2"),
    ({}, FLOAT, {"index": (4, 2)}, "index has T = 4, and hidden has 5"),
    ({}, FLOAT, {"gate_up": (8, 192, 32)}, "gate_up has H = 32, and hidden has 64"),
    ({}, FLOAT, {"down": (7, 64, 96)}, "down has E = 7, and gate_up has 8"),
    ({}, FLOAT, {"gate_up": (8, 96, 64)}, "gate_up has R = 96, and R has to be 2 I, which is 192"),
    ({"gated": 0}, FLOAT, {}, "gate_up has R = 192, and R has to be I, which is 96"),
    ({"transposed": 1}, FLOAT, {}, "gate_up has H = 192, and hidden has 64"),
    ({}, FLOAT | BIASES, {"gate_up_bias": (8, 96)}, "gate_up_bias has R = 96, and gate_up has 192"),
    (IN_MXFP4, MXFP4, {"gate_up": (8, 192, 64)}, "gate_up has P = 64, and 2 P has to be H, which is 64"),
    (IN_MXFP4, MXFP4, {"gate_up_scale": (8, 192, 4)}, "gate_up_scale has G = 4, and 32 G has to be H, which is 64"),
    (IN_MXFP4, MXFP4, {"gate_up_scale": (8, 96, 2)}, "gate_up_scale has R = 96, and gate_up has 192"),
    (IN_MXFP4, MXFP4, {"down": (8, 64, 96)}, "gate_up has R = 192, and R has to be 4 Q, which is 384"),
    (IN_MXFP4 | {"gated": 0}, MXFP4, {}, "gate_up has R = 192, and R has to be 2 Q, which is 96"),
    (IN_MXFP4, MXFP4, {"down_scale": (8, 64, 6)}, "down_scale has J = 6, and 32 J has to be 2 Q, which is 96"),
    (IN_MXFP4, MXFP4, {"down_scale": (8, 32, 3)}, "down_scale has H = 32, and hidden has 64"),
    (IN_MXFP4, MXFP4 | BIASES, {"down_bias": (8, 32)}, "down_bias has H = 32, and hidden has 64"),
    # H is 48, which is no multiple of 32: no number of blocks is right.
    (
        IN_MXFP4,
        {"gate_up": (8, 192, 24), "down": (8, 48, 48), "gate_up_scale": (8, 192, 1), "down_scale": (8, 48, 3)},
        {"hidden": (5, 48)},
        "gate_up_scale has G = 1, and 32 G has to be H, which is 48",
    ),
    (IN_FP8, FP8, {"hidden": (5, 512)}, "gate_up has H = 256, and hidden has 512"),
    (IN_FP8, FP8, {"gate_up": (8, 768, 128)}, "gate_up has H = 128, and hidden has 256"),
    (IN_FP8, FP8, {"gate_up_scale": (8, 768, 8)}, "gate_up_scale has G = 8, and 128 G has to be H, which is 256"),
    (IN_FP8, FP8, {"gate_up_scale": (8, 6, 2)}, "gate_up_scale has R = 6, and gate_up has 768"),
    (IN_FP8, FP8, {"gate_up_scale": (1, 768, 2)}, "gate_up_scale has E = 1, and gate_up has 8"),
    (IN_FP8, FP8, {"down": (8, 256, 192)}, "gate_up has R = 768, and R has to be 2 I, which is 384"),
    (IN_FP8 | {"gated": 0}, FP8, {}, "gate_up has R = 768, and R has to be I, which is 384"),
    (IN_FP8, FP8, {"down_scale": (8, 256, 12)}, "down_scale has J = 12, and 128 J has to be I, which is 384"),
    (IN_FP8, FP8, {"down_scale": (8, 2, 3)}, "down_scale has H = 2, and hidden has 256"),
    (IN_FP8, FP8 | FP8_BIASES, {"gate_up_bias": (8, 384)}, "gate_up_bias has R = 384, and gate_up has 768"),
    (IN_INT4, INT4, {"gate_up": (8, 192, 64)}, "gate_up has P = 64, and 2 P has to be H, which is 64"),
    (IN_INT4, ZEROS, {}, "gate_up_scale has G = 4, and 32 G has to be H, which is 64"),
    (IN_ZEROS, INT4, {}, "gate_up_scale has G = 2, and 32 G has to be 2 H, which is 128"),
    (IN_ZEROS, ZEROS, {"down_scale": (8, 64, 3)}, "down_scale has J = 3, and 32 J has to be 4 Q, which is 192"),
    (IN_ZEROS | {"gated": 0}, ZEROS, {}, "gate_up has R = 192, and R has to be 2 Q, which is 96"),
    (IN_WIDE, INT4, {}, "gate_up_scale has G = 2, and 128 G has to be H, which is 64"),
    # H and then I is one block and a half: the numbers of scales and zero points are what the products ask for.
    (
        IN_ZEROS,
        ZEROS,
        {"hidden": (5, 48), "gate_up": (8, 192, 24), "gate_up_scale": (8, 192, 3)}
        | {"down": (8, 48, 48), "down_scale": (8, 48, 6)},
        "gate_up_scale has G = 3, which has to be a multiple of 2",
    ),
    (
        IN_ZEROS,
        ZEROS,
        {"gate_up": (8, 96, 32), "gate_up_scale": (8, 96, 4), "down": (8, 64, 24), "down_scale": (8, 64, 3)},
        "down_scale has J = 3, which has to be a multiple of 2",
    ),
    # What the other kind has.
    (IN_FP8, FP8 | MXFP4, {"hidden": (5, 64)}, "gate_up has H = 32, and hidden has 64"),
    (IN_MXFP4, FP8, {}, "gate_up has R = 768, and R has to be 4 Q, which is 1536"),
    # H and then I is 192, which is no multiple of 128, with the last block left out or cut off.
    (
        IN_FP8,
        FP8,
        {"hidden": (5, 192), "gate_up": (8, 768, 192), "gate_up_scale": (8, 768, 1)}
        | {"down": (8, 192, 384), "down_scale": (8, 192, 3)},
        "gate_up_scale has G = 1, and 128 G has to be H, which is 192",
    ),
    (
        IN_FP8,
        FP8,
        {"gate_up": (8, 384, 256), "gate_up_scale": (8, 384, 2), "down": (8, 256, 192), "down_scale": (8, 256, 2)},
        "down_scale has J = 2, and 128 J has to be I, which is 192",
    ),
]


@pytest.mark.parametrize(("values", "weights", "changes", "message"), WRONG_SIZES)
def test_sizes_that_do_not_fit(values, weights, changes, message):
    """The kernels believe them: what is too small would be read past its end."""
    node = EXPERTS_CONTRACT.of_node({"dispatch": 0, **values})
    with pytest.raises(ValueError, match=f"^LynxExperts: {message}$"):
        node.check_sizes(shapes_of(weights, **changes))


def test_sizes_of_a_selection_that_do_not_fit():
    with pytest.raises(ValueError, match="LynxSelect: combine has E = 4, and choice has 8"):
        SELECT_CONTRACT.check_sizes([(5, 8), (5, 4), (5, 2), (5, 2), (), (), (5,)])


# The nodes that keep states: T = 6 tokens of B = 2 sequences; C = 32, W = 4; G = 2, N = 4, D = 16, M = 8.
CONV = {"values": (6, 32), "weight": (32, 4), "past_state": (2, 3, 32), "lengths": (2,), "bias": (32,)}
ATTENTION = {
    "query": (6, 32),
    "key": (6, 32),
    "value": (6, 32),
    "decay": (6, 4),
    "beta": (6, 4),
    "past_state": (2, 4, 16, 8),
    "lengths": (2,),
}
STATES = {"LynxCausalConv": CONV, "LynxLinearAttention": ATTENTION}
WRONG_STATES = [
    ("LynxCausalConv", {"weight": (16, 4)}, "weight has C = 16, and values has 32"),
    ("LynxCausalConv", {"weight": (32, 3)}, r"weight has W = 3, and W has to be V \+ 1, which is 4"),
    ("LynxCausalConv", {"past_state": (2, 3, 16)}, "past_state has C = 16, and values has 32"),
    ("LynxCausalConv", {"lengths": (3,)}, "lengths has B = 3, and past_state has 2"),
    ("LynxCausalConv", {"bias": (16,)}, "bias has C = 16, and values has 32"),
    ("LynxLinearAttention", {"key": (6, 64)}, "key has A = 64, and query has 32"),
    ("LynxLinearAttention", {"query": (6, 64), "key": (6, 64)}, "query has A = 64, and A has to be 2 F, which is 32"),
    ("LynxLinearAttention", {"value": (6, 16)}, "value has U = 16, and U has to be N M, which is 32"),
    ("LynxLinearAttention", {"decay": (5, 4)}, "decay has T = 5, and query has 6"),
    ("LynxLinearAttention", {"beta": (6, 2)}, "past_state has N = 4, and beta has 2"),
    ("LynxLinearAttention", {"lengths": (6,)}, "lengths has B = 6, and past_state has 2"),
    (
        "LynxLinearAttention",
        {"value": (6, 64), "beta": (6, 8), "past_state": (2, 8, 16, 8)},
        "beta has N = 8, and N has to be 4, which is 4",
    ),
]


def state_node(name):
    return CONTRACTS[name].of_node(CONTRACTS[name].parse_fields(ATTRIBUTES[name]))


@pytest.mark.parametrize(("name", "changes", "message"), WRONG_STATES)
def test_sizes_of_states_that_do_not_fit(name, changes, message):
    with pytest.raises(ValueError, match=f"^{name}: {message}$"):
        state_node(name).check_sizes(list((STATES[name] | changes).values()))


def test_states():
    """Counts of types, shapes and inputs; the state's type is the graph's own in one, float32 in the other."""
    for name, shapes in STATES.items():
        given, node = list(shapes.values()), state_node(name)
        node.check_sizes(given)
        node.check_sizes([(-1, *shape[1:]) for shape in given[:1]] + given[1:])
        assert node.output_shapes(given) == [given[0 if name == "LynxCausalConv" else 2], shapes["past_state"]]
        assert node.counts(given) == (6, 2)
        with pytest.raises(ValueError, match=f"{name}: T = 7 is no multiple of B = 2"):
            node.counts([(7, 32), *given[1:]])
    assert SELECT_CONTRACT.counts([(5, 8)]) == (5, 0)
    assert (CAUSAL_CONV_CONTRACT.input_counts, LINEAR_ATTENTION_CONTRACT.input_counts) == ((4, 5), (7,))
    conv = [*["bfloat16"] * 3, "int64", "bfloat16"]
    CAUSAL_CONV_CONTRACT.check_types(conv)
    CAUSAL_CONV_CONTRACT.check_types(conv[:4])
    assert CAUSAL_CONV_CONTRACT.output_types(conv) == ["bfloat16", "bfloat16"]
    attention = [*["float16"] * 3, *["float32"] * 3, "int64"]
    LINEAR_ATTENTION_CONTRACT.check_types(attention)
    assert LINEAR_ATTENTION_CONTRACT.output_types(attention) == ["float16", "float32"]
    with pytest.raises(ValueError, match="past_state is float16; allowed: float32"):
        LINEAR_ATTENTION_CONTRACT.check_types([*attention[:5], "float16", "int64"])
    for contract, types in ((CAUSAL_CONV_CONTRACT, conv), (LINEAR_ATTENTION_CONTRACT, attention)):
        every = [*types, *contract.output_types(types)]
        for position, kind in enumerate(every):
            for other in (*FLOAT_TYPES, "int32", "int64", "bool"):
                given = [*every[:position], other, *every[position + 1 :]]
                right = other == kind or (position == 0 and other in FLOAT_TYPES)
                assert contract.supports(position, given, len(types)) == right


def test_attributes_of_states():
    with pytest.raises(ValueError, match="LynxCausalConv: activation is 'gelu'; allowed: none, silu"):
        CAUSAL_CONV_CONTRACT.parse_fields({"activation": "gelu"})
    with pytest.raises(ValueError, match="update_rule is 'delta'; allowed: gated, gated_delta"):
        LINEAR_ATTENTION_CONTRACT.parse_fields(ATTRIBUTES["LynxLinearAttention"] | {"update_rule": "delta"})
    with pytest.raises(ValueError, match="LynxLinearAttention needs the attribute key_heads"):
        LINEAR_ATTENTION_CONTRACT.parse_fields({})


@pytest.mark.parametrize("kind", QUANTIZED_TYPES)
def test_quantized_weights(kind):
    """Of other types, their scales before the biases; the field and the tensors have to agree."""
    values = {"weights": kind}
    names = ["hidden", "index", "weight", "gate_up", "down", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias"]
    node = EXPERTS_CONTRACT.of_node({"dispatch": 0, **values})
    handed = EXPERTS_CONTRACT.of_node(HANDED | values)
    assert (node.input_counts, handed.input_counts) == ((7, 9), (8, 10))
    assert [tensor.name for tensor in node.inputs_of(9)] == names
    assert [tensor.name for tensor in node.inputs_of(7)] == names[:7]
    assert [tensor.name for tensor in handed.inputs_of(8)] == [*names[:7], "dispatch"]
    assert [tensor.name for tensor in handed.inputs_of(10)] == [*names, "dispatch"]
    types = ["bfloat16", "int64", "float32", *QUANTIZED_TYPES[kind]]
    node.check_types(types)
    node.check_types([*types, "bfloat16", "bfloat16"])
    assert node.output_types(types) == ["bfloat16"]
    with pytest.raises(ValueError, match="gate_up is int32; allowed: int8"):  # what TensorRT makes of uint8
        node.check_types([*types[:3], "int32", *types[4:]])
    with pytest.raises(ValueError, match="down_bias is float32; allowed: bfloat16"):
        node.check_types([*types, "bfloat16", "float32"])
    (other,) = QUANTIZED_TYPES.keys() - {kind}
    right, wrong = QUANTIZED_TYPES[kind][-1], QUANTIZED_TYPES[other][-1]
    with pytest.raises(ValueError, match=f"gate_up_scale is {wrong}; allowed: {right}"):
        node.check_types([*types[:3], *QUANTIZED_TYPES[other]])
    with pytest.raises(ValueError, match=f"down_scale is bfloat16; allowed: {right}"):  # the graph's own precision
        node.check_types([*types[:-1], "bfloat16"])
    with pytest.raises(ValueError, match="gate_up is int8; allowed: float16"):  # a node without the field
        EXPERTS_CONTRACT.check_types(["float16", *types[1:]])
    with pytest.raises(ValueError, match="LynxExperts has 5 inputs; it takes 7 or 9"):
        node.check_types(["float16", "int64", "float32", "float16", "float16"])
    with pytest.raises(ValueError, match="weights is 'int4'; allowed: float, mxfp4, fp8, nvfp4, int4_g32, "):
        EXPERTS_CONTRACT.parse_fields({"weights": "int4"})
    with pytest.raises(ValueError, match=f"LynxExperts: transposed is 1, and weights in {kind}"):
        EXPERTS_CONTRACT.parse_fields(values | {"transposed": 1})


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if FORMATS[kind].scale_type == "float"])
def test_scales_of_int4_and_nvfp4_are_of_the_graphs_precision(kind):
    node = EXPERTS_CONTRACT.of_node({"dispatch": 0, "weights": kind})
    types = ["bfloat16", "int64", "float32", "int8", "int8", "bfloat16", "bfloat16"]
    node.check_types(types)
    assert node.output_types(types) == ["bfloat16"]
    assert all(node.supports(position, [*types, "bfloat16"], 7) for position in range(8))
    for wrong in ("float16", "float32", "int8"):
        with pytest.raises(ValueError, match=f"gate_up_scale is {wrong}; allowed: bfloat16"):
            node.check_types([*types[:5], wrong, "bfloat16"])
        assert not node.supports(6, [*types[:6], wrong, "bfloat16"], 7)
    with pytest.raises(ValueError, match="down is bfloat16; allowed: int8"):
        node.check_types([*types[:4], "bfloat16", *types[5:]])


def test_a_node_has_the_metadata_or_not():
    """The field and the number of inputs have to agree, with and without biases."""
    plain, handed = EXPERTS_CONTRACT.of_node({"dispatch": 0}), EXPERTS_CONTRACT.of_node(HANDED)
    assert (plain.input_counts, handed.input_counts) == ((5, 7), (6, 8))
    names = ["hidden", "index", "weight", "gate_up", "down", "gate_up_bias", "down_bias", "dispatch"]
    assert [tensor.name for tensor in handed.inputs_of(8)] == names
    assert [tensor.name for tensor in handed.inputs_of(6)] == [*names[:5], "dispatch"]
    types = ["float16", "int64", "float32", "float16", "float16"]
    handed.check_types([*types, "int32"])
    with pytest.raises(ValueError, match="LynxExperts has 5 inputs; it takes 6 or 8 with dispatch = 1"):
        handed.check_types(types)
    with pytest.raises(ValueError, match="LynxExperts has 6 inputs; it takes 5 or 7"):
        plain.check_types([*types, "int32"])
    with pytest.raises(ValueError, match="dispatch is int64; allowed: int32"):
        handed.check_types([*types, "int64"])
    with pytest.raises(ValueError, match=r"dispatch has 2 dimensions; it must be \[D\]"):
        handed.check_ranks([2, 2, 2, 3, 3, 2])


@pytest.mark.parametrize("kind", FLOAT_TYPES)
@pytest.mark.parametrize(
    ("weights", "n_inputs"),
    [*(("float", n) for n in range(5, 9)), *((weights, n) for weights in QUANTIZED_TYPES for n in range(7, 11))],
)
def test_experts_formats(kind, weights, n_inputs):
    handed = n_inputs % 2 == 0
    contract = EXPERTS_CONTRACT.of_node({"dispatch": int(handed), "weights": weights})
    types = [kind, "int64", "float32", *QUANTIZED_TYPES.get(weights, [kind] * 2), kind, kind]
    types = [*types[: n_inputs - handed], *["int32"] * handed, kind]
    assert all(contract.supports(p, types, n_inputs) for p in range(len(types)))
    assert contract.output_types(types[:n_inputs]) == [kind]
    for position in range(len(types)):
        assert not contract.supports(position, types, n_inputs, linear=False)
        wrong = [*types[:position], "bool" if types[position] == "int8" else "int8", *types[position + 1 :]]
        assert not contract.supports(position, wrong, n_inputs)
        assert not contract.supports(position, types, n_inputs + 1)


@pytest.mark.parametrize("dispatch", [0, 1])
def test_select_formats(dispatch):
    """Each of its inputs and outputs has one type, and the linear format."""
    contract = SELECT_CONTRACT.of_node({"dispatch": dispatch})
    inputs = ["float32", "float32", "int64", "float32", "int32", "float32", "bool"]
    types = [*inputs, "int64", "float32", "int32", *["int32"] * dispatch]
    assert contract.output_types(inputs) == types[7:]
    for position, kind in enumerate(types):
        for other in (*FLOAT_TYPES, "int32", "int64", "bool"):
            given = [*types[:position], other, *types[position + 1 :]]
            assert contract.supports(position, given, 7) == (other == kind)
        assert not contract.supports(position, types, 7, linear=False)


def test_select_without_a_floor():
    """A node as it was before there were floors."""
    with pytest.raises(ValueError, match="LynxSelect has 6 inputs; it takes 7"):
        SELECT_CONTRACT.check_types(["float32", "float32", "int64", "float32", "int32", "bool"])
    with pytest.raises(ValueError, match="LynxSelect: floor is float16; allowed: float32"):
        SELECT_CONTRACT.check_types(["float32", "float32", "int64", "float32", "int32", "float16", "bool"])


def test_experts_precision_is_one():
    mixed = ["float16", "int64", "float32", "float32", "float16", "float16"]
    assert not EXPERTS_CONTRACT.supports(3, mixed, 5)
    with pytest.raises(ValueError, match="gate_up is float32; allowed: float16"):
        EXPERTS_CONTRACT.check_types(mixed[:5])


def test_weights_stay_float32_in_a_half_graph():
    types = ["float16", "int64", "float16", "float16", "float16", "float16"]
    assert not EXPERTS_CONTRACT.supports(2, types, 5)


def test_a_lone_bias_is_refused():
    with pytest.raises(ValueError, match="has 6 inputs; it takes 5 or 7"):
        EXPERTS_CONTRACT.check_types(["float32"] * 6)
    assert not EXPERTS_CONTRACT.supports(0, ["float32"] * 7, 6)


def test_ranks():
    SELECT_CONTRACT.check_ranks([2, 2, 2, 2, 0, 0, 1])
    with pytest.raises(ValueError, match=r"budget has 1 dimensions; it must be \[\]"):
        SELECT_CONTRACT.check_ranks([2, 2, 2, 2, 1, 0, 1])
    with pytest.raises(ValueError, match=r"floor has 1 dimensions; it must be \[\]"):
        SELECT_CONTRACT.check_ranks([2, 2, 2, 2, 0, 1, 1])


def test_no_heavy_import():
    code = "import sys, lynx_trt.plugins.contract, lynx_trt.plugins.python_plugin; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnx", "tensorrt"} & set(modules)
    assert not any("_native" in name for name in modules)


# ---- the Python plugin


def creator_of(trt, name):
    python_plugin.register(trt)  # a second time: harmless
    return next(creator for creator in python_plugin._CREATORS[trt.__name__] if creator.name == name)


KEPT: list = []


def fields_of(trt, name, attributes, *, nul: bool = False):
    fields = []
    for field in CONTRACTS[name].fields:
        if field.name not in attributes:
            continue
        value = attributes[field.name]
        if field.type == "char":  # the parser passes C strings, with their end
            fields.append(trt.PluginField(field.name, value.encode() + b"\0" * nul, trt.PluginFieldType.CHAR))
        else:
            kind = trt.PluginFieldType.INT32 if field.type == "int32" else trt.PluginFieldType.FLOAT32
            fields.append(trt.PluginField(field.name, np.array([value], dtype=field.type), kind))
    KEPT.append(fields)  # a collection copies fields without keeping them, a field keeps its value alive
    return trt.PluginFieldCollection(fields)


@pytest.mark.parametrize("name", CONTRACTS)
def test_registered(trt, name):
    contract = CONTRACTS[name]
    found = trt.get_plugin_registry().get_creator(contract.name, contract.version, contract.namespace)
    assert found is not None
    assert (found.name, found.plugin_version, found.plugin_namespace) == (name, "1", "lynx")
    assert [field.name for field in creator_of(trt, name).field_names] == [
        *(field.name for field in contract.fields),
        "kernels_id",
        "kernels",
    ]
    assert len(python_plugin._CREATORS[trt.__name__]) == len(CONTRACTS)


@pytest.mark.parametrize(
    ("name", "dispatch"), [*((name, dispatch) for name in MOE for dispatch in (0, 1)), *((n, 0) for n in STATEFUL)]
)
def test_attributes_survive_serialization(trt, name, dispatch):
    creator = creator_of(trt, name)
    phase = trt.TensorRTPhase.BUILD
    attributes = ATTRIBUTES[name] | ({"dispatch": dispatch} if dispatch else {})
    plugin = creator.create_plugin("node", fields_of(trt, name, attributes, nul=True), phase)
    expected = {key: value for key, value in attributes.items() if key not in PLUGIN}
    expected |= {"dispatch": dispatch} if name in MOE else {}
    expected |= {"epsilon": pytest.approx(1e-6)} if "epsilon" in expected else {}  # in float32
    assert plugin.values == expected
    stored = plugin.get_fields_to_serialize()
    gc.collect()  # the values must outlive the call: TensorRT reads them afterwards
    again = creator.create_plugin("node", stored, trt.TensorRTPhase.RUNTIME)
    assert again.values == expected
    assert again.clone().values == expected
    assert (again.plugin_name, again.plugin_version, again.plugin_namespace) == (name, "1", "lynx")
    outputs = len(CONTRACTS[name].outputs) + (dispatch if name == "LynxSelect" else 0)
    assert plugin.num_outputs == again.num_outputs == again.clone().num_outputs == outputs


def test_output_types(trt):
    plugin = creator_of(trt, "LynxSelect").create_plugin(
        "node", fields_of(trt, "LynxSelect", SELECT_ATTRIBUTES), trt.TensorRTPhase.BUILD
    )
    f32, i64 = trt.DataType.FLOAT, trt.DataType.INT64
    given = [f32, f32, i64, f32, trt.DataType.INT32, f32, trt.DataType.BOOL]
    assert plugin.get_output_data_types(given) == [i64, f32, trt.DataType.INT32]
    plugin = creator_of(trt, "LynxExperts").create_plugin(
        "node", fields_of(trt, "LynxExperts", EXPERTS_ATTRIBUTES), trt.TensorRTPhase.BUILD
    )
    bf16 = trt.DataType.BF16
    assert plugin.get_output_data_types([bf16, i64, f32, bf16, bf16]) == [bf16]
    i8, u8 = trt.DataType.INT8, trt.DataType.UINT8
    for weights, scale in (("mxfp4", i8), ("fp8", f32), ("int4_g128", bf16)):
        fields = fields_of(trt, "LynxExperts", EXPERTS_ATTRIBUTES | {"weights": weights})
        plugin = creator_of(trt, "LynxExperts").create_plugin("node", fields, trt.TensorRTPhase.BUILD)
        assert plugin.get_output_data_types([bf16, i64, f32, i8, i8, scale, scale]) == [bf16]
        for wrong in (u8, trt.DataType.FP8):
            with pytest.raises(ValueError, match=rf"gate_up is DataType\.{wrong.name}; allowed: int8"):
                plugin.get_output_data_types([bf16, i64, f32, wrong, wrong, scale, scale])


def test_handed_metadata_is_an_output_and_an_input(trt):
    python_plugin.take_refusals()
    f32, f16, i32, i64 = trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.INT32, trt.DataType.INT64
    select, experts = (
        creator_of(trt, name).create_plugin(name, fields_of(trt, name, attributes | HANDED), trt.TensorRTPhase.BUILD)
        for name, attributes in ATTRIBUTES.items()
        if name in MOE
    )
    assert select.get_output_data_types([f32, f32, i64, f32, i32, f32, trt.DataType.BOOL]) == [i64, f32, i32, i32]
    assert experts.get_output_data_types([f16, i64, f32, f16, f16, i32]) == [f16]
    with pytest.raises(ValueError, match="it takes 6 or 8 with dispatch = 1"):
        experts.get_output_data_types([f16, i64, f32, f16, f16, f16, f16])
    assert python_plugin.take_refusals() == [
        "node LynxExperts: LynxExperts has 7 inputs; it takes 6 or 8 with dispatch = 1"
    ]


def test_refusals_are_kept_for_the_message(trt):
    python_plugin.take_refusals()
    attributes = {**SELECT_ATTRIBUTES, "vote": "majority"}
    with pytest.raises(ValueError, match="majority"):
        creator_of(trt, "LynxSelect").create_plugin(
            "select.3", fields_of(trt, "LynxSelect", attributes), trt.TensorRTPhase.BUILD
        )
    assert python_plugin.take_refusals() == [
        "node select.3: LynxSelect: vote is 'majority'; allowed: count, weight, affinity, score"
    ]
    assert python_plugin.take_refusals() == []


@pytest.mark.parametrize("name", CONTRACTS)
def test_running_without_kernels_refuses_loudly(trt, name):
    plugin = creator_of(trt, name).create_plugin("n", fields_of(trt, name, ATTRIBUTES[name]), trt.TensorRTPhase.RUNTIME)
    plugin.on_shape_change([], [])
    with pytest.raises(TensorRTError, match=f"{name} holds no GPU kernels.*again with --sm"):
        plugin.enqueue([], [], [], [], 0, 0)
    assert python_plugin.take_refusals()[-1].startswith(f"node n: {name} holds no GPU kernels")
    assert plugin.get_workspace_size([], []) == 0


def with_kernels(trt, name, kernels_id: str, blob: bytes = b"", **changes) -> object:
    fields = list(fields_of(trt, name, ATTRIBUTES[name] | changes))
    fields.append(trt.PluginField("kernels_id", kernels_id.encode() + b"\0", trt.PluginFieldType.CHAR))
    if blob:
        fields.append(trt.PluginField("kernels", np.frombuffer(blob, np.int8), trt.PluginFieldType.INT8))
    KEPT.append(fields)
    return trt.PluginFieldCollection(fields)


def test_kernels_travel_and_run(trt, monkeypatch):
    """One node carries the kernels, another runs them: serialized, made again in any order, cloned for a context."""
    select = SelectSpec.from_attributes(SELECT_ATTRIBUTES, experts=8, experts_per_token=2)
    kernels = fake_kernels([select], (90,), 64)
    blob = kernels.to_bytes()
    monkeypatch.setattr(launcher, "_BLOBS", {})
    monkeypatch.setattr(launcher, "_PARSED", {})
    carrier = creator_of(trt, "LynxExperts").create_plugin(
        "carrier", with_kernels(trt, "LynxExperts", "some id", blob), trt.TensorRTPhase.BUILD
    )
    runner = creator_of(trt, "LynxSelect").create_plugin(
        "runner", with_kernels(trt, "LynxSelect", "some id"), trt.TensorRTPhase.BUILD
    )
    stored = [(p.contract.name, p.get_fields_to_serialize()) for p in (runner, carrier)]
    assert [[field.name for field in fields][-2:] for _, fields in stored] == [
        ["dispatch", "kernels_id"],
        ["kernels_id", "kernels"],
    ]
    monkeypatch.setattr(launcher, "_BLOBS", {})
    gc.collect()
    runner, carrier = (
        creator_of(trt, name).create_plugin("n", fields, trt.TensorRTPhase.RUNTIME) for name, fields in stored
    )
    assert carrier.clone().blob == blob
    runner = runner.attach_to_context(None)
    driver = FakeDriver()
    monkeypatch.setattr(type(runner), "driver", staticmethod(lambda: driver))
    shapes = [(5, 8), (5, 8), (5, 2), (5, 2), (), (), (5,)]
    descs = [SimpleNamespace(dims=shape, type=trt.DataType.FLOAT) for shape in shapes]
    runner.on_shape_change(descs, [])
    pointers = [256 * n for n in range(1, 8)]
    runner.enqueue(descs, [], pointers, pointers[:3], 4096, 77)
    (launch,) = driver.launched
    assert launch["words"][:7] == pointers
    assert launch["stream"] == 77
    dynamic = [SimpleNamespace(max=(64, *shape[1:]), desc=desc) for shape, desc in zip(shapes, descs, strict=True)]
    assert runner.get_workspace_size(dynamic, []) == launcher.workspace_bytes(kernels, select.key, 64) > 0


def test_a_builder_may_run_it_on_anything(trt, monkeypatch):
    """TensorRT may time a plugin on inputs of its own: it launches nothing before it is attached to a context."""
    select = SelectSpec.from_attributes(SELECT_ATTRIBUTES, experts=8, experts_per_token=2)
    blob = fake_kernels([select], (90,), 64).to_bytes()
    plugin = creator_of(trt, "LynxSelect").create_plugin(
        "n", with_kernels(trt, "LynxSelect", "timed", blob), trt.TensorRTPhase.BUILD
    )
    driver = FakeDriver()
    monkeypatch.setattr(type(plugin), "driver", staticmethod(lambda: driver))
    shapes = [(5, 8), (5, 8), (5, 2), (5, 2), (), (), (5,)]
    descs = [SimpleNamespace(dims=shape, type=trt.DataType.FLOAT) for shape in shapes]
    pointers = [256 * n for n in range(1, 8)]
    for timed in (plugin, plugin.clone()):
        timed.on_shape_change(descs, [])
        timed.enqueue(descs, [], pointers, pointers[:3], 4096, 77)
    assert driver.launched == driver.loaded == []
    attached = plugin.attach_to_context(None)
    attached.on_shape_change(descs, [])
    attached.enqueue(descs, [], pointers, pointers[:3], 4096, 77)
    assert len(driver.launched) == 1


def test_handed_metadata_is_read(trt, monkeypatch):
    """LynxExperts launches what was made for a node with the metadata, and refuses that of another T."""
    spec = ExpertsSpec.from_attributes(
        EXPERTS_ATTRIBUTES, experts=8, experts_per_token=2, hidden=16, inner=32, dtype="float32", dispatch_given=True
    )
    kernels = fake_kernels([spec], (90,), 64)
    plugin = creator_of(trt, "LynxExperts").create_plugin(
        "n", with_kernels(trt, "LynxExperts", "handed", kernels.to_bytes(), dispatch=1), trt.TensorRTPhase.RUNTIME
    )
    plugin = plugin.attach_to_context(None)
    driver = FakeDriver()
    monkeypatch.setattr(type(plugin), "driver", staticmethod(lambda: driver))
    shapes = [(5, 16), (5, 2), (5, 2), (8, 64, 16), (8, 16, 32), (28,)]
    descs = [SimpleNamespace(dims=shape, type=trt.DataType.FLOAT) for shape in shapes]
    plugin.on_shape_change(descs, [])
    pointers = [256 * n for n in range(1, 7)]
    plugin.enqueue(descs, [], pointers, [4096], 8192, 77)
    gate_up, *_ = driver.launched
    assert len(driver.launched) == 3
    assert [word for word in gate_up["words"] if word in pointers] == [pointers[0], pointers[3], pointers[5]]
    descs[-1] = SimpleNamespace(dims=(30,))
    with pytest.raises(ValueError, match=r"dispatch has D = 30, and D has to be T K .* which is 28"):
        plugin.on_shape_change(descs, [])


def test_another_gpu_is_told(trt, monkeypatch):
    select = SelectSpec.from_attributes(SELECT_ATTRIBUTES, experts=8, experts_per_token=2)
    blob = fake_kernels([select], (80, 90), 8).to_bytes()
    plugin = creator_of(trt, "LynxSelect").create_plugin(
        "n", with_kernels(trt, "LynxSelect", "for 80 and 90", blob), trt.TensorRTPhase.RUNTIME
    )
    monkeypatch.setattr(type(plugin), "driver", staticmethod(lambda: FakeDriver(sm=120)))
    shapes = [(5, 8), (5, 8), (5, 2), (5, 2), (), (), (5,)]
    descs = [SimpleNamespace(dims=shape, type=trt.DataType.FLOAT) for shape in shapes]
    python_plugin.take_refusals()
    with pytest.raises(ArtifactError, match="are for SM 80, 90, and this GPU is SM 120"):
        plugin.enqueue(descs, [], [0] * 7, [0] * 3, 0, 0)
    assert "this GPU is SM 120" in python_plugin.take_refusals()[0]


@pytest.mark.parametrize("name", STATEFUL)
def test_states_are_launched_for_their_sequences(trt, monkeypatch, name):
    """T and B are arguments; a step of as many tokens of fewer sequences is another, and of many more another plan."""
    values, shapes = CONTRACTS[name].parse_fields(ATTRIBUTES[name]), list(STATES[name].values())
    spec = launcher.spec_of(name, values, shapes, "float16")
    kernels = fake_kernels([spec], (90,), 64)
    fields = with_kernels(trt, name, f"of {name}", kernels.to_bytes())
    plugin = creator_of(trt, name).create_plugin("n", fields, trt.TensorRTPhase.RUNTIME).attach_to_context(None)
    driver = FakeDriver()
    monkeypatch.setattr(type(plugin), "driver", staticmethod(lambda: driver))
    inputs, outputs = [256 * n for n in range(1, 1 + len(shapes))], [8192, 16384]
    few, *_, many = plans(spec, 90, 64)
    (step,) = few.steps
    for sequences in (2, 3):
        given = [(sequences, *shape[1:]) if shape[0] == 2 else shape for shape in shapes]
        descs = [SimpleNamespace(dims=shape, type=trt.DataType.HALF) for shape in given]
        plugin.enqueue(descs, [], inputs, outputs, 0, 77)
        launch = driver.launched[-1]
        assert launch["words"] == [*inputs, *outputs, 6, sequences, 0, 0]
        assert launch["programs"] == step.grid.per * sequences
    dynamic = [SimpleNamespace(max=desc.dims, desc=desc) for desc in descs]
    assert plugin.get_workspace_size(dynamic, []) == many.workspace_bytes(6)
    del driver.launched[:]
    sizes = {"T": 48, "B": 2}
    tensors = CONTRACTS[name].inputs_of(len(shapes))
    given = [
        tuple(sizes.get(at, size) for at, size in zip(t.shape, shape, strict=True))
        for t, shape in zip(tensors, shapes, strict=True)
    ]
    descs = [SimpleNamespace(dims=shape, type=trt.DataType.HALF) for shape in given]
    plugin.enqueue(descs, [], inputs, outputs, 4096, 77)
    assert [launch["programs"] for launch in driver.launched] == [each.grid.programs(48, 132, 2) for each in many.steps]
