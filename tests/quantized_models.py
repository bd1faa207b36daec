"""Quantized checkpoints as the hub has them, made of small random ones; no code is shared with what reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# What a linear layer's tensor `weight` becomes: tensors by the endings of their names, which replace `.weight`.
Quantize = Callable[[torch.Tensor], dict[str, torch.Tensor]]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FP8_MAX = 448.0


def copy_of(folder: Path, target: Path, quantization: dict[str, Any] | None) -> Path:
    """A copy of a checkpoint whose config.json says how it is quantized."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    config = json.loads(path.read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    path.write_text(json.dumps(config))
    return target


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Change the tensors of a checkpoint of one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return folder


def quantize_linears(folder: Path, quantize: Quantize, *, ignore: tuple[str, ...] = ("gate", "lm_head")) -> Path:
    """Quantize the weight of each linear layer but those whose name ends in one of `ignore`."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            name, _, kind = key.rpartition(".")
            linear = kind == "weight" and tensors[key].dim() == 2 and not name.endswith("embed_tokens")
            if linear and name.rpartition(".")[2] not in ignore:
                for ending, tensor in quantize(tensors.pop(key)).items():
                    tensors[name + ending] = tensor

    return edit(folder, change)


def mxfp4(folder: Path, target: Path) -> Path:
    """gpt-oss: the experts' weights in blocks of 32 along the inner dimension, each with an exponent."""
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    copied = copy_of(folder, target, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            if key.endswith(("gate_up_proj", "down_proj")):
                tensors[f"{key}_blocks"], tensors[f"{key}_scales"] = _mxfp4_blocks(tensors.pop(key))

    return edit(copied, change)


def _mxfp4_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[E,C,R] -> blocks [E,R,C/32,16] and scales [E,R,C/32], both uint8."""
    blocked = weight.transpose(1, 2).float().unflatten(2, (-1, 32))
    exponents = torch.floor(torch.log2(blocked.abs().amax(-1).clamp_min(1e-30))) - 2
    codes = (blocked / torch.exp2(exponents)[..., None]).unsqueeze(-1).sub(E2M1).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def fp8(folder: Path, target: Path, block: tuple[int, int] | None, scale: str = "block") -> Path:
    """DeepSeek-V3's and Qwen3's form; `scale`: block, row, tensor or e8m0 (blocks whose scales are exponents)."""
    size = list(block) if block else None
    copied = copy_of(folder, target, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size})

    def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = block or {"row": (1, weight.shape[1]), "tensor": tuple(weight.shape)}[scale]
        scales = torch.stack(
            [
                torch.stack([piece.abs().max() / FP8_MAX for piece in strip.split(columns, dim=1)])
                for strip in weight.float().split(rows)
            ]
        )
        if scale == "e8m0":
            scales = torch.exp2(torch.ceil(torch.log2(scales)))
        values = (weight / expanded(scales, (rows, columns), weight.shape)).to(torch.float8_e4m3fn)
        if scale == "e8m0":
            scales = scales.to(torch.float8_e8m0fnu)
        return {".weight": values, ".weight_scale_inv": scales.reshape(()) if scale == "tensor" else scales}

    return quantize_linears(copied, quantize)


def compressed_fp8(folder: Path, target: Path, strategy: str) -> Path:
    """compressed-tensors: float-quantized with a scale a channel or tensor, in bf16, or blocks of 128 by 128."""
    block = (128, 128) if strategy == "block" else None
    copied = fp8(folder, target, block, {"channel": "row", "tensor": "tensor", "block": "block"}[strategy])
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "block_structure": block}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}}
    path = copied / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"0": group},
        "ignore": ["lm_head", "re:.*gate$"],
    }
    path.write_text(json.dumps(config))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("_scale_inv")]:
            tensors[key.removesuffix("_inv")] = tensors.pop(key).bfloat16()

    return edit(copied, change)


def merged_fp8(folder: Path, target: Path) -> Path:
    """A checkpoint whose experts of a layer are one tensor: those alone, in blocks of 128 by 128."""
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    copied = copy_of(folder, target, config)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            blocks = tensors[key].float().unflatten(2, (-1, 128)).unflatten(1, (-1, 128))
            scales = blocks.abs().amax((2, 4)) / FP8_MAX
            full = scales.repeat_interleave(128, 1).repeat_interleave(128, 2)
            tensors[key], tensors[f"{key}_scale_inv"] = (tensors[key] / full).to(torch.float8_e4m3fn), scales

    return edit(copied, change)


def nvfp4(folder: Path, target: Path, form: str, *, full: bool = False) -> Path:
    """NVFP4: of compressed-tensors, of modelopt, or modelopt's older one with a file of its own beside config.json.

    Args:
        folder: a checkpoint.
        target: where the quantized one goes.
        form: compressed-tensors, modelopt or hf_quant_config.
        full: not packed, but what it means, in float32.
    """
    config = None if full or form == "hf_quant_config" else NVFP4_CONFIGS[form]
    copied = copy_of(folder, target, config)
    if form == "hf_quant_config" and not full:
        (copied / "hf_quant_config.json").write_text(json.dumps(NVFP4_CONFIGS[form]))

    def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        blocks = weight.float().unflatten(1, (-1, 16))
        largest = blocks.abs().amax(-1)
        factor = largest.max() / (6 * FP8_MAX)
        stored = factor if form != "compressed-tensors" else (1 / factor).reshape(1)
        scales = (largest / 6 / factor).to(torch.float8_e4m3fn)
        multiplier = scales.float() / stored if form == "compressed-tensors" else scales.float() * stored
        codes = (blocks / multiplier[..., None]).unsqueeze(-1).sub(E2M1).abs().argmin(-1)
        if full:
            return {".weight": (E2M1[codes] * multiplier[..., None]).flatten(1)}
        codes = codes.flatten(1).to(torch.uint8)
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
        if form == "compressed-tensors":
            activations = {".input_global_scale": torch.tensor([3.0])}
            return {".weight_packed": packed, ".weight_scale": scales, ".weight_global_scale": stored, **activations}
        return {
            ".weight": packed,
            ".weight_scale": scales,
            ".weight_scale_2": stored,
            ".input_scale": torch.tensor(3.0),
        }

    quantized = quantize_linears(copied, quantize)
    return quantized if full else edit(quantized, _scales_of_caches)


NVFP4_CONFIGS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "float",
                    "symmetric": True,
                    "strategy": "tensor_group",
                    "group_size": 16,
                    "scale_dtype": "torch.float8_e4m3fn",
                },
                "input_activations": {"num_bits": 4, "type": "float", "dynamic": "local", "group_size": 16},
            }
        },
        "ignore": ["lm_head", "re:.*gate$"],
    },
    "modelopt": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}
        },
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt", "version": "0.47.0"},
    },
    "hf_quant_config": {
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": ["lm_head"],
        },
    },
}


def _scales_of_caches(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if "k_proj" in key or "v_proj" in key]:
        name = key.rpartition(".")[0]
        tensors[f"{name}.{name[-6]}_scale"] = torch.tensor(0.5)


def modelopt_fp8(folder: Path, target: Path, scale: str = "tensor") -> Path:
    """Modelopt's FP8: `scale` is tensor, or row, whose scales have one dimension."""
    copied = fp8(folder, target, None, scale)
    algorithm = {"tensor": "FP8", "row": "FP8_PER_CHANNEL_PER_TOKEN"}[scale]
    path = copied / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
    path.write_text(json.dumps(config))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("_scale_inv")]:
            scales = tensors.pop(key)
            tensors[key.removesuffix("_inv")] = scales.flatten() if scale == "row" else scales
            tensors[key.replace("weight_scale_inv", "input_scale")] = torch.tensor(0.5)
        _scales_of_caches(tensors)

    return edit(copied, change)


