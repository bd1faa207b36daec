"""A router by itself, without its experts: what it ranks and weighs by, where a fused op is given the choice ready."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lynx_trt.export.ops import OPSET
from lynx_trt.export.patterns.block import RefusedError
from lynx_trt.export.regions.closure import Region, closure, extract
from lynx_trt.export.regions.constants import Constants
from lynx_trt.export.regions.fit import RuleFit, fit_rule
from lynx_trt.export.regions.linears import MOVES
from lynx_trt.export.regions.probe import Array, evaluate, scalars
from lynx_trt.export.regions.topology import Topology
from lynx_trt.export.relayout import sizes_of

_PRODUCTS = ("MatMul", "Gemm", "Einsum", "Conv", "MatMulNBits", "FusedMatMul")
_MAX_NODES = 200
_TOKENS = 12

# The weights [T,K] that were used, from the chosen experts [T,K] and the region's values by graph value.
Weigh = Callable[[Array, Callable[[ir.Value], Array]], Array]


@dataclass(frozen=True)
class Derived:
    """What ranks [..,E], and by which rule which value weighs."""

    choice: ir.Value
    largest: bool
    source: ir.Value
    rule: RuleFit


def find_logits(scores: ir.Value, constants: Constants) -> ir.Value:
    """What the router's linear layer gave, from which the scores are computed; the scores where that isn't told."""
    seen: set[ir.Node] = set()
    starts: set[ir.Value] = set()
    pending = [scores]
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None:
            if value.const_value is None:
                return scores
            continue
        if node in seen or node.op_type == "Shape" or constants.get(value) is not None:
            continue
        if node.op_type in _PRODUCTS:
            starts.add(value)
            continue
        if len(seen) > _MAX_NODES:
            return scores
        seen.add(node)
        pending += [item for item in node.inputs if item is not None]
    return starts.pop() if len(starts) == 1 else scores


class Routers:
    """Derives the rules of routers of one graph."""

    def __init__(self, graph: ir.Graph) -> None:
        """Number the graph's nodes, as they are now."""
        self._topology = Topology(graph)
        self._constants = Constants()

    def derive(self, index: ir.Value, needed: list[ir.Value], experts: int, count: int, weigh: Weigh) -> Derived | None:
        """The rule behind a choice, or None if it is none that is known.

        Args:
            index: the chosen experts [..,K], or that value moved about.
            needed: values that `weigh` asks for.
            experts: E.
            count: K.
            weigh: gives the weights that are used.
        """
        node = _behind(index)
        if node is None or node.op_type != "TopK" or node.inputs[0] is None:
            return None
        scores = node.inputs[0]
        try:
            logits = find_logits(scores, self._constants)
            outputs = [scores, node.outputs[1], *needed]
            nodes, shapes = closure(self._topology, outputs, [logits])
            region = extract(nodes, [logits], shapes, outputs, OPSET, lambda size: size, set())
            return self._fit(region, node, logits, experts, count, weigh)
        except RefusedError:
            return None

    def count(self, index: ir.Value) -> int:
        """K of the TopK behind a choice, 0 where there is none."""
        node = _behind(index)
        ints = self._constants.ints(node.inputs[1]) if node is not None and node.op_type == "TopK" else None
        return ints[0] if ints is not None and len(ints) == 1 else 0

    def _fit(
        self, region: Region, node: ir.Node, logits: ir.Value, experts: int, count: int, weigh: Weigh
    ) -> Derived | None:
        generator = np.random.default_rng(0)
        results = _run(region, logits, experts, generator)
        rows = {name: array.reshape(-1, experts) for name, array in results.items() if _is_table(array, experts)}

        def value(wanted: ir.Value) -> Array:
            return results[region.names[wanted]]

        index = value(node.outputs[1]).reshape(-1, count).astype(np.int64)
        later = _later(region, node)
        names = [region.names[output] for member in region.nodes for output in member.outputs if output in region.names]
        sources = [(name, rows[name]) for name in (region.names[logits], *names) if name in rows and name not in later]
        rule = fit_rule(weigh(index, value), index, sources, scalars(region))
        assert node.inputs[0] is not None
        if rule is None:
            return None
        largest = bool(node.attributes.get_int("largest", 1))
        return Derived(node.inputs[0], largest, region.value(rule.source), rule)


def _behind(value: ir.Value) -> ir.Node | None:
    """The node that made a value, moves left out."""
    node = value.producer()
    while node is not None and node.domain == "" and node.op_type in MOVES:
        source = node.inputs[0]
        node = None if source is None else source.producer()
    return node


def _is_table(array: Array, experts: int) -> bool:
    return array.dtype.kind == "f" and array.shape[-1:] == (experts,) and array.size == _TOKENS * experts


def _run(region: Region, logits: ir.Value, experts: int, generator: np.random.Generator) -> dict[str, Array]:
    """One run on random logits."""
    rank = 2 if logits.shape is None else len(logits.shape)
    lead = (_TOKENS,) if rank == 2 else (2, _TOKENS // 2)
    table = generator.standard_normal((*lead, experts)) * 2.0
    feeds = dict.fromkeys(region.given, table)
    for name, value in region.weights.items():
        assert value.const_value is not None
        feeds[name] = generator.standard_normal(sizes_of(value.const_value))
    for name, value in region.shapes_of.items():
        dims = [size if isinstance(size, int) else None for size in value.shape or ()]
        guessed = (2, _TOKENS // 2)
        sizes = [d if d is not None else guessed[at] if at < 2 else 1 for at, d in enumerate(dims)]
        feeds[name] = np.zeros(sizes)
    return evaluate(region, feeds)


def _later(region: Region, node: ir.Node) -> set[str]:
    """Names of values that depend on the choice."""
    later = set(node.outputs)
    for member in region.nodes:
        if any(value in later for value in member.inputs):
            later |= set(member.outputs)
    return {region.names[value] for value in later if value in region.names}
