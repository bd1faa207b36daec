"""NVFP4: 16 values of 4 bits (E2M1) share a scale in FP8 (e4m3), and all of a weight one factor in float32.

A weight [R,C] is stored as [R,C/2] uint8, two values a byte, the first in the low half, and [R,C/16] float8_e4m3. The
scales of blocks are multiplied by the factor (modelopt's `NAME_scale_2`), or divided (compressed-tensors'
`NAME_global_scale`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lynx_trt import mxfp4, nvfp4
from lynx_trt.errors import CheckpointError
from lynx_trt.export.quantized.computed import ComputedTensor, Index, beside, fields_of, pieces_of, refuse_misfits
from lynx_trt.export.quantized.packed import both_of_a_byte
from lynx_trt.export.quantized.scaled import FP8, from_fp8
from lynx_trt.export.stored import Shards, StoredTensor

BLOCK = nvfp4.BLOCK
# Both values of each byte, as the 8 bytes of two float32.
_PAIRS = mxfp4.PAIRS.view(np.int64)[:, 0]


@dataclass(frozen=True)
class Nvfp4Tensor(ComputedTensor):
    """A weight [R,C]: value * (scale * factor), or value * (scale / factor) if it `divides`, each rounded to float32.

    `parts`: values, scales, factor.
    """

    divides: bool

    def pieces(self, shards: Shards) -> Iterator[tuple[Index, torch.Tensor]]:
        """See ComputedTensor.

        Raises:
            CheckpointError: the factor is none, with which weights could be zeros and nobody would see it.
        """
        factor = self._factor(shards)
        for index in pieces_of(self.shape):
            values = both_of_a_byte(_PAIRS, shards.piece(self.parts["values"], index).numpy())
            scales = self._multipliers(shards.piece(self.parts["scales"], index), factor)
            yield index, (values.reshape(*scales.shape, BLOCK) * scales[..., None]).reshape(values.shape)

    def scales(self, shards: Shards) -> Iterator[tuple[str, torch.Tensor]]:
        """See ComputedTensor: those of blocks."""
        stored = self.parts["scales"]
        yield stored.key, from_fp8(shards.read(stored))

    def refuse_faults(self, shards: Shards) -> None:
        """See ComputedTensor; a factor that can't be one."""
        self._factor(shards)
        super().refuse_faults(shards)

    def packed(self, shards: Shards) -> torch.Tensor:
        """The values as they are stored, [R,C/2] uint8."""
        return shards.read(self.parts["values"])

    def scales_of_rows(self, shards: Shards) -> torch.Tensor:
        """What values are multiplied with, scale and factor in one, [R,C/16] in float32.

        Raises:
            CheckpointError: the factor is none.
        """
        return self._multipliers(shards.read(self.parts["scales"]), self._factor(shards))

    def _multipliers(self, stored: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        scales = from_fp8(stored)
        return scales.div_(factor) if self.divides else scales.mul_(factor)

    def _factor(self, shards: Shards) -> torch.Tensor:
        stored = self.parts["factor"]
        factor = shards.read(stored).reshape(())
        if not torch.isfinite(factor) or (self.divides and not factor):
            raise CheckpointError(
                f"{stored.key} holds {factor.item():.6g}, {'by' if self.divides else 'with'} which scales can't be "
                f"{'divided' if self.divides else 'multiplied'}, so the checkpoint is broken; copy it again from where "
                "it came from"
            )
        return factor


def tensor_of(
    tensors: Mapping[str, StoredTensor], name: str, names: Mapping[str, str], *, divides: bool
) -> Nvfp4Tensor:
    """The weight `name`, whose values, scales and factor have such `names`.

    Raises:
        CheckpointError: one of them is missing, or they don't fit together.
    """
    dtypes = {"values": ("U8",), "scales": (FP8,), "factor": ("F32",)}
    parts = {part: beside(tensors, names[part], dtypes[part]) for part in dtypes}
    values, factor = parts["values"], parts["factor"]
    if len(values.shape) != 2 or values.shape[1] % (BLOCK // 2):
        raise CheckpointError(
            f"{values.key} is stored as {list(values.shape)}, which has to be a matrix with {BLOCK // 2} bytes for "
            f"each {BLOCK} columns; copy the checkpoint again"
        )
    rows, columns = values.shape[0], values.shape[1] * 2
    refuse_misfits(parts, {"scales": (rows, columns // BLOCK)})
    if factor.shape not in ((), (1,)):
        raise CheckpointError(
            f"{factor.key} is stored as {list(factor.shape)}, which has to be one number for all of {name}; copy the "
            "checkpoint again"
        )
    return Nvfp4Tensor(**fields_of(name, (rows, columns), parts), divides=divides)
