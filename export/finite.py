"""Weights that are numbers, before the cast to the artifact's precision and after it."""

from __future__ import annotations

import math

import torch

from lynx_trt.errors import CheckpointError

# Precisions of --precision, and what to say of a finite value that they don't hold.
_TOO_LARGE = {
    torch.float16: "more than fp16 holds; build with --precision bf16 or fp32",
    torch.bfloat16: "more than bf16 holds; build with --precision fp32",
    torch.float32: "more than any precision holds: the checkpoint is broken; copy it again from where it came from",
}


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are numbers, in a tensor of any type and shape.

    By the extremes, which a NaN becomes: on two cores 0.05 s a GB of bf16, where `isfinite` takes 2 s and the cast to
    fp16 0.6 s.
    """
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    return all(math.isfinite(extreme) for extreme in tensor.aminmax())


def refuse_not_finite(name: str, tensor: torch.Tensor, dtype: torch.dtype, *, masks: bool) -> None:
    """Raise if `tensor` holds NaN or an infinity, or has one once it is of `dtype`.

    With `masks` minus infinity is a value like others: it keeps an expert or a token from ever being chosen.

    Raises:
        CheckpointError: with `name`, the first such value and its coordinates.
    """
    wrong = ~torch.isfinite(tensor.to(dtype))
    if masks:
        wrong &= tensor != -math.inf
    if not wrong.any():
        return
    at = tuple(int(place) for place in torch.unravel_index(wrong.flatten().int().argmax(), tensor.shape))
    value = tensor[at].item()
    where = f"{name} holds {value:.6g} at {list(at)}"
    if math.isfinite(value):
        raise CheckpointError(f"{where}, {_TOO_LARGE[dtype]}")
    raise CheckpointError(f"{where}, so the checkpoint is broken; copy it again from where it came from")
