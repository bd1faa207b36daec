"""Attention, masks and the KV cache as native ONNX ops, through transformers' own extension points.

transformers lets a model's attention function, its mask function and its cache class be replaced by name.
Ours emit opset 24's `Attention` and `TensorScatter`: a cache of fixed length per sequence, written in place
at each sequence's own position, so that sequences of unequal length share a batch.

A layer with a sliding window has a ring: position p lies in row p modulo the ring's size, which is the window, the
tokens of one step, and what makes it a multiple of the latter. TensorRT writes rows in one piece alone, so a step may
not cross such a multiple; padding behind it that does lands in rows behind the ring, which nobody reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import causal_mask_function

from lynx_trt.errors import UnsupportedModelError

NAME = "lynx"


@dataclass(frozen=True)
class Step:
    """Tensors of the step being traced that reach attention and cache by no argument of the model's own."""

    positions: torch.Tensor  # [B,S] i64, position of each token in its sequence
    past_lengths: torch.Tensor  # [B] i64, tokens already in the cache: where this step is written
    cache_ends: torch.Tensor  # [B] i64, past_lengths + S
    lengths: torch.Tensor  # [B] i64, tokens of each row that are real
    rings: dict[int, int] = field(default_factory=dict)  # rows of a cache -> size of the ring in it
    choosing: set[int] = field(default_factory=set)  # layers that told `attention` which rows an indexer has chosen


_step: ContextVar[Step] = ContextVar("lynx_export_step")


@contextmanager
def tracing(step: Step) -> Iterator[None]:
    """Make `step` the one that attention and cache see."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def current_step() -> Step | None:
    """The step being traced, if there is one."""
    return _step.get(None)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Query [B,h,S,d], key and value [B,hk,L,d] (the whole cache), mask [B,1,S,L] bool or None (causal) -> [B,S,h,d].

    `s_aux` are gpt-oss' attention sinks, one logit a head. ONNX has no sinks: the cache's last row is never written,
    so its key and value are zero, and a mask column carries the sink in its place. `indices` [B,S,k] are the rows that
    an indexer has chosen for each token: the others are masked, so their keys are read all the same.
    """
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    if indices is not None:
        _step.get().choosing.add(module.layer_idx)  # type: ignore[arg-type]
        if indices.shape[-1] < key.shape[2]:
            allowed = _causal_mask(key) if attention_mask is None else attention_mask
            attention_mask = allowed & _chosen(indices, key.shape[2])
    if getattr(module, "expand_kv", None) is not _latents:
        return _attend(query, key, value, attention_mask, scale, softcap, s_aux).transpose(1, 2).contiguous(), None
    if attention_mask is None:  # is_causal would mean something else where heads are put in the place of tokens
        attention_mask = _causal_mask(key)
    up_key, up_value = _expansions(module)
    query_plain, query_turned = torch.split(query, [up_key.shape[1], query.shape[-1] - up_key.shape[1]], dim=-1)
    query = torch.cat([_per_head(query_plain, up_key), query_turned], dim=-1)
    output = _attend(query, key, value, attention_mask, scale, softcap, s_aux)
    output = _per_head(output[..., : up_value.shape[1]], up_value)
    return output.transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """[B,h,S,d] of a value's size."""
    step = _step.get()
    if s_aux is not None:
        mask = _mask_with_sink(query, key, mask, s_aux)
    value_size = value.shape[-1]
    if value_size != query.shape[-1]:  # TensorRT wants keys and values of one shape
        value = F.pad(value, [0, query.shape[-1] - value_size])
    attributes: dict[str, Any] = {"scale": scale}
    if softcap:
        attributes["softcap"] = float(softcap)
    inputs: tuple[torch.Tensor | None, ...] = (query, key, value, mask)
    if mask is None:
        inputs = (query, key, value, None, None, None, step.cache_ends)
        attributes["is_causal"] = 1
    output = torch.onnx.ops.symbolic(
        "Attention", inputs, attributes, dtype=query.dtype, shape=(*query.shape[:-1], value.shape[-1])
    )
    return output[..., :value_size]


def _chosen(indices: torch.Tensor, rows: int) -> torch.Tensor:
    """Where of `rows` rows the indices [B,S,k] are: [B,1,S,rows] bool."""
    marks = torch.zeros(*indices.shape[:2], rows)  # numbers: TensorRT scatters no truth values
    return (marks.scatter(2, indices.to(torch.int64), 1.0) > 0.5)[:, None]


def keep_latents(model: torch.nn.Module) -> set[int]:
    """Let the latent attention of DeepSeek-V2, V3 and their kin attend to what their caches hold; gives its layers.

    transformers expands the latents of the whole cache into keys and values of all heads, for every sequence in every
    step: for DeepSeek-V2-Lite at 2048 rows 8.6 GFLOP a layer and sequence, be it for one token. The expansion is
    linear, so it can be moved to the query and to the output (DeepSeek-V2, arXiv 2405.04434, section 2.1.2): all heads
    then share one key a row, the latent and the part with positions, and the latent is its value too. A prompt's scores
    are then over r + p values instead of n + p, up to three times the arithmetic: what a decode step saves is more.

    Such a layer has one cache of whole rows, latent and rotated part side by side, which is the key as it is. It is the
    value as well, of whose output the latents' columns are kept: a few products more, where a value of its own would be
    a copy of the cache in each step, and TensorRT refuses one that is narrower than the key.
    """
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    known = inspect.getsource(DeepseekV3Attention.expand_kv)
    layers: set[int] = set()
    module: Any
    for module in model.modules():
        expand = getattr(type(module), "expand_kv", None)
        if expand is not None and module.kv_b_proj.bias is None and inspect.getsource(expand) == known:
            module.expand_kv = _latents
            layers.add(module.layer_idx)
    return layers


