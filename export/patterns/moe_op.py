"""`com.microsoft.MoE`, ONNX Runtime's fused block.

Read from ONNX Runtime 1.32's CPU kernel by experiment: `router_probs` are logits; the softmax over all experts is
taken, its k best are used, and divided by their sum with `normalize_routing_weights`. gelu is the tanh form; swiglu
runs with `swiglu_fusion` 1 alone (gate and up alternate); an absent `swiglu_limit` is no limit.

FC3 (a separate up projection), swiglu_fusion 0 and 2, relu2 and geglu run on CUDA only, and are read as the op's
documentation has them. `fused.py` has what this op shares with QMoE.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from lynx_trt.export.patterns.block import Block
from lynx_trt.export.patterns.fused import Projections, fused_block, input_at, stored
from lynx_trt.export.patterns.rule import BlockRule


class MoeOp(BlockRule):
    """Rewrites each `com.microsoft.MoE`."""

    form = "com.microsoft.MoE"

    def pattern(self, op: Any, hidden: ir.Value) -> Any:
        """The op, whatever its optional inputs and attributes."""
        return op.MoE(
            hidden,
            _domain="com.microsoft",
            _allow_other_inputs=True,
            _allow_other_attributes=True,
            _outputs=["block"],
        )

    def recognise(self, node: ir.Node) -> Block:
        """See BlockRule."""
        weights = Projections(
            fc1=stored(node, 2, "fc1_experts_weights"),
            fc2=stored(node, 4, "fc2_experts_weights"),
            fc3=stored(node, 6, "fc3_experts_weights") if input_at(node, 6) is not None else None,
            fc1_bias=input_at(node, 3),
            fc2_bias=input_at(node, 5),
            fc3_bias=input_at(node, 7),
        )
        return fused_block(node, self.form, weights, self.routers)
