"""The order of a graph's nodes, and what every path from a node has to pass on its way out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir


class Topology:
    """Nodes of the main graph by number, in an order in which values are made before they are used."""

    def __init__(self, graph: ir.Graph) -> None:
        """Number the nodes and find each one's immediate postdominator."""
        self.nodes = list(graph)
        self.number = {node: number for number, node in enumerate(self.nodes)}
        for number, node in enumerate(self.nodes):
            for inner in nested(node):
                self.number[inner] = number
        self._after = self._postdominators()

    def users(self, value: ir.Value) -> set[int]:
        """The nodes that read a value, those in subgraphs by the node that holds them."""
        return {self.number[node] for node, _ in value.uses()}

    def join(self, values: Iterable[ir.Value]) -> int | None:
        """The first node that every path from the values' readers passes; None if there is no such node."""
        readers = set().union(*(self.users(value) for value in values))
        return self._common(readers)

    def after(self, number: int) -> int | None:
        """The next node that every path from a node passes."""
        found = self._after[number]
        return None if found is None or found == len(self.nodes) else found

    def _postdominators(self) -> list[int | None]:
        """Cooper, Harvey and Kennedy's algorithm; one pass is enough for a graph without cycles. The exit is node N."""
        exit_ = len(self.nodes)
        self._after = [None] * (exit_ + 1)
        self._after[exit_] = exit_
        for number in range(exit_ - 1, -1, -1):
            node = self.nodes[number]
            followers = set().union(*(self.users(output) for output in node.outputs)) if node.outputs else set()
            if any(output.is_graph_output() for output in node.outputs):
                followers.add(exit_)
            # What leads nowhere says nothing about where paths meet.
            live = [follower for follower in followers if self._after[follower] is not None]
            self._after[number] = self._meet(live)
        return self._after

    def _meet(self, numbers: list[int]) -> int | None:
        if not numbers:
            return None
        first = numbers[0]
        for second in numbers[1:]:
            while first != second:
                if first < second:
                    following = self._after[first]
                    assert following is not None
                    first = following
                else:
                    following = self._after[second]
                    assert following is not None
                    second = following
        return first

    def _common(self, numbers: set[int]) -> int | None:
        live = [number for number in sorted(numbers) if self._after[number] is not None]
        found = self._meet(live)
        return None if found is None or found == len(self.nodes) else found


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in a node's attributes, at any depth."""
    for attribute in node.attributes.values():
        graphs: tuple[ir.Graph, ...] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = tuple(attribute.as_graphs())
        for graph in graphs:
            yield graph
            for inner in graph:
                yield from subgraphs(inner)


def nested(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes of a node's subgraphs, at any depth."""
    for graph in subgraphs(node):
        yield from graph


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node needs: its inputs, and what its subgraphs take from outside."""
    yield from (value for value in node.inputs if value is not None)
    inner = list(subgraphs(node))
    for graph in inner:
        taken = [value for other in graph for value in other.inputs if value is not None]
        for value in (*taken, *graph.outputs):
            if value.graph not in inner:
                yield value