def _latents(latent: torch.Tensor, turned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In the place of `expand_kv`: both are the layer's one cache [B,1,L,r+p] already."""
    return latent, turned


def _expansions(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What multiplies the plain part of a query [h,n,r], and what the output in latents [h,r,v]."""
    sizes = [module.qk_nope_head_dim, module.v_head_dim]
    both = module.kv_b_proj.weight.reshape(-1, sum(sizes), module.kv_lora_rank)
    up_key, up_value = torch.split(both, sizes, dim=1)
    return up_key, up_value.transpose(1, 2)


def _per_head(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[B,h,S,a] by [h,a,b] -> [B,h,S,b]: a product a head over all sequences, which reads its weights once."""
    batch, heads, length, size = values.shape
    product = values.transpose(0, 1).reshape(heads, batch * length, size) @ weights
    return product.reshape(heads, batch, length, weights.shape[-1]).transpose(0, 1)


def _mask_with_sink(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor
) -> torch.Tensor:
    if mask is None:
        mask = _causal_mask(key)
    lowest = torch.finfo(query.dtype).min
    bias = torch.where(mask, 0.0, lowest).to(query.dtype)[..., :-1].expand(-1, query.shape[1], -1, -1)
    column = sinks.to(query.dtype).reshape(1, -1, 1, 1).expand(bias.shape[0], -1, bias.shape[2], 1)
    return torch.cat([bias, column], dim=-1)


def _ring_positions(rows: int, ring: int) -> torch.Tensor:
    """The position whose key each row of a ring's cache has after this step, [B,rows]; negative where there is none."""
    last = _step.get().cache_ends[:, None] - 1
    row = torch.arange(rows)[None]
    # Both below the sum of past and ring, so that what is divided is positive.
    return torch.where(row < ring, last - torch.remainder(last - row + ring, ring), -1)


def _causal_mask(key: torch.Tensor) -> torch.Tensor:
    """[B,1,S,L] bool."""
    if key.shape[2] in _step.get().rings:
        raise UnsupportedModelError("a layer with a sliding window attends without a mask")
    return torch.arange(key.shape[2])[None, None, None] <= _step.get().positions[:, None, :, None]


def mask_of_rule(
    q_offset: torch.Tensor,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> torch.Tensor | None:
    """The boolean mask [B,1,S,L] of a rule over (query position, key position).

    None where it is purely causal, unless the model reads it itself. `q_offset` are the positions [B,S]: what our cache
    gives for its sequence length.
    """
    ring = _step.get().rings.get(kv_length)
    if mask_function is causal_mask_function and allow_is_causal_skip and not ring:
        return None
    zero = torch.zeros((), dtype=torch.int64)
    positions = (_ring_positions(kv_length, ring) if ring else torch.arange(kv_length)[None])[:, None, None]
    mask = mask_function(zero, zero, q_offset[:, None, :, None], positions)
    return mask & (positions >= 0) if ring else mask


class CacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer's caches of fixed length L, written functionally by TensorScatter: keys and values [B,hk,L,d].

    Or one of keys and values side by side, where a layer attends to its latents; and one more, `index` [B,1,L,d], where
    an indexer chooses what a layer attends to by keys of its own.
    """

    is_compileable = True

    def __init__(self, *caches: torch.Tensor, index: torch.Tensor | None = None, ring: int = 0) -> None:
        """Wrap the graph's cache inputs; `ring` is the size of the rings in them, 0 where they are none."""
        super().__init__()
        self._ring, self.is_sliding = ring, ring > 0
        self._caches = caches
        self._index = index
        self.is_indexed = False
        self.is_initialized = True

    def caches(self) -> list[torch.Tensor]:
        """What it keeps."""
        return [*self._caches, *([] if self._index is None else [self._index])]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the cache is an input."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Write this step's rows at each sequence's own position; give the whole caches back."""
        rows = [key_states, value_states]
        if len(self._caches) == 1:
            rows = [torch.cat(rows, dim=-1)]
        self._caches = tuple(_scatter(*each, self._ring) for each in zip(self._caches, rows, strict=True))
        return self._caches[0], self._caches[-1]

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Write this step's keys [B,S,d] of the indexer; give them all back, [B,L,d].

        Without a cache for them it chooses every row that there is, whatever its keys: nothing reads them.
        """
        self.is_indexed = True
        if self._index is None:
            batch, _, size = indexer_key_states.shape
            return indexer_key_states.new_zeros(batch, self.get_max_length(), size)
        self._index = _scatter(self._index, indexer_key_states[:, None])
        return self._index[:, 0]

    def get_mask_sizes(self, _: Any) -> tuple[int, int]:
        """Keys span the whole cache, from position 0."""
        return self._caches[0].shape[2], 0

    def get_seq_length(self) -> Any:
        """Positions [B,S] instead of one length: transformers hands it on to the mask function as its offset."""
        return _step.get().positions

    def get_max_length(self) -> int:
        """L."""
        return int(self._caches[0].shape[2])


def _scatter(cache: torch.Tensor, update: torch.Tensor, ring: int = 0) -> torch.Tensor:
    past = _step.get().past_lengths
    inputs = (cache, update.to(cache.dtype), torch.remainder(past, ring) if ring else past)
    return torch.onnx.ops.symbolic(
        "TensorScatter", inputs, {"axis": 2, "mode": "linear"}, dtype=cache.dtype, shape=cache.shape
    )


def register() -> None:
    """Make `set_attn_implementation("lynx")` mean the functions above."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask_of_rule)
