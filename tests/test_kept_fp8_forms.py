"""Experts in FP8 by the forms of checkpoints that have them: what is kept of each, and what can't be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
from test_architectures import Batch
from test_kept_experts import arrays_of, built_once, dequantized_for, form_of, graph_of, nodes_of
from test_quantized import auto_fp8

from lynx_trt import inspect
from lynx_trt.artifact import Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.errors import CheckpointError
from lynx_trt.experts import ExpertsForm, experts
from lynx_trt.export import weights
from lynx_trt.export.checkpoint import open_checkpoint
from lynx_trt.export.hf import Source, read_source
from lynx_trt.export.kept import keep_experts
from lynx_trt.export.quantized.methods import Quantization
from lynx_trt.fp8 import dequantize
from lynx_trt.runtime.lowering import Form
from lynx_trt.runtime.ort import OrtBackend

Build = Callable[..., Artifact]
Make = Callable[[str], Path]
Change = Callable[[dict[str, torch.Tensor]], None]

EXPERTS, HIDDEN, INNER = 8, 256, 128
SIZES = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER}
QWEN3 = ("qwen3_moe", SIZES)
# The model and its sizes, and how it is quantized.
FORMS: dict[str, tuple[tuple[str, dict[str, int]], Callable[[Path, Path], Path]]] = {
    "qwen3": (QWEN3, partial(quantized_models.fp8, block=(128, 128))),
    "exponents": (QWEN3, partial(quantized_models.fp8, block=(128, 128), scale="e8m0")),
    "deepseek": (("deepseek_v3", SIZES), partial(quantized_models.fp8, block=(128, 128))),
    "odd rows": (QWEN3, partial(quantized_models.fp8, block=(48, 128))),
    "small rows": (QWEN3, partial(quantized_models.fp8, block=(64, 128))),
    "wide": (QWEN3, partial(quantized_models.fp8, block=(64, 256))),
    "large": (QWEN3, partial(quantized_models.fp8, block=(128, 256))),
    "in all": (QWEN3, partial(quantized_models.fp8, block=None, scale="tensor")),
    "row": (QWEN3, partial(quantized_models.fp8, block=None, scale="row")),
    "auto": (
        ("mixtral", {"hidden_size": HIDDEN, "intermediate_size": INNER}),
        lambda folder, target: auto_fp8(quantized_models.fp8(folder, target, None, "tensor")),
    ),
    "channel": (QWEN3, partial(quantized_models.compressed_fp8, strategy="channel")),
    "tensor": (QWEN3, partial(quantized_models.compressed_fp8, strategy="tensor")),
    "block": (QWEN3, partial(quantized_models.compressed_fp8, strategy="block")),
    "merged": (QWEN3, quantized_models.merged_fp8),
    # Not to be kept.
    "small I": (
        ("qwen3_moe", {"hidden_size": HIDDEN, "moe_intermediate_size": 96}),
        partial(quantized_models.fp8, block=(128, 128)),
    ),
}
KEPT = tuple(FORMS)[:-1]
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
PAIR = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="session")
def stored(workspace: Path) -> Make:
    """A small checkpoint by its form, what isn't quantized in bf16."""

    def make(form: str) -> Path:
        (name, sizes), quantize = FORMS[form]
        folder = workspace / "fp8-forms" / "stored" / form
        if not folder.exists():
            model = tiny_models.random_model(name, **sizes).bfloat16()
            quantize(tiny_models.save(model, workspace / "fp8-forms" / "plain" / form, merged=form == "merged"), folder)
        return folder

    return make


@pytest.fixture(scope="session")
def built(workspace: Path, stored: Make, build_quietly: Build) -> Callable[..., Artifact]:
    """The artifact of a form by its options."""
    make = built_once(workspace / "fp8-forms" / "built", build_quietly)
    return lambda form, **options: make(stored(form), **options)


@pytest.fixture
def own(stored: Make, tmp_path: Path) -> Callable[[str, Change], Path]:
    """A changed copy of a checkpoint."""
    return lambda form, change: edit(quantized_models.copy_of(stored(form), tmp_path / "own", None), change)


