"""`com.microsoft.QMoE`: the fused block with quantized experts.

A weight is (q - zero point) * scale, per row or per block of columns, the zero point 2^(bits-1) where none is given.
Those of 4 bits in a model of 16 stay so (lynx_trt/int4.py), if their blocks are multiples of 32. Others are dequantized
while they are written, an expert at a time; where the packed tensors lie is kept in the manifest, and their data file
in the artifact, for a plugin that reads them as they are.

Read from ONNX Runtime 1.32's CPU kernel by experiment: two 4-bit values a byte, the first in the low half; without
`router_weights` the weights of the chosen are always divided by their sum, whatever `normalize_routing_weights` says;
with them, `router_probs` only ranks, and their values weigh, divided by their sum if the attribute says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from lynx_trt import int4
from lynx_trt.export.patterns.block import Block, RefusedError
from lynx_trt.export.patterns.fused import Int4, Projection, Projections, constant_tensor, fused_block, input_at
from lynx_trt.export.patterns.rule import BlockRule, attribute_text
from lynx_trt.export.relayout import View, sizes_of

_BITS = (2, 4, 8)
# Inputs of the op: weights, scales, bias, zero points of FC1, FC2 and FC3.
_INPUTS = {"fc1": (2, 3, 4, 11), "fc2": (5, 6, 7, 12), "fc3": (8, 9, 10, 13)}
_ROUTER_WEIGHTS = 14


class QMoeOp(BlockRule):
    """Rewrites each `com.microsoft.QMoE` with integer weights."""

    form = "com.microsoft.QMoE"

    def pattern(self, op: Any, hidden: ir.Value) -> Any:
        """The op, whatever its optional inputs and attributes."""
        return op.QMoE(
            hidden,
            _domain="com.microsoft",
            _allow_other_inputs=True,
            _allow_other_attributes=True,
            _outputs=["block"],
        )

    def recognise(self, node: ir.Node) -> Block:
        """See BlockRule."""
        kind = attribute_text(node, "quant_type", "int")
        if kind != "int":
            raise RefusedError(f"its quant_type is {kind!r}; integer weights are known (quant_type 'int')")
        if node.attributes.get_int("weights_prepacked", -1) == 1:
            raise RefusedError("its weights are packed for CUDA; export it with qmoe_weights_prepacked=0")
        width, keep = _width(node), not self.dequantize
        fc1, fc2 = _quantized(node, "fc1", width), _quantized(node, "fc2", None)
        fc3 = _quantized(node, "fc3", width) if input_at(node, _INPUTS["fc3"][0]) is not None else None
        weights = Projections(
            fc1=fc1.projection(keep=keep),
            fc2=fc2.projection(keep=keep),
            fc3=None if fc3 is None else fc3.projection(keep=keep),
            fc1_bias=input_at(node, _INPUTS["fc1"][2]),
            fc2_bias=input_at(node, _INPUTS["fc2"][2]),
            fc3_bias=input_at(node, _INPUTS["fc3"][2]),
            packed={
                name: item.describe() for name, item in (("fc1", fc1), ("fc2", fc2), ("fc3", fc3)) if item is not None
            },
        )
        router_weights = input_at(node, _ROUTER_WEIGHTS)
        return fused_block(
            node,
            self.form,
            weights,
            self.routers,
            router_weights=router_weights,
            always_renormalize=router_weights is None,
        )


@dataclass(frozen=True)
class _Quantized:
    """One projection's packed weights [E,N,K*bits/8], scales [E,N] or [E,N,blocks], zero points packed like weights."""

    weights: View
    scales: View
    zero_points: View | None
    bits: int
    columns: int

    def projection(self, *, keep: bool) -> Projection:
        kept = self._kept() if keep and self.bits == 4 else None
        return Projection(self.weights.shape[0], self.weights.shape[1], self.columns, self.expert, kept=kept)

    def expert(self, number: int) -> Any:
        """[N,K] float32 of one expert."""
        scales, zeros = self._scales(number), self._zeros(number)
        values = unpack(self.weights.select(0, number).read(), self.bits, self.columns)
        blocked = values.reshape(*scales.shape, -1).astype(np.float32)
        return ((blocked - zeros[:, :, None]) * scales[:, :, None]).reshape(len(values), self.columns)

    @property
    def _blocks(self) -> int:
        """How many scales a row has."""
        return self.scales.shape[2] if len(self.scales.shape) == 3 else 1

    def _scales(self, number: int) -> Any:
        """[N,blocks] float32 of one expert."""
        scales = self.scales.select(0, number).read().astype(np.float32)
        return scales.reshape(len(scales), -1)

    def _zeros(self, number: int) -> Any:
        """[N,blocks] float32 of one expert."""
        rows, blocks = self.weights.shape[1], self._blocks
        if self.zero_points is None:
            return np.full((rows, blocks), 1 << (self.bits - 1), np.float32)
        packed = self.zero_points.select(0, number).read()
        count = blocks if packed.ndim == 2 else rows
        return unpack(packed, self.bits, count).astype(np.float32).reshape(rows, blocks)

    def _kept(self) -> Int4:
        """As LynxExperts takes them; its zero points are looked at once."""
        usual = self.zero_points is None or all(
            (self._zeros(number) == int4.ZERO).all() for number in range(self.weights.shape[0])
        )
        return Int4(
            self.columns // self._blocks,
            self.weights.tensor,
            self._scales,
            None if usual else self._zeros,
        )

    def describe(self) -> dict[str, Any]:
        """Where the packed form lies."""
        names = {"weights": self.weights, "scales": self.scales, "zero_points": self.zero_points}
        stored = {key: _place(view.tensor) for key, view in names.items() if view is not None}
        return {"bits": self.bits, "columns": self.columns, **stored}


