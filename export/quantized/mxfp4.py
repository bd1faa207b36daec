"""MXFP4 as gpt-oss has it: 32 values of 4 bits share an exponent of 8 bits (OCP Microscaling Formats 1.0).

`NAME_blocks` [E,R,G,16] uint8 holds two values a byte, the first in the low half; `NAME_scales` [E,R,G] uint8 the
exponents. The parameter NAME is [E,32G,R]: the model multiplies from the left, so each matrix is stored transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lynx_trt.errors import CheckpointError
from lynx_trt.export.quantized.computed import ComputedTensor, Index, beside, e8m0, fields_of, pieces_of
from lynx_trt.export.quantized.packed import both_of_a_byte, pairs_of
from lynx_trt.export.stored import Shards, StoredTensor

BLOCKS, SCALES = "_blocks", "_scales"
_BLOCK = 32
# By the four bits of E2M1: sign, two of exponent, one of mantissa.
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
_PAIRS = pairs_of(np.concatenate([_VALUES, -_VALUES]))


@dataclass(frozen=True)
class Mxfp4Tensor(ComputedTensor):
    """The experts' weights of one projection, [E,32G,R]."""

    def pieces(self, shards: Shards) -> Iterator[tuple[Index, torch.Tensor]]:
        """See ComputedTensor."""
        experts, columns, rows = self.shape
        for expert, chosen in pieces_of((experts, rows, columns)):
            blocks = shards.piece(self.parts["blocks"], (expert, chosen))
            scales = e8m0(shards.piece(self.parts["scales"], (expert, chosen)))
            values = (both_of_a_byte(_PAIRS, blocks.numpy()) * scales[..., None]).reshape(-1, columns)
            yield (expert, slice(None), chosen), values.T

    def scales(self, shards: Shards) -> Iterator[tuple[str, torch.Tensor]]:
        """See ComputedTensor."""
        stored = self.parts["scales"]
        yield stored.key, e8m0(shards.read(stored))


def find(tensors: Mapping[str, StoredTensor], _: dict[str, Any]) -> Iterator[ComputedTensor]:
    """Each weight of the checkpoint that is stored so.

    Raises:
        CheckpointError: a weight's scales are missing or don't fit its values.
    """
    for key, blocks in tensors.items():
        if not key.endswith(BLOCKS):
            continue
        name = key.removesuffix(BLOCKS)
        beside(tensors, key, ("U8",))
        scales = beside(tensors, name + SCALES, ("U8",))
        if len(blocks.shape) != 4 or blocks.shape[3] != _BLOCK // 2:
            raise CheckpointError(
                f"{key} is stored as {list(blocks.shape)}, which has to be [experts, rows, blocks, {_BLOCK // 2}]; "
                "copy the checkpoint again"
            )
        if scales.shape != blocks.shape[:3]:
            raise CheckpointError(
                f"{scales.key} is stored as {list(scales.shape)}, which has to be {list(blocks.shape[:3])}, a scale "
                f"for each block of {key}; copy the checkpoint again"
            )
        experts, rows, groups, _size = blocks.shape
        yield Mxfp4Tensor(**fields_of(name, (experts, groups * _BLOCK, rows), {"blocks": blocks, "scales": scales}))
