"""Each form and each choice of the fused ops: what comes out is what ONNX Runtime's op, or its documentation, gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from foreign_graphs import FORMS, ROUTINGS, RUNNABLE, Spec, make_model, save_model
from foreign_run import TOLERANCE, difference, error, feeds, rewrite, run, session
from onnx import helper, numpy_helper

from lynx_trt.experts import FORMATS
from lynx_trt.export.foreign import read_foreign
from lynx_trt.export.foreign_files import write_foreign
from lynx_trt.selection import PRESETS

PATTERN = {
    "moe": "com.microsoft.MoE",
    "moe_fc3": "com.microsoft.MoE",
    "qmoe4": "com.microsoft.QMoE",
    "qmoe8": "com.microsoft.QMoE",
    "trt_moe": "TRT_MoE",
    "gathered": "gathered experts",
    "grouped": "grouped experts",
    "loop_scatter": "per-expert loop",
    "loop_scatternd": "per-expert loop",
    "dense_batched": "dense experts",
    "dense_unrolled": "dense experts",
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_recognised(form: str, tmp_path: Path) -> None:
    model = make_model(Spec(form=form, bias=form != "moe_fc3"))
    foreign, rewritten = rewrite(model, tmp_path)
    assert dict(foreign.counts) == {PATTERN[form]: 2}
    assert [(b.experts, b.experts_per_token, b.hidden_size, b.intermediate) for b in foreign.blocks] == [
        (6, 2, 16, 8)
    ] * 2
    if form in RUNNABLE:
        assert difference(model, rewritten, foreign.experts) < TOLERANCE


@pytest.mark.parametrize("routing", ROUTINGS)
def test_each_rule_is_found(routing: str, tmp_path: Path) -> None:
    """The rule behind a choice, so that tokens can be sent to experts that they didn't choose."""
    spec = Spec(form="gathered", routing=routing, scale=2.5, layers=1)
    foreign, _ = rewrite(make_model(spec), tmp_path)
    words = {
        "softmax": "softmax, x 2.5",
        "softmax_renormalised": "softmax, renormalised, x 2.5",
        "topk_softmax": "softmax, renormalised, x 2.5",
        "sigmoid_bias": "sigmoid, ranked by other scores, renormalised, x 2.5",
        "groups": "sigmoid, ranked by other scores, renormalised, x 2.5",
    }
    assert foreign.blocks[0].rule == words[routing]


def test_the_selection_remaps_inside_a_foreign_block(tmp_path: Path) -> None:
    """With a budget, a decode step uses no more experts than it; a prefill goes on using all."""
    model = make_model(Spec(form="gathered", experts=16, count=4))
    foreign, rewritten = rewrite(model, tmp_path, preset="lynx-latency")
    opened = session(rewritten)
    for length, most in ((1, 5), (4, 16)):
        given = feeds(opened.get_inputs(), batch=8, length=length)
        _, active = opened.run(None, {**given, "budgets": np.array([5, 5], np.int32)})
        assert active.max() <= most
        assert (active.max() > 5) == (length > 1)
        # A floor that no expert's votes reach keeps nothing, as this preset guarantees nothing; prefill has none.
        floors = np.array([0.0, 9.0], np.float32)
        _, fewer = opened.run(None, {**given, "budgets": np.array([5, 5], np.int32), "floors": floors})
        assert fewer.tolist() == ([active[0], 0] if length == 1 else active.tolist())
    assert foreign.experts == [16, 16]


# ---- com.microsoft.MoE and QMoE ------------------------------------------------------------------------------------


def _moe_node(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type in ("MoE", "QMoE"))


def _set(node: onnx.NodeProto, **attributes: Any) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
    del node.attribute[:]
    node.attribute.extend(kept)
    made = [helper.make_attribute(name, value) for name, value in attributes.items() if value is not None]
    node.attribute.extend(made)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
