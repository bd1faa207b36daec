"""Models of text and images: the language model alone is built, in the layouts that published checkpoints have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import quantized_models
import tiny_models
import torch
from quantized_models import edit
from safetensors import safe_open
from safetensors.torch import save_file
from test_architectures import Batch
from test_kept_experts import form_of, graph_of, nodes_of

from lynx_trt.artifact import Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.export.checkpoint import auto_class, language_parameters, open_checkpoint
from lynx_trt.export.quantized.scaled import ScaledTensor
from lynx_trt.export.stored import Shards, StoredTensor
from lynx_trt.runtime.ort import OrtBackend

Build = Callable[..., Artifact]
# Qwen3-VL's experts are stored turned, and transformers can't tell that of a square matrix.
SIZES = {"hidden_size": 256, "moe_intermediate_size": 384}


def test_images_are_left_out(build_quietly: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_models.random_model("qwen3_vl_moe")
    folder = tiny_models.save(model, tmp_path / "model")
    built = build_quietly(folder, tmp_path / "out")
    sees = sum(parameter.numel() for parameter in model.model.visual.parameters())
    assert built.manifest.model.parameters == language_parameters(model) == model.num_parameters() - sees
    said = f"the artifact takes text alone: the {sees / 1e6:,.1f} M parameters of {folder} for images or sound are left"
    assert said in " ".join(capsys.readouterr().err.split())
    with safe_open(built.path("weights.safetensors"), "np") as file:
        names = list(file.keys())
    assert any("language_model" in name for name in names)
    assert not any("visual" in name for name in names)


def test_a_model_of_text_says_nothing_of_images(
    build_quietly: Build, checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_quietly(checkpoint("qwen3_moe"), tmp_path / "out")
    assert "images" not in capsys.readouterr().err


@pytest.mark.slow
def test_int4_of_kimi(build_quietly: Build, tmp_path: Path) -> None:
    """As Kimi K2.5 is published: what quantizes it stands in the config of the language model."""
    folder = tiny_models.save(tiny_models.random_model("kimi_k25", **SIZES).half(), tmp_path / "plain")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        # transformers writes the language model's layers as blocks, as it has those of what sees; the hub doesn't.
        for key in [key for key in tensors if key.startswith("language_model.model.blocks.")]:
            tensors[key.replace(".blocks.", ".layers.", 1)] = tensors.pop(key)

    edit(folder, rename)
    stored = quantized_models.integers(folder, tmp_path / "int4", "symmetric", group=32)
    path = stored / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    path.write_text(json.dumps(config))

    built = build_quietly(stored, tmp_path / "kept", precision="bf16")
    assert _weights(built) == {"int4_g32"}
    _agree(built, build_quietly(stored, tmp_path / "full", precision="fp32", dequantize=True))


@pytest.mark.parametrize("name", ["qwen3_vl_moe", pytest.param("gemma4", marks=pytest.mark.slow)])
def test_fp8_of_merged_experts(name: str, build_quietly: Build, tmp_path: Path) -> None:
    folder = tiny_models.save(tiny_models.random_model(name, **SIZES).bfloat16(), tmp_path / "plain")
    stored = quantized_models.merged_fp8(folder, tmp_path / "fp8")
    built = build_quietly(stored, tmp_path / "kept", precision="bf16")
    assert _weights(built) == {"fp8"}
    _agree(built, build_quietly(stored, tmp_path / "full", precision="fp32", dequantize=True))


def _agree(kept: Artifact, full: Artifact) -> None:
    """Kept experts are those that dequantized ones are made of; all else of the first is in bf16."""
    tokens, zero = np.array([Batch.random().rows[0]]), np.array([0])
    everything = Restriction((8,) * len(kept.manifest.model.moe_layers))
    logits, wanted = (
        OrtBackend(built, slots=1, form="auto").step(tokens, zero, zero + tokens.size, everything).logits
        for built in (kept, full)
    )
    assert np.abs(logits - wanted).max() < 0.05 * np.abs(wanted).max()


def test_the_class_is_of_text_where_there_is_one(checkpoint: Callable[[str], Path]) -> None:
    config = open_checkpoint(checkpoint("qwen3_moe")).config
    assert auto_class(config).__name__ == "AutoModelForCausalLM"
    config = open_checkpoint(checkpoint("glm4v_moe")).config
    assert auto_class(config).__name__ == "AutoModelForMultimodalLM"


def _weights(artifact: Artifact) -> set[str]:
    return {form_of(node).weights for node in nodes_of(graph_of(artifact))}


@pytest.mark.parametrize("scale", ["block", "row", "row of one", "all"])
def test_turned_scales(scale: str, tmp_path: Path) -> None:
    """A weight [2,256,384] of which the checkpoint has [2,384,256], whichever its scales are of."""
    experts, rows, columns = 2, 384, 256
    generator = torch.Generator().manual_seed(3)
    shape = {"block": (2, 3, 2), "row": (2, 384), "row of one": (2, 384, 1), "all": ()}[scale]
    block = (128, 128) if scale == "block" else (1, columns) if "row" in scale else (rows, columns)
    stored = {
        "w": torch.randn(experts, rows, columns, generator=generator).to(torch.float8_e4m3fn),
        "s": torch.rand(shape, generator=generator) + 0.5,
    }
    save_file(stored, tmp_path / "model.safetensors")
    parts = {
        kind: StoredTensor(tmp_path / "model.safetensors", key, dtype, tuple(stored[key].shape), 0)
        for kind, key, dtype in (("values", "w", "F8_E4M3"), ("scales", "s", "F32"))
    }
    tensor = ScaledTensor(tmp_path, "w", "F32", (experts, rows, columns), 0, parts=parts, block=block)
    turned = tensor.turn()
    assert isinstance(turned, ScaledTensor)
    assert turned.shape == (experts, columns, rows)
    grid = stored["s"].reshape(2, *(3, 2) if scale == "block" else (384, 1)) if shape else stored["s"].reshape(1, 1, 1)
    full = grid.repeat_interleave(128 if scale == "block" else 1, 1).repeat_interleave(128, 2)[:, :rows, :columns]
    wanted = (stored["w"].float() * (full if scale == "block" else grid)).mT
    with Shards() as shards:
        assert torch.equal(turned.read(shards, torch.float32), wanted)
        if scale != "row" and scale != "row of one":  # then columns of the turned weight have scales of their own
            each = turned.scales_of_rows(shards, 128)
            values = shards.read(turned.parts["values"]).float()
            assert torch.equal(values * each.expand(2, columns, 3).repeat_interleave(128, 2), wanted)
        piece = shards.piece(turned.parts["values"], (1, slice(5, 9)))
        assert torch.equal(piece.float(), stored["w"][1].float().mT[5:9])
