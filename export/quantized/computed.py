"""A weight that is computed of several stored tensors, in pieces of bounded size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from lynx_trt.errors import CheckpointError
from lynx_trt.export.stored import Shards, StoredTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

# Values computed at once, in float32: 32 MB, and a few times that for what is made on the way.
PIECE = 2**23
Index = tuple[int | slice, ...]
# The way out where a method is known, but not the form in which it stores weights.
ANOTHER = "take the model in a form that docs/quantized.md lists, or not quantized at all"


@dataclass(frozen=True)
class ComputedTensor(StoredTensor, ABC):
    """One weight of a quantized checkpoint.

    `file`, `nbytes` are those of its parts (of the values' file, of all), `shape` and `dtype` those of the weight: it
    is a float32 tensor that exists only while it is read.
    """

    parts: Mapping[str, StoredTensor]

    def turn(self) -> StoredTensor | None:
        """See StoredTensor: values that are packed along rows can't be read along columns."""
        return None

    def read(self, shards: Shards, dtype: torch.dtype) -> torch.Tensor:
        """The weight in `dtype`, a float type, rounded once from float32.

        Raises:
            CheckpointError: a part can't be what the method says.
        """
        result = torch.empty(self.shape, dtype=dtype)
        for index, values in self.pieces(shards):
            result[index] = values
        return result

    @abstractmethod
    def pieces(self, shards: Shards) -> Iterator[tuple[Index, torch.Tensor]]:
        """All of the weight: where in it, and the values there in float32."""

    @abstractmethod
    def scales(self, shards: Shards) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and values of each part that holds scales, in float32 and of the shape that is stored."""

    def refuse_faults(self, shards: Shards) -> None:
        """See StoredTensor: a scale that is no finite number."""
        for key, scales in self.scales(shards):
            wrong = ~torch.isfinite(scales)
            if wrong.any():
                at = [int(place) for place in torch.unravel_index(wrong.flatten().int().argmax(), scales.shape)]
                raise CheckpointError(
                    f"{key} holds {scales[tuple(at)].item():.6g} at {at}, which can't be a scale, so the checkpoint is "
                    "broken; copy it again from where it came from"
                )


def pieces_of(shape: tuple[int, ...], multiple: int = 1) -> Iterator[Index]:
    """Indices that cut a tensor [...,R,C] into pieces of PIECE values or less: rows of one matrix, whole multiples."""
    *leading, rows, columns = shape
    step = max(PIECE // max(columns, 1) // multiple, 1) * multiple
    for matrix in product(*(range(size) for size in leading)):
        for begin in range(0, rows, step):
            yield (*matrix, slice(begin, min(begin + step, rows)))


def beside(tensors: Mapping[str, StoredTensor], key: str, dtypes: tuple[str, ...]) -> StoredTensor:
    """The part `key`, which a weight can't do without.

    Raises:
        CheckpointError: it isn't there, or is stored in another type.
    """
    if key not in tensors:
        raise CheckpointError(
            f"the checkpoint lacks {key}, without which the weight that it belongs to can't be read; copy the "
            "checkpoint again"
        )
    stored = tensors[key]
    if stored.dtype not in dtypes:
        raise CheckpointError(
            f"{key} is stored as {stored.dtype}, which has to be {' or '.join(dtypes)}; copy the checkpoint again, or "
            "quantize it in a form that docs/quantized.md lists"
        )
    return stored


def refuse_misfits(parts: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise if a part has another shape.

    Raises:
        CheckpointError: with the part and both shapes.
    """
    for kind, part in parts.items():
        if part.shape != wanted.get(kind, part.shape):
            raise CheckpointError(
                f"{part.key} is stored as {list(part.shape)}, which has to be {list(wanted[kind])} for "
                f"{parts['values'].key} {list(parts['values'].shape)}; copy the checkpoint again"
            )


def fields_of(key: str, shape: tuple[int, ...], parts: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Fields of the weight `key` that is computed of `parts`, the values' first."""
    return {
        "file": next(iter(parts.values())).file,
        "key": key,
        "dtype": "F32",
        "shape": shape,
        "nbytes": sum(part.nbytes for part in parts.values()),
        "parts": parts,
    }


def e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """Powers of two of uint8 exponents, biased by 127; 255 is NaN (OCP Microscaling Formats 1.0, section 5.4.1)."""
    powers = torch.exp2(exponents.view(torch.uint8).to(torch.float32) - 127)
    return powers.masked_fill_(exponents.view(torch.uint8) == 255, torch.nan)
