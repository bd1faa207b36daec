"""Experts that an artifact keeps in FP8: the stored bytes, and their scales repeated to one for each 128 of a row.

Half of their size in bf16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lynx_trt import fp8
from lynx_trt.export import kept_rows
from lynx_trt.export.finite import refuse_not_finite
from lynx_trt.export.quantized.computed import pieces_of
from lynx_trt.export.quantized.scaled import FP8, ScaledTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from lynx_trt.export.moe import MoeLayer
    from lynx_trt.export.parts import Part
    from lynx_trt.export.sources import Source
    from lynx_trt.export.stored import Shards, StoredTensor

CALLED = "FP8"
ENDINGS = kept_rows.ENDINGS
_LARGEST = 448  # of E4M3


def is_stored_so(stored: StoredTensor) -> bool:
    """Whether it holds values in FP8 that are only to be multiplied by scales."""
    return isinstance(stored, ScaledTensor) and stored.parts["values"].dtype == FP8 and "zeros" not in stored.parts


def obstacle_of_layer(layer: MoeLayer) -> str | None:
    """See kept_rows.py."""
    return kept_rows.obstacle_of_layer(layer, CALLED)


def obstacle(name: str, source: Source, dtype: torch.dtype) -> str | None:
    """See kept_rows.py."""
    return kept_rows.obstacle(name, source, dtype, CALLED, fp8.BLOCK, _LARGEST)


def weights(sources: Mapping[str, Source]) -> str:
    """What the form's `weights` are: always the same."""
    return "fp8"


def parts(name: str, source: Source, model: PreTrainedModel, weights: str) -> Mapping[str, Part]:
    """See kept_rows.py."""
    return kept_rows.parts(name, source, model, weights, _values, _scales)


def _values(tensor: ScaledTensor, shards: Shards, chosen: slice) -> torch.Tensor:
    """The stored bytes; a value that is NaN is refused."""
    stored = shards.piece(tensor.parts["values"], (chosen,)).view(torch.int8)
    for index in pieces_of(tuple(stored.shape)):
        if ((stored[index] & 127) == 127).any():
            refuse_not_finite(tensor.key, tensor.read(shards, torch.float32), torch.float32, masks=False)
            raise AssertionError(f"{tensor.key} holds NaN, but its values are numbers")
    return stored


def _scales(tensor: ScaledTensor, shards: Shards, chosen: slice) -> torch.Tensor:
    """The scales; `obstacle` has seen that they are numbers."""
    return tensor.scales_of_rows(shards, fp8.BLOCK)[chosen]
