"""The NumPy reference of the experts against transformers' own expert modules, in float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from lynx_trt import fp8
from lynx_trt.errors import UsageError
from lynx_trt.experts import ACTIVATIONS, FORMATS, ExpertsForm, experts
from lynx_trt.mxfp4 import dequantize

Array = NDArray[Any]

# Odd sizes, all different, so that no transposition goes unseen. With 7 tokens of 2 experts some expert of 5 is hit
# by several tokens; expert 4 is hit by none (`_routing`).
TOKENS, EXPERTS, WIDTH, HIDDEN, INNER = 7, 5, 2, 6, 3

# Of ours: transformers' name.
NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}


def _module(kind: type[torch.nn.Module], **config: Any) -> Any:
    """A module of random float64 weights; the sizes go by each architecture's name for them."""
    sizes = {
        "num_local_experts": EXPERTS,
        "n_routed_experts": EXPERTS,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "moe_intermediate_size": INNER,
        "moe_latent_size": None,
        "_experts_implementation": "eager",
    }
    module = kind(SimpleNamespace(**sizes, **config)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        # Of scale 1.5, so that limits bite and activations leave their linear part.
        parameter.data.normal_(0, 1.5, generator=generator)
    return module


def _routing() -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(TOKENS, HIDDEN))
    index = np.stack([rng.permutation(EXPERTS - 1)[:WIDTH] for _ in range(TOKENS)])
    return hidden, index, rng.random((TOKENS, WIDTH))


def _run(module: Any, hidden: Array, index: Array, weight: Array) -> Array:
    with torch.no_grad():
        output = module(torch.from_numpy(hidden), torch.from_numpy(index), torch.from_numpy(weight))
    array: Array = output.numpy()
    return array


def _parameters(module: Any, *names: str) -> list[Array]:
    return [getattr(module, name).detach().numpy() for name in names]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_experts_are_those_of_mixtral(activation: str) -> None:
    module = _module(MixtralExperts, hidden_act=NAMES[activation])
    routing = _routing()
    got = experts(ExpertsForm(activation), *routing, *_parameters(module, "gate_up_proj", "down_proj"))
    np.testing.assert_allclose(got, _run(module, *routing), rtol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ungated_experts_are_those_of_nemotron(activation: str) -> None:
    module = _module(NemotronHExperts, mlp_hidden_act=NAMES[activation])
    routing = _routing()
    got = experts(ExpertsForm(activation, gated=False), *routing, *_parameters(module, "up_proj", "down_proj"))
    np.testing.assert_allclose(got, _run(module, *routing), rtol=1e-12)


def test_interleaved_clamped_experts_with_biases_are_those_of_gpt_oss() -> None:
    module = _module(GptOssExperts, swiglu_alpha=1.702, swiglu_limit=1.5)
    form = ExpertsForm(transposed=True, interleaved=True, alpha=1.702, limit=1.5, up_offset=1.0)
    routing = _routing()
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    got = experts(form, *routing, *_parameters(module, *names))
    np.testing.assert_allclose(got, _run(module, *routing), rtol=1e-12)
    # The limit is reached: without it the result is another.
    assert not np.allclose(got, experts(replace(form, limit=0.0), *routing, *_parameters(module, *names)), rtol=1e-3)


def _inputs(form: ExpertsForm, dtype: Any = np.float64) -> list[Array]:
    """hidden, index, weight, gate_up, down, gate_up_bias, down_bias."""
    rng = np.random.default_rng(1)
    rows = 2 * INNER if form.gated else INNER
    gate_up, down = rng.normal(size=(EXPERTS, rows, HIDDEN)), rng.normal(size=(EXPERTS, HIDDEN, INNER))
    if form.transposed:
        gate_up, down = gate_up.swapaxes(1, 2), down.swapaxes(1, 2)
    hidden, index, weight = _routing()
    biases = (rng.normal(size=(EXPERTS, rows)), rng.normal(size=(EXPERTS, HIDDEN)))
    return [hidden.astype(dtype), index, weight, *(a.astype(dtype) for a in (gate_up, down, *biases))]


@pytest.mark.parametrize("gated", [True, False])
def test_transposed_weights_are_the_same_experts(gated: bool) -> None:
    form = ExpertsForm(gated=gated)
    inputs = _inputs(form)
    swapped = [*inputs[:3], inputs[3].swapaxes(1, 2), inputs[4].swapaxes(1, 2), *inputs[5:]]
    np.testing.assert_array_equal(experts(replace(form, transposed=True), *swapped), experts(form, *inputs))


def test_interleaved_weights_are_the_same_experts() -> None:
    form = ExpertsForm(limit=0.5, up_offset=1.0)  # gate and up differ in how they are clamped and shifted
    inputs = _inputs(form)
    order = np.arange(2 * INNER).reshape(2, INNER).T.reshape(-1)  # 0, I, 1, I + 1, ...
    mixed = [*inputs[:3], inputs[3][:, order], inputs[4], inputs[5][:, order], inputs[6]]
    np.testing.assert_array_equal(experts(replace(form, interleaved=True), *mixed), experts(form, *inputs))


def test_limit_of_ungated_experts_is_that_of_up() -> None:
    # -3 and 3 become -2 and 2; relu2 of them is 0 and 4. One expert, H = I = 1.
    form = ExpertsForm("relu2", gated=False, limit=2.0)
    one = np.ones((1, 1, 1))
    got = experts(form, np.array([[-3.0], [3.0]]), np.zeros((2, 1), int), np.ones((2, 1)), one, one)
    np.testing.assert_array_equal(got, [[0.0], [4.0]])


def test_empty_slots_add_nothing_and_unused_experts_do_not_matter() -> None:
    form = ExpertsForm()
    inputs = _inputs(form)
    expected = experts(form, *inputs)
    inputs[1], inputs[2] = (np.pad(a, ((0, 0), (1, 0)), constant_values=-1) for a in inputs[1:3])  # a slot more
    for weights in inputs[3:]:
        weights[4] = np.nan  # nobody's expert; -1 would be this one, were it an index like others
    np.testing.assert_array_equal(experts(form, *inputs), expected)


def test_tokens_without_experts_get_zeros_whatever_they_hold() -> None:
    form = ExpertsForm()
    inputs = _inputs(form)
    inputs[0][2] = np.nan  # a padding row
    inputs[1][2] = -1
    got = experts(form, *inputs)
    assert (got[2] == 0).all()
    assert np.isfinite(got).all()
    inputs[1][:] = -1  # nobody is active
    assert (experts(form, *inputs) == 0).all()


def test_no_tokens() -> None:
    form = ExpertsForm()
    inputs = _inputs(form)
    assert experts(form, *(a[:0] for a in inputs[:3]), *inputs[3:]).shape == (0, HIDDEN)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_accumulated_in_float32_and_rounded_once(dtype: Any) -> None:
    form = ExpertsForm()
    inputs = _inputs(form, dtype)
    wide = [a if a.dtype == np.int64 else a.astype(np.float32) for a in inputs]
    got = experts(form, *inputs)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, experts(form, *wide).astype(dtype))


