"""Experts that stay in MXFP4 on their way from a checkpoint into an artifact, and when they don't."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import quantized_models
import torch
from numpy.typing import NDArray
from quantized_models import edit
from safetensors.torch import load_file
from test_architectures import Batch
from typer.testing import CliRunner

from lynx_trt import inspect
from lynx_trt.artifact import Artifact, read
from lynx_trt.budgets import Restriction
from lynx_trt.build import app, summary
from lynx_trt.errors import CheckpointError
from lynx_trt.experts import ExpertsForm, experts
from lynx_trt.export import weights
from lynx_trt.export.checkpoint import open_checkpoint
from lynx_trt.export.hf import read_source
from lynx_trt.export.kept import keep_experts
from lynx_trt.export.quantized.methods import Quantization
from lynx_trt.mxfp4 import dequantize
from lynx_trt.runtime.lowering import Form
from lynx_trt.runtime.ort import OrtBackend

Build = Callable[..., Artifact]
Change = Callable[[dict[str, torch.Tensor]], None]

LAYERS, EXPERTS, HIDDEN, INNER = 2, 8, 64, 32
MODULE = "model.layers.{}.mlp.experts"
PARTS = ("gate_up_proj_blocks", "down_proj_blocks", "gate_up_proj_scales", "down_proj_scales")
SHAPES = ((8, 64, 32), (8, 64, 16), (8, 64, 2), (8, 64, 1))
DOWN_SCALES = "model.layers.1.mlp.experts.down_proj_scales"


@pytest.fixture(scope="session")
def stored(workspace: Path, checkpoint: Callable[[str], Path]) -> Path:
    """A small gpt-oss in MXFP4, its other weights in bf16 as the hub's are."""
    folder = quantized_models.mxfp4(checkpoint("gpt_oss"), workspace / "kept" / "checkpoint")
    return edit(folder, lambda tensors: tensors.update(in_bf16(tensors)))


def in_bf16(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.bfloat16() for key, tensor in tensors.items() if tensor.is_floating_point()}


def built_once(folder: Path, build: Build) -> Callable[..., Artifact]:
    """The artifact of a checkpoint by its options, all in a folder, each made once."""
    made: dict[tuple[Any, ...], Artifact] = {}

    def make(checkpoint: Path, **options: Any) -> Artifact:
        key = (checkpoint, *options.items())
        if key not in made:
            made[key] = build(checkpoint, folder / str(len(made)), **{"precision": None, **options})
        return made[key]

    return make


@pytest.fixture(scope="session")
def built(workspace: Path, stored: Path, build_quietly: Build) -> Callable[..., Artifact]:
    """The artifact by its options."""
    return partial(built_once(workspace / "kept", build_quietly), stored)


@pytest.fixture
def own(stored: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """A changed copy of the checkpoint."""
    return lambda change: edit(quantized_models.copy_of(stored, tmp_path / "own", None), change)


def put(key: str, at: tuple[int, ...], value: int) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][at] = value

    return change


def graph_of(artifact: Artifact) -> onnx.GraphProto:
    return onnx.load(artifact.path("model.onnx")).graph


def nodes_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "LynxExperts"]


def arrays_of(graph: onnx.GraphProto, names: Iterable[str]) -> list[NDArray[Any]]:
    """Initializers by their names, from wherever they lie."""
    known = {tensor.name: tensor for tensor in graph.initializer}
    return [onnx.numpy_helper.to_array(known[name]) for name in names]


def form_of(node: onnx.NodeProto) -> ExpertsForm:
    values = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    fields = {name: values[name] for name in asdict(ExpertsForm())}
    words = {name: value.decode() for name, value in fields.items() if isinstance(value, bytes)}
    flags = {name: bool(fields[name]) for name in ("gated", "transposed", "interleaved")}
    return ExpertsForm(**{**fields, **words, **flags})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_tensors_are_those_of_the_checkpoint(precision: str, stored: Path, built: Callable[..., Artifact]) -> None:
    """Byte for byte; in the graph under the checkpoint's own names, in LynxExperts' order."""
    graph = graph_of(built(precision=precision))
    tensors = load_file(stored / "model.safetensors")
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for number, node in enumerate(nodes_of(graph)):
        module = MODULE.format(number)
        names = [f"{module}.{part}" for part in PARTS]
        assert list(node.input[3:]) == [*names, f"{module}.gate_up_proj_bias", f"{module}.down_proj_bias"]
        for name, array, shape in zip(names, arrays_of(graph, names), SHAPES, strict=True):
            assert types[name] == onnx.TensorProto.INT8
            assert array.shape == shape
            assert array.tobytes() == tensors[name].numpy().tobytes(), name
        assert form_of(node) == ExpertsForm("silu", True, False, True, form_of(node).alpha, 7.0, 1.0, "mxfp4")
    assert len(nodes_of(graph)) == LAYERS
    assert not [name for name in types if name.endswith("_proj")], "the weights in full are there as well"


