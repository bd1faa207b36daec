"""Blocks in standard ops: from a router's TopK to the value that all its experts are summed into.

Exporters write one and the same block in a hundred ways, so it is told by what it computes. The steps: the TopK's (or
ArgMax's) paths meet in some value; the products with stored weights on the way are the experts; the region between is
run on made-up numbers (`probe.py`), and is a block if the output is the weighted sum of exactly those experts
(`fit.py`). A region that computes anything else is refused, however much it looks like one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from lynx_trt.experts import ExpertsForm
from lynx_trt.export import ops
from lynx_trt.export.patterns.block import RefusedError
from lynx_trt.export.patterns.rule import Refusal, label
from lynx_trt.export.regions.closure import closure
from lynx_trt.export.regions.constants import Constants
from lynx_trt.export.regions.fit import RuleFit
from lynx_trt.export.regions.linears import MOVES, Linear, Linears, Roles, assign
from lynx_trt.export.regions.operands import Tracer
from lynx_trt.export.regions.probe import CantRunError
from lynx_trt.export.regions.router import find_logits
from lynx_trt.export.regions.study import Anchor, Study, Understood
from lynx_trt.export.regions.topology import Topology, reads

# Steps from where a router's paths first meet to the sum of its experts (a product, a reshape, a sum, a cast).
_MAX_STEPS = 24


@dataclass(frozen=True)
class Found:
    """A block in standard ops: see `patterns.block.Block` for the fields that are its own."""

    anchor: Anchor
    output: ir.Value
    output_rank: int
    shape_of: ir.Value | None
    hidden: ir.Value
    roles: Roles
    form: ExpertsForm
    swapped: bool
    order: tuple[int, ...]
    weight: ir.Value | None
    rule: RuleFit | None
    source: ir.Value | None
    data_depends: bool


class Finder:
    """Finds the blocks of one graph: `found`, by output value; `refused`, routers whose experts weren't understood."""

    def __init__(self, graph: ir.Graph) -> None:
        """Look at every TopK and ArgMax of the main graph."""
        self._graph = graph
        self._constants = Constants()
        self._topology = Topology(graph)
        self._before: set[ir.Node] = set()
        self._known: dict[str, Understood] = {}
        self.found: dict[ir.Value, Found] = {}
        refused: list[tuple[Anchor, RefusedError]] = []
        for anchor in self._anchors():
            try:
                found = self._find(anchor)
            except RefusedError as refusal:
                refused.append((anchor, refusal))
                continue
            if found is not None:
                self.found[found.output] = found
        # A TopK on the way to a block's own (over groups of experts, or a sort of its tokens) is no other block.
        self.refused = [
            Refusal(label(anchor.node), str(refusal))
            for anchor, refusal in refused
            if not any(value in self.found for value in self._chain(anchor))
            and not any(_feeds(anchor, other) for other, _ in refused if other is not anchor)
        ]

    def _anchors(self) -> Iterator[Anchor]:
        for node in self._topology.nodes:
            if node.domain != "" or not node.inputs or node.inputs[0] is None:
                continue
            scores = node.inputs[0]
            if scores.dtype is not None and not scores.dtype.is_floating_point():
                continue  # a sort of indices
            axis = node.attributes.get_int("axis", -1 if node.op_type == "TopK" else 0)
            rank = None if scores.shape is None else len(scores.shape)
            if axis != -1 and (rank is None or axis != rank - 1):
                continue
            if node.op_type == "TopK":
                count = self._constants.ints(node.inputs[1])
                if count is not None and len(count) == 1:
                    yield Anchor(node, scores, count[0], node.outputs[1], bool(node.attributes.get_int("largest", 1)))
            elif node.op_type in ("ArgMax", "ArgMin"):
                yield Anchor(node, scores, 1, node.outputs[0], node.op_type == "ArgMax")

    def _find(self, anchor: Anchor) -> Found | None:
        """The block that an anchor routes; None if it routes none.

        Raises:
            RefusedError: there are experts behind it, but no block that can be rewritten.
        """
        logits = find_logits(anchor.scores, self._constants)
        self._visit(logits)
        chain = self._chain(anchor)
        roles, hidden, emitted = None, None, None
        regions: list[tuple[list[ir.Node], set[ir.Value], list[ir.Value]]] = []
        for at, output in enumerate(chain):
            if roles is None:
                between = self._between(output)
                if any(_is_block(node) for node in between):
                    return None  # the router of a fused block, which has a pattern of its own
                linears = Linears(Tracer(self._constants)).find(between)
                if not _plausible(linears, anchor):
                    continue
                roles = assign(linears, between)
                hidden, emitted = self._hidden(roles)
            assert hidden is not None
            try:
                nodes, shapes = closure(self._topology, chain[: at + 1], [hidden, logits])
            except RefusedError:
                if not regions:
                    raise
                break
            regions.append((nodes, shapes, chain[: at + 1]))
        if not regions or roles is None or hidden is None or emitted is None:
            return None
        for region in regions[:0:-1]:
            # What comes after the sum may need shapes that can't be guessed; the sum itself is what matters.
            with contextlib.suppress(CantRunError):
                return self._understand(anchor, logits, hidden, emitted, roles, *region)
        return self._understand(anchor, logits, hidden, emitted, roles, *regions[0])

    def _chain(self, anchor: Anchor) -> list[ir.Value]:
        """Values that all paths from the anchor pass, in order."""
        number = self._topology.join(anchor.node.outputs)
        chain: list[ir.Value] = []
        while number is not None and len(chain) < _MAX_STEPS:
            node = self._topology.nodes[number]
            if len([output for output in node.outputs if output.uses() or output.is_graph_output()]) == 1:
                chain.append(node.outputs[0])
            number = self._topology.after(number)
        return chain

    def _visit(self, value: ir.Value) -> None:
        """Remember everything that `value` is computed from; each node is walked once for the whole graph."""
        pending = [value]
        while pending:
            node = pending.pop().producer()
            if node is not None and node not in self._before:
                self._before.add(node)
                pending += list(reads(node))

    def _between(self, output: ir.Value) -> list[ir.Node]:
        """Nodes on the way back from `output` that the router didn't need."""
        seen: set[ir.Node] = set()
        pending = [output]
        while pending:
            node = pending.pop().producer()
            if node is not None and node not in self._before and node not in seen:
                seen.add(node)
                pending += list(reads(node))
        return sorted(seen, key=lambda node: self._topology.number[node])

    def _hidden(self, roles: Roles) -> tuple[ir.Value, ir.Value]:
        """What all experts are given, and the same as the experts' ops should take it (after a change of type)."""
        found = {self._source(linear) for linears in roles.first for linear in linears}
        if len({hidden for hidden, _ in found}) != 1:
            raise RefusedError("its experts are not all given the same hidden states")
        return next(iter(found))

    def _source(self, linear: Linear) -> tuple[ir.Value, ir.Value]:
        """Back from a product's data through moves, to what the router had too, or to what something computed."""
        value = emitted = linear.data
        while True:
            node = value.producer()
            if node is None or node in self._before or node.domain != "" or node.op_type not in MOVES:
                return value, (emitted if emitted.producer() in (None, *_casts(value)) else value)
            source = node.inputs[0]
            if source is None:
                return value, value
            if node.op_type == "Cast":
                emitted = value
            value = source

    def _understand(
        self,
        anchor: Anchor,
        logits: ir.Value,
        hidden: ir.Value,
        emitted: ir.Value,
        roles: Roles,
        nodes: list[ir.Node],
        shapes: set[ir.Value],
        chain: list[ir.Value],
    ) -> Found:
        study = Study(self._constants, anchor, logits, hidden, roles, nodes, shapes, chain)
        region, understood = study.run(self._known)
        names = {name: value for value, name in region.names.items()}
        return Found(
            anchor=anchor,
            output=names[understood.output],
            output_rank=understood.output_rank,
            shape_of=None if understood.shape_of is None else names[understood.shape_of],
            hidden=emitted,
            roles=roles,
            form=understood.form,
            swapped=understood.swapped,
            order=understood.order,
            weight=None if understood.weight is None else names[understood.weight],
            rule=understood.rule,
            source=None if understood.rule is None else names[understood.rule.source],
            data_depends=_depends(roles, anchor),
        )