@pytest.mark.parametrize("bias", [False, True])
def test_activations_of_the_fused_op(activation: str, bias: bool, tmp_path: Path) -> None:
    model = make_model(Spec(form="moe", gated=False, activation="relu", bias=bias, layers=1))
    _set(_moe_node(model), activation_type=activation)
    foreign, rewritten = rewrite(model, tmp_path)
    assert difference(model, rewritten, foreign.experts) < TOLERANCE


@pytest.mark.parametrize("attributes", [
    {"swiglu_limit": 0.5},
    {"activation_alpha": 1.702, "activation_beta": 1.0},
    {"normalize_routing_weights": 0},
    {"k": 1},
    {"k": 6},  # every expert
], ids=str)  # fmt: skip
def test_attributes_of_the_fused_op(attributes: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(Spec(form="moe", layers=1))
    _set(_moe_node(model), **attributes)
    foreign, rewritten = rewrite(model, tmp_path)
    assert difference(model, rewritten, foreign.experts) < TOLERANCE


def test_separate_router_weights(tmp_path: Path) -> None:
    """QMoE's last input weighs, router_probs only ranks."""
    model = make_model(Spec(form="qmoe8", layers=1, hidden=20))  # a scale a row: see test_zero_points
    node = _moe_node(model)
    weighed = helper.make_node("Sigmoid", [node.input[1]], ["router_weights"])
    model.graph.node.insert(list(model.graph.node).index(node), weighed)
    node = _moe_node(model)
    node.input.extend([""] * (14 - len(node.input)) + ["router_weights"])
    foreign, rewritten = rewrite(model, tmp_path)
    assert foreign.blocks[0].rule == "router_weights, renormalised"
    assert difference(model, rewritten, foreign.experts) < TOLERANCE


def test_fc3_is_a_separate_up_projection(tmp_path: Path) -> None:
    """ONNX Runtime runs FC3 on CUDA alone: the same weights with gate and up in one are the reference."""
    spec = Spec(form="moe_fc3")
    foreign, rewritten = rewrite(make_model(spec), tmp_path)
    assert difference(make_model(replace(spec, form="moe")), rewritten, foreign.experts) < TOLERANCE


def test_sparse_mixer(tmp_path: Path) -> None:
    """Phi-3.5-MoE's router, written out in NumPy as its paper's code has it."""
    model = make_model(Spec(form="moe", layers=1))
    _set(_moe_node(model), use_sparse_mixer=1)
    foreign, rewritten = rewrite(model, tmp_path)
    assert foreign.blocks[0].rule is None
    assert "use_sparse_mixer" in " ".join(foreign.notes)
    select = next(node for node in rewritten.graph.node if node.op_type == "LynxSelect")
    for name in (select.input[2], select.input[3], _moe_node(model).input[1]):
        rewritten.graph.output.append(helper.make_empty_tensor_value_info(name))
    opened = session(rewritten)
    given = feeds(opened.get_inputs())
    *_, index, weight, logits = opened.run(None, {**given, "budgets": np.array([6], np.int32)})
    expected = [_sparse_mixer(row.astype(np.float64)) for row in logits]
    assert index.tolist() == [[expert for expert, _ in row] for row in expected]
    assert np.abs(weight - [[share for _, share in row] for row in expected]).max() < 1e-5


def _sparse_mixer(scores: Any) -> list[tuple[int, float]]:
    chosen = []
    allowed = scores.copy()
    for _ in range(2):
        best = int(allowed.argmax())
        factor = np.maximum(np.abs(scores), allowed[best])
        close = np.where((allowed[best] - scores) / factor > 0.02, -np.inf, allowed)
        powers = np.exp(close - close.max())
        chosen.append((best, float(powers[best] / powers.sum())))
        allowed[best] = -np.inf
    return chosen


@pytest.mark.parametrize(("attributes", "words"), [
    ({"activation_type": "softplus"}, "activation_type is 'softplus'"),
    ({"k": 7}, "k = 7 of 6"),
    ({"use_sparse_mixer": 1, "k": 3}, "use_sparse_mixer goes with k = 2"),
    ({"swiglu_fusion": 0}, "no known layout"),
    ({"k": "two"}, "not well-formed"),  # of another type
], ids=str)  # fmt: skip
def test_what_the_ops_cannot_express_is_refused(attributes: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = make_model(Spec(form="moe", layers=1))
    _set(_moe_node(model), **attributes)
    assert words in _refusal(model, tmp_path)


def test_weights_that_are_computed_are_refused(tmp_path: Path) -> None:
    """Weights given at run time can't be laid out."""
    model = make_model(Spec(form="moe", layers=1))
    node = _moe_node(model)
    doubled = helper.make_node("Add", [node.input[2], node.input[2]], ["doubled"])
    model.graph.node.insert(0, doubled)
    _moe_node(model).input[2] = "doubled"
    assert "'doubled' is not stored in the model" in _refusal(model, tmp_path)


@pytest.mark.parametrize(("attributes", "words"), [
    ({"quant_type": "fp4"}, "quant_type is 'fp4'"),
    ({"weights_prepacked": 1}, "packed for CUDA"),
    ({"expert_weight_bits": 3}, "has 3 bits"),
    ({"block_size": 32}, "scales are"),
], ids=str)  # fmt: skip
def test_quantized_weights_that_cannot_be_read_are_refused(
    attributes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = make_model(Spec(form="qmoe8", layers=1, hidden=16, inner=16))
    _set(_moe_node(model), **attributes)
    assert words in _refusal(model, tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points(bits: int, tmp_path: Path) -> None:
    """Packed like the weights; the default is the middle of the range.

    8 bits with a scale a row, 4 bits with one a block: with 8 bits and blocks the kernel rounds activations to 8 bits.
    """
    model = make_model(Spec(form=f"qmoe{bits}", layers=1, hidden=32 if bits == 4 else 20, inner=32))
    _give_zero_points(model, bits)
    foreign, rewritten = rewrite(model, tmp_path)
    assert difference(model, rewritten, foreign.experts) < TOLERANCE


def _give_zero_points(model: onnx.ModelProto, bits: int, only: int | None = None) -> None:
    """Random ones, or bytes of that value."""
    node = _moe_node(model)
    node.input.extend([""] * (14 - len(node.input)))
    generator = np.random.default_rng(0)
    for at, scales in ((11, 3), (12, 6)):
        shape = next(list(t.dims) for t in model.graph.initializer if t.name == node.input[scales])
        packed = generator.integers(0, 256, [*shape[:-1], -(-shape[-1] * bits // 8)]).astype(np.uint8)
        if only is not None:
            packed[:] = only
        model.graph.initializer.append(numpy_helper.from_array(packed, f"zeros{at}"))
        node.input[at] = f"zeros{at}"


@pytest.mark.parametrize("zeros", ["none", "usual", "random"])
@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        pytest.param({"block": 32, "hidden": 96, "inner": 64}, "int4_g32", id="32"),
        pytest.param({"block": 64, "hidden": 64, "inner": 128}, "int4_g32", id="64"),
        pytest.param({"block": 128, "hidden": 256, "inner": 128}, "int4_g128", id="128"),
        pytest.param({"block": 64, "hidden": 128, "inner": 160}, "int4_g32", id="rows"),  # a scale for 128 and for 160
    ],
)
def test_qmoe_of_16_bits_stays_in_int4(sizes: dict[str, int], kind: str, zeros: str, tmp_path: Path) -> None:
    model = make_model(Spec(form="qmoe4", layers=1, dtype="fp16", bias=True, gated=zeros == "random", **sizes))
    if zeros != "none":
        _give_zero_points(model, 4, None if zeros == "random" else 0x88)
    foreign, rewritten = rewrite(model, tmp_path)
    (block,) = foreign.blocks
    assert block.form.weights == kind + ("_zeros" if zeros == "random" else "")
    assert difference(model, rewritten, foreign.experts) < TOLERANCE
    kept = {name.rpartition(".")[2]: stack for name, stack in foreign.stacks.items() if "bias" not in name}
    biases = 2 * (block.hidden_size + block.intermediate * (2 if block.form.gated else 1))
    assert sum(stack.nbytes for stack in kept.values()) == 6 * (block.expert_bytes - biases)
    full = read_foreign(tmp_path / "original" / "model.onnx", PRESETS["lynx"], dequantize=True)
    assert full.blocks[0].form == replace(block.form, weights="float")
    for name in ("gate_up", "down"):
        values, scales = (kept[each].numpy() for each in (name, f"{name}_scale"))
        matrix = FORMATS[block.form.weights].dequantize(values, scales)
        np.testing.assert_array_equal(matrix.astype(np.float16), full.stacks[f"lynx.moe.0.{name}"].numpy())


def test_int4_of_a_data_file_stays_where_it_is(tmp_path: Path) -> None:
    """Only scales are laid out anew."""
    spec = Spec(form="qmoe4", layers=1, dtype="fp16", hidden=128, inner=256, block=128)
    path = save_model(spec, tmp_path / "model", external=True)
    foreign = read_foreign(path, PRESETS["lynx"])
    assert [name.rpartition(".")[2] for name in foreign.stacks] == ["gate_up_scale", "down_scale"]
    (tmp_path / "rewritten").mkdir()
    write_foreign(foreign, tmp_path / "rewritten")
    original, rewritten = onnx.load(path), onnx.load(tmp_path / "rewritten" / "model.onnx")
    assert difference(original, rewritten, foreign.experts) < TOLERANCE


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"dtype": "fp32"}, "the graph computes in fp32"),
        ({"block": 16}, "a scale is for 16 columns, and LynxExperts has one for each 32 or 128"),
        ({"form": "qmoe8"}, None),
        ({"activation": "identity"}, None),  # has rows twice, of which one is negated
    ],
)
def test_other_qmoe_is_dequantized(spec: dict[str, Any], why: str | None, tmp_path: Path) -> None:
    usual = {"form": "qmoe4", "dtype": "fp16", "block": 32, "hidden": 32, "inner": 32, "layers": 2, "gated": False}
    foreign, _ = rewrite(make_model(Spec(**(usual | spec))), tmp_path)
    assert [block.form.weights for block in foreign.blocks] == ["float"] * 2
    assert all(block.packed for block in foreign.blocks)
    notes = [line for line in foreign.notes if "int4" in line]  # one for all layers
    assert len(notes) == (why is not None)
    assert all(note.endswith(str(why)) for note in notes)


def _refusal(model: onnx.ModelProto, folder: Path) -> str:
    onnx.save(model, folder / "model.onnx")
    foreign = read_foreign(folder / "model.onnx", PRESETS["lynx"])
    assert not foreign.blocks
    (refusal,) = foreign.refused
    node = next((node for node in model.graph.node if node.op_type in ("MoE", "QMoE")), None)
    assert node is None or node.name in refusal.node
    return refusal.reason


# ---- blocks alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("form", ["moe", "gathered", "loop_scatter", "dense_batched"])
def test_a_block_alone(form: str, rank: int, tmp_path: Path) -> None:
    """A graph that is a block and nothing else: no tokens, no mask, so the budget is the caller's affair."""
    model = make_model(Spec(form=form, fragment=rank, layers=1))
    foreign, rewritten = rewrite(model, tmp_path)
    assert sum(foreign.counts.values()) == 1
    opened = session(rewritten)
    hidden = np.random.default_rng(0).standard_normal((2, 5, 16)[3 - rank :]).astype(np.float32)
    tokens = next(value for value in opened.get_inputs() if value.name == "token_mask")
    mask = np.ones(hidden.shape[:-1] if len(tokens.shape) == rank - 1 else hidden.size // 16, bool)
    given = {
        "hidden": hidden,
        "budgets": np.array([6], np.int32),
        "floors": np.zeros(1, np.float32),
        "token_mask": mask,
    }
    after = opened.run(["output"], given)[0]
    assert error(run(model, {"hidden": hidden}), after) < TOLERANCE
