"""Which ways of quantizing are known; a checkpoint's tensors with each quantized weight in the place of its parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lynx_trt.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from lynx_trt.export.quantized.computed import ComputedTensor
    from lynx_trt.export.stored import StoredTensor

    Finder = Callable[[dict[str, StoredTensor], dict[str, Any]], Iterator[ComputedTensor]]

# By quant_method of config.json: the module that finds and reads what is stored so.
METHODS = {
    "mxfp4": "mxfp4",
    "fp8": "fp8",
    "compressed-tensors": "compressed",
    "gptq": "gptq",
    "awq": "awq",
    "modelopt": "modelopt",
    "modelopt_fp4": "modelopt",
}
# Where modelopt's older checkpoints say how they are quantized, beside a config.json that doesn't.
_MODELOPT = "hf_quant_config.json"
# The way out for what is quantized in a form that nobody here can read.
DEQUANTIZE = "load it in transformers with dequantize=True and save_pretrained() it in bf16 first"
# Endings of names that only parts of a quantized weight have.
_MARKS = ("_blocks", "_scale_inv", ".weight_scale", ".weight_packed", ".qweight", ".absmax")
# Endings of names of what a dequantized weight needs no more: shapes, and how activations and caches were quantized.
_LEFT_ASIDE = (
    "weight_shape",
    "weight_zero_point",
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "activation_scale",
    "output_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
)


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint was quantized, and how much of it: weights, bytes of them as stored.

    Of those weights an artifact keeps `kept` as they are stored; `obstacle`, a clause, is why it keeps none of those
    that it could.
    """

    method: str
    weights: int
    nbytes: int
    kept: int = 0
    obstacle: str | None = None

    def in_words(self, precision: str) -> str:
        """What becomes of the weights in an artifact of that precision."""
        if not self.weights:
            return (
                f"config.json says that the checkpoint is quantized ({self.method}), but all of its weights are stored "
                "in full; they are read as they are"
            )
        how, rest = f"the checkpoint is quantized ({self.method})", self.weights - self.kept
        dequantized = f"dequantized to {precision} while they are read"
        if self.kept:
            others = f", and {rest} are {dequantized}" if rest else ""
            return f"{how}: {self.kept} of its weights stay as they are stored{others}"
        why = f", for {self.obstacle}" if self.obstacle else ""
        return f"{how}: {rest} of its weights are {dequantized}{why}"


def quantization_config(raw: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """What config.json, or modelopt's file beside it, says of how the weights are quantized; None if they are not.

    Raises:
        CheckpointError: it is no object, or doesn't say by which method.
        UnsupportedModelError: by one that is not known here.
    """
    text = raw.get("text_config")
    config = raw.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if not config:
        config = _modelopt_config(path.with_name(_MODELOPT))
    if not config:
        return None
    if not isinstance(config, dict) or not isinstance(config.get("quant_method"), str):
        raise CheckpointError(
            f"{path} has a quantization_config without quant_method, which says how the weights are stored; copy it "
            "again from where the checkpoint came from"
        )
    method = config["quant_method"]
    if method not in METHODS:
        raise UnsupportedModelError(
            f"the checkpoint is quantized ({method}), which this version can't read, but {', '.join(METHODS)} it can; "
            + DEQUANTIZE
        )
    return config


def _modelopt_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("quantization"), dict):
        raise CheckpointError(
            f"{path} has no object quantization, which says how the weights are stored; copy it again from where the "
            "checkpoint came from"
        )
    return {**config, "quant_method": "modelopt"}


def _finder(method: str) -> Finder:
    """The method's `find`; torch, which all of them import, is not for a checkpoint that isn't quantized."""
    finder: Finder = import_module(f"lynx_trt.export.quantized.{METHODS[method]}").find
    return finder


def dequantized(
    tensors: dict[str, StoredTensor], config: dict[str, Any] | None, path: Path
) -> tuple[dict[str, StoredTensor], Quantization | None]:
    """The tensors with each quantized weight in the place of its parts, and a word on them; `config` is of `path`.

    Raises:
        CheckpointError: parts of a weight are missing or don't fit together, or nothing says how to read them.
    """
    found = list(_finder(config["quant_method"])(tensors, config)) if config else []
    marked = next((key for key in tensors if key.endswith(_MARKS)), None)
    if not found and marked is not None:
        said = f"quant_method {config['quant_method']}, which has none such" if config else "no quantization_config"
        raise CheckpointError(
            f"{marked} is a part of a quantized weight, but {path} has {said}; copy that file again from where the "
            f"checkpoint came from, or {DEQUANTIZE}"
        )
    if not config:
        return tensors, None
    parts = {part.key for tensor in found for part in tensor.parts.values()}
    rest = {key: tensor for key, tensor in tensors.items() if key not in parts and not key.endswith(_LEFT_ASIDE)}
    weights: dict[str, StoredTensor] = {tensor.key: tensor for tensor in found}
    twice = sorted(rest.keys() & weights.keys())
    if twice:
        raise CheckpointError(f"the checkpoint holds {twice[0]} both quantized and not; copy it again")
    nbytes = sum(tensor.nbytes for tensor in found)
    return {**rest, **weights}, Quantization(config["quant_method"], len(found), nbytes)
