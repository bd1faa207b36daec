"""Experts in int4 of GPTQ, AWQ and compressed-tensors: in which form they are kept, and when they can't be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import quantized_models
import tiny_models
import torch
from numpy.typing import NDArray
from quantized_models import edit
from safetensors.torch import load_file
from test_kept_experts import arrays_of, built_once, dequantized_for, form_of, graph_of, greedy, nodes_of

from lynx_trt import inspect
from lynx_trt.artifact import Artifact
from lynx_trt.errors import CheckpointError
from lynx_trt.experts import FORMATS, ExpertsForm
from lynx_trt.export import weights
from lynx_trt.export.checkpoint import open_checkpoint
from lynx_trt.export.hf import Source, read_source
from lynx_trt.export.kept import keep_experts
from lynx_trt.runtime.lowering import Form

Build = Callable[..., Artifact]
Make = Callable[[str], Path]
Change = Callable[[dict[str, torch.Tensor]], None]

EXPERTS, HIDDEN, INNER = 8, 256, 128
LINEAR = "model.layers.1.mlp.experts.3.up_proj"
PAIR = ("gate_up_proj", "down_proj")
# How each is quantized, and the form in which its experts are kept.
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"method": "gptq", "group": 128, "act_order": False}, "int4_g128_zeros"),
    "gptq in one form for all": ({"method": "gptq", "group": 32, "act_order": False}, "int4_g32_zeros"),
    "gptq symmetric": ({"method": "gptq_symmetric", "group": 128, "act_order": False}, "int4_g128"),
    "gptq a row": ({"method": "gptq_symmetric", "group": -1, "act_order": False}, "int4_g128"),
    "gptq_v2": ({"method": "gptq_v2", "group": 64, "act_order": False}, "int4_g32_zeros"),
    "awq": ({"method": "awq", "group": 128}, "int4_g128_zeros"),
    "awq 64": ({"method": "awq", "group": 64}, "int4_g32_zeros"),
    "packed": ({"method": "packed", "group": 32}, "int4_g32_zeros"),
    "packed a row": ({"method": "packed", "group": -1}, "int4_g128_zeros"),
    "symmetric": ({"method": "symmetric", "group": 128}, "int4_g128"),
    "symmetric 64": ({"method": "symmetric", "group": 64}, "int4_g32"),
    "symmetric a row": ({"method": "symmetric", "group": -1}, "int4_g128"),
    # H is a multiple of 128 and I, 96, is not: one group is all of a row.
    "narrow": ({"method": "symmetric", "group": 128}, "int4_g32"),
    # Not to be kept.
    "act-order": ({"method": "gptq", "group": 128}, ""),
    "small groups": ({"method": "awq", "group": 16}, ""),
    "small I": ({"method": "symmetric", "group": 16}, ""),
}
SIZES = {"narrow": 96, "small I": 48}
KEPT = [form for form, (_, weights) in FORMS.items() if weights]


@pytest.fixture(scope="session")
def stored(workspace: Path) -> Make:
    """A small checkpoint in fp16 by its form."""

    def make(form: str) -> Path:
        folder, plain = (workspace / "int4" / kind / form for kind in ("stored", "plain"))
        if not folder.exists():
            sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": SIZES.get(form, INNER)}
            tiny_models.save(tiny_models.random_model("qwen3_moe", **sizes).half(), plain)
            quantized_models.integers(plain, folder, **FORMS[form][0])
        return folder

    return make


@pytest.fixture
def own(stored: Make, tmp_path: Path) -> Callable[[str, Change], Path]:
    """A changed copy of a checkpoint."""
    return lambda form, change: edit(quantized_models.copy_of(stored(form), tmp_path / "own", None), change)


@pytest.fixture(scope="session")
def built(workspace: Path, stored: Make, build_quietly: Build) -> Callable[..., Artifact]:
    """The artifact of a form by its options."""
    make = built_once(workspace / "int4" / "built", build_quietly)
    return lambda form, **options: make(stored(form), **options)


def said_of(source: Source) -> str:
    assert source.quantization is not None
    return source.quantization.in_words(source.precision)


def in_full(source: Source, name: str) -> NDArray[np.float32]:
    """The weights that are kept of a parameter, by the format's reference."""
    values, scales = (source.weights.load(f"{name}{ending}") for ending in ("", "_scale"))
    layer = next(layer for layer in source.layers if name.startswith(layer.name))
    return FORMATS[layer.form.weights].dequantize(values.numpy(), scales.float().numpy())