def expanded(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """The scale of each element."""
    rows, columns = torch.arange(shape[0]) // block[0], torch.arange(shape[1]) // block[1]
    return scales[rows][:, columns]


def integers(
    folder: Path, target: Path, method: str, *, full: bool = False, group: int = 16, act_order: bool = True
) -> Path:
    """int4 in groups, as `method` packs it; `full`: not packed, but what it means, in float32.

    With zero points but in symmetric and gptq_symmetric; mixed: with two groups, attention in int8 with a scale a row;
    gptq_v2: with zero points as they are.

    Args:
        folder: a checkpoint.
        target: where the quantized one goes.
        method: one of _PACKERS.
        full: see above.
        group: columns that share a scale; -1: all of a row.
        act_order: of GPTQ: they lie apart.
    """
    symmetric = method.endswith("symmetric")
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, **strategy}
    rows = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"}
    experts = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    attention = {"targets": ["re:.*self_attn.*"], "weights": rows, "format": "pack-quantized"}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": symmetric, "desc_act": act_order}
    config = {
        "packed": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head", "re:.*gate"],
        },
        "symmetric": {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]},
        "mixed": {"quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": ["lm_head"]},
        "gptq": gptq,
        "gptq_symmetric": gptq,
        "gptq_v2": {**gptq, "checkpoint_format": "gptq_v2"},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"},
    }[method]
    if method in ("packed", "symmetric", "mixed"):
        config["config_groups"] = {"0": experts} | ({"1": attention} if method == "mixed" else {})
    copied = copy_of(folder, target, None if full else config)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in _linears(tensors):
            weight, name = tensors.pop(key), key.removesuffix(".weight")
            columns = weight.shape[1]
            bits, size = (8, -1) if method == "mixed" and "self_attn" in key else (4, group)
            # Columns that share a scale lie apart in GPTQ: what it calls act-order.
            order = torch.arange(columns) // (columns if size == -1 else size)
            if "gptq" in method and act_order:
                order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(len(order)))]
            least = {"symmetric": 8, "gptq_symmetric": 8, "gptq": 1}.get(method, 0)
            values, scales, zeros = _grouped(weight.float(), order, bits, least, symmetric=symmetric)
            if full:
                tensors[key] = (values - zeros[:, order]) * scales[:, order]
                continue
            for ending, part in _PACKERS[method](values, scales, zeros, order, bits).items():
                tensors[name + ending] = part

    return edit(copied, change)


