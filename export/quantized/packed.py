"""Integers of a few bits, packed into int32."""

from __future__ import annotations

import numpy as np
import torch


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """[R,N] int32 -> [R,N*32/bits] float32: unsigned values of 4 or 8 bits, the first in the lowest bits."""
    data = packed.contiguous().numpy().view(np.uint8)
    if bits == 8:
        return torch.from_numpy(data.astype(np.float32))
    return torch.from_numpy(np.take(_PAIRS, data).view(np.float32))


_NIBBLES = np.arange(256)
# Both values of a byte, as the 8 bytes of two float32: one look-up for two values.
_PAIRS = np.stack([_NIBBLES & 15, _NIBBLES >> 4], axis=1).astype(np.float32).view(np.int64)[:, 0]
