"""Experts that stay in FP8 on their way from a checkpoint of the hub's layout into an artifact, and when they don't."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import quantized_models
import tiny_models
import torch
from quantized_models import edit
from safetensors.torch import load_file
from test_kept_experts import Build, arrays_of, form_of, graph_of, greedy, in_bf16, nodes_of
from typer.testing import CliRunner

from lynx_trt import inspect
from lynx_trt.artifact import Artifact, read
from lynx_trt.errors import CheckpointError
from lynx_trt.experts import ExpertsForm
from lynx_trt.export import weights
from lynx_trt.export.checkpoint import open_checkpoint
from lynx_trt.export.hf import read_source
from lynx_trt.fp8 import dequantize

LAYERS, EXPERTS, HIDDEN, INNER = 2, 8, 256, 128
MODULE = "model.layers.{}.mlp.experts"
NAN = 0x7F

# A checkpoint's way: size of blocks in its config, and what a scale is for.
WAYS: dict[str, tuple[tuple[int, int] | None, str]] = {
    "blocks": ((128, 128), "block"),
    "small_rows": ((64, 128), "block"),
    "wide": ((128, 256), "block"),
    "exponents": ((128, 128), "e8m0"),
    "row": (None, "row"),
    "tensor": (None, "tensor"),
}


@pytest.fixture(scope="session")
def in_full(workspace: Path) -> Path:
    model = tiny_models.random_model("qwen3_moe", hidden_size=HIDDEN, moe_intermediate_size=INNER)
    folder = tiny_models.save(model, workspace / "kept-fp8" / "full")
    return edit(folder, lambda tensors: tensors.update(in_bf16(tensors)))


@pytest.fixture(scope="session")
def stored(workspace: Path, in_full: Path) -> Callable[..., Path]:
    """The same checkpoint in FP8, stored in one of the WAYS or another."""

    def make(way: str, block: tuple[int, int] | None = None) -> Path:
        folder = workspace / "kept-fp8" / f"{way}-{block}"
        if not folder.exists():
            quantized_models.fp8(in_full, folder, *(WAYS[way] if block is None else (block, "block")))
        return folder

    return make


def built(folder: Path, build_quietly: Build, tmp_path: Path, **options: object) -> Artifact:
    return build_quietly(folder, tmp_path / f"out-{len(list(tmp_path.iterdir()))}", **{"precision": None, **options})


@pytest.mark.parametrize("way", WAYS)
def test_kept_weights_are_those_that_are_dequantized(
    way: str, stored: Callable[..., Path], build_quietly: Build, tmp_path: Path
) -> None:
    """Times their repeated scales they equal, bit for bit, what an artifact in float32 holds; values are the bytes."""
    kept = graph_of(built(stored(way), build_quietly, tmp_path))
    full = graph_of(built(stored(way), build_quietly, tmp_path, precision="fp32"))
    tensors = load_file(stored(way) / "model.safetensors")
    for layer, (one, other) in enumerate(zip(nodes_of(kept), nodes_of(full), strict=True)):
        assert form_of(one) == ExpertsForm(weights="fp8")
        assert form_of(other) == ExpertsForm()
        prefix = f"{MODULE.format(layer)}."
        assert list(one.input[3:]) == [
            f"{prefix}{name}" for name in ("gate_up_proj", "down_proj", "gate_up_proj_scale", "down_proj_scale")
        ]
        gate_up, down, gate_up_scale, down_scale = arrays_of(kept, one.input[3:])
        assert gate_up.dtype == down.dtype == np.int8
        assert gate_up_scale.shape == (EXPERTS, 2 * INNER, HIDDEN // 128)
        assert down_scale.shape == (EXPERTS, HIDDEN, INNER // 128)
        for expert in range(EXPERTS):
            parts = [tensors[f"{prefix}{expert}.{name}.weight"].view(torch.int8) for name in ("gate_proj", "up_proj")]
            np.testing.assert_array_equal(gate_up[expert], torch.cat(parts).numpy())
        for values, scales, wanted in zip(
            (gate_up, down), (gate_up_scale, down_scale), arrays_of(full, other.input[3:]), strict=True
        ):
            np.testing.assert_array_equal(dequantize(values, scales), wanted)


def test_kept_experts_are_nearer_to_float32(stored: Callable[..., Path], build_quietly: Build, tmp_path: Path) -> None:
    """In ONNX Runtime, which computes in float32: kept experts are not rounded to bf16, all else of both is."""
    text, wanted = greedy(built(stored("blocks"), build_quietly, tmp_path, precision="fp32"), "auto")
    errors = []
    for dequantized in (False, True):
        other, logits = greedy(built(stored("blocks"), build_quietly, tmp_path, dequantize=dequantized), "auto")
        assert other == text
        errors.append(float(np.square(logits - wanted).mean() ** 0.5))
    assert errors[0] < errors[1] < 0.01 * np.abs(wanted).max()
    by_body, _ = greedy(built(stored("blocks"), build_quietly, tmp_path, precision="fp16"), None)
    assert by_body == text


def test_in_pieces(stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As large ones are read: some experts each."""
    monkeypatch.setattr(weights, "_EXPERTS_BYTES", 3 * 2 * INNER * HIDDEN)
    source = read_source(open_checkpoint(stored("blocks")), "bf16").weights
    name = f"{MODULE.format(0)}.gate_up_proj"
    pieces = list(source.pieces(name))
    assert [len(piece) for piece in pieces] == [3, 3, 2]
    assert torch.equal(torch.cat(pieces), source.load(name))


