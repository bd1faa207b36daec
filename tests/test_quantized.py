"""Quantized checkpoints: dequantized while they are read, bit for bit as transformers does it, and refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized_models
import tiny_models
import torch
import transformers
from quantized_models import edit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_architectures import Batch, eager_logits, exported_logits

from lynx_trt import inspect
from lynx_trt.build import summary
from lynx_trt.calibration import source
from lynx_trt.comparison.runners import HuggingFaceRunner
from lynx_trt.errors import CheckpointError, LynxError, UnsupportedModelError
from lynx_trt.export.checkpoint import empty_model, open_checkpoint
from lynx_trt.export.hf import DTYPES
from lynx_trt.export.loaded import load_model
from lynx_trt.export.quantized import computed
from lynx_trt.export.stored import Shards
from lynx_trt.export.weights import CheckpointWeights

Build = Callable[..., Any]
Make = Callable[[str], Path]

# Of which model, and how it is quantized. Small blocks, since small models have small weights.
FORMS: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
    "mxfp4": ("gpt_oss", quantized_models.mxfp4),
    # blocks that divide every weight, as in Qwen3's FP8 checkpoints
    "fp8-qwen3": ("qwen3_moe", lambda folder, target: quantized_models.fp8(folder, target, (8, 16))),
    # the last blocks are partial, as DeepSeek-V3's kv_a_proj_with_mqa has them (576 rows in blocks of 128)
    "fp8-deepseek": ("deepseek_v3", lambda folder, target: quantized_models.fp8(folder, target, (32, 24))),
    "fp8-row": ("qwen3_moe", lambda folder, target: quantized_models.fp8(folder, target, None, "row")),
    "fp8-tensor": ("qwen3_moe", lambda folder, target: quantized_models.fp8(folder, target, None, "tensor")),
    # the scales' name in checkpoints of AutoFP8
    "fp8-auto": ("mixtral", lambda folder, target: auto_fp8(quantized_models.fp8(folder, target, None, "tensor"))),
    "fp8-e8m0": ("qwen3_moe", lambda folder, target: quantized_models.fp8(folder, target, (1, 32), "e8m0")),
    **{
        method: ("qwen3_moe", partial(quantized_models.integers, method=method))
        for method in ("packed", "symmetric", "mixed", "gptq", "awq")
    },
}


def auto_fp8(folder: Path) -> Path:
    """Scales under another name, and those of activations beside them."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("_scale_inv")]:
            tensors[key.removesuffix("_inv")] = tensors.pop(key)
            tensors[key.replace("weight_scale_inv", "input_scale")] = torch.tensor(0.5)

    return edit(folder, change)


@pytest.fixture(scope="session")
def quantized(workspace: Path, checkpoint: Callable[[str], Path]) -> Make:
    """The folder of a quantized checkpoint, by its form."""

    def make(form: str) -> Path:
        name, quantize = FORMS[form]
        folder = workspace / "quantized" / form
        return folder if folder.exists() else quantize(checkpoint(name), folder)

    return make


@pytest.fixture
def own(quantized: Make, tmp_path: Path) -> Make:
    """A copy of a quantized checkpoint that the test may break."""
    return lambda form: quantized_models.copy_of(quantized(form), tmp_path / form, None)


def weights_of(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    model = empty_model(checkpoint, dtype)
    weights = CheckpointWeights(checkpoint, model)
    return {name: weights.load(name) for name in model.state_dict()}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_mxfp4_equals_transformers(precision: str, quantized: Make) -> None:
    """Every parameter of the model that transformers makes of the same folder."""
    config = transformers.Mxfp4Config(dequantize=True)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        quantized("mxfp4"), quantization_config=config, dtype=DTYPES[precision]
    )
    ours = weights_of(quantized("mxfp4"), DTYPES[precision])
    for name, theirs in reference.state_dict().items():
        assert same_bits(ours[name], theirs), name


