"""AWQ in the form `gemm`: integers of 4 bits, eight outputs to an int32, in an order of their own.

For a linear layer `NAME` with weight [N,K]: `NAME.qweight` int32 [K,N/8], `NAME.scales` [G,N], `NAME.qzeros` int32
[G,N/8], packed as the values are. From the lowest bits on, an int32 holds outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lynx_trt.errors import UnsupportedModelError
from lynx_trt.export.quantized import gptq
from lynx_trt.export.quantized.computed import ANOTHER, ComputedTensor, fields_of, refuse_misfits
from lynx_trt.export.quantized.packed import unpack
from lynx_trt.export.stored import Shards, StoredTensor

_BITS, _EACH = 4, 8
# Where in an int32 each of its eight outputs lies.
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True)
class AwqTensor(gptq.GroupedTensor):
    """A weight [N,K] stored as [K,N]."""

    def rows(self, shards: Shards, chosen: slice) -> torch.Tensor:
        """See GroupedTensor."""
        return _in_order(shards.piece(self.parts["values"], (chosen,)))

    def zeros(self, shards: Shards) -> torch.Tensor:
        """See GroupedTensor."""
        return _in_order(shards.read(self.parts["zeros"]))

    def pairs(self, shards: Shards) -> torch.Tensor:
        """See GroupedTensor: of each byte, which has two of N, and the one below it, two bytes of K."""
        stored = shards.read(self.parts["values"]).view(torch.uint8)
        first, second = stored[0::2], stored[1::2]
        lower, upper = first & 15 | second << 4, first >> 4 | second & 0xF0
        pairs = torch.stack([lower, upper], dim=-1).reshape(len(first), -1, _EACH)[..., _PLACES]
        return pairs.reshape(len(first), -1).T.contiguous().view(torch.int8)


def _in_order(packed: torch.Tensor) -> torch.Tensor:
    values = unpack(packed, _BITS)
    return values.reshape(len(values), -1, _EACH)[..., _PLACES].reshape(values.shape)


def find(tensors: Mapping[str, StoredTensor], config: dict[str, Any]) -> Iterator[ComputedTensor]:
    """Each weight that is stored so.

    Raises:
        CheckpointError: the parts of a weight don't fit together.
        UnsupportedModelError: another form, or another number of bits.
    """
    form, bits = str(config.get("version", "gemm")).lower(), config.get("bits", _BITS)
    if form != "gemm" or bits != _BITS:
        raise UnsupportedModelError(
            f"the checkpoint is quantized (awq) in the form {form!r} with {bits} bits, which this version can't read, "
            f"but gemm with 4 bits it can; {ANOTHER}"
        )
    for key in tensors:
        if not key.endswith(".qweight"):
            continue
        name = key.removesuffix(".qweight")
        parts = gptq.grouped_parts(tensors, name)
        (inner, packed), groups = parts["values"].shape, parts["scales"].shape[0]
        refuse_misfits(parts, {"scales": (groups, packed * _EACH), "zeros": (groups, packed)})
        fields = fields_of(f"{name}.weight", (packed * _EACH, inner), parts)
        group = gptq.group_size(config, parts["scales"], inner)
        yield AwqTensor(**fields, bits=_BITS, group=group, less_one=False)
