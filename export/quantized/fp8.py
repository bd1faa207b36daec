"""FP8 with scales beside the values: blocks as DeepSeek-V3 and Qwen3 have them, a scale for each row, or one in all.

`NAME` [...,R,C] float8_e4m3 and `NAME_scale_inv`, by which the values are multiplied, its name notwithstanding (AutoFP8
calls it `NAME_scale`): [...,ceil(R/r),ceil(C/c)] for blocks of `weight_block_size` r by c, of which the last may be
partial; else [...,R,1] or [...,R], or one number. Scales are floats, or exponents of 8 bits (float8_e8m0, or uint8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lynx_trt.export.quantized.computed import ComputedTensor, beside, fields_of
from lynx_trt.export.quantized.scaled import FP8, SCALES, ScaledTensor, block_size, fitting_block
from lynx_trt.export.stored import StoredTensor

_SCALES = ("_scale_inv", ".weight_scale")


def find(tensors: Mapping[str, StoredTensor], config: dict[str, Any]) -> Iterator[ComputedTensor]:
    """Each weight that has scales beside it; `config` may hold `weight_block_size`.

    Raises:
        CheckpointError: the size of a block is none, or a weight and its scales don't fit together.
    """
    block = block_size(config.get("weight_block_size"), "weight_block_size")
    for key in tensors:
        if not key.endswith(_SCALES):
            continue
        values, scales = beside(tensors, key.rpartition("_scale")[0], (FP8,)), beside(tensors, key, SCALES)
        fields = fields_of(values.key, values.shape, {"values": values, "scales": scales})
        yield ScaledTensor(**fields, block=fitting_block(values, values.shape, scales, block))
