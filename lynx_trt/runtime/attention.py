"""Attention over the cache for ONNX Runtime on the CPU: one node where there were ten.

`com.microsoft.GroupQueryAttention` writes the new rows into the cache and lets each sequence attend to its own rows.
ONNX Runtime's Attention computes every row of the cache for every sequence and masks what is too much, between two
TensorScatter and four Transpose.

GroupQueryAttention has two ways to compute float32 (onnxruntime 1.32): one that streams over the cache, made for
long ones, four lanes at a time, and one that keeps all scores and calls the matrix product's kernels. Where heads are
small the second is faster, and a sink of weight 0 asks for it (`_sink`). Microseconds for 6 layers of lynx-tiny on one
thread, streaming and scores: batch 16 at 20, 60, 100 and 140 rows 111, 270, 422, 580 and 155, 230, 310, 415; batch 1
at 100 rows 39 and 31; a prompt of 128 tokens 780 and 580. With heads of 128 they are equal.

Latent attention, where all heads read the same rows, has a form of its own (`_fold`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from lynx_trt.runtime.graph import GraphEdit

MICROSOFT = "com.microsoft"
PAST, REAL = "past_lengths", "lengths"  # inputs of every artifact's graph
SWAPPED = [0, 2, 1, 3]
# Heads and caches for which scores are kept: all of them are in memory at once, heads x tokens x rows of cache.
SMALL_HEAD, SHORT_CACHE = 64, 4096


def lower_attention(edit: GraphEdit, graph: onnx.GraphProto) -> None:
    """Replace every Attention over a cache; what has no such form sees at least no more rows than the longest has."""
    for node in graph.node:
        if node.op_type != "Attention":
            continue
        if _is_latent(edit, node):
            _fold(edit, node)
            continue
        if len(node.input) < 7 or node.input[3] or not node.input[6]:
            continue  # with a mask of its own (sinks, windows) it stays as it is
        found = _Cached.of(edit, node)
        if found is None:
            _trim(edit, node)
        else:
            found.replace(edit)


@dataclass(frozen=True)
class _Cached:
    """An Attention node and the two TensorScatter that fill the cache that it reads."""

    node: onnx.NodeProto
    key: onnx.NodeProto
    value: onnx.NodeProto
    heads: int
    key_heads: int
    size: int
    rows: int  # of the cache; 0 where it varies

    @classmethod
    def of(cls, edit: GraphEdit, node: onnx.NodeProto) -> _Cached | None:
        """The pattern at a node; None where it is another, as where keys and values differ in size."""
        attributes = _attributes(node)
        key, value = (edit.producer(name) for name in node.input[1:3])
        if key is None or value is None or any(scatter.op_type != "TensorScatter" for scatter in (key, value)):
            return None
        shapes = [edit.known_shape(name) for name in (node.input[0], key.input[0], value.input[0])]
        if any(len(shape) != 4 for shape in shapes) or shapes[1] != shapes[2]:
            return None
        (_, heads, _, size), (_, key_heads, _, key_size), _ = shapes
        plain = set(attributes) <= {"is_causal", "scale", "softcap"} and attributes.get("is_causal") == 1
        fits = plain and heads and key_heads and heads % key_heads == 0 and size == key_size
        # GroupQueryAttention on the CPU wants whole vectors of 8.
        cache = edit.known_shape(key.input[0])
        rows = cache[2] if len(cache) == 4 else 0
        return cls(node, key, value, heads, key_heads, size, rows) if fits and size % 8 == 0 else None

    def replace(self, edit: GraphEdit) -> None:
        """Put GroupQueryAttention in the place of the three nodes."""
        edit.take(self.key)
        edit.take(self.value)
        place = edit.take(self.node)
        with edit.inserting(place, "attention"):
            query = self._flat(edit, self.node.input[0], self.heads)
            key = self._flat(edit, self.key.input[1], self.key_heads)
            value = self._flat(edit, self.value.input[1], self.key_heads)
            last, longest, real = _lengths(edit, self.node.input[6])
            kept = {name: value for name, value in _attributes(self.node).items() if name != "is_causal"}
            caches = [self.key.input[0], self.value.input[0]]
            result, whole = self._result(edit)
            edit.add_many(
                "GroupQueryAttention",
                [query, key, value, *caches, last, longest, *[""] * 4, self._sink(edit), *[""] * 4, real],
                3,
                outputs=[result, self.key.output[0], self.value.output[0]],
                domain=MICROSOFT,
                num_heads=self.heads,
                kv_num_heads=self.key_heads,
                **kept,
            )
            if not whole:
                apart = edit.add("Reshape", [result, edit.integers([0, 0, self.heads, self.size])])
                edit.add("Transpose", [apart], perm=SWAPPED, outputs=[self.node.output[0]])

    def _sink(self, edit: GraphEdit) -> str:
        """A sink [heads] that adds exp(-inf) = 0 to each softmax's sum: only the way it is computed is another."""
        if self.size > SMALL_HEAD or not 0 < self.rows <= SHORT_CACHE:
            return ""
        return edit.constant(np.full(self.heads, -np.inf, np.float32))

    def _flat(self, edit: GraphEdit, name: str, heads: int) -> str:
        """[B,S,heads*size] of what is [B,heads,S,size]: from before the Transpose, if there is one."""
        node = edit.producer(name)
        if node is not None and node.op_type == "RotaryEmbedding":
            flat = self._flat(edit, node.input[0], heads)
            attributes = {**_attributes(node), "num_heads": heads}
            return edit.add("RotaryEmbedding", [flat, *node.input[1:]], **attributes)
        if node is not None and node.op_type == "Transpose" and _attributes(node).get("perm") == SWAPPED:
            before, apart = edit.producer(node.input[0]), node.input[0]
            if before is not None and before.op_type == "Reshape" and self._is_flat(edit, before.input[0], heads):
                return str(before.input[0])
        else:
            apart = edit.add("Transpose", [name], perm=SWAPPED)
        return edit.add("Reshape", [apart, edit.integers([0, 0, heads * self.size])])

    def _is_flat(self, edit: GraphEdit, name: str, heads: int) -> bool:
        shape = edit.known_shape(name)
        return len(shape) == 3 and shape[2] == heads * self.size

    def _result(self, edit: GraphEdit) -> tuple[str, bool]:
        """The name of [B,S,heads*size], and whether the graph has it already, behind a Transpose and a Reshape."""
        transpose = edit.only_consumer(self.node.output[0], "Transpose")
        if transpose is not None and _attributes(transpose).get("perm") == SWAPPED:
            reshape = edit.only_consumer(transpose.output[0], "Reshape")
            if reshape is not None and self._is_flat(edit, reshape.output[0], self.heads):
                edit.take(transpose)
                edit.take(reshape)
                return reshape.output[0], True
        return edit.name("attention"), False


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _lengths(edit: GraphEdit, ends: str) -> tuple[str, str, str]:
    """i32: each sequence's last row with this step's tokens [B], rows at most of any, real tokens of each [B].

    `ends` is where each row's tokens end, padding included. A sequence without a token has no last row, and the op
    wants one; since nothing of it is real, none is read.
    """

    def last() -> str:
        real_end = edit.add("Add", [PAST, REAL])
        row = edit.add("Sub", [edit.add("Max", [real_end, edit.integers(1)]), edit.integers(1)])
        return edit.add("Cast", [row], to=TensorProto.INT32)

    def longest() -> str:
        return edit.add("Cast", [edit.add("ReduceMax", [ends], keepdims=0)], to=TensorProto.INT32)

    def real() -> str:
        return edit.add("Cast", [REAL], to=TensorProto.INT32)

    return edit.once("last row", last), edit.once(f"longest/{ends}", longest), edit.once("real tokens", real)