def test_every_byte_of_mxfp4(tmp_path: Path, quantized: Make) -> None:
    """All pairs of values under all exponents; what float32 doesn't hold is infinite."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].repeat(1, 1, 16)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["every_blocks"], tensors["every_scales"] = blocks, scales

    folder = edit(quantized_models.copy_of(quantized("mxfp4"), tmp_path / "every", None), change)
    stored = open_checkpoint(folder).tensors["every"]
    with Shards() as shards:
        ours = stored.read(shards, torch.float32)
    assert ours.shape == stored.shape == (1, 512, 255)
    assert same_bits(ours, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("form", ["fp8-qwen3", "fp8-row", "fp8-tensor", "fp8-e8m0"])
def test_fp8_equals_transformers(form: str, precision: str, quantized: Make) -> None:
    """Its operation on every weight; loading the folder whole would need accelerate."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    checkpoint = open_checkpoint(quantized(form))
    stored = load_file(quantized(form) / "model.safetensors")
    scaled = [key.removesuffix("_scale_inv") for key in stored if key.endswith("_scale_inv")]
    assert len(scaled) == 2 * (4 + 8 * 3)
    for key in scaled:
        theirs = Fp8Dequantize(None)._dequantize_one(stored[key], stored[f"{key}_scale_inv"], DTYPES[precision])
        with Shards() as shards:
            assert same_bits(checkpoint.tensors[key].read(shards, DTYPES[precision]), theirs), key


FILES = Path(__file__).parent / "quantized_files"
CASES = [
    (path.name, case)
    for path in sorted(FILES.glob("*.safetensors"))
    for case in sorted(safe_open(path, "pt").metadata())
]