def equal_to_dequantized(kept: Path, full: Path, precision: str) -> Source:
    """What is kept of one checkpoint is bit for bit in float32 what is read of the other; of it all, each weight."""
    source = read_source(open_checkpoint(kept), precision)
    expected = read_source(open_checkpoint(full), "fp32").weights
    for layer in source.layers:
        for name in (f"{layer.name}.{name}" for name in PAIR):
            found = in_full(source, name)
            assert found.tobytes() == expected.load(name).numpy().tobytes(), name
            assert np.abs(found).max() > 0.1
    assert len(source.layers) == 2
    return source


def rounded(tensors: dict[str, torch.Tensor]) -> None:
    """Scales as bf16 has them."""
    for key in [key for key in tensors if key.endswith(("scales", "weight_scale"))]:
        tensors[key] = tensors[key].bfloat16()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("form", KEPT)
def test_weights_equal_the_dequantized(
    form: str, precision: str, stored: Make, own: Callable[[str, Change], Path]
) -> None:
    """In float32; scales, which these checkpoints have in fp16, are those of the precision."""
    folder = stored(form)
    source = equal_to_dequantized(folder, folder if precision == "fp16" else own(form, rounded), precision)
    assert {layer.form for layer in source.layers} == {ExpertsForm(weights=FORMS[form][1])}
    assert source.quantization is not None
    assert source.quantization.obstacle is None
    assert source.quantization.kept == 2 * EXPERTS * 3


def test_scales_in_bf16(stored: Make, own: Callable[[str, Change], Path]) -> None:
    """Of a checkpoint that has them so; fp16 has room for these."""
    folder = own("packed", rounded)
    for precision in ("bf16", "fp16"):
        equal_to_dequantized(folder, folder, precision)