def _trim(edit: GraphEdit, node: onnx.NodeProto) -> None:
    """Let an Attention see the cache up to the longest sequence, not to its end."""
    with edit.inserting(edit.take(node), "attention"):
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for place in (1, 2):
            copy.input[place] = _first_rows(edit, node.input[place], node.input[6], 2)
        edit.put(copy)


def _is_latent(edit: GraphEdit, node: onnx.NodeProto) -> bool:
    """Keys and values are one cache [B,1,L,d], queries are [B,h,S,d], and there is a mask for all heads."""
    if len(node.input) != 4 or node.input[1] != node.input[2]:
        return False
    scatter = edit.producer(node.input[1])
    if scatter is None or scatter.op_type != "TensorScatter":
        return False
    query, cache, mask = (edit.known_shape(name) for name in (node.input[0], scatter.input[0], node.input[3]))
    return len(query) == len(cache) == len(mask) == 4 and query[1] > 1 == cache[1] == mask[1] and query[3] > 0


def _fold(edit: GraphEdit, node: onnx.NodeProto) -> None:
    """Latent attention: over the rows up to the longest sequence, in decode as one head of as many tokens.

    All heads read the same rows, so in a step of one token a sequence their queries are the rows of one matrix, and the
    cache is read once for all of them. Of a prompt each head has a matrix of its own, whose scores stay in the
    processor's cache. GroupQueryAttention has neither, and takes no second chunk of several prompts.
    """
    query, key, _, mask = node.input[:4]
    _, heads, _, size = edit.known_shape(query)
    with edit.inserting(edit.take(node), "attention"):
        ends = edit.once("ends", lambda: edit.add("Add", [PAST, _length(edit, query)]))
        tokens = edit.once(f"tokens/{heads}", lambda: _tokens(edit, query, heads))
        shape = edit.once(f"folded/{heads}/{size}", lambda: _joined(edit, [0, -1], tokens, [size]))
        rows = _first_rows(edit, key, ends, 2)
        allowed = edit.once(f"allowed/{mask}/{heads}", lambda: _allowed(edit, _first_rows(edit, mask, ends, 3), tokens))
        inputs = [edit.add("Reshape", [query, shape]), rows, rows, allowed]
        folded = edit.add("Attention", inputs, **_attributes(node))
        edit.add("Reshape", [folded, edit.integers([0, heads, -1, size])], outputs=[node.output[0]])


