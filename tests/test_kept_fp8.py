"""Experts in FP8 of a checkpoint of the hub's layout: what keeping them is good for, and when they can't be kept."""

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
from test_kept_experts import Build, greedy, in_bf16

from lynx_trt.artifact import Artifact
from lynx_trt.errors import CheckpointError

HIDDEN, INNER = 256, 128
MODULE = "model.layers.{}.mlp.experts"
NAN = 0x7F


@pytest.fixture(scope="session")
def in_full(workspace: Path) -> Path:
    model = tiny_models.random_model("qwen3_moe", hidden_size=HIDDEN, moe_intermediate_size=INNER)
    folder = tiny_models.save(model, workspace / "kept-fp8" / "full")
    return edit(folder, lambda tensors: tensors.update(in_bf16(tensors)))


@pytest.fixture(scope="session")
def stored(workspace: Path, in_full: Path) -> Callable[..., Path]:
    """The same checkpoint in FP8, in blocks of some rows by columns."""

    def make(block: tuple[int, int] = (128, 128)) -> Path:
        folder = workspace / "kept-fp8" / str(block)
        return folder if folder.exists() else quantized_models.fp8(in_full, folder, block)

    return make


def built(folder: Path, build_quietly: Build, tmp_path: Path, **options: object) -> Artifact:
    return build_quietly(folder, tmp_path / f"out-{len(list(tmp_path.iterdir()))}", **{"precision": None, **options})


@pytest.mark.slow
def test_kept_experts_are_nearer_to_float32(stored: Callable[..., Path], build_quietly: Build, tmp_path: Path) -> None:
    """In ONNX Runtime, which computes in float32: kept experts are not rounded to bf16, all else of both is."""
    text, wanted = greedy(built(stored(), build_quietly, tmp_path, precision="fp32"), "auto")
    errors = []
    for dequantized in (False, True):
        other, logits = greedy(built(stored(), build_quietly, tmp_path, dequantize=dequantized), "auto")
        assert other == text
        errors.append(float(np.square(logits - wanted).mean() ** 0.5))
    assert errors[0] < errors[1] < 0.01 * np.abs(wanted).max()
    by_body, _ = greedy(built(stored(), build_quietly, tmp_path, precision="fp16"), None)
    assert by_body == text


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
    artifact = built(stored(block), build_quietly, tmp_path, **options)
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
    return edit(quantized_models.copy_of(stored(), tmp_path / "own", None), change)


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
