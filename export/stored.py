"""Tensors of a checkpoint as they lie on disk: known by their headers, read one at a time or in pieces."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor of the checkpoint lies; `dtype` is safetensors' name (`BF16`, `F32`, ...).

    One that is `turned` has its last two dimensions the other way round on disk; `shape` is what it has here.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    turned: bool = field(default=False, kw_only=True)

    def turn(self) -> StoredTensor | None:
        """The same with its last two dimensions the other way round; None if it can't be read so."""
        *leading, rows, columns = self.shape
        return replace(self, shape=(*leading, columns, rows), turned=not self.turned)

    def read(self, shards: Shards, dtype: torch.dtype) -> torch.Tensor:
        """The tensor as it is stored. `dtype` is for those that are computed of others (export/quantized)."""
        return shards.read(self)

    def refuse_faults(self, shards: Shards) -> None:
        """Of a tensor that is computed of others: raise if one of those is what is wrong with it.

        Raises:
            CheckpointError: with the name of the other tensor.
        """


class Shards(ExitStack):
    """Shards opened for one parameter: kept open, every page that was ever read would stay mapped."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[Path, Any] = {}

    def read(self, stored: StoredTensor) -> torch.Tensor:
        """A whole tensor, as it is stored."""
        tensor: torch.Tensor = self._file(stored).get_tensor(stored.key)
        return tensor.mT.contiguous() if stored.turned else tensor

    def piece(self, stored: StoredTensor, index: tuple[int | slice, ...]) -> torch.Tensor:
        """What `index` chooses of a tensor of one dimension or more; nothing else of it is read."""
        if stored.turned:
            every = [*index, *[slice(None)] * (len(stored.shape) - len(index))]
            index = (*every[:-2], every[-1], every[-2])
        tensor: torch.Tensor = self._file(stored).get_slice(stored.key)[index]
        return tensor.mT.contiguous() if stored.turned else tensor

    def _file(self, stored: StoredTensor) -> Any:
        from safetensors import safe_open

        if stored.file not in self._open:
            self._open[stored.file] = self.enter_context(safe_open(stored.file, framework="pt"))
        return self._open[stored.file]
