"""`com.microsoft.GroupQueryAttention` to ONNX's own Attention, RotaryEmbedding and TensorScatter.

The cache keeps its style: past in, present out, rows written where the sequence's own length says, in the buffer that
was given or in one that grows by the step. For TensorRT, whose TensorScatter wants it so, the buffers get a fixed
number of rows (`cache_rows`), as they have where past and present share one. A window-sized cache
(`sliding_window_cache`) keeps the newest rows at its front, as the op's documentation has it. Attention sinks and
softcap have no standard form that TensorRT reads; they are written out as products and a softmax.

B sequences, S tokens in the step, h heads (g of them share one of `kv` for keys and values), d their size; of a
sequence, P tokens are cached before the step and T after it; M rows of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from lynx_trt.export.standard.builder import Builder, LeftError, Rule, input_at, number, required, static_size, whole

_UNKNOWN = {
    12: "a quantized cache",
    13: "a quantized cache",
    14: "q_norm_weight",
    15: "k_norm_weight",
    16: "query_seqlens",
}
# Below every position that a row can have.
_NOWHERE = 1 << 40


@dataclass(frozen=True)
class _Shape:
    heads: int
    shared: int  # kv
    size: int

    @property
    def group(self) -> int:
        return self.heads // self.shared


@dataclass(frozen=True)
class _Step:
    """The step's numbers: S [1], T, P and the valid tokens Q = min(S, T) [B]; positions of its tokens [B,S]."""

    length: ir.Value
    after: ir.Value
    before: ir.Value
    valid: ir.Value
    positions: ir.Value


@dataclass(frozen=True)
class _Keys:
    """Keys and values [B,kv,M,d], the position of each row [B,M] (or [1,M]), and what the graph gives back."""

    key: ir.Value
    value: ir.Value
    positions: ir.Value
    present_key: ir.Value | None
    present_value: ir.Value | None


def group_query_attention(cache_rows: int | None, node: ir.Node, op: Builder) -> Sequence[ir.Value | None]:
    """See the module."""
    for at, what in _UNKNOWN.items():
        if input_at(node, at) is not None:
            raise LeftError(f"{what} has no standard form")
    if whole(node, "qk_output", 0) or not whole(node, "causal", 1):
        raise LeftError("qk_output and causal = 0 are not known here")
    shape = _measure(node)
    query, key, value = _heads(node, op, shape)
    step = _step(node, op, required(node, 0))
    if whole(node, "do_rotary", 0):
        query, key = (_rotate(node, op, x, step) for x in (query, key))
    keys = _cache(node, op, key, value, step, cache_rows)
    out = _attend(node, op, query, keys, step, shape)
    merged = op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), op.ints(0, 0, shape.heads * shape.size))
    return [merged, keys.present_key, keys.present_value]


def _measure(node: ir.Node) -> _Shape:
    heads, shared = whole(node, "num_heads", 0), whole(node, "kv_num_heads", 0)
    if heads < 1 or shared < 1 or heads % shared:
        raise LeftError(f"num_heads = {heads} and kv_num_heads = {shared} don't fit each other")
    packed = input_at(node, 1) is None
    width = static_size(required(node, 0), 2)
    past = input_at(node, 3)
    size = None if past is None else static_size(past, 3)
    if size is None and width is not None:
        size = width // (heads + 2 * shared if packed else heads)
    if size is None:
        raise LeftError("the size of its heads is not recorded")
    for cache in (input_at(node, 3), input_at(node, 4), *node.outputs[1:3]):
        # Exporters leave it open, and TensorRT has to know it.
        if cache is not None and cache.shape is not None and len(cache.shape) == 4:
            cache.shape = ir.Shape([*cache.shape[:3], size])
    return _Shape(heads, shared, size)


def _heads(node: ir.Node, op: Builder, shape: _Shape) -> tuple[ir.Value, ir.Value, ir.Value]:
    """[B,h,S,d] queries, [B,kv,S,d] keys and values."""
    query, key, value = required(node, 0), input_at(node, 1), input_at(node, 2)
    if key is None or value is None:
        sizes = op.ints(*(count * shape.size for count in (shape.heads, shape.shared, shape.shared)))
        query, key, value = op.Split(query, sizes, axis=2, _outputs=3)

    def split(x: ir.Value, count: int) -> ir.Value:
        made: ir.Value = op.Transpose(op.Reshape(x, op.ints(0, 0, count, shape.size)), perm=[0, 2, 1, 3])
        return made

    return split(query, shape.heads), split(key, shape.shared), split(value, shape.shared)


