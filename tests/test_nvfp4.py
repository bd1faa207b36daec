"""Checkpoints in NVFP4, of compressed-tensors and modelopt, and modelopt's FP8, read as if they were not quantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import quantized_models
import tiny_models
import torch
from quantized_models import NVFP4_CONFIGS, copy_of, edit
from safetensors.torch import load_file, save_file
from test_architectures import Batch
from test_quantized import put, refused, replace, same_bits, say, weights_of

from lynx_trt.artifact import Artifact
from lynx_trt.calibration import source
from lynx_trt.comparison.runners import HuggingFaceRunner
from lynx_trt.errors import CheckpointError, LynxError, UnsupportedModelError
from lynx_trt.export.checkpoint import open_checkpoint
from lynx_trt.export.hf import DTYPES
from lynx_trt.export.loaded import load_model
from lynx_trt.export.quantized import computed
from lynx_trt.export.quantized.nvfp4 import Nvfp4Tensor
from lynx_trt.export.stored import Shards

Build = Callable[..., Artifact]
Make = Callable[[str], Path]

FORMS = tuple(NVFP4_CONFIGS)
# Linear layers of the model of one layer: four of attention and three of each expert.
LINEARS = 4 + 8 * 3
LINEAR = "model.layers.0.mlp.experts.5.up_proj"
EXPERT = f"{LINEAR}.weight"
WEIGHTS = "weights.safetensors"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


@pytest.fixture(scope="session")
def in_full(workspace: Path) -> Path:
    return tiny_models.save(tiny_models.random_model("qwen3_moe", num_hidden_layers=1), workspace / "nvfp4" / "full")


@pytest.fixture(scope="session")
def stored(workspace: Path, in_full: Path) -> Callable[..., Path]:
    """A checkpoint in NVFP4 by its form, or what it means in full."""

    def make(form: str, *, full: bool = False) -> Path:
        folder = workspace / "nvfp4" / f"{form}-{full}"
        return folder if folder.exists() else quantized_models.nvfp4(in_full, folder, form, full=full)

    return make


@pytest.fixture
def own(stored: Make, tmp_path: Path) -> Make:
    """A copy that the test may break."""
    return lambda form: copy_of(stored(form), tmp_path / form, None)


def names_of(form: str) -> tuple[str, str, str]:
    """Of values, scales and factor, behind the weight's."""
    return ("_packed", "_scale", "_global_scale") if form == "compressed-tensors" else ("", "_scale", "_scale_2")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("factor", [1.0, 0.0123, 3e4])
