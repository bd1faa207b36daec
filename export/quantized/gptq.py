"""GPTQ: integers of 4 or 8 bits, packed down the inner dimension; and what AWQ shares with it.

For a linear layer `NAME` with weight [N,K]: `NAME.qweight` int32 [K*bits/32,N], the first value in the lowest bits;
`NAME.scales` [G,N]; `NAME.qzeros` int32 [G,N*bits/32], packed across; `NAME.g_idx` int32 [K], the group of each row, or
none, where groups of `group_size` follow each other, the last of which may be partial. The weight is
(value - zero point) * scale. In the first form of the files, which is what a config without
`checkpoint_format: gptq_v2` means, zero points are stored less one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lynx_trt import int4
from lynx_trt.errors import CheckpointError, UnsupportedModelError
from lynx_trt.export.quantized.computed import (
    ANOTHER,
    ComputedTensor,
    Index,
    beside,
    fields_of,
    pieces_of,
    refuse_misfits,
)
from lynx_trt.export.quantized.packed import unpack
from lynx_trt.export.quantized.scaled import repeated
from lynx_trt.export.stored import Shards, StoredTensor

_VALUES, _SCALES, _ZEROS, _ORDER = ".qweight", ".scales", ".qzeros", ".g_idx"
_FLOATS = ("F16", "BF16", "F32")
_BITS = (4, 8)


@dataclass(frozen=True)
class GroupedTensor(ComputedTensor):
    """A weight [N,K] stored as [K,N], with a scale and a zero point for each group of K and each of N.

    `parts`: values, scales, zeros, and order, which may be missing.
    """

    bits: int
    group: int  # of K, where there is no order
    less_one: bool  # zero points as stored

    def pieces(self, shards: Shards) -> Iterator[tuple[Index, torch.Tensor]]:
        """See ComputedTensor."""
        outer, inner = self.shape
        ((_, scales),) = self.scales(shards)
        zeros = self.zeros(shards)
        groups = self._groups(shards)
        for (chosen,) in pieces_of((inner, outer), 32 // self.bits):
            assert isinstance(chosen, slice)
            group = groups[chosen]
            values = self.rows(shards, chosen).sub_(zeros[group]).mul_(scales[group])
            yield (slice(None), chosen), values.T

    def rows(self, shards: Shards, chosen: slice) -> torch.Tensor:
        """Stored values [k,N] of some of K, in float32."""
        packed = slice(chosen.start * self.bits // 32, chosen.stop * self.bits // 32)
        return unpack(shards.piece(self.parts["values"], (packed,)).T, self.bits).T

    def zeros(self, shards: Shards) -> torch.Tensor:
        """Zero points [G,N] in float32."""
        zeros = unpack(shards.read(self.parts["zeros"]), self.bits)
        return (zeros + 1) % (1 << self.bits) if self.less_one else zeros

    def scales(self, shards: Shards) -> Iterator[tuple[str, torch.Tensor]]:
        """See ComputedTensor."""
        stored = self.parts["scales"]
        yield stored.key, shards.read(stored).to(torch.float32)

    def columns_a_scale(self, shards: Shards) -> int | None:
        """How many of K that follow each other share a scale; None where those that do lie apart (act-order)."""
        if "order" not in self.parts:
            return self.group
        groups = self._groups(shards)
        first = int((groups == 0).sum())
        return first if first and torch.equal(groups, torch.arange(len(groups)) // first) else None

    def scales_of_rows(self, shards: Shards, each: int) -> torch.Tensor:
        """[N,K/each] in float32: one for each of N and each `each` of K, which has a multiple of it to a scale."""
        ((_, scales),) = self.scales(shards)
        return self._of_rows(scales, shards, each)

    def pairs(self, shards: Shards) -> torch.Tensor:
        """Of 4 bits, the values as lynx_trt/int4.py has them, [N,K/2] int8."""
        return shards.read(self.parts["values"]).T.contiguous().view(torch.int8)

    def has_zeros(self, shards: Shards) -> bool:
        """Whether a zero point of those values is another than int4.ZERO."""
        return bool((self.zeros(shards) != int4.ZERO).any())

    def zeros_of_rows(self, shards: Shards, each: int) -> torch.Tensor:
        """Their zero points, as scales_of_rows has the scales."""
        return self._of_rows(self.zeros(shards), shards, each)

    def _of_rows(self, grid: torch.Tensor, shards: Shards, each: int) -> torch.Tensor:
        columns = self.columns_a_scale(shards)
        assert columns is not None, f"{self.key} is in act-order"
        return repeated(grid.T, columns, each, self.shape[1])

    def _groups(self, shards: Shards) -> torch.Tensor:
        """The group of each of K."""
        count, inner = self.parts["scales"].shape[0], self.shape[1]
        if "order" not in self.parts:
            return torch.arange(inner) // self.group
        order = shards.read(self.parts["order"]).long()
        if inner and not 0 <= int(order.min()) <= int(order.max()) < count:
            raise CheckpointError(
                f"{self.parts['order'].key} names groups {int(order.min())} to {int(order.max())}, but there are "
                f"{count}, from 0 on; copy the checkpoint again"
            )
        return order


def find(tensors: Mapping[str, StoredTensor], config: dict[str, Any]) -> Iterator[ComputedTensor]:
    """Each weight that is stored so; its bits are seen in the shapes.

    Raises:
        CheckpointError: the parts of a weight don't fit together.
        UnsupportedModelError: a number of bits or a form that is not known here.
    """
    form = config.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(
            f"the checkpoint is quantized (gptq) in the form {form!r}, which this version can't read, but gptq and "
            "gptq_v2 it can; convert it to one of these"
        )
    for key in tensors:
        if key.endswith(_VALUES):
            yield _tensor(tensors, key.removesuffix(_VALUES), config, less_one=form == "gptq")


def _tensor(
    tensors: Mapping[str, StoredTensor], name: str, config: dict[str, Any], *, less_one: bool
) -> ComputedTensor:
    parts = grouped_parts(tensors, name)
    (packed, outer), (groups, _) = parts["values"].shape, parts["scales"].shape
    bits = parts["zeros"].shape[1] * 32 // max(outer, 1)
    if bits not in _BITS:
        raise UnsupportedModelError(
            f"{name}{_VALUES} has values of {bits} bits, which this version can't read, but 4 and 8 it can; " + ANOTHER
        )
    inner = packed * 32 // bits
    if name + _ORDER in tensors:
        parts["order"] = beside(tensors, name + _ORDER, ("I32", "I64"))
    wanted = {"scales": (groups, outer), "zeros": (groups, outer * bits // 32), "order": (inner,)}
    refuse_misfits(parts, wanted)
    group = inner if "order" in parts else group_size(config, parts["scales"], inner)
    fields = fields_of(f"{name}.weight", (outer, inner), parts)
    return GroupedTensor(**fields, bits=bits, group=group, less_one=less_one)


def group_size(config: dict[str, Any], scales: StoredTensor, inner: int) -> int:
    """How many of the `inner` values of a row share one of its `scales`, where nothing says it of each.

    Raises:
        CheckpointError: `group_size` of the config makes another number of groups, or is missing where the last group
            could be partial.
    """
    count, size = scales.shape[0], config.get("group_size")
    if size is None and inner % count == 0:
        size = inner // count
    size = inner if size == -1 else size
    if type(size) is int and size > 0 and -(-inner // size) == count:
        return size
    raise CheckpointError(
        f"quantization_config has group_size {config.get('group_size')!r}, which does not make {count} groups of "
        f"{inner}, as {scales.key} {list(scales.shape)} has them; copy the checkpoint again"
    )


def grouped_parts(tensors: Mapping[str, StoredTensor], name: str) -> dict[str, StoredTensor]:
    """Values, scales and zero points of a linear layer, all of them matrices.

    Raises:
        CheckpointError: one isn't there, is of another type, or is no matrix.
    """
    parts = {
        "values": beside(tensors, name + _VALUES, ("I32",)),
        "scales": beside(tensors, name + _SCALES, _FLOATS),
        "zeros": beside(tensors, name + _ZEROS, ("I32",)),
    }
    for part in parts.values():
        if len(part.shape) != 2 or not part.shape[0]:
            raise CheckpointError(f"{part.key} is stored as {list(part.shape)}, which is no matrix; copy it again")
    return parts