def put(key: str, at: tuple[int, ...], value: float) -> Change:
    """Change one element, of FP8 by its byte."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[key]
        (tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor)[at] = value

    return change


def layers_of(source: Source) -> list[str]:
    return [layer.name for layer in source.layers]


def checkpoints_own(folder: Path, module: str) -> dict[str, torch.Tensor]:
    """By names in an experts' module: bytes and repeated scales, put together by hand."""
    tensors, block = load_file(folder / "model.safetensors"), block_of(folder)
    parts: dict[str, list[torch.Tensor]] = {name + end: [] for name in PAIR for end in ("", "_scale")}
    for number in range(EXPERTS):
        for name, keys in zip(PAIR, (("gate_proj", "up_proj"), ("down_proj",)), strict=True):
            if f"{module}.{name}" in tensors:
                stored = [(tensors[f"{module}.{name}"][number], tensors[f"{module}.{name}_scale_inv"][number])]
            else:
                stored = [matrix_of(tensors, f"{module}.{number}.{key}.weight") for key in keys]
            scales = [expanded_to(scales, block, values.shape)[:, ::128] for values, scales in stored]
            parts[name].append(torch.cat([values.view(torch.int8) for values, _ in stored]))
            parts[f"{name}_scale"].append(torch.cat(scales))
    return {name: torch.stack(tensors) for name, tensors in parts.items()}


def block_of(folder: Path) -> tuple[int, int] | None:
    """As config.json has it."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = config.get("config_groups")
    size = groups["0"]["weights"]["block_structure"] if groups else config["weight_block_size"]
    return (size[0], size[1]) if size else None


def matrix_of(tensors: dict[str, torch.Tensor], key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of one that lies apart, by its usual name."""
    if key not in tensors:  # Mixtral's names
        for ours, theirs in (("mlp", "block_sparse_moe"), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            key = key.replace(ours, theirs)
    return tensors[key], tensors[f"{key}_scale_inv" if f"{key}_scale_inv" in tensors else f"{key}_scale"]


def expanded_to(scales: torch.Tensor, block: tuple[int, int] | None, shape: torch.Size) -> torch.Tensor:
    """The scale of each element, in float32; without a block a scale is for a row, or for all."""
    if block:
        return quantized_models.expanded(scales.float(), block, shape)
    return scales.float().reshape(-1, 1).expand(shape)


@pytest.mark.parametrize(
    "form",
    [
        form
        if form in ("deepseek", "exponents", "auto", "channel", "merged")
        else pytest.param(form, marks=pytest.mark.slow)
        for form in KEPT
    ],
)
def test_tensors_are_those_of_the_checkpoint(form: str, stored: Make, built: Callable[..., Artifact]) -> None:
    """Byte for byte, each scale repeated, under the parameters' names and in LynxExperts' order."""
    artifact = built(form)
    graph = graph_of(artifact)
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    nodes, layers = nodes_of(graph), artifact.manifest.model.moe_layers
    for node, layer in zip(nodes, layers, strict=True):
        names = [f"{layer.name}.{name}{ending}" for ending in ("", "_scale") for name in PAIR]
        assert list(node.input[3:]) == names
        own = checkpoints_own(stored(form), layer.name)
        for name, array in zip(names, arrays_of(graph, names), strict=True):
            expected = own[name.rpartition(".")[2]].numpy()
            assert types[name] == (onnx.TensorProto.FLOAT if name.endswith("_scale") else onnx.TensorProto.INT8)
            np.testing.assert_array_equal(array, expected, err_msg=name)
        assert form_of(node) == ExpertsForm(weights="fp8")
    assert len(nodes) >= 2


@pytest.mark.parametrize("form", KEPT)
def test_weights_equal_the_dequantized(form: str, stored: Make) -> None:
    """Bit for bit in float32, what is read of the checkpoint without precision's rounding."""
    kept = read_source(open_checkpoint(stored(form)), "bf16")
    full = read_source(open_checkpoint(stored(form)), "fp32").weights
    assert kept.quantization is not None
    assert kept.quantization.obstacle is None
    for layer in layers_of(kept):
        for name in PAIR:
            values, scales = (kept.weights.load(f"{layer}.{name}{ending}").numpy() for ending in ("", "_scale"))
            found = dequantize(values, scales)
            assert found.tobytes() == full.load(f"{layer}.{name}").numpy().tobytes()
            assert np.abs(found).max() > 0.1


def test_experts_equal_those_of_the_dequantized(built: Callable[..., Artifact]) -> None:
    """By the reference, on what both files hold; powers of two as scales, so that bf16 holds the weights."""
    kept, full = graph_of(built("exponents")), graph_of(built("exponents", dequantize=True))
    rng = np.random.default_rng(5)
    hidden, index, weight = rng.normal(size=(6, HIDDEN)), rng.integers(0, EXPERTS, (6, 2)), rng.random((6, 2))
    for one, other in zip(nodes_of(kept), nodes_of(full), strict=True):
        gate_up, down, gate_up_scale, down_scale = arrays_of(kept, one.input[3:])
        scales = {"gate_up_scale": gate_up_scale, "down_scale": down_scale}
        found = experts(form_of(one), hidden, index, weight, gate_up, down, **scales)
        assert form_of(other) == replace(form_of(one), weights="float")
        expected = experts(form_of(other), hidden, index, weight, *arrays_of(full, other.input[3:]))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
        assert np.abs(found).max() > 0.1


def logits_of(artifact: Artifact, form: Form | None) -> NDArray[Any]:
    """Of a prompt of nine tokens and of eight more, [9,V]."""
    backend = OrtBackend(artifact, slots=1, form=form)
    everything = Restriction((EXPERTS,) * len(artifact.manifest.model.moe_layers))
    row = Batch.random().rows[0]
    logits = [backend.step(np.array([row[:9]]), np.array([0]), np.array([9]), everything).logits[0].copy()]
    for place in range(9, 17):
        tokens, past = np.array([[row[place % len(row)]]]), np.array([place])
        logits.append(backend.step(tokens, past, np.array([1]), everything).logits[0].copy())
    return np.stack(logits)


@pytest.mark.parametrize(
    ("precision", "form"),
    [*(pytest.param(each, "auto", marks=pytest.mark.slow) for each in ("bf16", "fp16")), ("fp16", None)],
)
def test_logits_equal_those_of_the_dequantized(
    precision: str, form: Form | None, built: Callable[..., Artifact]
) -> None:
    """In ONNX Runtime, prefill and decode, lowered and as the graph is: the same weights, other orders of sums."""
    found = logits_of(built("exponents", precision=precision), form)
    expected = logits_of(built("exponents", precision=precision, dequantize=True), form)
    scale = np.abs(expected).max()
    assert scale > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=(1e-5 if form else 3e-3) * scale)


