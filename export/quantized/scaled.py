"""A weight stored a value an element, or packed along its rows, with a scale for each block of rows by columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from lynx_trt.errors import CheckpointError
from lynx_trt.export.quantized.computed import ComputedTensor, Index, e8m0, pieces_of
from lynx_trt.export.stored import Shards, StoredTensor

FP8 = "F8_E4M3"
FLOATS = ("F32", "BF16", "F16")
SCALES = (*FLOATS, "F8_E8M0", "U8")
# Each byte's value: a look-up is four times as fast as torch's conversion.
_FP8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()


@dataclass(frozen=True)
class ScaledTensor(ComputedTensor):
    """A weight [...,R,C]: (value - zero point) * scale, both of a `block` of rows by columns.

    `parts`: values; scales, one for each block, a row or in all; zeros (of integers, may be missing) like scales.
    """

    block: tuple[int, int]

    def turn(self) -> StoredTensor | None:
        """See StoredTensor. Scales a row, or one in all, are of columns then, or one in all, as they are."""
        grid, parts = grid_of(self.shape, self.block), dict(self.parts)
        for kind, part in self.parts.items():
            turned = part.turn() if kind == "values" or part.shape == grid else part
            if turned is None:
                return None
            parts[kind] = turned
        *leading, rows, columns = self.shape
        return replace(self, parts=parts, shape=(*leading, columns, rows), block=self.block[::-1])

    def pieces(self, shards: Shards) -> Iterator[tuple[Index, torch.Tensor]]:
        """See ComputedTensor."""
        rows, columns = self.block
        ((_, stored),) = self.scales(shards)
        scales, zeros = self._grid(stored), self.zeros(shards)
        for index in pieces_of(self.shape, rows):
            *matrix, chosen = index
            assert isinstance(chosen, slice)
            own = (*matrix, slice(chosen.start // rows, -(-chosen.stop // rows)))
            values = self.values(shards, index)
            if zeros is not None:
                values -= over_block(zeros[own], rows, columns, values.shape)
            yield index, values.mul_(over_block(scales[own], rows, columns, values.shape))

    def values(self, shards: Shards, index: Index) -> torch.Tensor:
        """The stored values of a piece, in float32."""
        values = shards.piece(self.parts["values"], index)
        return from_fp8(values) if self.parts["values"].dtype == FP8 else values.to(torch.float32)

    def zeros(self, shards: Shards) -> torch.Tensor | None:
        """Zero points in float32, for each block."""
        return self._grid(shards.read(self.parts["zeros"]).to(torch.float32)) if "zeros" in self.parts else None

    def scales(self, shards: Shards) -> Iterator[tuple[str, torch.Tensor]]:
        """See ComputedTensor."""
        stored = self.parts["scales"]
        values = shards.read(stored)
        yield stored.key, e8m0(values) if stored.dtype in ("F8_E8M0", "U8") else values.to(torch.float32)

    def columns_a_scale(self, _: Shards) -> int:
        """How many columns share a scale; maybe more than there are."""
        return self.block[1]

    def scales_of_rows(self, shards: Shards, each: int) -> torch.Tensor:
        """[...,R,C/each] in float32: one for each row and each `each` of its columns, of coarser blocks by repetition.

        C and the columns of a block, unless it is as wide as the weight, are multiples of `each`.
        """
        ((_, stored),) = self.scales(shards)
        return self.of_rows(self._grid(stored), each)

    def of_rows(self, grid: torch.Tensor, each: int) -> torch.Tensor:
        """The same of any numbers [...,ceil(R/rows),ceil(C/columns)], one for each block."""
        rows, columns = self.block
        if rows > 1:
            grid = grid.repeat_interleave(rows, dim=-2)[..., : self.shape[-2], :]
        return repeated(grid, columns, each, self.shape[-1])

    def _grid(self, stored: torch.Tensor) -> torch.Tensor:
        """One for each block, whichever shape they are stored in."""
        grid = grid_of(self.shape, self.block)
        return stored.reshape(grid) if stored.numel() == torch.Size(grid).numel() else stored.reshape(-1).expand(grid)


def from_fp8(stored: torch.Tensor) -> torch.Tensor:
    """Values of FP8 in float32."""
    return torch.from_numpy(np.take(_FP8, stored.view(torch.uint8).numpy()))


def over_block(grid: torch.Tensor, rows: int, columns: int, shape: torch.Size) -> torch.Tensor:
    """Of [ceil(R/rows),ceil(C/columns)], one for each block, what broadcasts to `shape` [R,C]."""
    if rows > 1:
        grid = grid.repeat_interleave(rows, dim=0)[: shape[0]]
    return grid.repeat_interleave(columns, dim=1)[:, : shape[1]] if grid.shape[1] > 1 else grid


def repeated(grid: torch.Tensor, columns: int, each: int, width: int) -> torch.Tensor:
    """Of [...,ceil(width/columns)], one for so many columns, [...,width/each]: one for each `each` of them."""
    wanted = width // each
    if grid.shape[-1] == 1:
        return grid.expand(*grid.shape[:-1], wanted)
    return grid.repeat_interleave(columns // each, dim=-1)[..., :wanted]


def grid_of(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """How many blocks, whole or partial, a weight of that shape has down and across."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def fitting_block(
    values: StoredTensor, shape: tuple[int, ...], scales: StoredTensor, block: tuple[int, int] | None
) -> tuple[int, int]:
    """Rows and columns that share a scale: those of `block`, or if there is none those that the scales' shape means.

    Raises:
        CheckpointError: the scales of a weight of that shape have another one.
    """
    if len(shape) < 2:
        raise CheckpointError(f"{values.key} is stored as {list(shape)}, which is no matrix; copy the checkpoint again")
    row = (1, max(shape[-1], 1))
    each = [grid_of(shape, row), shape[:-1], (), (1,), (1,) * len(shape)]
    fitting = [grid_of(shape, block)] if block else each
    if scales.shape not in fitting:
        wanted = " or ".join(str(list(shape)) for shape in fitting[:3])
        why = f"in blocks of {list(block)}" if block else "if config.json has no size of blocks"
        raise CheckpointError(
            f"{scales.key} is stored as {list(scales.shape)}, which has to be {wanted} for {values.key} {list(shape)} "
            f"{why}; copy the checkpoint again"
        )
    return block or row


def block_size(value: object, key: str) -> tuple[int, int] | None:
    """Rows and columns of a block as config.json has them under `key`.

    Raises:
        CheckpointError: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    raise CheckpointError(
        f"quantization_config has {key} {value!r}, which has to be two whole numbers such as [128, 128]; copy "
        "config.json again"
    )
