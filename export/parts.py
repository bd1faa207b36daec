"""What an artifact holds in the place of a parameter: its stored bytes, or what is beside them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lynx_trt.export.stored import Shards


@dataclass(frozen=True)
class Part(ABC):
    """A tensor of a layer's experts, by the first dimension, of which some at a time are read."""

    shape: tuple[int, int, int]  # as LynxExperts takes it
    dtype: torch.dtype  # in the graph

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        experts, rows, columns = self.shape
        return experts * rows * columns * self.dtype.itemsize

    @abstractmethod
    def experts(self, shards: Shards, first: int, last: int) -> torch.Tensor:
        """Those of the experts first..last-1; of the checkpoint nothing else is read.

        Raises:
            CheckpointError: a value is no number.
        """
