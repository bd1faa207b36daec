"""Experts that are kept in FP8, NVFP4 or int4: what these have in common, rows of stored tensors that are put together.

The hub's checkpoints have a tensor for each expert and projection. What is made of the rows of each (values, and scales
once they are repeated) is put together by the rule that puts together the weights in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lynx_trt.errors import CheckpointError
from lynx_trt.experts import FORMATS
from lynx_trt.export.parts import Part
from lynx_trt.export.quantized.computed import ComputedTensor
from lynx_trt.export.quantized.gptq import GroupedTensor
from lynx_trt.export.quantized.scaled import ScaledTensor
from lynx_trt.export.sources import disagrees
from lynx_trt.export.stored import Shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lynx_trt.export.moe import MoeLayer
    from lynx_trt.export.sources import Source

# The values have the parameter's own name.
SCALE = "_scale"
ENDINGS = ("", SCALE)


@dataclass(frozen=True)
class RowsPart(Part):
    """Of parameter `name`: what `of` makes of each stored tensor that it consists of.

    `of` is given one, the shards and a slice. It gives what there is for the tensor's rows [R,...], or for those
    experts that the slice chooses where the tensor holds several [E,R,...].
    """

    name: str
    source: Source
    model: PreTrainedModel
    of: Callable[[Any, Shards, slice], torch.Tensor]

    def experts(self, shards: Shards, first: int, last: int) -> torch.Tensor:
        """See Part."""
        whole = self.source.converter is None
        chosen = slice(first, last) if whole else slice(None)
        source = self.source if whole else self.source.part(first, last)
        return source.merged(self.name, self.name, lambda stored: self.of(stored, shards, chosen), self.model)


def tensors_of(source: Source) -> list[ScaledTensor | GroupedTensor]:
    """What a parameter is made of, if all of it is stored so."""
    return [tensor for tensor in source.tensors() if isinstance(tensor, ScaledTensor | GroupedTensor)]


def shape_of(name: str, source: Source, model: PreTrainedModel) -> tuple[int, int, int]:
    """Experts, rows and columns of parameter `name`.

    Raises:
        CheckpointError: the stored tensors together have another shape than the parameter.
    """
    shape = source.rows_of_experts()
    wanted = tuple(model.get_parameter(name).shape)
    if shape is None or shape != wanted:
        raise CheckpointError(disagrees(name, shape, wanted))
    return shape


def parts(
    name: str,
    source: Source,
    model: PreTrainedModel,
    weights: str,
    values: Callable[[Any, Shards, slice], torch.Tensor],
    scales: Callable[[Any, Shards, slice], torch.Tensor],
) -> Mapping[str, Part]:
    """What LynxExperts takes of parameter `name`: values by its own name, what is beside them by a name like it.

    Args:
        name: of the parameter.
        source: what it is made of.
        model: whose parameter it is.
        weights: the form's, one of FORMATS.
        values: see `of` of RowsPart; int8.
        scales: the same, rounded here to the type that scales have in that form.

    Raises:
        CheckpointError: the stored tensors together have another shape than the parameter.
    """
    experts, rows, columns = shape_of(name, source, model)
    form = FORMATS[weights]
    dtype = torch.float32 if form.scale_type == "float32" else model.get_parameter(name).dtype

    def rounded(tensor: Any, shards: Shards, chosen: slice) -> torch.Tensor:
        return scales(tensor, shards, chosen).to(dtype)

    return {
        name: RowsPart((experts, rows, columns // form.per_byte), torch.int8, name, source, model, values),
        name + SCALE: RowsPart((experts, rows, form.scales(columns)), dtype, name, source, model, rounded),
    }


def obstacle_of_layer(layer: MoeLayer, called: str) -> str | None:
    """Why a layer can't have weights of the format that is called so, a clause; None if it can."""
    if not layer.form.transposed:
        return None
    return f"{layer.name} sums over the rows of its matrices, and LynxExperts over the columns of those in {called}"


def obstacle_of_shape(name: str, shape: tuple[int, int, int] | None, called: str, block: int) -> str | None:
    """Why a parameter whose stored rows have that shape together can't be kept, a clause; None if it can.

    Args:
        name: of the parameter.
        shape: experts, rows, columns; None: it is made of them in another way.
        called: the format.
        block: the fewest columns that share a scale in it.
    """
    if shape is None:
        return f"{name} is made of its stored tensors in another way than by putting rows below each other"
    if shape[2] % block:
        return f"{name} sums over {shape[2]} columns, and LynxExperts has weights in {called} of multiples of {block}"
    return None


def obstacle(name: str, source: Source, dtype: torch.dtype, called: str, block: int, largest: int) -> str | None:
    """Why parameter `name` can't be kept for an artifact of that dtype, a clause; None if it can.

    Of the checkpoint all scales are read.

    Args:
        name: of the parameter.
        source: what it is made of.
        dtype: of the artifact.
        called: the format.
        block: the fewest columns that share a scale in it.
        largest: what a scale is multiplied with at most.

    Raises:
        CheckpointError: a scale is no finite number.
    """
    shape, tensors = source.rows_of_experts(), tensors_of(source)
    why = obstacle_of_shape(name, shape, called, block)
    if why or shape is None:
        return why
    with Shards() as shards:  # of one parameter: what is read is small
        for tensor in tensors:
            columns = tensor.columns_a_scale(shards)
            if columns is None:
                return (
                    f"columns of {tensor.key} that share a scale lie apart (act-order), and LynxExperts has a scale "
                    f"for each {block} columns of {called} that follow each other"
                )
            if columns % block and columns < shape[2]:
                return (
                    f"a scale of {tensor.key} is for {columns} columns, and LynxExperts has a scale for each {block} "
                    f"columns of {called}"
                )
        return _too_large(tensors, shards, torch.finfo(dtype).max, largest)


def _too_large(tensors: list[ScaledTensor | GroupedTensor], shards: Shards, most: float, largest: int) -> str | None:
    """A clause if one of the scales allows weights beyond `most`: those are looked at one by one."""
    for tensor in tensors:
        for key, scales in tensor.scales(shards):
            scale = largest_of(tensor, scales, shards)
            if scale > most / largest:
                return (
                    f"{key} holds the scale {scale:.6g}, with which weights can be beyond {most:.6g}, the largest "
                    "number of the precision"
                )
    return None


def largest_of(tensor: ComputedTensor, scales: torch.Tensor, shards: Shards) -> float:
    """The largest of a tensor's scales, whatever their sign.

    Raises:
        CheckpointError: one is no finite number.
    """
    largest = scales.abs().max().item() if scales.numel() else 0.0
    if not math.isfinite(largest):  # of NaN too
        tensor.refuse_faults(shards)
    return largest
