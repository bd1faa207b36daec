"""Experts in NVFP4 of compressed-tensors and modelopt: what is kept of them, and when they can't be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import quantized_models
import torch
from quantized_models import NVFP4_CONFIGS, edit
from safetensors.torch import load_file
from test_kept_experts import dequantized_for, greedy

from lynx_trt.artifact import Artifact
from lynx_trt.experts import FORMATS, ExpertsForm
from lynx_trt.export.checkpoint import open_checkpoint
from lynx_trt.export.hf import Source, read_source

PAIR = ("gate_up_proj", "down_proj")
LINEAR = "model.layers.1.mlp.experts.3.up_proj"
FACTOR = {"compressed-tensors": ".weight_global_scale"}


@pytest.fixture(scope="session")
def stored(workspace: Path, checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    """A checkpoint in NVFP4 by its form."""

    def make(form: str) -> Path:
        folder = workspace / "kept-nvfp4" / form
        return folder if folder.exists() else quantized_models.nvfp4(checkpoint("qwen3_moe"), folder, form)

    return make


def kept(source: Source, name: str) -> tuple[np.ndarray, np.ndarray]:
    values, scales = (source.weights.load(f"{name}{ending}") for ending in ("", "_scale"))
    return values.numpy(), scales.float().numpy()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("form", NVFP4_CONFIGS)
def test_weights_are_the_dequantized_but_for_their_scales_rounding(
    form: str, precision: str, stored: Callable[[str], Path]
) -> None:
    """A scale is rounded to the precision once; values are the stored bytes."""
    source = read_source(open_checkpoint(stored(form)), precision)
    full = read_source(open_checkpoint(stored(form)), "fp32").weights
    assert {layer.form for layer in source.layers} == {ExpertsForm(weights="nvfp4")}
    assert source.quantization is not None
    assert (source.quantization.obstacle, source.quantization.kept) == (None, 2 * 8 * 3)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    for layer in source.layers:
        for name in (f"{layer.name}.{name}" for name in PAIR):
            values, scales = kept(source, name)
            expected, found = full.load(name).numpy(), FORMATS["nvfp4"].dequantize(values, scales)
            bound = torch.finfo(half).eps / 2 * np.abs(expected) + 6 * 2.0**-25  # the latter of fp16's smallest numbers
            assert (np.abs(found - expected) <= bound).all()
            assert np.abs(found).max() > 0.1
    # The bytes of an expert's up projection lie below those of its gate.
    tensors = load_file(stored(form) / "model.safetensors")
    packed = tensors[LINEAR + (".weight_packed" if form == "compressed-tensors" else ".weight")].numpy().view(np.int8)
    values, scales = kept(source, "model.layers.1.mlp.experts.gate_up_proj")
    np.testing.assert_array_equal(values[3, len(packed) :], packed)
    factor = tensors[LINEAR + FACTOR.get(form, ".weight_scale_2")]
    block = tensors[f"{LINEAR}.weight_scale"].float()
    block = block / factor if form == "compressed-tensors" else block * factor
    np.testing.assert_array_equal(scales[3, len(packed) :], block.to(half).float().numpy())


def test_text_and_size(stored: Callable[[str], Path], build_quietly: Callable[..., Artifact], tmp_path: Path) -> None:
    """The same text as with all weights dequantized, and a third of the experts' bytes."""
    options = {"precision": "fp16"}
    one = build_quietly(stored("modelopt"), tmp_path / "kept", **options)
    other = build_quietly(stored("modelopt"), tmp_path / "full", dequantize=True, **options)
    layers, full = (artifact.manifest.model.moe_layers for artifact in (one, other))
    assert [layer.form["weights"] for layer in (*layers, *full)] == ["nvfp4"] * 2 + ["float"] * 2
    assert [layer.expert_bytes * 16 for layer in layers] == [layer.expert_bytes * 5 for layer in full]
    assert one.manifest.model.parameters == other.manifest.model.parameters
    (text, logits), (expected, others) = greedy(one, "auto"), greedy(other, "auto")
    assert text == expected
    np.testing.assert_allclose(logits, others, rtol=0, atol=3e-3 * np.abs(others).max())


@pytest.mark.parametrize("form", ["compressed-tensors", "modelopt"])
def test_scales_too_large_for_the_kernels(
    form: str,
    stored: Callable[[str], Path],
    build_quietly: Callable[..., Artifact],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LINEAR + FACTOR.get(form, ".weight_scale_2")].fill_(1 / 128 if form == "compressed-tensors" else 128.0)

    folder = edit(quantized_models.copy_of(stored(form), tmp_path / "own", None), enlarge)
    words = f"{LINEAR}.weight has the scale", "the GPU kernels take scales up to 2.0, which are weights up to 12"
    dequantized_for(folder, build_quietly, capsys, *words, precision="bf16")


def test_precision(
    stored: Callable[[str], Path], build_quietly: Callable[..., Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    why = "LynxExperts has weights in NVFP4 in fp16 and bf16 alone, and the precision is fp32"
    dequantized_for(stored("modelopt"), build_quietly, capsys, why, precision="fp32")