def test_experts_in_the_file_equal_the_dequantized(built: Callable[..., Artifact]) -> None:
    """By the reference, on what both files hold: bf16 holds each value times its scale, so the weights are equal."""
    kept, full = graph_of(built()), graph_of(built(dequantize=True))
    rng = np.random.default_rng(5)
    hidden, index = rng.normal(size=(6, HIDDEN)), rng.integers(0, EXPERTS, (6, 2))
    weight = rng.random((6, 2))
    for one, other in zip(nodes_of(kept), nodes_of(full), strict=True):
        gate_up, down, gate_up_scale, down_scale, *biases = arrays_of(kept, one.input[3:])
        found = experts(
            form_of(one),
            hidden,
            index,
            weight,
            gate_up,
            down,
            *biases,
            gate_up_scale=gate_up_scale,
            down_scale=down_scale,
        )
        assert form_of(other) == replace(form_of(one), transposed=True, weights="float")
        expected = experts(form_of(other), hidden, index, weight, *arrays_of(full, other.input[3:]))
        np.testing.assert_allclose(found, expected, rtol=1e-12)  # sums in another order
        assert np.abs(found).max() > 0.1
        np.testing.assert_array_equal(
            dequantize(down, down_scale).swapaxes(1, 2), arrays_of(full, other.input[4:5])[0].astype(np.float32)
        )


