"""`com.microsoft.RotaryEmbedding` to ONNX's own RotaryEmbedding of opset 23."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lynx_trt.export.standard.builder import Builder, LeftError, Rule, number, required, static_size, whole


def rotary_embedding(node: ir.Node, op: Builder) -> Sequence[ir.Value | None]:
    """RotaryEmbedding(x, position_ids, cos, sin); x is [B,S,heads*size] or [B,heads,S,size]."""
    x, positions, cos, sin = (required(node, at) for at in range(4))
    if whole(node, "is_packed_batching", 0) or number(node, "scale", 1.0) != 1.0:
        raise LeftError("is_packed_batching and scale have no standard form")
    rank = None if x.shape is None else len(x.shape)
    if rank not in (3, 4):
        raise LeftError("whether its input has 3 or 4 axes is not recorded")
    rotated = whole(node, "rotary_embedding_dim", 0)
    heads = whole(node, "num_heads", 0)
    length = op.Shape(x, start=2, end=3) if rank == 4 else op.Shape(x, start=1, end=2)
    ids = _positions(op, positions, length)
    attributes = {"interleaved": whole(node, "interleaved", 0), "rotary_embedding_dim": rotated}
    if rank == 4:
        return [op.RotaryEmbedding(x, cos, sin, ids, **attributes)]
    if not heads:
        half = static_size(cos, 1)
        if half is None:
            raise LeftError("the size of its heads is not recorded")
        split = op.Reshape(x, op.ints(0, 0, -1, 2 * half))
    else:
        split = op.Reshape(x, op.ints(0, 0, heads, -1))
    turned = op.RotaryEmbedding(op.Transpose(split, perm=[0, 2, 1, 3]), cos, sin, ids, **attributes)
    return [op.Reshape(op.Transpose(turned, perm=[0, 2, 1, 3]), op.ints(0, 0, -1))]


def _positions(op: Builder, positions: ir.Value, length: ir.Value) -> ir.Value:
    """[B,S] ids; a vector of one is the first position of every row."""
    rank = None if positions.shape is None else len(positions.shape)
    if rank == 2:
        return positions
    if rank != 1:
        found = "is not recorded" if rank is None else f"is {rank}"
        raise LeftError(f"the number of axes of its position_ids {found}, and 1 and 2 are known")
    zero, one = op.int(0), op.int(1)
    steps = op.Range(zero, op.Squeeze(length, op.ints(0)), one)
    row: ir.Value = op.Unsqueeze(op.Add(steps, positions), op.ints(0))
    return row


RULES = (Rule("com.microsoft", "RotaryEmbedding", rotary_embedding),)