def _step(node: ir.Node, op: Builder, query: ir.Value) -> _Step:
    length = op.Shape(query, start=1, end=2)
    last = op.Reshape(op.Cast(required(node, 5), to=int(ir.DataType.INT64)), op.ints(-1))
    after = op.Add(last, op.ints(1))
    valid = op.Min(after, length)
    before = op.Sub(after, valid)
    positions = op.Add(op.Unsqueeze(before, op.ints(1)), _count(op, length))
    return _Step(length, after, before, valid, positions)


def _count(op: Builder, length: ir.Value) -> ir.Value:
    """0, 1, ... [length] for a length [1]."""
    counted: ir.Value = op.Range(op.int(0), op.Squeeze(length, op.ints(0)), op.int(1))
    return counted


def _rotate(node: ir.Node, op: Builder, x: ir.Value, step: _Step) -> ir.Value:
    cos, sin, ids = required(node, 7), required(node, 8), input_at(node, 9)
    half = static_size(cos, 1)
    attributes = {"interleaved": whole(node, "rotary_interleaved", 0)}
    if half is not None:
        attributes["rotary_embedding_dim"] = 2 * half
    rotated: ir.Value = op.RotaryEmbedding(x, cos, sin, step.positions if ids is None else ids, **attributes)
    return rotated


def _cache(node: ir.Node, op: Builder, key: ir.Value, value: ir.Value, step: _Step, cache_rows: int | None) -> _Keys:
    pasts = [input_at(node, 3), input_at(node, 4)]
    if pasts[0] is None or pasts[1] is None:
        return _Keys(key, value, op.Unsqueeze(_count(op, step.length), op.ints(0)), key, value)
    fixed = cache_rows is not None and all(past is not None and past.is_graph_input() for past in pasts)
    if fixed and cache_rows is not None:
        window = whole(node, "local_window_size", -1) if whole(node, "sliding_window_cache", 0) else cache_rows
        _fix_rows(node, min(cache_rows, window))
    if whole(node, "sliding_window_cache", 0):
        return _window_cache(op, pasts[0], pasts[1], key, value, step)
    total = op.Reshape(op.Cast(required(node, 6), to=int(ir.DataType.INT64)), op.ints(1))
    presents = [
        op.TensorScatter(past if fixed else _grown(op, past, total), new, step.before, axis=2)
        for past, new in ((pasts[0], key), (pasts[1], value))
    ]
    rows = op.Unsqueeze(_count(op, op.Shape(presents[0], start=2, end=3)), op.ints(0))
    return _Keys(presents[0], presents[1], rows, presents[0], presents[1])


def _fix_rows(node: ir.Node, rows: int) -> None:
    """Past and present of a fixed number of rows."""
    for value in (input_at(node, 3), input_at(node, 4), *node.outputs[1:3]):
        if value is not None and value.shape is not None and len(value.shape) == 4:
            value.shape = ir.Shape([*value.shape[:2], rows, value.shape[3]])


def _grown(op: Builder, past: ir.Value, total: ir.Value) -> ir.Value:
    """The buffer with room for `total` rows; one that has it already (shared with present) stays as it is."""
    missing = op.Max(op.Sub(total, op.Shape(past, start=2, end=3)), op.ints(0))
    shape = op.Concat(op.Shape(past, start=0, end=2), missing, op.Shape(past, start=3, end=4), axis=0)
    room = op.CastLike(op.ConstantOfShape(shape), past)
    grown: ir.Value = op.Concat(past, room, axis=2)
    return grown


def _window_cache(
    op: Builder, past_key: ir.Value, past_value: ir.Value, key: ir.Value, value: ir.Value, step: _Step
) -> _Keys:
    """The newest min(T, C) rows at the front of buffers of C rows; older ones are dropped."""
    room = op.Shape(past_key, start=2, end=3)
    kept = op.Unsqueeze(op.Min(step.before, room), op.ints(1))  # [B,1], rows of the past that hold something
    before, valid = (op.Unsqueeze(x, op.ints(1)) for x in (step.before, step.valid))
    rows = op.Unsqueeze(_count(op, room), op.ints(0))
    old = op.Where(op.Less(rows, kept), op.Add(op.Sub(before, kept), rows), op.int(_NOWHERE))
    positions = op.Concat(old, op.Add(before, _count(op, step.length)), axis=1)
    joined = [op.Concat(past, new, axis=2) for past, new in ((past_key, key), (past_value, value))]
    filled = op.Add(kept, valid)
    source = op.Add(rows, op.Sub(filled, op.Min(filled, room)))
    index = op.Where(op.Less(source, kept), source, op.Add(room, op.Sub(source, kept)))
    last = op.Sub(op.Add(room, step.length), op.ints(1))
    index = op.Unsqueeze(op.Min(index, last), op.ints(1, 3))
    presents = [op.GatherElements(x, op.Expand(index, op.Shape(past_key)), axis=2) for x in joined]
    return _Keys(joined[0], joined[1], positions, presents[0], presents[1])


