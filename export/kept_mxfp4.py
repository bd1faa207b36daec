"""Experts that an artifact keeps in MXFP4, byte for byte: a quarter of their size in bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lynx_trt import mxfp4
from lynx_trt.export.quantized.mxfp4 import BLOCKS, SCALES, Mxfp4Tensor
from lynx_trt.export.stored import Shards

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedModel

    from lynx_trt.export.moe import MoeLayer
    from lynx_trt.export.parts import Part
    from lynx_trt.export.sources import Source
    from lynx_trt.export.stored import StoredTensor

CALLED = "MXFP4"
ENDINGS = (BLOCKS, SCALES)


def is_stored_so(stored: StoredTensor) -> bool:
    """Whether it holds values in MXFP4."""
    return isinstance(stored, Mxfp4Tensor)


def obstacle_of_layer(layer: MoeLayer) -> str | None:
    """Why a layer of that form can't have such weights, a clause; None if it can."""
    if layer.form.transposed:
        return None
    return f"those of {layer.name} have their blocks across what LynxExperts sums over"


def obstacle(name: str, source: Source, dtype: torch.dtype) -> str | None:
    """Why parameter `name` can't be kept, a clause; None if it can.

    That H and I are multiples of 32 is not asked: what is stored has whole blocks of them.

    Raises:
        CheckpointError: a scale is no number.
    """
    if source.converter is not None:
        return f"{name} is made of what is stored by a conversion"
    for tensor in _tensors(source):
        with Shards() as shards:  # one at a time: every page that was read stays mapped until they are closed
            beyond = tensor.scale_beyond(mxfp4.LARGEST_SCALE, shards)
        if beyond:
            key, scale, at = beyond
            return (
                f"{key} holds the scale {scale} at {at}, and the GPU kernels take scales up to {mxfp4.LARGEST_SCALE}, "
                "which are weights up to 12"
            )
    return None


def weights(sources: Mapping[str, Source]) -> str:
    """What the form's `weights` are: always the same."""
    return "mxfp4"


def parts(name: str, source: Source, model: PreTrainedModel, weights: str) -> Mapping[str, Part]:
    """What LynxExperts takes of parameter `name`, by the names that the checkpoint has for it."""
    (tensor,) = _tensors(source)
    return {name + ending: part for ending, part in tensor.as_stored().items()}


def _tensors(source: Source) -> list[Mxfp4Tensor]:
    return [tensor for tensor in source.tensors() if isinstance(tensor, Mxfp4Tensor)]
