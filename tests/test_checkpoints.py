"""Checkpoints as they come: in both layouts, in shards, tied, with tensors that nobody asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lynx_trt.artifact import Artifact
from lynx_trt.export.checkpoint import empty_model, open_checkpoint
from lynx_trt.export.weights import CheckpointWeights

Build = Callable[..., Artifact]


def weights(artifact: Artifact) -> dict[str, Any]:
    with safe_open(artifact.path("weights.safetensors"), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe", "qwen3_vl_moe"]
)
def test_both_layouts_give_the_model_its_weights(name: str, build_quietly: Build, tmp_path: Path) -> None:
    """The hub's (a tensor an expert, in shards) and the merged one: bit for bit the parameters of the model."""
    model = tiny_models.random_model(name)
    hub = tiny_models.save(model, tmp_path / "hub", shard="100KB")
    folders = [hub]
    if name in ("qwen3_moe", "gpt_oss"):  # where the layouts differ the most, and where they don't
        folders.append(tiny_models.save(model, tmp_path / "merged", merged=True))
    own = {key: value for key, value in model.state_dict().items() if value.nbytes >= 1024}
    for folder in folders:
        written = weights(build_quietly(folder, tmp_path / f"{folder.name}-artifact"))
        for key, value in own.items():
            if key in written:
                torch.testing.assert_close(written[key], value, rtol=0, atol=0)
        experts = [key for key in own if "experts" in key and "shared" not in key]
        assert experts
        assert set(experts) <= set(written)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mixtral", [3, 3, 2]),
        ("qwen3_moe", [3, 3, 2]),
        ("deepseek_v3", [3, 3, 2]),
        ("gpt_oss", [8]),
        ("granitemoe", [8]),
    ],
)
def test_experts_are_read_some_at_a_time(
    name: str, parts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each is a tensor of its own: a layer of DeepSeek-V3 has 15 GB of gate and up alone."""
    model = tiny_models.random_model(name)
    checkpoint = open_checkpoint(tiny_models.save(model, tmp_path / "hub"))
    found = CheckpointWeights(checkpoint, empty_model(checkpoint, torch.float32))
    experts = [key for key in model.state_dict() if key.endswith("experts.gate_up_proj")]
    assert experts
    for key in experts:
        own = model.state_dict()[key]
        monkeypatch.setattr("lynx_trt.export.weights._EXPERTS_BYTES", 3 * own.nbytes // len(own))
        pieces = list(found.pieces(key))
        assert [len(piece) for piece in pieces] == parts
        assert torch.equal(torch.cat(pieces), own)


def test_weights_are_cast_to_the_precision(build_quietly: Build, tmp_path: Path) -> None:
    """A bf16 checkpoint built in fp16 and fp32, as from_pretrained would cast it."""
    model = tiny_models.random_model("mixtral", dtype=torch.bfloat16)
    folder = tiny_models.save(model, tmp_path / "bf16")
    for precision, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        written = weights(build_quietly(folder, tmp_path / precision, precision=precision))
        name = "model.layers.0.mlp.experts.gate_up_proj"
        torch.testing.assert_close(written[name], model.state_dict()[name].to(dtype), rtol=0, atol=0)


def test_tied_embedding_is_written_once(build_quietly: Build, tmp_path: Path) -> None:
    model = tiny_models.random_model("qwen3_moe", tie_word_embeddings=True)
    built = build_quietly(tiny_models.save(model, tmp_path / "tied"), tmp_path / "artifact")
    vocabulary = [tensor for tensor in weights(built).values() if tuple(tensor.shape) == (256, 64)]
    assert len(vocabulary) == 1


def test_extra_tensors_are_left_out(build_quietly: Build, tmp_path: Path) -> None:
    """DeepSeek-V3's published shards hold a prediction head that the model class doesn't have."""
    folder = tiny_models.save(tiny_models.random_model("deepseek_v3"), tmp_path / "extra")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.ones(64, 128)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    built = build_quietly(folder, tmp_path / "artifact")
    assert not [name for name in weights(built) if "eh_proj" in name]


def test_weights_file_is_aligned_and_whole(artifact: Callable[..., Artifact]) -> None:
    """The ONNX file points into a safetensors file that other tools can read; no tensor starts in mid-element."""
    import onnx

    built = artifact("gpt_oss", preset="lynx")
    graph = onnx.load(built.path("model.onnx"), load_external_data=False).graph
    stored = weights(built)
    outside = [tensor for tensor in graph.initializer if tensor.external_data]
    assert {tensor.name for tensor in outside} == set(stored)
    for tensor in outside:
        entry = {item.key: item.value for item in tensor.external_data}
        assert int(entry["offset"]) % np.dtype(np.float32).itemsize == 0
        assert entry["location"] == "weights.safetensors"
