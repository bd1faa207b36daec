"""MXFP4 as gpt-oss has it: 32 values of 4 bits share an exponent of 8 bits (OCP Microscaling Formats 1.0).

`NAME_blocks` [E,R,G,16] uint8 holds two values a byte, the first in the low half; `NAME_scales` [E,R,G] uint8 the
exponents. The parameter NAME is [E,32G,R]: the model multiplies from the left, so each matrix is stored transposed.
Their bytes are those that LynxExperts takes (lynx_trt/mxfp4.py), so that an artifact can hold them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lynx_trt import mxfp4
from lynx_trt.errors import CheckpointError
from lynx_trt.export.parts import Part
from lynx_trt.export.quantized.computed import ComputedTensor, Index, beside, e8m0, fields_of, pieces_of
from lynx_trt.export.quantized.packed import both_of_a_byte
from lynx_trt.export.stored import Shards, StoredTensor

BLOCKS, SCALES = "_blocks", "_scales"
_BLOCK = mxfp4.BLOCK
# Both values of each byte, as the 8 bytes of two float32.
_PAIRS = mxfp4.PAIRS.view(np.int64)[:, 0]


@dataclass(frozen=True)
class PartBytes(Part):
    """The bytes of one part, as int8 of the shape that LynxExperts has them in: [E,R,16G] of blocks, [E,R,G] of scales.

    They go into an artifact as they are, so there is nothing to check in them but what `Mxfp4Tensor` does.
    """

    stored: StoredTensor

    def experts(self, shards: Shards, first: int, last: int) -> torch.Tensor:
        """See Part."""
        stored = shards.piece(self.stored, (slice(first, last),))
        return stored.view(torch.int8).reshape(last - first, *self.shape[1:])


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

    def as_stored(self) -> dict[str, PartBytes]:
        """What LynxExperts takes of it, by the endings of the checkpoint's own names."""
        blocks, scales = self.parts["blocks"], self.parts["scales"]
        experts, rows, groups = scales.shape
        return {
            BLOCKS: PartBytes((experts, rows, groups * _BLOCK // 2), torch.int8, blocks),
            SCALES: PartBytes((experts, rows, groups), torch.int8, scales),
        }

    def scale_beyond(self, largest: int, shards: Shards) -> tuple[str, int, list[int]] | None:
        """The first byte of scale above `largest`: the part's name, the byte, its place; None if there is none.

        Raises:
            CheckpointError: one is no number.
        """
        stored = self.parts["scales"]
        scales = shards.read(stored).numpy()
        if not scales.size or scales.max() <= largest:
            return None
        self.refuse_faults(shards)
        at = np.unravel_index(np.argmax(scales > largest), scales.shape)
        return stored.key, int(scales[at]), [int(place) for place in at]


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