def unpack(packed: Any, bits: int, count: int) -> Any:
    """The last axis of bytes as `count` values of `bits` each, the first in the lowest bits."""
    if bits == 8:
        return packed[..., :count]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return values.reshape(*packed.shape[:-1], -1)[..., :count]


def _place(tensor: ir.TensorProtocol) -> dict[str, Any]:
    place: dict[str, Any] = {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(sizes_of(tensor))}
    if isinstance(tensor, ir.ExternalTensor):
        place |= {"file": str(tensor.location), "offset": tensor.offset or 0, "length": tensor.length}
    return place


def _width(node: ir.Node) -> int:
    """H, the rows of FC2."""
    weights = input_at(node, _INPUTS["fc2"][0])
    if weights is None:
        raise RefusedError("it lacks fc2_experts_weights")
    shape = sizes_of(constant_tensor(weights, "fc2_experts_weights"))
    if len(shape) != 3:
        raise RefusedError(f"its fc2_experts_weights is {list(shape)}, not [experts, rows, bytes]")
    return shape[1]


def _quantized(node: ir.Node, name: str, columns: int | None) -> _Quantized:
    at_weights, at_scales, _, at_zeros = _INPUTS[name]
    weights, scales, zeros = (input_at(node, at) for at in (at_weights, at_scales, at_zeros))
    if weights is None or scales is None:
        raise RefusedError(f"it lacks the weights or scales of {name.upper()}")
    bits = node.attributes.get_int(f"{name}_expert_weight_bits", node.attributes.get_int("expert_weight_bits", 4))
    if bits not in _BITS:
        raise RefusedError(f"its {name.upper()} has {bits} bits; known are {', '.join(map(str, _BITS))}")
    packed, scale = (
        View.whole(constant_tensor(v, f"{name} {r}")) for v, r in ((weights, "weights"), (scales, "scales"))
    )
    if len(packed.shape) != 3 or packed.tensor.dtype != ir.DataType.UINT8:
        raise RefusedError(
            f"its {name.upper()} weights are {packed.tensor.dtype} {list(packed.shape)}, not uint8 [E,N,bytes]"
        )
    experts, rows, size = packed.shape
    count = columns if columns is not None else size * 8 // bits
    if size != -(-count * bits // 8):
        raise RefusedError(
            f"its {name.upper()} weights are {list(packed.shape)}, and {count} columns of {bits} bits take "
            f"{-(-count * bits // 8)} bytes; weights packed for CUDA can't be read: export with "
            "qmoe_weights_prepacked=0"
        )
    block = node.attributes.get_int("block_size", 0) or count
    blocks = -(-count // block)
    if (
        count % block
        or scale.shape not in ((experts, rows), (experts, rows, blocks))
        or (blocks > 1 and len(scale.shape) == 2)
    ):
        raise RefusedError(
            f"its {name.upper()} scales are {list(scale.shape)}; with {rows} rows of {blocks} blocks they don't fit"
        )
    zero_points = None if zeros is None else View.whole(constant_tensor(zeros, f"{name} zero points"))
    if zero_points is not None:
        _check_zero_points(name, zero_points, experts, rows, blocks, bits)
    return _Quantized(packed, scale, zero_points, bits, count)


def _check_zero_points(name: str, zeros: View, experts: int, rows: int, blocks: int, bits: int) -> None:
    flat, blocked = (experts, -(-rows * bits // 8)), (experts, rows, -(-blocks * bits // 8))
    if zeros.shape not in (flat, blocked) or (zeros.shape == flat and blocks > 1):
        raise RefusedError(f"its {name.upper()} zero points are {list(zeros.shape)}, and have to be {list(blocked)}")
