"""What every pattern has: an onnxscript rewrite rule that recognises a block, says why it refuses, and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase

from lynx_trt.export.patterns.block import Block, Emitter, RefusedError

if TYPE_CHECKING:
    from lynx_trt.export.regions.router import Routers


@dataclass(frozen=True)
class Refusal:
    """A node that looks like an MoE block and isn't rewritten, and why."""

    node: str
    reason: str


class BlockRule(RewriteRuleClassBase):  # type: ignore[misc]
    """A pattern of MoE blocks: `pattern` names the node that gives the output, `recognise` understands the block.

    `found` and `refused` are what the rule came to after it was applied.
    """

    form = ""

    def __init__(self, emitter: Emitter) -> None:
        """A rule that writes its blocks with `emitter`."""
        # Dead nodes go at the end: weights and routers may be shared with what stays.
        super().__init__(name=self.form, remove_nodes=False)
        self._emitter = emitter
        self._routers: Routers | None = None
        self._block: Block | None = None
        self.found: list[Block] = []
        self.refused: list[Refusal] = []

    @property
    def dequantize(self) -> bool:
        """Whether weights that could stay quantized are dequantized."""
        return self._emitter.dequantize

    @property
    def routers(self) -> Routers:
        """What derives a router's rule; made when it is first asked for."""
        if self._routers is None:
            from lynx_trt.export.regions.router import Routers

            self._routers = Routers(self._emitter.graph)
        return self._routers

    def recognise(self, node: ir.Node) -> Block:
        """The block that `node` gives the output of.

        Raises:
            RefusedError: the node is no block, or one that the ops can't express.
        """
        raise NotImplementedError

    def candidate(self, node: ir.Node) -> bool:
        """Whether a node that the pattern matches may be a block at all; one that may not is passed over in silence."""
        return True

    def check(self, context: Any, block: ir.Value, **_: Any) -> MatchResult:
        """Whether there is a block here; a refusal is kept with its reason."""
        result = MatchResult()
        node = block.producer()
        assert node is not None
        if not self.candidate(node):
            return result.fail("no block", [node])
        try:
            if node.graph is not self._emitter.graph:
                raise RefusedError("it is inside a subgraph (If, Loop or Scan), where blocks are not rewritten")
            self._block = self.recognise(node)
        except RefusedError as refusal:
            self.refused.append(Refusal(label(node), str(refusal)))
            result.fail(str(refusal), [node])
        except (TypeError, ValueError, IndexError) as error:  # an attribute of another type, a weight of another rank
            self.refused.append(Refusal(label(node), f"it is not well-formed: {error}"))
            result.fail(str(error), [node])
        return result

    def rewrite(self, op: Any, **_: Any) -> ir.Value:
        """The two ops in the block's place."""
        assert self._block is not None
        self.found.append(self._block)
        return self._emitter.emit(op, self._block)


def label(node: ir.Node) -> str:
    """A node for a message: its name and op, or its output where it has no name."""
    op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return f"{node.name!r} ({op})" if node.name else f"{op} with the output {node.outputs[0].name!r}"


def attribute_text(node: ir.Node, name: str, default: str) -> str:
    """A string attribute."""
    return str(node.attributes.get_string(name, default))
