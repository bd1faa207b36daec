"""NVFP4 as experts' weights: values of 4 bits (E2M1), of which 16 share a scale (NVIDIA modelopt, compressed-tensors).

Along the dimension that a matrix sums over, a byte has two values, the first in its lower half: [...,D] is stored as
values [...,D/2], int8 in graphs for their bits alone, and scales [...,D/16] of the graph's own precision. In
checkpoints a scale is a number of 8 bits (E4M3) times one of float32 for the whole tensor; here it is their product, so
that a tensor merged of several has one kind of scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lynx_trt import mxfp4

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Values that share a scale.
BLOCK = 16
# The largest scale that the GPU kernels take, with which weights reach 12.
LARGEST_SCALE = 2.0


def dequantize(values: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float32]:
    """[...,D/2] bytes of either sign and [...,D/16] floats to [...,D]."""
    return mxfp4.scaled(values, np.asarray(scales).astype(np.float32))