def _linears(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [key for key in tensors if key.endswith("_proj.weight")]


def _grouped(
    weight: torch.Tensor, order: torch.Tensor, bits: int, least: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N,K] and the group of each column -> values [N,K], scales [N,G] as float16 has them, zero points [N,G]."""
    columns = [weight[:, order == number] for number in range(int(order.max()) + 1)]
    low = torch.stack([each.amin(1) for each in columns], 1).clamp(max=0)
    high = torch.stack([each.amax(1) for each in columns], 1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / (2**bits - 1 - symmetric)).half().float()
    zeros = (-low / scales).round().clamp(least, 8 if symmetric else 2**bits - 1)
    values = (weight / scales[:, order] + zeros[:, order]).round().clamp(0, 2**bits - 1)
    return values, scales, zeros


def _pack(values: torch.Tensor, bits: int, places: list[int] | None = None) -> torch.Tensor:
    """[R,C] -> int32 [R,C*bits/32]; `places` says which of its few each int32 holds from the lowest bits on."""
    each = 32 // bits
    few = values.to(torch.int64).unflatten(1, (-1, each))[..., places or list(range(each))]
    return sum(few[..., number] << (bits * number) for number in range(each)).to(torch.int32)  # type: ignore[union-attr]


def _pack_compressed(values: Any, scales: Any, zeros: Any, order: Any, bits: int) -> dict[str, torch.Tensor]:
    return {
        ".weight_packed": _pack(values, bits),
        ".weight_scale": scales.half(),
        ".weight_zero_point": _pack(zeros.T, bits).T,
        ".weight_shape": torch.tensor(values.shape),
    }


def _pack_gptq(values: Any, scales: Any, zeros: Any, order: Any, bits: int) -> dict[str, torch.Tensor]:
    return {
        ".qweight": _pack(values, bits).T,
        ".scales": scales.half().T,
        ".qzeros": _pack(zeros.T - 1, bits),
        ".g_idx": order.to(torch.int32),
    }


def _pack_gptq_v2(values: Any, scales: Any, zeros: Any, order: Any, bits: int) -> dict[str, torch.Tensor]:
    return {**_pack_gptq(values, scales, zeros, order, bits), ".qzeros": _pack(zeros.T, bits)}


def _pack_awq(values: Any, scales: Any, zeros: Any, order: Any, bits: int) -> dict[str, torch.Tensor]:
    places = [0, 2, 4, 6, 1, 3, 5, 7]
    return {
        ".qweight": _pack(values.T, bits, places),
        ".scales": scales.half().T,
        ".qzeros": _pack(zeros.T, bits, places),
    }


def _pack_symmetric(values: Any, scales: Any, zeros: Any, order: Any, bits: int) -> dict[str, torch.Tensor]:
    packed = _pack_compressed(values, scales, zeros, order, bits)
    del packed[".weight_zero_point"]
    return packed


_PACKERS = {
    "packed": _pack_compressed,
    "symmetric": _pack_symmetric,
    "mixed": _pack_compressed,
    "gptq": _pack_gptq,
    "gptq_symmetric": _pack_gptq,
    "gptq_v2": _pack_gptq_v2,
    "awq": _pack_awq,
}