@pytest.mark.parametrize(("file", "case"), CASES)
def test_weights_that_other_packages_quantized(
    file: str, case: str, tmp_path: Path, quantized: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what the package itself makes of them, in the type of its scales; in pieces as well as whole."""
    with safe_open(FILES / file, "pt") as stored:
        config = json.loads(stored.metadata()[case])
        every = {
            key.removeprefix(f"{case}."): stored.get_tensor(key)
            for key in stored.keys()  # noqa: SIM118
            if key.startswith(f"{case}.")
        }
    expected = every.pop("expected")
    folder = say(quantized_models.copy_of(quantized("fp8-row"), tmp_path / "case", None), quantization_config=config)
    save_file({f"a.b.{key}": tensor for key, tensor in every.items()}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    weight = checkpoint.tensors["a.b.weight"]
    assert weight.shape == expected.shape
    assert checkpoint.quantization.weights == 1  # type: ignore[union-attr]
    for piece in (2**20, 1):
        monkeypatch.setattr(computed, "PIECE", piece)
        with Shards() as shards:
            assert same_bits(weight.read(shards, expected.dtype), expected)
            in_float32 = weight.read(shards, torch.float32)
        assert same_bits(in_float32.to(expected.dtype), expected)


def test_scales_by_the_name_that_auto_fp8_gives_them(quantized: Make) -> None:
    """The weights of the same model with scales by the usual name."""
    stored = load_file(quantized("fp8-auto") / "model.safetensors")
    checkpoint = open_checkpoint(quantized("fp8-auto"))
    scaled = [key for key in stored if f"{key}_scale" in stored]
    assert checkpoint.quantization.weights == len(scaled) == 2 * (4 + 8 * 3)  # type: ignore[union-attr]
    assert weights_of(quantized("fp8-auto"), torch.float32)  # nothing else is missing or wrong
    with Shards() as shards:
        for key in scaled:
            expected = stored[key].float() * stored[f"{key}_scale"]
            assert same_bits(checkpoint.tensors[key].read(shards, torch.float32), expected), key


def test_only_scales_of_queries_keys_and_values_are_left_aside(own: Make) -> None:
    """And not what merely ends in one's name."""
    names = ("a.k_scale", "a.v_scale", "a.q_scale", "a.k_proj.output_scale", "a.block_scale")
    folder = edit(own("fp8-qwen3"), lambda tensors: tensors.update({name: torch.ones(3) for name in names}))
    assert set(open_checkpoint(folder).tensors) & set(names) == {"a.block_scale"}


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_groups_in_order_of_which_the_last_is_partial(method: str, own: Make) -> None:
    """40 values in groups of 16, and nothing that says the group of each: three groups of 14 would fit as well."""
    order = torch.arange(40) // 16
    values, scales, zeros = quantized_models._grouped(torch.randn(8, 40), order, 4, 1, symmetric=False)
    parts = quantized_models._PACKERS[method](values, scales, zeros, order, 4)
    parts.pop(".g_idx", None)
    folder = edit(own(method), lambda tensors: tensors.update({f"a.b{key}": part for key, part in parts.items()}))
    with Shards() as shards:
        ours = open_checkpoint(folder).tensors["a.b.weight"].read(shards, torch.float32)
    assert same_bits(ours, (values - zeros[:, order]) * scales[:, order])


def test_partial_blocks(quantized: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the formula, element by element: transformers refuses such weights, or takes the blocks for smaller ones.

    In pieces of one block's rows, as large weights are read.
    """
    monkeypatch.setattr(computed, "PIECE", 1)
    checkpoint = open_checkpoint(quantized("fp8-deepseek"))
    stored = load_file(quantized("fp8-deepseek") / "model.safetensors")
    key = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert stored[key].shape == (40, 64)
    assert stored[f"{key}_scale_inv"].shape == (2, 3)
    for key in [key.removesuffix("_scale_inv") for key in stored if key.endswith("_scale_inv")]:
        scales = quantized_models.expanded(stored[f"{key}_scale_inv"], (32, 24), stored[key].shape)
        with Shards() as shards:
            assert same_bits(checkpoint.tensors[key].read(shards, torch.float32), stored[key].float() * scales)


@pytest.mark.parametrize("form", ["mxfp4", "fp8-qwen3", "fp8-deepseek", "packed", "symmetric", "mixed", "gptq", "awq"])
def test_logits_equal_those_of_the_dequantized_model(
    form: str,
    quantized: Make,
    checkpoint: Make,
    build_quietly: Build,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The artifact in ONNX Runtime against eager, which has the weights that transformers or the formula makes."""
    model = tiny_models.random_model(FORMS[form][0])
    model.load_state_dict(dequantized_by_others(form, quantized(form), checkpoint))
    batch = Batch.random()
    eager_error = eager_logits(model, batch)
    reference = eager_logits(model.double(), batch)
    eager_error = np.abs(eager_error - reference)
    built = build_quietly(quantized(form), tmp_path / "artifact", preset="lynx")
    error = np.abs(exported_logits(built, batch) - reference)
    assert error.max() <= 2 * eager_error.max() + np.finfo(np.float32).eps * np.abs(reference).max()
    plain = eager_logits(tiny_models.random_model(FORMS[form][0]).double(), batch)
    assert np.abs(plain - reference).max() > 1000 * error.max()  # or the check would see nothing
    record = built.manifest.build["quantization"]
    said = json.loads((quantized(form) / "config.json").read_text())["quantization_config"]["quant_method"]
    assert record["method"] == said
    assert record["weights"] > 0
    assert "are not used" not in capsys.readouterr().err  # scales, shapes and the like are no tensors too many


def dequantized_by_others(form: str, folder: Path, checkpoint: Make) -> dict[str, torch.Tensor]:
    """Parameters in float32."""
    if form in quantized_models._PACKERS:
        full = quantized_models.integers(checkpoint("qwen3_moe"), folder.parent / f"{form}-full", form, full=True)
        return dict(transformers.AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32).state_dict())
    if form == "mxfp4":
        config = transformers.Mxfp4Config(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32
        )
        return dict(model.state_dict())
    block = tuple(json.loads((folder / "config.json").read_text())["quantization_config"]["weight_block_size"])
    plain = quantized_models.copy_of(folder, folder.parent / f"{folder.name}-plain", None)
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("_scale_inv")]:
            name, scales = key.removesuffix("_scale_inv"), tensors.pop(key)
            tensors[name] = tensors[name].float() * quantized_models.expanded(scales, block, tensors[name].shape)

    model = transformers.AutoModelForCausalLM.from_pretrained(edit(plain, change), dtype=torch.float32)
    return dict(model.state_dict())