def test_every_value_under_every_scale(
    factor: float, form: str, tmp_path: Path, stored: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pairs of values under each of the 254 scales that are numbers: rounded twice, as the formula says."""
    scale_bytes = np.array([byte for byte in range(256) if byte & 127 != 127], np.uint8)
    values = torch.arange(256, dtype=torch.uint8).repeat(254, 1)
    scales = torch.from_numpy(scale_bytes).view(torch.float8_e4m3fn)[:, None].repeat(1, 32)
    one = torch.tensor([factor]) if form == "compressed-tensors" else torch.tensor(factor)
    folder = copy_of(stored(form), tmp_path / "every", None)
    parts = dict(zip(names_of(form), (values, scales, one), strict=True))
    save_file({f"a.weight{name}": part for name, part in parts.items()}, folder / "model.safetensors")

    numbers = scale_bytes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    multiplier = numbers / np.float32(factor) if form == "compressed-tensors" else numbers * np.float32(factor)
    both = np.stack([np.arange(256) & 15, np.arange(256) >> 4], 1).flatten()
    magnitudes = np.where(both & 8, -E2M1[both & 7], E2M1[both & 7])
    expected = torch.from_numpy(magnitudes * multiplier[:, None])
    weight = open_checkpoint(folder).tensors["a.weight"]
    assert weight.shape == expected.shape == (254, 512)
    for piece in (2**23, 3000, 1):
        monkeypatch.setattr(computed, "PIECE", piece)
        with Shards() as shards:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert same_bits(weight.read(shards, dtype), expected.to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_what_can_be_kept_of_a_weight(form: str, stored: Make) -> None:
    """Its values as they are, and scales that have its factor in them."""
    tensors = load_file(stored(form) / "model.safetensors")
    values, scales, factor = (tensors[EXPERT + name] for name in names_of(form))
    weight = open_checkpoint(stored(form)).tensors[EXPERT]
    assert isinstance(weight, Nvfp4Tensor)
    with Shards() as shards:
        assert same_bits(weight.packed(shards), values)
        expected = scales.float() / factor if form == "compressed-tensors" else scales.float() * factor
        assert same_bits(weight.scales_of_rows(shards), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_is_that_of_the_weights_in_full(form: str, precision: str, stored: Callable[..., Path]) -> None:
    ours, wanted = (weights_of(stored(form, full=full), DTYPES[precision]) for full in (False, True))
    for name, expected in wanted.items():
        assert same_bits(ours[name], expected), name


@pytest.mark.parametrize(("form", "precision"), [("compressed-tensors", "fp32"), ("modelopt", "bf16")])
def test_the_artifact_is_that_of_the_weights_in_full(
    form: str,
    precision: str,
    stored: Callable[..., Path],
    build_quietly: Build,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Byte for byte; scales of activations and caches are no tensors too many. Calibration takes it as its source."""
    one = build_quietly(stored(form), tmp_path / "one", precision=precision, dequantize=True)
    said = capsys.readouterr().err
    other = build_quietly(stored(form, full=True), tmp_path / "other", precision=precision)
    assert (one.folder / WEIGHTS).read_bytes() == (other.folder / WEIGHTS).read_bytes()
    assert (one.folder / "model.onnx").read_bytes() == (other.folder / "model.onnx").read_bytes()
    assert "are not used" not in said
    assert f"quantized ({form}): {LINEARS} of its weights are dequantized to {precision}" in " ".join(said.split())
    assert one.manifest.build["quantization"]["weights"] == LINEARS
    probed = source.load(source.open_source(one, stored(form)), device="cpu", dtype=torch.float32)
    assert len(probed.layers) == len(one.manifest.model.moe_layers)


@pytest.mark.parametrize("form", FORMS)
def test_whole_model_for_compare_and_calibrate(form: str, stored: Callable[..., Path]) -> None:
    model = load_model(open_checkpoint(stored(form)), torch.bfloat16)
    ours = weights_of(stored(form, full=True), torch.bfloat16)
    for name, theirs in model.state_dict().items():
        assert same_bits(ours[name], theirs), name


@pytest.mark.parametrize("form", FORMS)
def test_what_compare_runs_beside_an_artifact(form: str, stored: Callable[..., Path]) -> None:
    """By methods that transformers doesn't know."""
    ids = np.array([Batch.random().rows[0]])
    found = []
    for folder in (stored(form), stored(form, full=True)):
        runner = HuggingFaceRunner(folder, None)
        found.append(runner.prefill(ids))
        runner.close()
    np.testing.assert_allclose(*found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", ["tensor", "row"])
def test_fp8_of_modelopt(scale: str, in_full: Path, tmp_path: Path) -> None:
    folder = quantized_models.modelopt_fp8(in_full, tmp_path / "fp8", scale)
    tensors = load_file(folder / "model.safetensors")
    opened = open_checkpoint(folder)
    assert opened.quantization is not None
    assert opened.quantization.weights == LINEARS
    assert not [key for key in opened.tensors if key.endswith("_scale")]
    with Shards() as shards:
        for key in [key.removesuffix("_scale") for key in tensors if key.endswith(".weight_scale")]:
            scales = tensors[f"{key}_scale"]
            expected = tensors[key].float() * (scales[:, None] if scale == "row" else scales)
            assert same_bits(opened.tensors[key].read(shards, torch.float32), expected), key


def test_experts_in_fp8_of_modelopt_stay(build_quietly: Build, tmp_path: Path) -> None:
    """Their bytes, and the scale of each tensor repeated."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 4}
    model = tiny_models.random_model("qwen3_moe", **sizes)
    folder = quantized_models.modelopt_fp8(tiny_models.save(model, tmp_path / "full"), tmp_path / "fp8")
    built = build_quietly(folder, tmp_path / "out", precision="bf16")
    assert {layer.quantized for layer in built.manifest.model.moe_layers} == {"fp8"}
    kept, tensors = load_file(built.folder / WEIGHTS), load_file(folder / "model.safetensors")
    experts = "model.layers.0.mlp.experts"
    for expert in range(4):
        both = [f"{experts}.{expert}.{name}_proj.weight" for name in ("gate", "up")]
        values = torch.cat([tensors[key].view(torch.int8) for key in both])
        scales = torch.cat([tensors[f"{key}_scale"].expand(128, 2) for key in both])
        assert torch.equal(kept[f"{experts}.gate_up_proj"][expert], values)
        assert torch.equal(kept[f"{experts}.gate_up_proj_scale"][expert], scales)


def without(key: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key]

    return change


def filled(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return replace(key, lambda tensor: torch.full_like(tensor, value))


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        *(
            case
            for form in ("compressed-tensors", "modelopt")
            for values, scales, factor in [[EXPERT + name for name in names_of(form)]]
            for case in [
                (form, without(scales), [f"lacks {scales}"]),
                (form, without(factor), [f"lacks {factor}"]),
                (form, without(values), [f"lacks {values}"]),
                (form, put(scales, (2, 1), 0x7F), [f"{scales} holds nan at [2, 1]", "can't be a scale", "broken"]),
                (form, put(scales, (2, 1), 0xFF), [f"{scales} holds nan at [2, 1]"]),
                (form, filled(factor, float("nan")), [f"{factor} holds nan", "broken"]),
                (form, filled(factor, float("inf")), [f"{factor} holds inf", "broken"]),
                (form, replace(factor, lambda t: t.repeat(2)), [factor, "[2]", "one number for all of"]),
                (form, replace(factor, lambda t: t.half()), [factor, "F16", "has to be F32"]),
                (form, replace(scales, lambda t: t[1:]), [scales, "[31, 4]", "[32, 4]"]),
                # groups of 32
                (form, replace(scales, lambda t: t[:, ::2]), [scales, "[32, 2]", "[32, 4]"]),
                (form, replace(scales, lambda t: t.float()), [scales, "F32", "has to be F8_E4M3"]),
                (form, replace(values, lambda t: t[:, :30]), [values, "[32, 30]", "8 bytes for each 16 columns"]),
                (form, replace(values, lambda t: t.flatten()), [values, "[1024]", "matrix"]),
                (form, replace(values, lambda t: t.view(torch.int8)), [values, "I8", "has to be U8"]),
            ]
        ),
        ("compressed-tensors", filled(f"{EXPERT}_global_scale", 0), [f"{EXPERT}_global_scale holds 0", "divided"]),
        ("modelopt", lambda t: [t.pop(f"{EXPERT}{name}") for name in ("_scale", "_scale_2")],
         [EXPERT, "U8", "has no scales beside it"]),
        ("modelopt", lambda t: t.update({f"{LINEAR}.pre_quant_scale": torch.ones(64)}), ["pre_quant_scale", "AWQ"]),
        ("modelopt", lambda t: t.update({"a.experts.down_proj_weight_scale": torch.ones(8)}), ["all experts"]),
    ],
)  # fmt: skip
def test_broken_parts(form: str, change: Any, words: list[str], own: Make) -> None:
    """Before a weight is written that none can be made of."""
    with pytest.raises(LynxError) as caught:
        weights_of(edit(own(form), change), torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_factor_of_zero(own: Make) -> None:
    """By which scales are multiplied: a number, and a weight of zeros."""
    folder = edit(own("modelopt"), filled(f"{EXPERT}_scale_2", 0))
    merged = weights_of(folder, torch.float32)["model.layers.0.mlp.experts.gate_up_proj"]
    assert not merged[5, 32:].any()
    assert merged[5, :32].any()


def modelopt(**changes: Any) -> dict[str, Any]:
    return {**NVFP4_CONFIGS["modelopt"], **changes}


def groups_of(size: int) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": size}}}


def compressed(**changes: Any) -> dict[str, Any]:
    right = NVFP4_CONFIGS["compressed-tensors"]
    group = right["config_groups"]["group_0"]
    return {**right, "config_groups": {"group_0": {**group, "weights": {**group["weights"], **changes}}}}


@pytest.mark.parametrize(
    ("form", "error", "said", "words"),
    [
        *(
            ("modelopt", UnsupportedModelError, modelopt(quant_algo=algorithm), [f"{algorithm!r}", "NVFP4", "FP8"])
            for algorithm in ("MIXED_PRECISION", "W4A8_AWQ", "W4A16_AWQ", "NVFP4_AWQ", "MXFP8", None, ["NVFP4"], {})
        ),
        ("modelopt", UnsupportedModelError, modelopt(config_groups=groups_of(32)), ["group_size 32", "16 it can"]),
        ("modelopt", UnsupportedModelError, modelopt(group_size=32), ["group_size 32"]),
        ("modelopt", CheckpointError, modelopt(quant_algo="FP8"), ["U8", "has to be F8_E4M3"]),
        ("modelopt", CheckpointError, NVFP4_CONFIGS["compressed-tensors"], ["lacks", "_packed"]),
        ("modelopt", CheckpointError, None, ["weight_scale", "no quantization_config"]),
        ("compressed-tensors", UnsupportedModelError, compressed(group_size=32), ["tensor_group of 32", "NVFP4"]),
        ("compressed-tensors", UnsupportedModelError, compressed(type="int"), ["nvfp4-pack-quantized"]),
        ("compressed-tensors", UnsupportedModelError, compressed(num_bits=8), ["8 bits"]),
        ("compressed-tensors", UnsupportedModelError, compressed(symmetric=False), ["nvfp4-pack-quantized"]),
        ("compressed-tensors", CheckpointError, NVFP4_CONFIGS["modelopt"], ["lacks", ".weight"]),
    ],
)  # fmt: skip
def test_config_that_says_something_else(
    form: str, error: type[LynxError], said: Any, words: list[str], own: Make, build_quietly: Build
) -> None:
    refused(error, say(own(form), quantization_config=said), build_quietly, *words)


@pytest.mark.parametrize("changes", [{"quant_method": "modelopt_fp4"}, {"quant_algo": "W4A16_NVFP4"}, {"ignore": None}])
def test_other_words_for_the_same(changes: dict[str, Any], own: Make, stored: Callable[..., Path]) -> None:
    folder = say(own("modelopt"), quantization_config=modelopt(**changes))
    opened = open_checkpoint(folder)
    assert opened.quantization is not None
    assert opened.quantization.weights == LINEARS
    full = load_file(stored("modelopt", full=True) / "model.safetensors")
    with Shards() as shards:
        assert same_bits(opened.tensors[EXPERT].read(shards, torch.float32), full[EXPERT])


def test_modelopt_fp4_is_nvfp4_if_nothing_else_is_said(own: Make) -> None:
    opened = open_checkpoint(say(own("modelopt"), quantization_config={"quant_method": "modelopt_fp4"}))
    assert opened.quantization is not None
    assert opened.quantization.weights == LINEARS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["hf_quant_config.json", "can't be read as JSON"]),
        ("[1]", ["hf_quant_config.json", "no object quantization"]),
        ('{"quantization": null}', ["no object quantization"]),
        ('{"quantization": {"quant_algo": "W4A8_AWQ"}}', ["'W4A8_AWQ'"]),
        ('{"quantization": {"quant_algo": "NVFP4", "group_size": 32}}', ["group_size 32"]),
    ],
)
def test_file_beside_config_that_says_something_else(
    text: str, words: list[str], own: Make, build_quietly: Build
) -> None:
    folder = own("hf_quant_config")
    (folder / "hf_quant_config.json").write_text(text)
    refused(LynxError, folder, build_quietly, *words)


def test_file_beside_config_of_caches_alone(in_full: Path, tmp_path: Path) -> None:
    """And config.json goes before it."""
    folder = copy_of(in_full, tmp_path / "full", None)
    file = folder / "hf_quant_config.json"
    file.write_text(json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}))
    opened = open_checkpoint(folder)
    assert opened.quantization is not None
    assert opened.quantization.weights == 0
    file.write_text("{")
    named = open_checkpoint(say(folder, quantization_config={"quant_method": "fp8"})).quantization
    assert named is not None
    assert named.method == "fp8"
