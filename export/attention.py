"""Attention, masks and the KV cache as native ONNX ops, through transformers' own extension points.

transformers lets a model's attention function, its mask function and its cache class be replaced by name.
Ours emit opset 24's `Attention` and `TensorScatter`: a cache of fixed length per sequence, written in place
at each sequence's own position, so that sequences of unequal length share a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import causal_mask_function

NAME = "lynx"


@dataclass(frozen=True)
class Step:
    """Tensors of the step being traced that reach attention and cache by no argument of the model's own."""

    positions: torch.Tensor  # [B,S] i64, position of each token in its sequence
    past_lengths: torch.Tensor  # [B] i64, tokens already in the cache: where this step is written
    cache_ends: torch.Tensor  # [B] i64, past_lengths + S


_step: ContextVar[Step] = ContextVar("lynx_export_step")


@contextmanager
def tracing(step: Step) -> Iterator[None]:
    """Make `step` the one that attention and cache see."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Query [B,h,S,d], key and value [B,hk,L,d] (the whole cache), mask [B,1,S,L] bool or None (causal) -> [B,S,h,d].

    `s_aux` are gpt-oss' attention sinks, one logit a head. ONNX has no sinks: the cache's last row is never written,
    so its key and value are zero, and a mask column carries the sink in its place.
    """
    step = _step.get()
    mask = attention_mask
    if s_aux is not None:
        mask = _mask_with_sink(query, key, mask, s_aux, step)
    value_size = value.shape[-1]
    if value_size != query.shape[-1]:  # latent attention; TensorRT wants keys and values of one shape
        value = F.pad(value, [0, query.shape[-1] - value_size])
    attributes: dict[str, Any] = {"scale": float(query.shape[-1] ** -0.5 if scaling is None else scaling)}
    if softcap:
        attributes["softcap"] = float(softcap)
    inputs: tuple[torch.Tensor | None, ...] = (query, key, value, mask)
    if mask is None:
        inputs = (query, key, value, None, None, None, step.cache_ends)
        attributes["is_causal"] = 1
    output = torch.onnx.ops.symbolic(
        "Attention", inputs, attributes, dtype=query.dtype, shape=(*query.shape[:-1], value.shape[-1])
    )
    return output[..., :value_size].transpose(1, 2).contiguous(), None


def _mask_with_sink(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor, step: Step
) -> torch.Tensor:
    if mask is None:
        mask = torch.arange(key.shape[2])[None, None, None] <= step.positions[:, None, :, None]
    lowest = torch.finfo(query.dtype).min
    bias = torch.where(mask, 0.0, lowest).to(query.dtype)[..., :-1].expand(-1, query.shape[1], -1, -1)
    column = sinks.to(query.dtype).reshape(1, -1, 1, 1).expand(bias.shape[0], -1, bias.shape[2], 1)
    return torch.cat([bias, column], dim=-1)


def mask_of_rule(
    q_offset: torch.Tensor, kv_length: int, mask_function: Callable[..., torch.Tensor], **_: Any
) -> torch.Tensor | None:
    """The boolean mask [B,1,S,L] of a rule over (query position, key position); None where it is purely causal.

    `q_offset` are the positions [B,S]: what our cache gives for its sequence length.
    """
    if mask_function is causal_mask_function:
        return None
    zero = torch.zeros((), dtype=torch.int64)
    return mask_function(zero, zero, q_offset[:, None, :, None], torch.arange(kv_length)[None, None, None])


class CacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's cache of fixed length L: keys and values [B,hk,L,d], written functionally by TensorScatter."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Wrap the graph's cache inputs."""
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the cache is an input."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Write this step's rows at each sequence's own position; give the whole cache back."""
        self.keys, self.values = _scatter(self.keys, key_states), _scatter(self.values, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, _: Any) -> tuple[int, int]:
        """Keys span the whole cache, from position 0."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        """Positions [B,S] instead of one length: transformers hands it on to the mask function as its offset."""
        return _step.get().positions

    def get_max_length(self) -> int:
        """L."""
        return int(self.keys.shape[2])


def _scatter(cache: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    inputs = (cache, update.to(cache.dtype), _step.get().past_lengths)
    return torch.onnx.ops.symbolic(
        "TensorScatter", inputs, {"axis": 2, "mode": "linear"}, dtype=cache.dtype, shape=cache.shape
    )


def register() -> None:
    """Make `set_attn_implementation("lynx")` mean the functions above."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask_of_rule)
