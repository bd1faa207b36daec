"""Experts that an artifact keeps in NVFP4: the stored values, and scales times their tensor's factor.

0.63 bytes a weight, where the checkpoint has 0.56 and bf16 2: a scale of 16 bits instead of 8 (lynx_trt/nvfp4.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lynx_trt import nvfp4
from lynx_trt.export import kept_rows
from lynx_trt.export.quantized.nvfp4 import Nvfp4Tensor
from lynx_trt.export.stored import Shards

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from lynx_trt.export.moe import MoeLayer
    from lynx_trt.export.parts import Part
    from lynx_trt.export.sources import Source
    from lynx_trt.export.stored import StoredTensor

CALLED = "NVFP4"
ENDINGS = kept_rows.ENDINGS


def is_stored_so(stored: StoredTensor) -> bool:
    """Whether it holds values in NVFP4."""
    return isinstance(stored, Nvfp4Tensor)


def obstacle_of_layer(layer: MoeLayer) -> str | None:
    """See kept_rows.py."""
    return kept_rows.obstacle_of_layer(layer, CALLED)


def obstacle(name: str, source: Source, dtype: torch.dtype) -> str | None:
    """Why parameter `name` can't be kept, a clause; None if it can. Of the checkpoint all scales are read.

    Raises:
        CheckpointError: a scale is no finite number.
    """
    if why := kept_rows.obstacle_of_shape(name, source.rows_of_experts(), CALLED, nvfp4.BLOCK):
        return why
    with Shards() as shards:  # of one parameter: what is read is small
        for tensor in _tensors(source):
            largest = kept_rows.largest_of(tensor, tensor.scales_of_rows(shards), shards)
            if largest > nvfp4.LARGEST_SCALE:
                return (
                    f"{tensor.key} has the scale {largest:.6g}, and the GPU kernels take scales up to "
                    f"{nvfp4.LARGEST_SCALE}, which are weights up to 12"
                )
    return None


def weights(sources: Mapping[str, Source]) -> str:
    """What the form's `weights` are: there is one kind."""
    return "nvfp4"


def parts(name: str, source: Source, model: PreTrainedModel, weights: str) -> Mapping[str, Part]:
    """See kept_rows.py."""
    return kept_rows.parts(name, source, model, weights, _values, _scales)


def _tensors(source: Source) -> list[Nvfp4Tensor]:
    return [tensor for tensor in source.tensors() if isinstance(tensor, Nvfp4Tensor)]


def _values(tensor: Nvfp4Tensor, shards: Shards, _: slice) -> torch.Tensor:
    """The values of a tensor, which holds one expert's."""
    return tensor.packed(shards).view(torch.int8)


def _scales(tensor: Nvfp4Tensor, shards: Shards, _: slice) -> torch.Tensor:
    """Its scales; `obstacle` has seen that they are numbers."""
    return tensor.scales_of_rows(shards)
