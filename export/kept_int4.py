"""Experts that an artifact keeps in int4: a quarter of their size in bf16, and what scales and zero points take.

GPTQ, AWQ and compressed-tensors pack the same values in three ways; they become bytes of two that follow each other in
a row (lynx_trt/int4.py). A model has one form: blocks of 128 if all of its tensors can be cut into these, and zero
points if one of them isn't 8.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from lynx_trt import int4
from lynx_trt.experts import FORMATS
from lynx_trt.export import kept_rows
from lynx_trt.export.quantized.compressed import PackedTensor
from lynx_trt.export.quantized.gptq import GroupedTensor
from lynx_trt.export.stored import Shards

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from lynx_trt.export.moe import MoeLayer
    from lynx_trt.export.parts import Part
    from lynx_trt.export.sources import Source
    from lynx_trt.export.stored import StoredTensor

CALLED = "int4"
ENDINGS = kept_rows.ENDINGS
_BITS = 4


def is_stored_so(stored: StoredTensor) -> bool:
    """Whether it holds packed values of 4 bits."""
    return isinstance(stored, GroupedTensor | PackedTensor) and stored.bits == _BITS


def obstacle_of_layer(layer: MoeLayer) -> str | None:
    """See kept_rows.py."""
    return kept_rows.obstacle_of_layer(layer, CALLED)


def obstacle(name: str, source: Source, dtype: torch.dtype) -> str | None:
    """See kept_rows.py."""
    return kept_rows.obstacle(name, source, dtype, CALLED, min(int4.BLOCKS), int4.LARGEST_ZERO)


def weights(sources: Mapping[str, Source]) -> str:
    """What the form's `weights` are for all of these, which have no obstacle. All zero points are read."""
    block, zeros = max(int4.BLOCKS), False
    for source in sources.values():
        with Shards() as shards:  # of one parameter: what is read is small
            for tensor in _tensors(source):
                columns, width = tensor.columns_a_scale(shards) or 0, tensor.shape[1]
                if width % block or (columns % block and columns < width):
                    block = min(int4.BLOCKS)
                zeros = zeros or tensor.has_zeros(shards)
    return int4.name_of(block, zeros=zeros)


def parts(name: str, source: Source, model: PreTrainedModel, weights: str) -> Mapping[str, Part]:
    """See kept_rows.py; zero points are behind scales."""
    form = FORMATS[weights]
    scales = partial(_scales, block=form.block, zeros=form.zeros)
    return kept_rows.parts(name, source, model, weights, _values, scales)


def _tensors(source: Source) -> list[GroupedTensor | PackedTensor]:
    return [tensor for tensor in source.tensors() if isinstance(tensor, GroupedTensor | PackedTensor)]


def _values(tensor: GroupedTensor | PackedTensor, shards: Shards, _: slice) -> torch.Tensor:
    """The values of a tensor, which holds one expert's."""
    return tensor.pairs(shards)


def _scales(tensor: GroupedTensor | PackedTensor, shards: Shards, _: slice, *, block: int, zeros: bool) -> torch.Tensor:
    """Its scales, and its zero points behind them; `obstacle` has seen that they are numbers."""
    scales = tensor.scales_of_rows(shards, block)
    return torch.cat([scales, tensor.zeros_of_rows(shards, block)], dim=1) if zeros else scales