def test_float32_is_accumulated_in_float32() -> None:
    form = ExpertsForm()
    inputs = _inputs(form, np.float32)
    exact = experts(form, *(a if a.dtype == np.int64 else a.astype(np.float64) for a in inputs))
    got = experts(form, *inputs)
    assert got.dtype == np.float32
    assert not np.array_equal(got, exact.astype(np.float32))
    np.testing.assert_allclose(got, exact, rtol=1e-4)


def test_silu_does_not_overflow() -> None:
    # exp(200) is no float32; silu(-200) is 0 and silu(200) is 200. A warning of NumPy's would fail here too.
    form = ExpertsForm(gated=False)
    one = np.ones((1, 1, 1), np.float32)
    with np.errstate(all="raise", under="ignore"):
        hidden = np.array([[-200], [200]], np.float32)
        got = experts(form, hidden, np.zeros((2, 1), int), np.ones((2, 1), np.float32), one, one)
    np.testing.assert_allclose(got, [[0.0], [200.0]], atol=1e-30)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, np.zeros(3), r"hidden and down have the shapes \(3,\)"),
        (1, np.zeros((TOKENS, WIDTH)), "index is float64"),
        (1, np.full((TOKENS, WIDTH), 5), "index spans 5 to 5: it has to lie in -1 to 4"),
        (1, np.full((TOKENS, WIDTH), -2), "index spans -2 to -2"),
        (2, np.zeros((TOKENS, 1)), r"weight has the shape \(7, 1\).*\(7, 2\)"),
        (3, np.zeros((EXPERTS, INNER, HIDDEN)), r"gate_up has the shape \(5, 3, 6\).*\(5, 6, 6\)"),  # ungated ones
        (4, np.zeros((EXPERTS, INNER, HIDDEN)), r"gate_up has the shape \(5, 6, 6\).*\(5, 12, 6\)"),  # transposed
        (5, np.zeros((EXPERTS, INNER)), r"gate_up_bias has the shape \(5, 3\).*\(5, 6\)"),
        (6, np.zeros((EXPERTS, INNER)), r"down_bias has the shape \(5, 3\).*\(5, 6\)"),
    ],
)
def test_wrong_inputs_are_named(place: int, value: Array, message: str) -> None:
    inputs = _inputs(ExpertsForm())
    inputs[place] = value
    with pytest.raises(UsageError, match=message):
        experts(ExpertsForm(), *inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "swish"}, "activation is 'swish'.*silu, gelu, gelu_tanh, relu, relu2"),
        ({"gated": 1}, "gated is 1"),
        ({"alpha": 0.0}, "alpha is 0.0.*above 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"limit": -7.0}, "limit is -7.0"),
        ({"limit": float("inf")}, "limit is inf.*0 for no limit"),
        ({"up_offset": float("nan")}, "up_offset is nan"),
        ({"gated": False, "interleaved": True}, "gated is False"),
        ({"gated": False, "up_offset": 1.0}, "gated is False"),
    ],
)
def test_wrong_forms_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExpertsForm(**fields)