def _length(edit: GraphEdit, query: str) -> str:
    """The step's tokens a sequence [1]."""
    return edit.once("length", lambda: edit.add("Shape", [query], start=2, end=3))


def _tokens(edit: GraphEdit, query: str, heads: int) -> str:
    """Tokens a sequence [1] of the folded query: the step's, or in decode one for each head."""
    length = _length(edit, query)
    is_decode = edit.add("Equal", [length, edit.integers([1])])
    return edit.add("Where", [is_decode, edit.integers([heads]), length])


def _allowed(edit: GraphEdit, mask: str, tokens: str) -> str:
    """The mask [B,1,S,rows] for the folded query."""
    return edit.add("Expand", [mask, _joined(edit, [1, 1], tokens, [1])])


def _joined(edit: GraphEdit, before: list[int], size: str, behind: list[int]) -> str:
    """A shape of which one dimension is computed."""
    return edit.add("Concat", [edit.integers(before), size, edit.integers(behind)], axis=0)


def _first_rows(edit: GraphEdit, name: str, ends: str, axis: int) -> str:
    """A key, value or mask of the cache's rows, cut behind the longest sequence's last."""

    def cut() -> str:
        rows = edit.once(f"rows/{ends}", lambda: _rows(edit, ends))
        return edit.add("Slice", [name, edit.integers([0]), rows, edit.integers([axis])])

    return edit.once(f"rows/{ends}/{name}", cut)


def _rows(edit: GraphEdit, ends: str) -> str:
    # One row at least: an attention over no keys at all is 0 / 0.
    longest = edit.add("ReduceMax", [ends], keepdims=0)
    return edit.add("Reshape", [edit.add("Max", [longest, edit.integers(1)]), edit.integers([1])])