def test_bytes_are_those_of_the_checkpoint(stored: Make, built: Callable[..., Artifact]) -> None:
    """compressed-tensors packs as LynxExperts does; each scale of a group of 64 is there twice."""
    graph, tensors = graph_of(built("symmetric 64")), load_file(stored("symmetric 64") / "model.safetensors")
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for number, node in enumerate(nodes_of(graph)):
        module = f"model.layers.{number}.mlp.experts"
        names = [f"{module}.{name}{ending}" for ending in ("", "_scale") for name in PAIR]
        assert list(node.input[3:]) == names
        assert [types[name] for name in names] == [onnx.TensorProto.INT8] * 2 + [onnx.TensorProto.FLOAT16] * 2
        gate_up, down, gate_up_scale, down_scale = arrays_of(graph, names)
        assert gate_up.shape == (EXPERTS, 2 * INNER, HIDDEN // 2)
        assert down_scale.shape == (EXPERTS, HIDDEN, INNER // 32)
        for expert in range(EXPERTS):
            of = {name: f"{module}.{expert}.{name}_proj.weight" for name in ("gate", "up", "down")}
            packed = [tensors[f"{of[name]}_packed"] for name in ("gate", "up")]
            assert gate_up[expert].tobytes() == torch.cat(packed).numpy().tobytes()
            assert down[expert].tobytes() == tensors[f"{of['down']}_packed"].numpy().tobytes()
            scales = torch.cat([tensors[f"{of[name]}_scale"] for name in ("gate", "up")])
            np.testing.assert_array_equal(gate_up_scale[expert], scales.numpy().repeat(2, axis=1))
        assert form_of(node) == ExpertsForm(weights="int4_g32")


def test_zero_points_lie_behind_the_scales_of_a_row(stored: Make) -> None:
    """As numbers of their type; GPTQ's first form stores them less one."""
    source = read_source(open_checkpoint(stored("gptq")), "fp16")
    tensors = load_file(stored("gptq") / "model.safetensors")
    made = source.weights.load("model.layers.1.mlp.experts.gate_up_proj_scale")
    assert made.shape == (EXPERTS, 2 * INNER, 2 * HIDDEN // 128)
    assert made.dtype == torch.float16
    assert torch.equal(made[3, INNER:, :2], tensors[f"{LINEAR}.scales"].T)
    points = [(tensors[f"{LINEAR}.qzeros"] >> 4 * place & 15) + 1 for place in range(8)]
    assert torch.equal(made[3, INNER:, 2:], torch.stack(points, dim=2).reshape(2, INNER).T.half())


def test_zero_points_of_zero(own: Callable[[str, Change], Path]) -> None:
    """Less one they are 15 in GPTQ's first form."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LINEAR}.qzeros"][1] = -1

    folder = own("gptq", change)
    source = equal_to_dequantized(folder, folder, "fp16")
    made = source.weights.load("model.layers.1.mlp.experts.gate_up_proj_scale")
    assert not made[3, INNER:, 3].any()


def test_one_zero_point_that_is_another(own: Callable[[str, Change], Path]) -> None:
    """A model's layers have one form: zero points of 8 stand beside all other scales."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LINEAR}.qzeros"][0, 0] += 1

    folder = own("gptq symmetric", change)
    source = equal_to_dequantized(folder, folder, "fp16")
    assert {layer.form.weights for layer in source.layers} == {"int4_g128_zeros"}
    points = source.weights.load("model.layers.1.mlp.experts.gate_up_proj_scale")[..., 2:]
    assert (points != 8).sum() == 1
    assert points[3, INNER, 0] == 9


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_groups_that_nothing_names(form: str, own: Callable[[str, Change], Path]) -> None:
    """GPTQ without `g_idx`, as AWQ never has it: `group_size` of config.json says what they are."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(".g_idx")]:
            del tensors[key]

    folder = own(form, change)
    source = equal_to_dequantized(folder, folder, "fp16")
    assert {layer.form.weights for layer in source.layers} == {"int4_g128_zeros"}


@pytest.mark.parametrize("form", ["gptq", "awq", "packed"])
def test_in_pieces(form: str, stored: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large ones are read: some experts each."""
    source = read_source(open_checkpoint(stored(form)), "fp16")
    for name in ("gate_up_proj", "down_proj_scale"):
        key = f"{source.layers[0].name}.{name}"
        whole = source.weights.load(key)
        monkeypatch.setattr(weights, "_EXPERTS_BYTES", 3 * whole[0].nbytes)
        pieces = list(source.weights.pieces(key))
        assert [len(piece) for piece in pieces] == [3, 3, 2]
        assert torch.equal(torch.cat(pieces), whole)


def test_manifest_and_inspect(built: Callable[..., Artifact]) -> None:
    """Bytes are those in the file: an expert's, all weights'; the form and the words say int4."""
    kept, full = built("awq"), built("awq", dequantize=True)
    one = 3 * HIDDEN * INNER
    stored = one // 2 + 2 * 2 * one // 128  # two numbers of 16 bits for each 128
    for artifact, nbytes in ((kept, stored), (full, 2 * one)):
        for layer in artifact.manifest.model.moe_layers:
            assert (layer.expert_bytes, layer.intermediate) == (nbytes, INNER)
    model = kept.manifest.model
    assert [layer.form["weights"] for layer in model.moe_layers] == ["int4_g128_zeros"] * 2
    assert model.parameters == full.manifest.model.parameters
    assert model.weight_bytes == full.manifest.model.weight_bytes - 2 * EXPERTS * (2 * one - stored)
    record = kept.manifest.build["quantization"]
    assert record == {**full.manifest.build["quantization"], "kept": 2 * EXPERTS * 3}
    rows = dict(inspect.rows(kept.manifest))
    assert "48 kept as stored and 8 dequantized" in rows["checkpoint"]
    assert rows["experts"].endswith("in int4 (blocks of 128, zero points)")
    assert "int4" not in dict(inspect.rows(full.manifest))["experts"]


@pytest.mark.parametrize(("form", "lowered"), [("awq", "auto"), ("awq", None), ("symmetric 64", "auto")])
def test_text_equals_that_of_the_dequantized(form: str, lowered: Form | None, built: Callable[..., Artifact]) -> None:
    """In ONNX Runtime, prefill and decode: weights that are kept are not rounded to fp16, all else of both is."""
    text, logits = greedy(built(form), lowered)
    other_text, other_logits = greedy(built(form, dequantize=True), lowered)
    assert text == other_text
    scale = np.abs(other_logits).max()
    assert scale > 1
    np.testing.assert_allclose(logits, other_logits, rtol=0, atol=3e-3 * scale)


@pytest.mark.parametrize(
    ("form", "precision", "words"),
    [
        ("act-order", "fp16", ["columns of model.layers.0.mlp.experts.0.gate_proj.weight", "lie apart (act-order)"]),
        ("small groups", "bf16", ["is for 16 columns, and LynxExperts has a scale for each 32 columns of int4"]),
        ("small I", "bf16", ["a scale of model.layers.0.mlp.experts.0.gate_proj.weight is for 16 columns"]),
        ("awq", "fp32", ["LynxExperts has weights in int4 in fp16 and bf16 alone, and the precision is fp32"]),
    ],
)
def test_dequantized_and_why(form: str, precision: str, words: list[str], stored: Make) -> None:
    source = read_source(open_checkpoint(stored(form)), precision)
    assert {layer.form.weights for layer in source.layers} == {"float"}
    said = said_of(source)
    for word in ("56 of its weights are dequantized to", "while they are read, for", *words):
        assert word in said, said
    assert " for " not in said_of(read_source(open_checkpoint(stored(form)), precision, dequantize=True))


def test_build_says_why(stored: Make, tmp_path: Path, build_quietly: Build, capsys: pytest.CaptureFixture[str]) -> None:
    folder = quantized_models.copy_of(stored("act-order"), tmp_path / "copy", None)
    dequantized_for(folder, build_quietly, capsys, "(act-order)")


def large(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LINEAR}.scales"][1, 2] = -5000  # of int4 a weight is up to 16 of them


def one_in_full(tensors: dict[str, torch.Tensor]) -> None:
    for ending in (".qweight", ".qzeros", ".scales"):
        del tensors[LINEAR + ending]
    tensors[f"{LINEAR}.weight"] = torch.ones(INNER, HIDDEN)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (large, [f"{LINEAR}.scales holds the scale 5000", "beyond 65504"]),
        (one_in_full, [f"{LINEAR}.weight is not stored in int4, and all layers' experts are kept or none's"]),
    ],
)
def test_one_tensor_that_is_not_to_be_kept(
    change: Change, words: list[str], own: Callable[[str, Change], Path]
) -> None:
    source = read_source(open_checkpoint(own("awq", change)), "fp16")
    assert {layer.form.weights for layer in source.layers} == {"float"}
    for word in words:
        assert word in said_of(source)


def test_weights_that_lie_across(stored: Make) -> None:
    """A model that sums over the rows of what is stored."""
    source = read_source(open_checkpoint(stored("awq")), "bf16", dequantize=True)
    source.layers[1].form = replace(source.layers[1].form, transposed=True)
    assert source.quantization is not None
    found = keep_experts(source.model, source.layers, source.weights, source.quantization, "bf16", source.fake)
    assert found.kept == 0
    assert "sums over the rows of its matrices, and LynxExperts over the columns of those in int4" in str(found)


def put(key: str, at: tuple[int, ...], value: float) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][at] = value

    return change


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("awq", put(f"{LINEAR}.scales", (1, 2), torch.nan), rf"{LINEAR}\.scales holds nan at \[1, 2\].*broken"),
        ("gptq", put(f"{LINEAR}.scales", (1, 2), torch.inf), rf"{LINEAR}\.scales holds inf at \[1, 2\].*broken"),
        ("packed", put(f"{LINEAR}.weight_scale", (2, 1), torch.nan), r"weight_scale holds nan at \[2, 1\].*broken"),
        ("gptq", put(f"{LINEAR}.g_idx", (5,), 2), rf"{LINEAR}\.g_idx names groups 0 to 2, but there are 2"),
        ("gptq", lambda tensors: tensors.pop(f"{LINEAR}.qzeros"), rf"lacks {LINEAR}\.qzeros"),
        ("symmetric", lambda tensors: tensors.pop(f"{LINEAR}.weight_packed"), rf"lacks {LINEAR}\.weight"),
    ],
)
def test_broken_parts(form: str, change: Change, words: str, own: Callable[[str, Change], Path]) -> None:
    """Before anything is written."""
    with pytest.raises(CheckpointError, match=words):
        read_source(open_checkpoint(own(form, change)), "fp16")


