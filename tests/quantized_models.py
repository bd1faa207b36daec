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


def expanded(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """The scale of each element."""
    rows, columns = torch.arange(shape[0]) // block[0], torch.arange(shape[1]) // block[1]
    return scales[rows][:, columns]
