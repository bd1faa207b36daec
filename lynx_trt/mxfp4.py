"""MXFP4 (OCP Microscaling Formats 1.0): values of 4 bits (E2M1), of which 32 share a scale of 8 bits (E8M0).

Along the dimension that a matrix sums over, a byte has two values, the first in its lower half, and each 32 values have
one byte of scale: [...,D] is stored as values [...,D/2] and scales [...,D/32]. This is how gpt-oss comes. Both are int8
in graphs, for their bits alone: TensorRT takes no unsigned bytes (seen with 1.7.1 for RTX).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Values that share a scale.
BLOCK = 32
# By the four bits: sign, two of exponent, one of mantissa.
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# Both values of each byte.
PAIRS = np.stack([VALUES[np.arange(256) & 15], VALUES[np.arange(256) >> 4]], axis=1)
# What each byte of scale means; 255 is NaN (section 5.4.1).
SCALES = np.where(np.arange(256) == 255, np.nan, np.exp2(np.arange(256) - 127.0)).astype(np.float32)
# The largest byte of scale that the GPU kernels take, 2.0, with which weights reach 12. Up to it they make weights of
# both 16-bit types with one multiplication.
LARGEST_SCALE = 128


def dequantize(values: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float32]:
    """[...,D/2] and [...,D/32], bytes of either sign, to [...,D]."""
    return scaled(values, SCALES[scales.view(np.uint8)])


def scaled(values: NDArray[Any], factors: NDArray[np.float32]) -> NDArray[np.float32]:
    """[...,D/2] bytes of either sign, and a factor for each block of a row [...,blocks], to [...,D]."""
    blocks = PAIRS[values.view(np.uint8)].reshape(*factors.shape, -1) * factors[..., None]
    matrix: NDArray[np.float32] = blocks.reshape(*values.shape[:-1], 2 * values.shape[-1])
    return matrix
