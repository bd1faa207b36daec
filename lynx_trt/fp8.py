"""FP8 as experts' weights: values of 8 bits (E4M3 without infinities), of which 128 share a scale in float32.

The blocks lie along the dimension that a matrix sums over: [...,D] is stored as values [...,D] and scales [...,D/128].
Checkpoints have coarser scales (blocks of 128 rows too, a scale a row, one in all), which are repeated: 3 % more bytes.
Values are int8 in graphs, for their bits alone, as those of mxfp4.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Values that share a scale.
BLOCK = 128


def _value(byte: int) -> float:
    """A sign, four bits of exponent biased by 7, three of mantissa; all of the latter seven set is NaN."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return float("nan")
    value = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return -value if byte & 128 else value


# What each byte means.
VALUES = np.array([_value(byte) for byte in range(256)], np.float32)


def dequantize(values: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float32]:
    """[...,D] bytes of either sign and [...,D/128] float32 to [...,D]."""
    blocks = VALUES[values.view(np.uint8)].reshape(*scales.shape, BLOCK) * scales[..., None]
    matrix: NDArray[np.float32] = blocks.reshape(values.shape)
    return matrix
