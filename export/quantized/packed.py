"""Integers of a few bits, packed into bytes or int32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def pairs_of(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Of the 16 values of 4 bits both of each byte, the lower half's first, as the 8 bytes of two float32 [256]."""
    byte = np.arange(256)
    return np.stack([values[byte & 15], values[byte >> 4]], axis=1).view(np.int64)[:, 0]


def both_of_a_byte(pairs: NDArray[np.int64], data: NDArray[Any]) -> torch.Tensor:
    """[...,N] uint8 -> [...,2N] float32: one look-up in `pairs` for two values."""
    return torch.from_numpy(np.take(pairs, data).view(np.float32))


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """[R,N] int32 -> [R,N*32/bits] float32: unsigned values of 4 or 8 bits, the first in the lowest bits."""
    data = packed.contiguous().numpy().view(np.uint8)
    if bits == 8:
        return torch.from_numpy(data.astype(np.float32))
    return both_of_a_byte(_UNSIGNED, data)


_UNSIGNED = pairs_of(np.arange(16, dtype=np.float32))