@pytest.mark.parametrize("form", ["mxfp4", "fp8-deepseek", "mixed", "gptq"])
def test_whole_model_for_compare_and_calibrate(form: str, quantized: Make) -> None:
    """Loaded by transformers, its parameters are those that an artifact gets."""
    model = load_model(open_checkpoint(quantized(form)), torch.bfloat16)
    assert not hasattr(model.config, "quantization_config")
    ours = weights_of(quantized(form), torch.bfloat16)
    for name, theirs in model.state_dict().items():
        assert same_bits(ours[name], theirs), name


def refused(error: type[LynxError], folder: Path, build: Build, *words: str, **options: Any) -> None:
    """`build` says what is wrong in one line, and leaves nothing behind."""
    output = folder.parent / "out"
    with pytest.raises(error) as caught:
        build(folder, output, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert not output.exists()


WAY_OUT = "not quantized at all"
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
LINEAR = EXPERT.removesuffix(".weight")


def put(key: str, at: tuple[int, ...], value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Change one element, of fp8 or uint8 by its byte."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[key]
        (tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor)[at] = value

    return change


def replace(key: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = how(tensors[key])

    return change


# Found where others are, after an export each.
LIKE_OTHERS: list[tuple[str, Any, list[str]]] = [
    ("fp8-qwen3", put(EXPERT, (2, 3), 255), [f"{EXPERT} holds nan at [2, 3]", "broken"]),
    ("fp8-qwen3", put(f"{EXPERT}_scale_inv", (1, 2), float("inf")), [f"{EXPERT}_scale_inv holds inf at [1, 2]"]),
    ("gptq", put(f"{LINEAR}.g_idx", (5,), -1), [f"{LINEAR}.g_idx", "-1 to 3", "there are 4"]),
]


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("mxfp4", lambda tensors: tensors.pop(f"{GATE_UP}_scales"), [f"lacks {GATE_UP}_scales"]),
        ("mxfp4", lambda tensors: tensors.pop(f"{GATE_UP}_blocks"), [GATE_UP, "lacks 1 of"]),
        ("mxfp4", replace(f"{GATE_UP}_scales", lambda t: t[:, 1:]), [f"{GATE_UP}_scales", "[8, 63, 2]", "[8, 64, 2]"]),
        ("mxfp4", replace(f"{GATE_UP}_scales", lambda t: t.float()), [f"{GATE_UP}_scales", "F32", "has to be U8"]),
        ("mxfp4", replace(f"{GATE_UP}_blocks", lambda t: t[..., :8]), [f"{GATE_UP}_blocks", "[8, 64, 2, 8]"]),
        # fewer blocks of the right form: the weight is another one than the config's
        ("mxfp4", lambda t: [replace(f"{GATE_UP}_{p}", lambda x: x[:, :, :1])(t) for p in ("blocks", "scales")],
         [GATE_UP, "(8, 32, 64)", "(8, 64, 64)", "don't belong together"]),
        ("mxfp4", put(f"{GATE_UP}_scales", (3, 2, 1), 255), [f"{GATE_UP}_scales holds nan at [3, 2, 1]", "broken"]),
        ("fp8-qwen3", lambda tensors: tensors.pop(f"{EXPERT}_scale_inv"), [EXPERT, "F8_E4M3", "scales"]),
        ("fp8-qwen3", lambda tensors: tensors.pop(EXPERT), [f"lacks {EXPERT}"]),
        ("fp8-qwen3", replace(f"{EXPERT}_scale_inv", lambda t: t[1:]), [f"{EXPERT}_scale_inv", "[3, 4]", "[4, 4]"]),
        ("fp8-qwen3", replace(f"{EXPERT}_scale_inv", lambda t: t.long()), [f"{EXPERT}_scale_inv", "I64", "F32"]),
        # already dequantized, and the scales left where they were
        ("fp8-qwen3", replace(EXPERT, lambda t: t.bfloat16()), [EXPERT, "BF16", "has to be F8_E4M3"]),
        ("fp8-qwen3", replace(EXPERT, lambda t: t.view(torch.int8)), [EXPERT, "I8", "has to be F8_E4M3"]),
        ("fp8-qwen3", put(EXPERT, (2, 3), 127), [f"{EXPERT} holds nan at [2, 3]", "broken"]),
        ("fp8-qwen3", put(f"{EXPERT}_scale_inv", (1, 2), float("nan")), [f"{EXPERT}_scale_inv holds nan at [1, 2]"]),
        ("fp8-row", replace(f"{EXPERT}_scale_inv", lambda t: t[:, :0]), [f"{EXPERT}_scale_inv", "[32, 0]", "[32, 1]"]),
        ("fp8-e8m0", put(f"{EXPERT}_scale_inv", (2, 1), 255), [f"{EXPERT}_scale_inv holds nan at [2, 1]"]),
        ("packed", lambda tensors: tensors.pop(f"{EXPERT}_scale"), [f"lacks {EXPERT}_scale"]),
        ("packed", lambda tensors: tensors.pop(f"{EXPERT}_packed"), [f"lacks {EXPERT}"]),
        ("packed", replace(f"{EXPERT}_scale", lambda t: t[:, :1]), [f"{EXPERT}_scale", "[32, 1]", "[32, 4]"]),
        ("packed", replace(f"{EXPERT}_scale", lambda t: t.int()), [f"{EXPERT}_scale", "I32", "F32 or BF16 or F16"]),
        ("packed", replace(f"{EXPERT}_packed", lambda t: t.view(torch.uint8)), [f"{EXPERT}_packed", "U8", "I32"]),
        ("packed", replace(f"{EXPERT}_zero_point", lambda t: t[:3]), [f"{EXPERT}_zero_point", "[3, 4]", "[4, 4]"]),
        ("packed", put(f"{EXPERT}_scale", (1, 2), float("nan")), [f"{EXPERT}_scale holds nan at [1, 2]"]),
        ("packed", replace(f"{EXPERT}_packed", lambda t: t.flatten()), [f"{EXPERT}_packed", "[256]", "no matrix"]),
        # columns in an order of their own
        ("packed", lambda t: t.update({f"{EXPERT}_g_idx": torch.zeros(64)}), [f"{EXPERT}_g_idx", "actorder"]),
        ("gptq", lambda tensors: tensors.pop(f"{LINEAR}.scales"), [f"lacks {LINEAR}.scales"]),
        ("gptq", lambda tensors: tensors.pop(f"{LINEAR}.qzeros"), [f"lacks {LINEAR}.qzeros"]),
        ("gptq", replace(f"{LINEAR}.scales", lambda t: t[:, 1:]), [f"{LINEAR}.scales", "[4, 31]", "[4, 32]"]),
        ("gptq", replace(f"{LINEAR}.qzeros", lambda t: t[1:]), [f"{LINEAR}.qzeros", "[3, 4]", "[4, 4]"]),
        ("gptq", replace(f"{LINEAR}.g_idx", lambda t: t[1:]), [f"{LINEAR}.g_idx", "[63]", "[64]"]),
        ("gptq", put(f"{LINEAR}.g_idx", (5,), 4), [f"{LINEAR}.g_idx", "0 to 4", "there are 4"]),
        ("gptq", put(f"{LINEAR}.scales", (1, 2), float("inf")), [f"{LINEAR}.scales holds inf at [1, 2]"]),
        ("awq", replace(f"{LINEAR}.qzeros", lambda t: t[0]), [f"{LINEAR}.qzeros", "[4]", "no matrix"]),
        ("awq", replace(f"{LINEAR}.scales", lambda t: t[:, 1:]), [f"{LINEAR}.scales", "[4, 31]", "[4, 32]"]),
        # groups that the config's size doesn't make
        ("awq", lambda t: [replace(f"{LINEAR}.{part}", lambda x: x[:3])(t) for part in ("scales", "qzeros")],
         [f"{LINEAR}.scales [3, 32]", "group_size 16", "3 groups of 64"]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in LIKE_OTHERS),
    ],
)  # fmt: skip
def test_broken_parts(form: str, change: Any, words: list[str], own: Make, build_quietly: Build) -> None:
    """Missing, of another shape or type, or no number: the part is named, not what would have come of it."""
    refused(LynxError, edit(own(form), change), build_quietly, *words)


def test_scale_of_zero(own: Make) -> None:
    """It is a number, and its weights are zeros: a row of zeros is quantized so by some."""
    folder = edit(own("fp8-qwen3"), put(f"{EXPERT}_scale_inv", (1, 2), 0.0))
    merged = weights_of(folder, torch.float32)["model.layers.1.mlp.experts.gate_up_proj"]
    assert not merged[5, 32 + 8 : 32 + 16, 32:48].any()


def test_dequantized_weight_beyond_fp16(own: Make, build_quietly: Build, tmp_path: Path) -> None:
    """What the refusal says to do works."""
    folder = edit(own("fp8-qwen3"), put(f"{EXPERT}_scale_inv", (1, 2), 1e6))
    refused(CheckpointError, folder, build_quietly, EXPERT, "more than fp16 holds", "bf16", precision="fp16")
    build_quietly(folder, tmp_path / "artifact", precision="bf16")


def say(folder: Path, **changes: Any) -> Path:
    """Change config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def groups(weights: dict[str, Any], **group: Any) -> dict[str, Any]:
    """compressed-tensors' config with one group; what is given replaces what is right."""
    right = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16}
    one = {"targets": ["Linear"], "format": "pack-quantized", "weights": {**right, **weights}, **group}
    return {"quant_method": "compressed-tensors", "config_groups": {"0": one}}


