"""Int4 as experts' weights: values of 4 bits, of which 32 or 128 share a scale and maybe a zero point (GPTQ, AWQ, ...).

Along the dimension that a matrix sums over, a byte has two values of 0 to 15, the first in its lower half: [...,D] is
stored as values [...,D/2], int8 in graphs for their bits alone, as those of mxfp4.py. A weight is
(value - zero point) * scale. Scales are of the graph's own precision. Without zero points ("int4_g32", "int4_g128")
they are [...,D/32] or [...,D/128], and a zero point is 8. With them ("int4_g32_zeros", "int4_g128_zeros") those of a
row come behind its scales, whole numbers of 0 to 16 in the scales' type: [...,2*D/32] or [...,2*D/128].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Values that share a scale. Checkpoints' groups of 64, or other multiples of these, have their scales repeated.
BLOCKS = (32, 128)
# The zero point where none is stored.
ZERO = 8
# Zero points are 0 to this, one more than a value can be: GPTQ's first form stores them less one.
LARGEST_ZERO = 16
# Both values of each byte.
PAIRS = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1).astype(np.float32)


def name_of(block: int, *, zeros: bool) -> str:
    """What LynxExperts' attribute `weights` is, of such weights."""
    return f"int4_g{block}" + ("_zeros" if zeros else "")


def dequantize(values: NDArray[Any], scales: NDArray[Any], *, block: int, zeros: bool) -> NDArray[np.float32]:
    """[...,D/2] bytes of either sign and [...,D/block] or [...,2*D/block] floats to [...,D]."""
    width = 2 * values.shape[-1]
    each = np.asarray(scales).astype(np.float32)
    factors, points = np.split(each, 2, axis=-1) if zeros else (each, np.full_like(each, ZERO))
    numbers = PAIRS[values.view(np.uint8)].reshape(*factors.shape, block)
    matrix: NDArray[np.float32] = (numbers - points[..., None]) * factors[..., None]
    return matrix.reshape(*values.shape[:-1], width)
