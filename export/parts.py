"""What an artifact holds in the place of a parameter: its stored bytes, or what is beside them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lynx_trt.export.stored import Shards


class Part(ABC):
    """A tensor of a layer's experts, by the first dimension, of which some at a time are read."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Its shape, as LynxExperts takes it."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Its type in the graph."""

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