# ------------------------------------------------------------------------------------------------------- MXFP4


def _mxfp4(rng: np.random.Generator, *shape: int) -> tuple[Array, Array]:
    """Random values and scales of a matrix [...,D]; scales from 2^-9 to 2."""
    *rows, width = shape
    values = rng.integers(-128, 128, (*rows, width // 2)).astype(np.int8)
    scales = rng.integers(118, 129, (*rows, width // 32)).astype(np.uint8).view(np.int8)
    return values, scales


def test_mxfp4_is_what_the_format_says() -> None:
    # By hand: 0x21 is 1.0 over 0.5, 0xF8 is -6.0 over -0.0; 127 is 1, 130 is 8, 0 is 2^-127, 255 no number.
    values = np.zeros((4, 16), np.uint8)
    values[:, 0], values[:, 15] = 0x21, 0xF8
    matrix = dequantize(values.view(np.int8), np.array([[127], [130], [0], [255]], np.uint8).view(np.int8))
    assert matrix[0, [0, 1, 30, 31]].tolist() == [0.5, 1, 0, -6]
    assert np.signbit(matrix[0, 30])
    assert matrix[1, [0, 1, 31]].tolist() == [4, 8, -48]
    assert matrix[2, 31] == -6 * 2.0**-127
    assert np.isnan(matrix[3]).all()


@pytest.mark.parametrize("form", [ExpertsForm(weights="mxfp4"), ExpertsForm("gelu", gated=False, weights="mxfp4")])
def test_experts_in_mxfp4_are_those_of_their_dequantized_weights(form: ExpertsForm) -> None:
    rng = np.random.default_rng(3)
    rows = 128 if form.gated else 64
    gate_up, gate_up_scale = _mxfp4(rng, EXPERTS, rows, 32)
    down, down_scale = _mxfp4(rng, EXPERTS, 32, 64)
    hidden, index = rng.normal(size=(TOKENS, 32)), rng.integers(0, EXPERTS, (TOKENS, WIDTH))
    weight = rng.random((TOKENS, WIDTH))
    scales = {"gate_up_scale": gate_up_scale, "down_scale": down_scale}
    found = experts(form, hidden, index, weight, gate_up, down, **scales)
    full = dequantize(gate_up, gate_up_scale), dequantize(down, down_scale)
    np.testing.assert_array_equal(found, experts(replace(form, weights="float"), hidden, index, weight, *full))
    assert np.abs(found).max() > 1


def test_mistakes_of_mxfp4_are_named() -> None:
    with pytest.raises(UsageError, match="weights is 'fp3': it has to be one of float, mxfp4"):
        ExpertsForm(weights="fp3")
    with pytest.raises(UsageError, match="transposed is True: weights in mxfp4"):
        ExpertsForm(weights="mxfp4", transposed=True)
    rng = np.random.default_rng(3)
    (gate_up, gate_up_scale), (down, down_scale) = _mxfp4(rng, 4, 64, 64), _mxfp4(rng, 4, 64, 32)
    hidden, index, weight = np.zeros((2, 64)), np.zeros((2, 1), np.int64), np.ones((2, 1))
    form = ExpertsForm(weights="mxfp4")
    with pytest.raises(UsageError, match="gate_up_scale has to be given of mxfp4 weights"):
        experts(form, hidden, index, weight, gate_up, down)
    with pytest.raises(UsageError, match=r"down_scale has the shape \(4, 64, 2\)"):
        experts(form, hidden, index, weight, gate_up, down, None, None, gate_up_scale, gate_up_scale)
    with pytest.raises(UsageError, match="gate_up_scale has to be left out of float weights"):
        experts(
            ExpertsForm(), hidden, index, weight, np.zeros((4, 64, 64)), np.zeros((4, 64, 32)), None, None, down_scale
        )
    with pytest.raises(UsageError, match="H and I are 64 and 48: in mxfp4 they have to be multiples of 32"):
        experts(
            form,
            hidden,
            index,
            weight,
            np.zeros((4, 96, 32)),
            np.zeros((4, 64, 24)),
            None,
            None,
            np.zeros((4, 96, 2)),
            np.zeros((4, 64, 1)),
        )


# --------------------------------------------------------------------------------------------------------- FP8


def test_fp8_is_what_the_format_says() -> None:
    """As ml_dtypes has it, NaN at the same two bytes."""
    bits = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(fp8.VALUES, bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    values, scales = np.tile(bits, (2, 2)), np.array([[1, 2, 0.5, 3], [1, 1, 1, 1]], np.float32)
    matrix = fp8.dequantize(values.view(np.int8), scales)
    np.testing.assert_array_equal(matrix[1], np.tile(fp8.VALUES, 2))
    np.testing.assert_array_equal(matrix[0], np.tile(fp8.VALUES, 2) * np.repeat(scales[0], 128))


def test_experts_in_fp8_are_those_of_their_dequantized_weights() -> None:
    rng = np.random.default_rng(3)
    gate_up, down = (
        rng.integers(0, 126, shape).astype(np.int8) for shape in ((EXPERTS, 256, 256), (EXPERTS, 256, 128))
    )
    scales = {
        "gate_up_scale": rng.random((EXPERTS, 256, 2), np.float32),
        "down_scale": rng.random((EXPERTS, 256, 1), np.float32),
    }
    hidden, index = rng.normal(size=(TOKENS, 256)), rng.integers(0, EXPERTS, (TOKENS, WIDTH))
    form, weight = ExpertsForm(weights="fp8"), rng.random((TOKENS, WIDTH))
    found = experts(form, hidden, index, weight, gate_up, down, **scales)
    full = [fp8.dequantize(each, scale) for each, scale in zip((gate_up, down), scales.values(), strict=True)]
    np.testing.assert_array_equal(found, experts(ExpertsForm(), hidden, index, weight, *full))
    with pytest.raises(UsageError, match=r"gate_up_scale has the shape \(5, 256, 1\)"):
        experts(form, hidden, index, weight, gate_up, down, None, None, *[scales["down_scale"]] * 2)


# ------------------------------------------------------------------------------------------------------- int4


def test_int4_is_what_the_format_says() -> None:
    # By hand: 0x21 is 1 and 2, 0xF0 is 0 and 15.
    values = np.zeros((2, 32), np.uint8)
    values[:, 0], values[:, 31] = 0x21, 0xF0
    there = values.view(np.int8)
    matrix = FORMATS["int4_g32"].dequantize(there, np.array([[0.5, 2], [0, -1]], np.float16))
    assert matrix[:, [0, 1, 2, 62, 63]].tolist() == [[-3.5, -3, -4, -16, 14], [0, 0, 0, 8, -7]]
    # Both scales of a row, then both of its zero points.
    beside = np.array([[0.5, 2, 0, 16], [3, -1, 1, 15]], np.float16)
    matrix = FORMATS["int4_g32_zeros"].dequantize(there, beside)
    assert matrix[:, [0, 1, 2, 62, 63]].tolist() == [[0.5, 1, 0, -32, -2], [0, 3, -3, 15, 0]]


def test_nvfp4_is_what_the_format_says() -> None:
    # By hand: 0x21 is 0.5 and 1, 0xF0 is 0 and -6.
    values = np.zeros((1, 16), np.uint8)
    values[:, 0], values[:, 15] = 0x21, 0xF0
    matrix = FORMATS["nvfp4"].dequantize(values.view(np.int8), np.array([[0.5, 0.25]], np.float16))
    assert matrix[0, [0, 1, 2, 30, 31]].tolist() == [0.25, 0.5, 0, 0, -1.5]


@pytest.mark.parametrize("weights", [name for name in FORMATS if FORMATS[name].scale_type == "float"])
def test_experts_in_int4_and_nvfp4_are_those_of_their_dequantized_weights(weights: str) -> None:
    rng, stored = np.random.default_rng(9), FORMATS[weights]
    block, inputs = stored.block, {}
    for name, rows, width in (("gate_up", 4 * block, block), ("down", block, 2 * block)):
        inputs[name] = rng.integers(-128, 128, (EXPERTS, rows, width // 2)).astype(np.int8)
        inputs[f"{name}_scale"] = rng.integers(1, 17, (EXPERTS, rows, stored.scales(width))).astype(np.float16)
    full = {name: stored.dequantize(inputs[name], inputs[f"{name}_scale"]) for name in ("gate_up", "down")}
    given = {"hidden": rng.normal(size=(TOKENS, block)), "index": rng.integers(0, EXPERTS, (TOKENS, WIDTH))}
    given["weight"] = rng.random((TOKENS, WIDTH))
    got = experts(ExpertsForm(weights=weights), **given, **inputs)
    np.testing.assert_array_equal(got, experts(ExpertsForm(), **given, **full))
    with pytest.raises(UsageError, match=r"down_scale has the shape"):
        experts(ExpertsForm(weights=weights), **given, **{**inputs, "down_scale": inputs["down_scale"][..., :-1]})