def test_in_pieces(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large ones are read: some experts each."""
    monkeypatch.setattr(weights, "_EXPERTS_BYTES", 3 * 64 * 32)
    source = read_source(open_checkpoint(stored), "bf16").weights
    name = f"{MODULE.format(0)}.gate_up_proj_blocks"
    pieces = list(source.pieces(name))
    assert [len(piece) for piece in pieces] == [3, 3, 2]
    assert torch.equal(torch.cat(pieces), source.load(name))


def test_manifest_and_inspect(built: Callable[..., Artifact]) -> None:
    """Bytes are those in the file: an expert's, all weights'; the form and the words say MXFP4."""
    kept, full = built(), built(dequantize=True)
    blocks, biases = (2 * INNER * HIDDEN + HIDDEN * INNER) // 2, 2 * (2 * INNER + HIDDEN)
    for artifact, size in ((kept, blocks + blocks // 16 + biases), (full, 4 * blocks + biases)):
        for layer in artifact.manifest.model.moe_layers:
            assert layer.expert_bytes == size
            assert layer.intermediate == INNER
    model = kept.manifest.model
    assert [layer.form["weights"] for layer in model.moe_layers] == ["mxfp4"] * LAYERS
    assert [layer.form["transposed"] for layer in model.moe_layers] == [0] * LAYERS
    assert model.parameters == full.manifest.model.parameters
    saved = LAYERS * EXPERTS * (4 * blocks - blocks - blocks // 16)
    small = LAYERS * 8 * 64  # bytes of down_proj_scales, which are so small that they lie in the graph
    assert model.weight_bytes == full.manifest.model.weight_bytes - saved - small
    record = kept.manifest.build["quantization"]
    assert record == {**full.manifest.build["quantization"], "kept": 4}
    assert summary(kept.manifest, kept.folder)["quantization"] == record
    rows = dict(inspect.rows(kept.manifest))
    assert rows["checkpoint"] == "quantized (mxfp4): 4 weights of 52.2 kB, 4 kept as stored"
    assert rows["experts"] == "8 a layer, 2 a token, 3.5 kB each, in MXFP4"
    rows = dict(inspect.rows(full.manifest))
    assert rows["checkpoint"] == "quantized (mxfp4): 4 weights of 52.2 kB, 4 dequantized"
    assert "MXFP4" not in rows["experts"]


def test_build_says_what_it_keeps(stored: Path, tmp_path: Path) -> None:
    """In one line, and in --json; --dequantize does the other."""
    arguments = [str(stored), "--tensorrt", "none", "--json", "-o"]
    for more, words, kept in (
        ([], "4 of its weights stay as they are stored; all weights take ", 4),
        (["--dequantize"], "4 of its weights are dequantized to bf16 while they are read; all weights take ", 0),
    ):
        result = CliRunner().invoke(app, [*arguments, str(tmp_path / str(kept)), *more])
        assert result.exit_code == 0, result.output
        (line,) = [line for line in result.stderr.splitlines() if "quantized (" in line]
        assert f"note: the checkpoint is quantized (mxfp4): {words}" in line
        assert json.loads(result.stdout)["quantization"]["kept"] == kept
        assert read(tmp_path / str(kept)).manifest.build["options"]["dequantize"] is bool(more)


def test_expert_weights_go_by_what_is_written(
    stored: Path, build_quietly: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule of 2 GB looks at the artifact, not at the weights in full."""
    between = 250_000
    monkeypatch.setattr("lynx_trt.build.OUTSIDE_FROM", between)
    options = [
        build_quietly(stored, tmp_path / str(full), precision="bf16", dequantize=full).manifest.build["options"]
        for full in (False, True)
    ]
    assert [each["expert_weights"] for each in options] == ["engine", "external"]


def dequantized_for(
    folder: Path, build: Build, capsys: pytest.CaptureFixture[str], *words: str, **options: Any
) -> None:
    """`build` dequantizes all, and says why in one line."""
    artifact = build(folder, folder.parent / "out-of-kept", **{"precision": None, "overwrite": True, **options})
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "quantized (" in line]
    for word in ("of its weights are dequantized", "while they are read, for", *words):
        assert word in line, line
    assert all(layer.quantized is None for layer in artifact.manifest.model.moe_layers)
    assert artifact.manifest.build["quantization"]["kept"] == 0
    assert {form_of(node).weights for node in nodes_of(graph_of(artifact))} == {"float"}