@pytest.mark.parametrize(
    ("form", "error", "said", "words"),
    [
        ("fp8-qwen3", CheckpointError, None, ["_scale_inv", "no quantization_config"]),
        ("mxfp4", CheckpointError, {}, ["_blocks", "no quantization_config"]),
        ("fp8-qwen3", CheckpointError, {"weight_block_size": [8, 16]}, ["without quant_method"]),
        ("fp8-qwen3", CheckpointError, ["fp8"], ["without quant_method"]),
        ("fp8-qwen3", UnsupportedModelError, {"quant_method": "bitsandbytes"}, ["(bitsandbytes)", "mxfp4, fp8"]),
        ("fp8-qwen3", CheckpointError, {"quant_method": "fp8"}, ["_scale_inv", "config.json has no size of blocks"]),
        ("awq", UnsupportedModelError, {"quant_method": "awq", "version": "gemv"}, ["(awq)", "gemv", "gemm", WAY_OUT]),
        ("gptq", UnsupportedModelError, {"quant_method": "gptq", "checkpoint_format": "marlin"}, ["(gptq)", "marlin"]),
        ("packed", CheckpointError, {"quant_method": "compressed-tensors"}, ["config_groups"]),
        ("packed", CheckpointError, groups({}, targets=["re:.*attn.*"]), ["experts", "targets"]),
        ("packed", CheckpointError, groups({"group_size": 0}), ["group_size 0"]),
        ("packed", CheckpointError, groups({"group_size": 32}), ["_scale", "[64, 2]", "[64, 1]", "[1, 32]"]),
        ("packed", CheckpointError, groups({"num_bits": 8}), ["_scale", "[64, 2]", "[64, 1]"]),
        ("packed", CheckpointError, groups({}, targets="Linear"), ["targets", "'Linear'"]),
        ("packed", CheckpointError, groups({}, targets=["re:*experts"]), ["re:*experts", "no pattern"]),
        (
            "packed",
            CheckpointError,
            {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": [4]}}},
            ["config_groups"],
        ),
        ("packed", CheckpointError, groups({"num_bits": 8}, format="int-quantized"), ["_packed", "int-quantized"]),
        ("packed", UnsupportedModelError, groups({"num_bits": 3}), ["3 bits", "compressed-tensors", WAY_OUT]),
        (
            "packed",
            UnsupportedModelError,
            {**groups({}), "sparsity_config": {"format": "sparse-24-bitmask"}},
            ["sparse", "'sparse-24-bitmask'", WAY_OUT],
        ),
        ("packed", UnsupportedModelError, groups({}, format="nvfp4-pack-quantized"), ["nvfp4-pack-quantized"]),
        ("packed", UnsupportedModelError, groups({}, format=["pack-quantized"]), ["['pack-quantized']"]),
        ("packed", UnsupportedModelError, groups({"strategy": "token"}), ["token"]),
        # of another method than the config says
        ("fp8-qwen3", CheckpointError, {"quant_method": "mxfp4"}, ["_scale_inv", "quant_method mxfp4", "dequantize"]),
        ("mxfp4", CheckpointError, {"quant_method": "fp8"}, ["_blocks", "quant_method fp8"]),
        *(
            ("fp8-qwen3", CheckpointError, {"quant_method": "fp8", "weight_block_size": size}, ["weight_block_size"])
            for size in ([8], [8, 0], [8, -16], "8x16", [8.0, 16.0], [True, 16], {})
        ),
    ],
)
def test_config_that_says_something_else(
    form: str, error: type[LynxError], said: Any, words: list[str], own: Make, build_quietly: Build
) -> None:
    refused(error, say(own(form), quantization_config=said), build_quietly, *words)


def test_config_says_quantized_and_the_weights_are_not(
    own: Make,
    checkpoint: Callable[[str], Path],
    build_quietly: Build,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Dequantized by somebody who left config.json as it was."""
    folder = quantized_models.copy_of(checkpoint("qwen3_moe"), tmp_path / "full", {"quant_method": "fp8"})
    build_quietly(folder, tmp_path / "artifact")
    assert "all of its weights are stored in full" in capsys.readouterr().err


def test_build_says_what_it_does(
    quantized: Make, build_quietly: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, with the method, the precision and both sizes; the larger is that of the weights as written."""
    built = build_quietly(quantized("mxfp4"), tmp_path / "artifact", precision="fp16", dequantize=True)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "quantized (" in line]
    assert "quantized (mxfp4): 4 of its weights are dequantized to fp16" in line
    assert "319.5 kB instead of 296.8 kB" in line
    assert built.manifest.model.weight_bytes == pytest.approx(319.5e3, rel=0.01)
    assert ("checkpoint", "quantized (mxfp4): 4 weights of 52.2 kB, 4 dequantized") in inspect.rows(built.manifest)
    assert summary(built.manifest, built.folder)["quantization"]["method"] == "mxfp4"


def test_compare_and_calibrate_take_it(
    quantized: Make, build_quietly: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the checkpoint that an artifact was built from, and as what runs beside it; DeepSeek-V3's partial blocks."""
    folder = quantized("fp8-deepseek")
    built = build_quietly(folder, tmp_path / "artifact")
    probed = source.load(source.open_source(built, folder), device="cpu", dtype=torch.float32)
    assert len(probed.layers) == len(built.manifest.model.moe_layers)
    runner = HuggingFaceRunner(folder, None)
    ids = np.array([Batch.random().rows[0]])
    theirs = runner.prefill(ids)
    runner.close()
    with torch.no_grad():
        ours = load_model(open_checkpoint(folder), torch.float32)(torch.from_numpy(ids)).logits[:, -1].numpy()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
