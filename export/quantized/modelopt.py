"""NVIDIA's modelopt (Model Optimizer): NVFP4 and FP8, one of them for all quantized weights of a checkpoint.

- NVFP4, W4A16_NVFP4: `NAME` uint8 [R,C/2], `NAME_scale` float8_e4m3 [R,C/16], `NAME_scale_2` float32, one number.
- FP8, FP8_PER_CHANNEL_PER_TOKEN: `NAME` float8_e4m3 [R,C], `NAME_scale` of floats, one in all or one a row.

Which it is says `quant_algo`; which weights are quantized is seen by their scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lynx_trt.errors import CheckpointError, UnsupportedModelError
from lynx_trt.export.quantized import nvfp4
from lynx_trt.export.quantized.computed import ANOTHER, ComputedTensor, beside, fields_of
from lynx_trt.export.quantized.scaled import FLOATS, FP8, ScaledTensor, fitting_block
from lynx_trt.export.stored import StoredTensor

_SCALE, _FACTOR = ".weight_scale", ".weight_scale_2"
# What inputs are multiplied with: where it isn't part of a norm, the model is another than without.
_SMOOTHED = ".pre_quant_scale"
_NVFP4 = ("NVFP4", "W4A16_NVFP4")
_FP8 = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")


def find(tensors: Mapping[str, StoredTensor], config: dict[str, Any]) -> Iterator[ComputedTensor]:
    """Each weight that has scales beside it.

    Raises:
        CheckpointError: the parts of a weight don't fit together.
        UnsupportedModelError: quantized in a way that is not known here.
    """
    names = dict.fromkeys(key.rpartition("_scale")[0] for key in tensors if key.endswith((_SCALE, _FACTOR)))
    algorithm, size = _said(config)
    if algorithm is None and not names:
        return  # caches alone, or nothing any more
    if algorithm not in _NVFP4 + _FP8:
        raise UnsupportedModelError(
            f"the checkpoint is quantized (modelopt) by quant_algo {algorithm!r}, which this version can't read, but "
            f"{', '.join(_NVFP4 + _FP8)} it can; {ANOTHER}"
        )
    if algorithm in _NVFP4 and size not in (None, nvfp4.BLOCK):
        raise UnsupportedModelError(
            f"the checkpoint is quantized (modelopt {algorithm}) with group_size {size!r}, which this version can't "
            f"read, but {nvfp4.BLOCK} it can; {ANOTHER}"
        )
    _refuse_others(tensors)
    for name in names:
        yield _nvfp4(tensors, name) if algorithm in _NVFP4 else _fp8(tensors, name)


def _said(config: dict[str, Any]) -> tuple[Any, Any]:
    """`quant_algo`, and how many columns share a scale, None of either if it isn't said.

    hf_quant_config.json has both under `quantization`, config.json the latter in groups as compressed-tensors has them.
    """
    inner = config.get("quantization")
    said: dict[str, Any] = {**config, **inner} if isinstance(inner, dict) else config
    algorithm, size = said.get("quant_algo"), said.get("group_size")
    if algorithm is None and config["quant_method"] == "modelopt_fp4":
        algorithm = _NVFP4[0]
    groups = said.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if size is None and isinstance(weights, dict):
            size = weights.get("group_size")
    return algorithm.upper() if isinstance(algorithm, str) else algorithm, size


def _refuse_others(tensors: Mapping[str, StoredTensor]) -> None:
    for key in tensors:
        if key.endswith(_SMOOTHED):
            raise UnsupportedModelError(
                f"{key} is what inputs are multiplied with (AWQ, SVDQuant), which this version can't read; {ANOTHER}"
            )
        if key.endswith("_weight_scale"):
            raise UnsupportedModelError(
                f"{key} is for all experts of a layer in one tensor, which of modelopt this version can't read, but a "
                f"tensor for each expert it can; {ANOTHER}"
            )


def _nvfp4(tensors: Mapping[str, StoredTensor], name: str) -> ComputedTensor:
    names = {"values": name, "scales": f"{name}_scale", "factor": f"{name}_scale_2"}
    return nvfp4.tensor_of(tensors, name, names, divides=False)


def _fp8(tensors: Mapping[str, StoredTensor], name: str) -> ComputedTensor:
    values = beside(tensors, name, (FP8,))
    if name + "_scale_2" in tensors:
        raise CheckpointError(
            f"{name}_scale_2 is a part of a weight in NVFP4, but the checkpoint's quant_algo is FP8; copy config.json "
            "again from where the checkpoint came from"
        )
    scales = beside(tensors, f"{name}_scale", FLOATS)
    fields = fields_of(name, values.shape, {"values": values, "scales": scales})
    return ScaledTensor(**fields, block=fitting_block(values, values.shape, scales, None))
