"""Experts that an artifact keeps in FP8: the stored bytes, and their scales repeated to one for each 128 of a row.

Half of their size in bf16. The hub's checkpoints have a tensor for each expert and projection: values, and scales once
they are repeated, are put together by the rule that puts together the weights in full.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lynx_trt import fp8
from lynx_trt.errors import CheckpointError
from lynx_trt.export.finite import refuse_not_finite
from lynx_trt.export.parts import Part
from lynx_trt.export.quantized.computed import pieces_of
from lynx_trt.export.quantized.scaled import FP8, ScaledTensor
from lynx_trt.export.sources import Source, disagrees
from lynx_trt.export.stored import Shards

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from lynx_trt.export.moe import MoeLayer
    from lynx_trt.export.stored import StoredTensor

# The values have the parameter's own name.
SCALE = "_scale"
ENDINGS = ("", SCALE)
_LARGEST = 448  # of E4M3


@dataclass(frozen=True)
class _Fp8Part(Part):
    """Of parameter `name` [E,R,C]: what `of` makes of each tensor that it consists of."""

    name: str
    source: Source
    model: PreTrainedModel
    full: tuple[int, int, int]

    @abstractmethod
    def of(self, tensor: ScaledTensor, shards: Shards, chosen: slice) -> torch.Tensor:
        """That of one stored tensor: of its rows [R,C], or of the experts `chosen` where it holds several [E,R,C]."""

    def experts(self, shards: Shards, first: int, last: int) -> torch.Tensor:
        """See Part."""
        whole = self.source.converter is None
        chosen = slice(first, last) if whole else slice(None)
        source = self.source if whole else self.source.part(first, last)

        def read(stored: StoredTensor) -> torch.Tensor:
            assert isinstance(stored, ScaledTensor)
            return self.of(stored, shards, chosen)

        return source.merged(self.name, self.name, read, self.model)


@dataclass(frozen=True)
class _Values(_Fp8Part):
    """The stored bytes, as int8 [E,R,C]."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """See Part."""
        return self.full

    @property
    def dtype(self) -> torch.dtype:
        """See Part."""
        return torch.int8

    def of(self, tensor: ScaledTensor, shards: Shards, chosen: slice) -> torch.Tensor:
        """See _Fp8Part; a value that is NaN is refused."""
        stored = shards.piece(tensor.parts["values"], (chosen,)).view(torch.int8)
        for index in pieces_of(tuple(stored.shape)):
            if ((stored[index] & 127) == 127).any():
                refuse_not_finite(tensor.key, tensor.read(shards, torch.float32), torch.float32, masks=False)
                raise AssertionError(f"{tensor.key} holds NaN, but its values are numbers")
        return stored


@dataclass(frozen=True)
class _Scales(_Fp8Part):
    """The scales, as float32 [E,R,C/128]; `obstacle` has seen that they are numbers."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """See Part."""
        experts, rows, columns = self.full
        return experts, rows, columns // fp8.BLOCK

    @property
    def dtype(self) -> torch.dtype:
        """See Part."""
        return torch.float32

    def of(self, tensor: ScaledTensor, shards: Shards, chosen: slice) -> torch.Tensor:
        """See _Fp8Part."""
        return tensor.scales_of_rows(shards, fp8.BLOCK)[chosen]


def is_stored_so(stored: StoredTensor) -> bool:
    """Whether it holds values in FP8 that are only to be multiplied by scales."""
    return isinstance(stored, ScaledTensor) and stored.parts["values"].dtype == FP8 and "zeros" not in stored.parts


def obstacle_of_layer(layer: MoeLayer) -> str | None:
    """Why a layer of that form can't have such weights, a clause; None if it can."""
    if not layer.form.transposed:
        return None
    return f"{layer.name} sums over the rows of its matrices, and LynxExperts over the columns of those in FP8"


def obstacle(name: str, source: Source, dtype: torch.dtype) -> str | None:
    """Why parameter `name` can't be kept for an artifact of that dtype, a clause; None if it can.

    Of the checkpoint all scales are read.

    Raises:
        CheckpointError: a scale is no finite number.
    """
    shape, tensors = source.rows_of_experts(), _tensors(source)
    if shape is None:
        return f"{name} is made of its stored tensors in another way than by putting rows below each other"
    if shape[2] % fp8.BLOCK:
        return f"{name} sums over {shape[2]} columns, and LynxExperts has weights in FP8 of multiples of {fp8.BLOCK}"
    for tensor in tensors:
        columns = tensor.block[1]
        if columns % fp8.BLOCK and columns < shape[2]:
            return (
                f"a scale of {tensor.key} is for {columns} columns, and LynxExperts has a scale for each {fp8.BLOCK} "
                "columns of FP8"
            )
    return _too_large(tensors, dtype)


def parts(name: str, source: Source, model: PreTrainedModel) -> Mapping[str, Part]:
    """What LynxExperts takes of parameter `name`: values by its own name, scales by a name like it.

    Raises:
        CheckpointError: the stored tensors together have another shape than the parameter.
    """
    shape = source.rows_of_experts()
    wanted = tuple(model.get_parameter(name).shape)
    if shape is None or shape != wanted:
        raise CheckpointError(disagrees(name, shape, wanted))
    return {name: _Values(name, source, model, shape), name + SCALE: _Scales(name, source, model, shape)}


def _tensors(source: Source) -> list[ScaledTensor]:
    return [tensor for tensor in source.tensors() if isinstance(tensor, ScaledTensor)]


def _too_large(tensors: list[ScaledTensor], dtype: torch.dtype) -> str | None:
    """A clause if one of the scales allows weights beyond what `dtype` holds: those are looked at one by one."""
    most = torch.finfo(dtype).max / _LARGEST
    with Shards() as shards:  # of one parameter: they are small
        for tensor in tensors:
            tensor.refuse_faults(shards)
            for key, scales in tensor.scales(shards):
                largest = scales.abs().max().item() if scales.numel() else 0.0
                if largest > most:
                    return (
                        f"{key} holds the scale {largest:.6g}, with which weights can be beyond "
                        f"{torch.finfo(dtype).max:.6g}, the largest number of the precision"
                    )
    return None