def test_shard_that_ends_too_soon(own: Callable[[str, Change], Path], build_quietly: Build, tmp_path: Path) -> None:
    folder = own("awq", lambda _: None)
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        build_quietly(folder, tmp_path / "out", precision="fp16")
    assert not (tmp_path / "out").exists()


def test_engine(stored: Make, build_quietly: Build, tmp_path: Path) -> None:
    """TensorRT takes the artifact's graph; from outside it is to be given what is kept."""
    options = {"precision": "bf16", "tensorrt": "rtx", "sm": "none", "expert_weights": "external"}
    artifact = build_quietly(stored("awq"), tmp_path / "out", **options)
    engine = artifact.manifest.engine
    assert engine is not None
    assert engine.plugin_layers["LynxExperts"] == 2
    source = read_source(open_checkpoint(stored("awq")), "bf16").weights
    external = {item["name"]: item for item in engine.external}
    for layer in artifact.manifest.model.moe_layers:
        for name in (f"{layer.name}.{name}{ending}" for ending in ("", "_scale") for name in PAIR):
            item, tensor = external[name], source.load(name)
            assert item["dtype"] == str(tensor.dtype).removeprefix("torch.")
            data = artifact.path(item["file"]).read_bytes()[item["offset"] : item["offset"] + item["length"]]
            assert data == tensor.view(torch.uint8).numpy().tobytes()
