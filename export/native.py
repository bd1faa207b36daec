"""Norms and rotary embeddings as native ONNX ops, wherever a probe shows that they are what they seem.

A class name proves nothing: a "RMSNorm" may add one to its weight or divide by something else. So every
module is asked: on random numbers, does the native op give what the module gives? Only then is it replaced;
otherwise the module stays as the primitive ops that it is written in, slower but right.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]
ROTARY_FUNCTIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")


def use_native_norms(model: nn.Module) -> int:
    """Replace the forward of every plain RMSNorm by `rms_norm` (exported as RMSNormalization); how many it were."""
    replaced = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, torch.Tensor) or weight.dim() != 1:
            continue
        epsilon = next((getattr(module, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), None)
        if isinstance(epsilon, float) and epsilon > 0 and _is_plain_rms_norm(module, epsilon):
            module.forward = _native_norm(module, epsilon)
            replaced += 1
    return replaced


def _native_norm(module: nn.Module, epsilon: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        return F.rms_norm(hidden, tuple(weight.shape), weight.to(hidden.dtype), epsilon)

    return forward


def _is_plain_rms_norm(module: nn.Module, epsilon: float) -> bool:
    assert isinstance(module.weight, torch.Tensor)
    weight = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0))
    probe = copy.copy(module)
    probe._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    # Small rows too: only there a wrong epsilon shows.
    hidden = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[1.0], [1e-3], [30.0]]
    )
    with torch.no_grad(), suppress(Exception):
        return torch.allclose(probe(hidden), F.rms_norm(hidden, weight.shape, weight, epsilon), atol=1e-5)
    return False


@contextmanager
def native_rotary(model: nn.Module) -> Iterator[int]:
    """Replace the models' rotary functions by RotaryEmbedding for a while; yields how many were replaced."""
    embeddings = {type(m).__module__: m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")}
    undo: list[tuple[Any, str, Any]] = []
    try:
        for module_name, embedding in embeddings.items():
            module = sys.modules[module_name]
            for name in ROTARY_FUNCTIONS:
                original = vars(module).get(name)
                native = _equal_rotation(original, embedding) if original is not None else None
                if native is not None:
                    undo.append((module, name, original))
                    setattr(module, name, native)
        yield len(undo)
    finally:
        for target, name, original in undo:
            setattr(target, name, original)


def _candidates() -> Iterator[Rotate]:
    """RotaryEmbedding in its two layouts, fed with what models make of cos and sin: whole, halved, or every other."""
    takes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda c: c,
        lambda c: c[..., : c.shape[-1] // 2],
        lambda c: c[..., ::2],
    ]
    for interleaved in (False, True):
        for take in takes:
            yield _rotation(interleaved, take)


def _rotation(interleaved: bool, take: Callable[[torch.Tensor], torch.Tensor]) -> Rotate:
    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any, **__: Any) -> Any:
        cos, sin = take(cos), take(sin)
        size = 2 * cos.shape[-1]
        return tuple(
            torch.onnx.ops.rotary_embedding(
                t,
                cos.to(t.dtype),
                sin.to(t.dtype),
                interleaved=interleaved,
                rotary_embedding_dim=size if size < t.shape[-1] else 0,
            )
            for t in (q, k)
        )

    return rotate


def _equal_rotation(original: Rotate, embedding: nn.Module) -> Rotate | None:
    """The candidates whose attention logits and norms are those of the model's own rotation; that where none is.

    Logits and not values: a model that permutes a head's entries on the way is served as well. What is asked is one
    size of heads after the other, in multiples of what is rotated: what holds for one says nothing of another.
    """
    with torch.no_grad(), suppress(Exception):
        cos, sin = embedding(torch.zeros(1, 3, 8), position_ids=torch.tensor([[3, 11, 40]]))
        found = {multiple: _rotation_of(original, cos, sin, multiple) for multiple in (1, 2, 4)}
        if any(found.values()):
            return _by_size(found, original)
    return None


def _rotation_of(original: Rotate, cos: torch.Tensor, sin: torch.Tensor, multiple: int) -> Rotate | None:
    """The candidate for heads of so many times the size of `cos`."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, 3, cos.shape[-1] * multiple)
    q, k = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    for candidate in _candidates():
        with suppress(Exception):
            if _same_rotation(original(q, k, cos, sin), candidate(q, k, cos, sin)):
                return candidate
    return None


def _by_size(found: dict[int, Rotate | None], original: Rotate) -> Rotate:
    signature = inspect.signature(original)

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, *others: Any, **named: Any) -> Any:
        multiple, rest = divmod(q.shape[-1], cos.shape[-1])
        native = None if rest or k.shape[-1] != q.shape[-1] else found.get(multiple)
        # The native op has heads before tokens, as the default is.
        if signature.bind(q, k, cos, *others, **named).arguments.get("unsqueeze_dim", 1) != 1:
            native = None
        return (native or original)(q, k, cos, *others, **named)

    return rotate


def _same_rotation(one: Any, other: Any) -> bool:
    (a, b), (c, d) = one, other
    return (
        a.shape == c.shape
        and torch.allclose(a @ b.mT, c @ d.mT, atol=1e-4)
        and torch.allclose(a.norm(dim=-1), c.norm(dim=-1), atol=1e-4)
    )
