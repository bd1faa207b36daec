"""Attention over the cache for ONNX Runtime on the CPU: one node where there were ten.

`com.microsoft.GroupQueryAttention` writes the new rows into the cache and lets each sequence attend to its own rows.
ONNX Runtime's Attention computes every row of the cache for every sequence and masks what is too much, between two
TensorScatter and four Transpose.

GroupQueryAttention has two ways to compute float32 (onnxruntime 1.32): one that streams over the cache, made for
long ones, four lanes at a time, and one that keeps all scores and calls the matrix product's kernels. Where heads are
small the second is faster, and a sink of weight 0 asks for it (`_sink`). Microseconds for 6 layers of lynx-tiny on one
thread, streaming and scores: batch 16 at 20, 60, 100 and 140 rows 111, 270, 422, 580 and 155, 230, 310, 415; batch 1
at 100 rows 39 and 31; a prompt of 128 tokens 780 and 580. With heads of 128 they are equal.
"""

from __future__ import annotations

import functools
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
        if node.op_type != "Attention" or len(node.input) < 7 or node.input[3] or not node.input[6]:
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
        ends = node.input[6]
        rows = edit.once(f"rows/{ends}", lambda: _rows(edit, ends))
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        bounds = [edit.integers([0]), rows, edit.integers([2])]
        for place in (1, 2):
            name = node.input[place]
            copy.input[place] = edit.once(f"rows/{ends}/{name}", functools.partial(_first_rows, edit, name, bounds))
        edit.put(copy)


def _first_rows(edit: GraphEdit, name: str, bounds: list[str]) -> str:
    """The first rows [B,h,rows,d] of a key or value [B,h,L,d]; where it is put together of parts, of each of them."""
    parts = edit.producer(name)
    if parts is None or parts.op_type != "Concat" or _attributes(parts).get("axis") not in (-1, 3):
        return edit.add("Slice", [name, *bounds])
    return edit.add("Concat", [edit.add("Slice", [part, *bounds]) for part in parts.input], axis=-1)


def _rows(edit: GraphEdit, ends: str) -> str:
    # One row at least: an attention over no keys at all is 0 / 0.
    longest = edit.add("ReduceMax", [ends], keepdims=0)
    return edit.add("Reshape", [edit.add("Max", [longest, edit.integers(1)]), edit.integers([1])])
