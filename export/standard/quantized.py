"""ONNX Runtime's products and look-ups with 4- and 8-bit weights, dequantized: plain MatMul and Gather.

The weights are dequantized while they are written, some rows at a time; the graph grows by that, and runs everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from lynx_trt.export.patterns.qmoe_op import unpack
from lynx_trt.export.relayout import Stack, Table, View
from lynx_trt.export.standard.builder import Builder, LeftError, Rule, input_at, required, whole


def rules(stacks: dict[str, Stack | Table]) -> list[Rule]:
    """The rules; the tables that they need are put into `stacks`, by initializer name."""
    return [
        Rule("com.microsoft", "MatMulNBits", partial(matmul_nbits, stacks)),
        Rule("com.microsoft", "GatherBlockQuantized", partial(gather_block_quantized, stacks)),
    ]


def matmul_nbits(stacks: dict[str, Stack | Table], node: ir.Node, op: Builder) -> Sequence[ir.Value | None]:
    """MatMulNBits(a, b, scales, zero_points, g_idx, bias): a @ dequantized(b)^T; b is [N,blocks,bytes]."""
    a, bias = required(node, 0), input_at(node, 5)
    if input_at(node, 4) is not None:
        raise LeftError("g_idx has no standard form")
    rows, columns, bits, block = (whole(node, name, 0) for name in ("N", "K", "bits", "block_size"))
    table = _table(node, 1, 2, 3, rows, columns, bits or 4, block)
    weight = _store(stacks, node, table)
    product = op.MatMul(a, op.Transpose(weight, perm=[1, 0]))
    return [product if bias is None else op.Add(product, bias)]


def gather_block_quantized(stacks: dict[str, Stack | Table], node: ir.Node, op: Builder) -> Sequence[ir.Value | None]:
    """GatherBlockQuantized(data, indices, scales, zero_points): rows of a quantized table."""
    axis, quantized = whole(node, "gather_axis", 0), whole(node, "quantize_axis", 1)
    data = _stored(required(node, 0))
    if len(data.shape) == 3:  # a product's weight, [N,blocks,bytes]
        data = data.reshape((data.shape[0], data.shape[1] * data.shape[2])) or data
    if axis != 0 or quantized != 1 or len(data.shape) != 2:
        raise LeftError("only rows of a table quantized along its rows are known here")
    bits = whole(node, "bits", 4)
    packed = data.tensor.dtype == ir.DataType.UINT8
    if not packed:
        raise LeftError(f"its table is {data.tensor.dtype}, and uint8 is known here")
    rows, size = data.shape
    table = _table(node, 0, 2, 3, rows, size * 8 // bits, bits, whole(node, "block_size", 128))
    return [op.Gather(_store(stacks, node, table), required(node, 1), axis=0)]


def _stored(value: ir.Value) -> View:
    tensor = ir.convenience.get_const_tensor(value)
    node = value.producer()
    if tensor is None and node is not None and node.op_type == "Reshape":  # a weight shared with a product
        return _stored(required(node, 0))
    if tensor is None:
        raise LeftError(f"{value.name!r} is not stored in the model")
    return View.whole(tensor)


def _table(node: ir.Node, data: int, scales: int, zeros: int, rows: int, columns: int, bits: int, block: int) -> Table:
    """The dequantized weights [rows,columns]."""
    if bits not in (2, 4, 8) or block < 1:
        raise LeftError(f"{bits} bits in blocks of {block} are not known here")
    packed, scale = _stored(required(node, data)), _stored(required(node, scales))
    zero = None if input_at(node, zeros) is None else _stored(required(node, zeros))
    blocks = -(-columns // block)
    wanted = rows * blocks * block * bits // 8
    if (
        int(np.prod(packed.shape)) not in (wanted, rows * columns * bits // 8)
        or int(np.prod(scale.shape)) != rows * blocks
    ):
        raise LeftError(
            f"its weights are {list(packed.shape)} with scales {list(scale.shape)}, which don't fit each other"
        )
    if packed.tensor.dtype != ir.DataType.UINT8:
        raise LeftError(f"its weights are {packed.tensor.dtype}, and uint8 is known here")
    dtype = scale.tensor.dtype
    flat, scale_rows = packed.reshape((rows, int(np.prod(packed.shape)) // rows)), scale.reshape((rows, blocks))
    assert flat is not None and scale_rows is not None  # noqa: PT018
    zero_rows = None
    if zero is not None:
        if zero.tensor.dtype not in (ir.DataType.UINT8, dtype):
            raise LeftError(f"its zero points are {zero.tensor.dtype}, and uint8 is known here")
        zero_rows = zero.reshape((rows, int(np.prod(zero.shape)) // rows))

    def read(start: int, stop: int) -> Any:
        values = unpack(flat.take(0, start, stop).read(), bits, blocks * block).astype(np.float32)
        padded = np.zeros((stop - start, blocks * block), np.float32)
        padded[:, : values.shape[1]] = values
        factors = scale_rows.take(0, start, stop).read().astype(np.float32)
        offsets: Any = np.float32(1 << (bits - 1))
        if zero_rows is not None:
            offsets = zero_rows.take(0, start, stop).read()
            offsets = unpack(offsets, bits, blocks) if offsets.dtype == np.uint8 else offsets
            offsets = offsets.astype(np.float32)[:, :, None]
        blocked = padded.reshape(stop - start, blocks, block)
        return ((blocked - offsets) * factors[:, :, None]).reshape(stop - start, -1)[:, :columns]

    return Table((rows, columns), dtype, read)


def _store(stacks: dict[str, Stack | Table], node: ir.Node, table: Table) -> ir.Value:
    """An initializer whose bytes come when they are written."""
    assert node.graph is not None
    name = f"{node.name or node.outputs[0].name}.dequantized"
    if name in stacks:
        raise LeftError("another node has its name")
    stacks[name] = table
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(table.numpy(), dtype=table.dtype, name=name),
        dtype=table.dtype,
        shape=ir.Shape(table.shape),
        name=name,
    )
    value = ir.Value(name=name, type=ir.TensorType(table.dtype), shape=ir.Shape(table.shape), const_value=tensor)
    node.graph.register_initializer(value)
    return value