def _attend(node: ir.Node, op: Builder, query: ir.Value, keys: _Keys, step: _Step, shape: _Shape) -> ir.Value:
    """[B,h,S,d]."""
    window, softcap = whole(node, "local_window_size", -1), number(node, "softcap", 0.0)
    bias, sink = input_at(node, 10), input_at(node, 11)
    scale = number(node, "scale", 0.0) or shape.size**-0.5
    smooth = sink is not None or whole(node, "smooth_softmax", -1) == 1
    if bias is not None and whole(node, "sliding_window_cache", 0):
        raise LeftError("an attention_bias with a window-sized cache is not known here")
    if not (smooth or softcap or bias is not None or window > 0 or whole(node, "sliding_window_cache", 0)):
        filled = op.Add(step.before, step.length)
        inputs = [query, keys.key, keys.value, None, None, None, filled]
        plain: ir.Value = op.Attention(*inputs, is_causal=1, scale=scale)
        return plain
    allowed = _allowed(op, keys, step, window)
    if not (smooth or softcap or bias is not None):
        masked: ir.Value = op.Attention(query, keys.key, keys.value, allowed, scale=scale)
        return masked
    return _written_out(op, query, keys, allowed, shape, scale, softcap, bias, sink, smooth)


def _allowed(op: Builder, keys: _Keys, step: _Step, window: int) -> ir.Value:
    """[B,1,S,M] bool: which rows a token may look at."""
    own = op.Unsqueeze(step.positions, op.ints(1, 3))
    row = op.Unsqueeze(keys.positions, op.ints(1, 2))
    allowed: ir.Value = op.LessOrEqual(row, own)
    if window > 0:
        allowed = op.And(allowed, op.Greater(row, op.Sub(own, op.int(window))))
    return allowed


def _written_out(
    op: Builder,
    query: ir.Value,
    keys: _Keys,
    allowed: ir.Value,
    shape: _Shape,
    scale: float,
    softcap: float,
    bias: ir.Value | None,
    sink: ir.Value | None,
    smooth: bool,
) -> ir.Value:
    """Products and a softmax in float32, with a column for the sink."""
    one = ir.DataType.FLOAT
    batch, length = op.Shape(query, start=0, end=1), op.Shape(query, start=2, end=3)
    rows = op.Shape(keys.key, start=2, end=3)
    grouped = op.Reshape(query, op.ints(0, shape.shared, -1, shape.size))
    scores = op.Cast(op.MatMul(grouped, op.Transpose(keys.key, perm=[0, 1, 3, 2])), to=int(one))
    scores = op.Mul(scores, op.number(scale, one))
    each_head = op.Concat(batch, op.ints(shape.heads), length, rows, axis=0)
    scores = op.Reshape(scores, each_head)
    if softcap:
        scores = op.Mul(op.Tanh(op.Div(scores, op.number(softcap, one))), op.number(softcap, one))
    if bias is not None:
        room = op.Sub(rows, op.Shape(bias, start=3, end=4))
        beyond = op.Concat(op.ints(0, 0, 0, 0, 0, 0, 0), op.Max(room, op.ints(0)), axis=0)
        scores = op.Add(scores, op.Cast(op.Pad(bias, beyond), to=int(one)))
    scores = op.Where(allowed, scores, op.number(float(np.finfo(np.float32).min), one))
    if smooth:
        column = op.ints(1, shape.heads, 1, 1)
        logit = op.number(0.0, one) if sink is None else op.Reshape(op.Cast(sink, to=int(one)), column)
        wide = op.Expand(logit, op.Concat(batch, op.ints(shape.heads), length, op.ints(1), axis=0))
        shares = op.Slice(op.Softmax(op.Concat(scores, wide, axis=3), axis=-1), op.ints(0), op.ints(-1), op.ints(3))
    else:
        shares = op.Softmax(scores, axis=-1)
    shares = op.CastLike(op.Reshape(shares, op.Concat(batch, op.ints(shape.shared, -1), rows, axis=0)), keys.value)
    mixed: ir.Value = op.MatMul(shares, keys.value)
    return op.Reshape(mixed, op.ints(0, shape.heads, -1, shape.size))  # type: ignore[no-any-return]


def rules(cache_rows: int | None) -> list[Rule]:
    """The rule, for caches that grow (None) or have a fixed number of rows."""
    return [Rule("com.microsoft", "GroupQueryAttention", partial(group_query_attention, cache_rows))]