def test_manifest_and_inspect(stored: Callable[..., Path], build_quietly: Build, tmp_path: Path) -> None:
    artifact = built(stored("blocks"), build_quietly, tmp_path)
    for layer in read(artifact.folder).manifest.model.moe_layers:
        assert layer.quantized == "fp8"
        values = 3 * HIDDEN * INNER
        assert layer.expert_bytes == values + 4 * values // 128
    quantization = artifact.manifest.build["quantization"]
    assert quantization["kept"] == LAYERS * EXPERTS * 3
    assert quantization["obstacle"] is None
    said = CliRunner().invoke(inspect.app, [str(artifact.folder)]).output
    assert "in FP8" in said


def test_an_engine_from_outside(stored: Callable[..., Path], build_quietly: Build, tmp_path: Path) -> None:
    artifact = built(stored("blocks"), build_quietly, tmp_path, tensorrt="rtx", sm="none", expert_weights="external")
    engine = artifact.manifest.engine
    assert engine is not None
    types = {item["name"]: item["dtype"] for item in engine.external}
    prefix = MODULE.format(1)
    assert types[f"{prefix}.down_proj"] == "int8"
    assert types[f"{prefix}.gate_up_proj_scale"] == "float32"


def test_compressed_tensors(stored: Callable[..., Path], build_quietly: Build, tmp_path: Path) -> None:
    """Its names and its config, the same numbers: a scale a row."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    groups = {"0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    folder = quantized_models.copy_of(stored("row"), tmp_path / "compressed", config)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("_scale_inv")]:
            tensors[key.removesuffix("_inv")] = tensors.pop(key).reshape(-1, 1)

    kept = built(edit(folder, rename), build_quietly, tmp_path)
    assert {layer.quantized for layer in kept.manifest.model.moe_layers} == {"fp8"}
    graphs = graph_of(kept), graph_of(built(stored("row"), build_quietly, tmp_path))
    found, wanted = (arrays_of(graph, nodes_of(graph)[1].input[3:]) for graph in graphs)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("block", "options", "words"),
    [
        ((64, 64), {}, "is for 64 columns, and LynxExperts has a scale for each 128"),
        ((128, 128), {"precision": "fp32"}, "fp16 and bf16 alone, and the precision is fp32"),
        ((128, 128), {"dequantize": True}, "are dequantized to bf16"),
    ],
)
def test_dequantized_and_why(
    block: tuple[int, int],
    options: dict[str, object],
    words: str,
    stored: Callable[..., Path],
    build_quietly: Build,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact = built(stored("other", block), build_quietly, tmp_path, **options)
    assert words in " ".join(capsys.readouterr().err.split())
    assert {layer.quantized for layer in artifact.manifest.model.moe_layers} == {None}


def test_columns_that_are_no_multiple(
    checkpoint: Callable[[str], Path], build_quietly: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The usual small model has 64 and 32 of them."""
    folder = quantized_models.fp8(checkpoint("qwen3_moe"), tmp_path / "narrow", None, "row")
    artifact = built(folder, build_quietly, tmp_path, precision="bf16")
    assert "columns, and LynxExperts has weights in FP8 of multiples of 128" in " ".join(
        capsys.readouterr().err.split()
    )
    assert {layer.quantized for layer in artifact.manifest.model.moe_layers} == {None}


def _own(stored: Callable[..., Path], tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    return edit(quantized_models.copy_of(stored("blocks"), tmp_path / "own", None), change)


def test_a_value_that_is_no_number(stored: Callable[..., Path], build_quietly: Build, tmp_path: Path) -> None:
    name = f"{MODULE.format(1)}.3.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(torch.uint8)[5, 7] = NAN

    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight"):
        built(_own(stored, tmp_path, change), build_quietly, tmp_path)


def test_a_scale_that_is_no_number(stored: Callable[..., Path], build_quietly: Build, tmp_path: Path) -> None:
    name = f"{MODULE.format(0)}.2.down_proj.weight_scale_inv"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, 0] = torch.inf

    with pytest.raises(CheckpointError, match=rf"{name} holds inf"):
        built(_own(stored, tmp_path, change), build_quietly, tmp_path)


def test_an_expert_in_full(
    stored: Callable[..., Path], in_full: Path, build_quietly: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of many: the others are dequantized too."""
    name = f"{MODULE.format(1)}.3.up_proj.weight"
    full = load_file(in_full / "model.safetensors")[name]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{name}_scale_inv"]
        tensors[name] = full

    artifact = built(_own(stored, tmp_path, change), build_quietly, tmp_path)
    assert f"{name} is not stored in FP8" in " ".join(capsys.readouterr().err.split())
    assert {layer.quantized for layer in artifact.manifest.model.moe_layers} == {None}