def test_scale_beyond_the_kernels(
    own: Callable[[Change], Path], build_quietly: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one layer of two: all layers have one form."""
    folder = own(put(DOWN_SCALES, (3, 2, 0), 129))
    dequantized_for(folder, build_quietly, capsys, DOWN_SCALES, "the scale 129 at [3, 2, 0]", "up to 128")


def test_largest_scale_of_the_kernels(own: Callable[[Change], Path], build_quietly: Build, tmp_path: Path) -> None:
    artifact = build_quietly(own(put(DOWN_SCALES, (3, 2, 0), 128)), tmp_path / "out", precision="bf16")
    assert artifact.manifest.model.moe_layers[1].quantized == "mxfp4"


def test_scale_that_is_no_number(own: Callable[[Change], Path], build_quietly: Build, tmp_path: Path) -> None:
    """Before anything is written, and though one before it is beyond the kernels."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN_SCALES][1, 0, 0], tensors[DOWN_SCALES][3, 2, 0] = 129, 255

    with pytest.raises(CheckpointError, match=rf"{DOWN_SCALES} holds nan at \[3, 2, 0\].*broken"):
        build_quietly(own(change), tmp_path / "out", precision="bf16")
    assert not (tmp_path / "out").exists()


def test_float32_has_no_mxfp4(
    own: Callable[[Change], Path], build_quietly: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = own(lambda _: None)
    dequantized_for(folder, build_quietly, capsys, "fp16 and bf16 alone", "is fp32", precision="fp32")


def test_a_matrix_in_full(
    own: Callable[[Change], Path],
    checkpoint: Callable[[str], Path],
    build_quietly: Build,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One of four: the others are dequantized too."""
    name = "model.layers.1.mlp.experts.gate_up_proj"
    full = load_file(checkpoint("gpt_oss") / "model.safetensors")[name]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        tensors[name] = full.bfloat16()

    dequantized_for(own(change), build_quietly, capsys, f"{name} is not stored in MXFP4", "3 of its weights")


def test_shard_that_ends_too_soon(own: Callable[[Change], Path], build_quietly: Build, tmp_path: Path) -> None:
    folder = own(lambda _: None)
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        build_quietly(folder, tmp_path / "out", precision="bf16")
    assert not (tmp_path / "out").exists()


def test_weights_that_lie_across(stored: Path) -> None:
    """A model that multiplies from the right, whose rows are not what the stored blocks run along."""
    source = read_source(open_checkpoint(stored), "bf16", dequantize=True)
    source.layers[1].form = replace(source.layers[1].form, transposed=False)
    assert source.quantization is not None
    found = keep_experts(source.model, source.layers, source.weights, source.quantization, "bf16", source.fake)
    assert found.kept == 0
    assert "those of model.layers.1.mlp.experts have their blocks across" in found.in_words("bf16")


def test_words_on_some_of_the_weights() -> None:
    words = Quantization("mxfp4", 6, 100, kept=4).in_words("bf16")
    assert words.endswith("4 of its weights stay as they are stored, and 2 are dequantized to bf16 while they are read")


def test_the_graph_as_an_onnx_file(built: Callable[..., Artifact], build_quietly: Build, tmp_path: Path) -> None:
    """`build` on an artifact's own graph: its blocks are known, with the sizes of the weights in full."""
    kept = built()
    again = build_quietly(kept.path("model.onnx"), tmp_path / "again", precision=None).manifest.model.moe_layers
    for one, other in zip(again, kept.manifest.model.moe_layers, strict=True):
        assert (one.intermediate, one.quantized, one.expert_bytes) == (INNER, "mxfp4", other.expert_bytes)


def greedy(artifact: Artifact, form: Form | None) -> tuple[list[int], NDArray[Any]]:
    """32 tokens after a prompt of nine, and the logits [33,V] that they were the largest of."""
    backend = OrtBackend(artifact, slots=1, form=form)
    everything = Restriction((EXPERTS,) * LAYERS)
    tokens = Batch.random().rows[0][:9]
    logits = [backend.step(np.array([tokens]), np.array([0]), np.array([9]), everything).logits[0].copy()]
    for _ in range(32):
        tokens.append(int(logits[-1].argmax()))
        past = np.array([len(tokens) - 1])
        logits.append(backend.step(np.array([tokens[-1:]]), past, np.array([1]), everything).logits[0].copy())
    return tokens, np.stack(logits)


@pytest.mark.parametrize(("precision", "form"), [("bf16", "auto"), ("fp16", "auto"), ("fp16", None)])
def test_text_equals_that_of_the_dequantized(precision: str, form: Form | None, built: Callable[..., Artifact]) -> None:
    """In ONNX Runtime, prefill and decode, lowered and as the graph is; logits too: sums of the same numbers."""
    text, logits = greedy(built(precision=precision), form)
    other_text, other_logits = greedy(built(precision=precision, dequantize=True), form)
    assert text == other_text
    scale = np.abs(other_logits).max()
    assert scale > 1
    np.testing.assert_allclose(logits, other_logits, rtol=0, atol=(1e-5 if form else 1e-3) * scale)


@pytest.mark.parametrize("where", ["external", "engine"])
def test_engine(where: str, stored: Path, build_quietly: Build, tmp_path: Path) -> None:
    """TensorRT takes the artifact's graph; from outside it is to be given the checkpoint's bytes."""
    artifact = build_quietly(
        stored, tmp_path / "out", precision="bf16", tensorrt="rtx", sm="none", expert_weights=where
    )
    engine = artifact.manifest.engine
    assert engine is not None
    assert engine.plugin_layers["LynxExperts"] == LAYERS
    tensors = load_file(stored / "model.safetensors")
    names = {f"{MODULE.format(layer)}.{part}" for layer in range(LAYERS) for part in PARTS}
    external = {item["name"]: item for item in engine.external if item["name"] in names}
    if where == "engine":
        assert not engine.external
        return
    assert {name for name in names if tensors[name].nbytes >= weights.EXTERNAL_BYTES} <= external.keys()
    for name, item in external.items():
        assert item["dtype"] == "int8"
        data = artifact.path(item["file"]).read_bytes()[item["offset"] : item["offset"] + item["length"]]
        assert data == tensors[name].numpy().tobytes()