def _feeds(anchor: Anchor, other: Anchor) -> bool:
    """Whether an anchor helps to make what another one ranks."""
    seen: set[ir.Node] = set()
    pending = [other.scores]
    while pending and len(seen) < 400:
        node = pending.pop().producer()
        if node is anchor.node:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            pending += [value for value in node.inputs if value is not None]
    return False


def _casts(value: ir.Value) -> list[ir.Node]:
    return [node for node, _ in value.uses() if node.op_type == "Cast"]


def _plausible(linears: list[Linear], anchor: Anchor) -> bool:
    """Whether there are products enough for experts, so that a TopK that routes nothing is passed over in silence."""
    last = anchor.scores.shape[-1] if anchor.scores.shape is not None and len(anchor.scores.shape) else None
    wanted = last if isinstance(last, int) else 4 * anchor.count
    return len(linears) >= 2 and sum(len(linear.matrices) for linear in linears) >= max(wanted, 4)


def _is_block(node: ir.Node) -> bool:
    return node.domain == ops.DOMAIN or node.op_type in ("MoE", "QMoE", "TRT_MoE")


def _depends(roles: Roles, anchor: Anchor) -> bool:
    """Whether what the first layer is given depends on the router's choice: only a token's own experts then run."""
    seen: set[ir.Value] = set()
    pending = [linear.data for linear in roles.first[0]]
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is anchor.node:
            return True
        if value in seen or node is None:
            continue
        seen.add(value)
        if node.op_type in MOVES or node.op_type in _INDEXING:
            pending += [item for item in node.inputs if item is not None]
    return False


_INDEXING_NAMES = "Add And CumSum Div Equal Mod Mul Not NonZero OneHot Range ScatterElements Sub TopK Where"
_INDEXING = frozenset(_INDEXING_NAMES.split())