@pytest.mark.parametrize("form", ["qwen3", "deepseek", "channel", "tensor"])
def test_logits_within_rounding(form: str, built: Callable[..., Artifact]) -> None:
    """Scales that are no powers of two: dequantized weights are rounded to bf16, kept ones are not."""
    expected = logits_of(built(form, dequantize=True), "auto")
    error = np.abs(logits_of(built(form), "auto") - expected).max()
    assert error <= 2**-6 * np.abs(expected).max()


@pytest.mark.parametrize("form", ["qwen3", "merged"])
def test_in_pieces(form: str, stored: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large ones are read: some experts each."""
    source = read_source(open_checkpoint(stored(form)), "bf16")
    for name, bytes_of_one in (("gate_up_proj", 2 * INNER * HIDDEN), ("down_proj_scale", 4 * HIDDEN * INNER // 128)):
        monkeypatch.setattr(weights, "_EXPERTS_BYTES", 3 * bytes_of_one)
        key = f"{source.layers[0].name}.{name}"
        pieces = list(source.weights.pieces(key))
        assert [len(piece) for piece in pieces] == [3, 3, 2]
        assert torch.equal(torch.cat(pieces), source.weights.load(key))


def test_manifest_and_inspect(built: Callable[..., Artifact]) -> None:
    """Bytes are those in the file: an expert's, all weights'; the form and the words say FP8."""
    kept, full = built("qwen3"), built("qwen3", dequantize=True)
    one = 3 * HIDDEN * INNER
    for artifact, nbytes in ((kept, one + one // 32), (full, 2 * one)):
        for layer in artifact.manifest.model.moe_layers:
            assert (layer.expert_bytes, layer.intermediate) == (nbytes, INNER)
    model = kept.manifest.model
    assert [layer.form["weights"] for layer in model.moe_layers] == ["fp8"] * 2
    assert model.parameters == full.manifest.model.parameters
    assert model.weight_bytes == full.manifest.model.weight_bytes - 2 * EXPERTS * (one - one // 32)
    record = kept.manifest.build["quantization"]
    assert record == {**full.manifest.build["quantization"], "kept": 2 * EXPERTS * 3}
    rows = dict(inspect.rows(kept.manifest))
    assert rows["checkpoint"] == "quantized (fp8): 56 weights of 1.7 MB, 48 kept as stored and 8 dequantized"
    assert rows["experts"] == "8 a layer, 2 a token, 101.4 kB each, in FP8"
    assert "FP8" not in dict(inspect.rows(full.manifest))["experts"]


def test_the_graph_as_an_onnx_file(built: Callable[..., Artifact], build_quietly: Build, tmp_path: Path) -> None:
    """`build` on an artifact's own graph: its blocks are known, with the sizes of the weights in full."""
    kept = built("qwen3")
    again = build_quietly(kept.path("model.onnx"), tmp_path / "again", precision=None).manifest.model
    for one, other in zip(again.moe_layers, kept.manifest.model.moe_layers, strict=True):
        assert (one.intermediate, one.quantized, one.expert_bytes) == (INNER, "fp8", other.expert_bytes)


@pytest.mark.parametrize("where", ["external", "engine"])
def test_engine(where: str, stored: Make, build_quietly: Build, tmp_path: Path) -> None:
    """TensorRT takes the artifact's graph; from outside it is to be given the checkpoint's bytes."""
    options = {"precision": "bf16", "tensorrt": "rtx", "sm": "none", "expert_weights": where}
    artifact = build_quietly(stored("qwen3"), tmp_path / "out", **options)
    engine = artifact.manifest.engine
    assert engine is not None
    assert engine.plugin_layers["LynxExperts"] == 2
    if where == "engine":
        assert not engine.external
        return
    external = {item["name"]: item for item in engine.external}
    for layer in artifact.manifest.model.moe_layers:
        for name, tensor in checkpoints_own(stored("qwen3"), layer.name).items():
            item = external[f"{layer.name}.{name}"]
            assert item["dtype"] == str(tensor.dtype).removeprefix("torch.")
            data = artifact.path(item["file"]).read_bytes()[item["offset"] : item["offset"] + item["length"]]
            assert data == tensor.numpy().tobytes()


def test_an_inner_size_that_fp8_has_not(stored: Make, build_quietly: Build, capsys: pytest.CaptureFixture[str]) -> None:
    dequantized_for(stored("small I"), build_quietly, capsys, "down_proj sums over 96 columns", "multiples of 128")


def test_weights_beyond_the_precision(
    own: Callable[[str, Change], Path], build_quietly: Build, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A scale with which fp16 may not hold a weight: each is looked at; bf16 has room for all."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT].view(torch.uint8)[:] = 1
        tensors[f"{EXPERT}_scale_inv"][0, 1] = -200

    folder = own("qwen3", change)
    words = (f"{EXPERT}_scale_inv holds the scale 200", "beyond 65504")
    dequantized_for(folder, build_quietly, capsys, *words, precision="fp16")
    kept = build_quietly(folder, tmp_path / "bf16", precision="bf16")
    assert kept.manifest.model.moe_layers[0].quantized == "fp8"


def test_value_of_a_merged_tensor_that_is_no_number(
    own: Callable[[str, Change], Path], build_quietly: Build, tmp_path: Path
) -> None:
    key = "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(CheckpointError, match=rf"{key} holds nan at \[5, 2, 3\].*broken"):
        build_quietly(own("merged", put(key, (5, 2, 3), 0xFF)), tmp_path / "out", precision="bf16")
    assert not (tmp_path / "out").exists()


def test_shapes_that_only_add_up(own: Callable[[str, Change], Path], build_quietly: Build, tmp_path: Path) -> None:
    """Matrices of the right size that lie the other way."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            if ".experts." in key and "down_proj" in key:
                tensors[key] = (
                    tensors[key].view(torch.uint8).T.contiguous().view(tensors[key].dtype)
                    if (tensors[key].dtype == torch.float8_e4m3fn)
                    else tensors[key].T
                )

    with pytest.raises(CheckpointError, match=r"down_proj is stored as \(8, 128, 256\), but config.json says"):
        build_quietly(own("qwen3", change), tmp_path / "out", precision="bf16")


def kept_after(stored: Make, change: Callable[[Source], None]) -> Quantization:
    """What becomes of the experts of a checkpoint that was read and then changed."""
    source = read_source(open_checkpoint(stored("qwen3")), "bf16", dequantize=True)
    assert source.quantization is not None
    change(source)
    return keep_experts(source.model, source.layers, source.weights, source.quantization, "bf16", source.fake)


def test_weights_that_lie_across(stored: Make) -> None:
    """A model that sums over the rows of what is stored."""

    def change(source: Source) -> None:
        source.layers[1].form = replace(source.layers[1].form, transposed=True)

    found = kept_after(stored, change)
    assert found.kept == 0
    assert "model.layers.1.mlp.experts sums over the rows" in found.in_words("bf16")


def test_weights_that_are_put_together_in_another_way(stored: Make) -> None:
    from transformers.core_model_loading import Concatenate

    def change(source: Source) -> None:
        converter = source.weights.source("model.layers.0.mlp.experts.gate_up_proj").converter
        converter.operations[1] = Concatenate(dim=2)

    found = kept_after(stored, change)
    assert found.kept == 0
    assert "gate_up_proj is made of its stored tensors in another way" in found.in_words("bf16")
