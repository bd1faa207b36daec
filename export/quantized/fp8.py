"""FP8 with scales beside the values: blocks as DeepSeek-V3 and Qwen3 have them, a scale for each row, or one in all.

`NAME` [...,R,C] float8_e4m3 and `NAME_scale_inv`, by which the values are multiplied, its name notwithstanding:
[...,ceil(R/r),ceil(C/c)] for blocks of `weight_block_size` r by c, of which the last may be partial; else [...,R,1] or
[...,R], or one number. Scales are floats, or exponents of 8 bits (float8_e8m0, or uint8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lynx_trt.errors import CheckpointError
from lynx_trt.export.quantized.computed import ComputedTensor, Index, beside, e8m0, pieces_of
from lynx_trt.export.stored import Shards, StoredTensor

VALUES, SCALE = "F8_E4M3", "_scale_inv"
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
# Each byte's value: a look-up is four times as fast as torch's conversion.
_TABLE = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()


@dataclass(frozen=True)
class Fp8Tensor(ComputedTensor):
    """A weight [...,R,C] with a scale for each `block` of rows by columns."""

    block: tuple[int, int]

    def pieces(self, shards: Shards) -> Iterator[tuple[Index, torch.Tensor]]:
        """See ComputedTensor."""
        rows, columns = self.block
        ((_, scales),) = self.scales(shards)
        grid = _grid(self.shape, self.block)
        scales = scales.reshape(grid) if scales.numel() == torch.Size(grid).numel() else scales.expand(grid)
        for index in pieces_of(self.shape, rows):
            *matrix, chosen = index
            assert isinstance(chosen, slice)
            values = np.take(_TABLE, shards.piece(self.parts["values"], index).view(torch.uint8).numpy())
            own = scales[(*matrix, slice(chosen.start // rows, -(-chosen.stop // rows)))]
            yield index, scaled(torch.from_numpy(values), own, rows, columns)

    def scales(self, shards: Shards) -> Iterator[tuple[str, torch.Tensor]]:
        """See ComputedTensor."""
        stored = self.parts["scales"]
        values = shards.read(stored)
        yield stored.key, e8m0(values) if stored.dtype in ("F8_E8M0", "U8") else values.to(torch.float32)


def find(tensors: Mapping[str, StoredTensor], config: dict[str, Any]) -> Iterator[ComputedTensor]:
    """Each weight that has scales beside it; `config` may hold `weight_block_size`.

    Raises:
        CheckpointError: the size of a block is none, or a weight and its scales don't fit together.
    """
    block = _block(config)
    for scale_key in tensors:
        if not scale_key.endswith(SCALE):
            continue
        values = beside(tensors, scale_key.removesuffix(SCALE), (VALUES,))
        scales = beside(tensors, scale_key, _SCALES)
        yield Fp8Tensor(
            file=values.file,
            key=values.key,
            dtype="F32",
            shape=values.shape,
            nbytes=values.nbytes + scales.nbytes,
            parts={"values": values, "scales": scales},
            block=fitting_block(values, scales, block),
        )


def _block(config: dict[str, Any]) -> tuple[int, int] | None:
    value = config.get("weight_block_size")
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    raise CheckpointError(
        f"quantization_config has weight_block_size {value!r}, which has to be two whole numbers such as [128, 128]; "
        "copy config.json again"
    )


def fitting_block(values: StoredTensor, scales: StoredTensor, block: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns that share a scale: those of `block`, or if there is none those that the scales' shape means.

    Raises:
        CheckpointError: the scales have another shape.
    """
    shape = values.shape
    if len(shape) < 2:
        raise CheckpointError(f"{values.key} is stored as {list(shape)}, which is no matrix; copy the checkpoint again")
    row = (1, max(shape[-1], 1))
    each = [_grid(shape, row), shape[:-1], (), (1,), (1,) * len(shape)]
    fitting = [_grid(shape, block)] if block else each
    if scales.shape not in fitting:
        wanted = " or ".join(str(list(shape)) for shape in fitting[:3])
        why = f"in blocks of {list(block)}" if block else "if config.json has no weight_block_size"
        raise CheckpointError(
            f"{scales.key} is stored as {list(scales.shape)}, which has to be {wanted} for {values.key} {list(shape)} "
            f"{why}; copy the checkpoint again"
        )
    return block or row


def scaled(values: torch.Tensor, scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Multiply [R,C] float32, in place, by the scale [ceil(R/rows),ceil(C/columns)] of each block."""
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(columns, dim=1)[:, : values.shape[1]]
    if rows == 1:
        return values.mul_(scales)
    for number, begin in enumerate(range(0, len(values), rows)):
        values[begin : begin + rows] *= scales[number]
    return values


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Scales of a weight of that shape: one for each block, whole or partial, down and across."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
