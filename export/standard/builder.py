"""Nodes in the making: what the rewrites of single ops are written with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir


class LeftError(Exception):
    """An op can't be rewritten and stays as it is; the message says why."""


class Builder:
    """Makes nodes of standard ops: `op.Add(a, b)`, `op.Split(x, axis=1, _outputs=2)`; they are inserted in order."""

    def __init__(self) -> None:
        """No nodes yet."""
        self.nodes: list[ir.Node] = []

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        """The maker of an op; inputs are positional (None: absent), attributes by name."""
        if op_type.startswith("_"):
            raise AttributeError(op_type)

        def make(*inputs: ir.Value | None, _outputs: int = 1, **attributes: Any) -> Any:
            node = ir.node(op_type, inputs, attributes, num_outputs=_outputs)
            self.nodes.append(node)
            return node.outputs[0] if _outputs == 1 else node.outputs

        return make

    def ints(self, *values: int) -> ir.Value:
        """A constant vector int64."""
        return self._constant(np.array(values, np.int64))

    def int(self, value: int) -> ir.Value:
        """A constant scalar int64."""
        return self._constant(np.array(value, np.int64))

    def number(self, value: float, dtype: ir.DataType) -> ir.Value:
        """A constant scalar of floats."""
        return self._constant(np.array(value).astype(dtype.numpy()))

    def _constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        made: ir.Value = self.Constant(value=ir.tensor(array))
        return made


Rewrite = Callable[[ir.Node, Builder], Sequence[ir.Value | None]]


@dataclass(frozen=True)
class Rule:
    """One op and how it is rewritten: to a value for each of its outputs, None for those that nobody may use."""

    domain: str
    op_type: str
    rewrite: Rewrite


def apply(node: ir.Node, rule: Rule) -> bool:
    """Rewrite one node, in place; False if it has to stay.

    Raises:
        LeftError: it has to stay, and why.
    """
    builder = Builder()
    made = rule.rewrite(node, builder)
    assert node.graph is not None
    pairs = list(zip(node.outputs, [*made, *([None] * len(node.outputs))], strict=False))
    for old, new in pairs:
        if new is None and (old.uses() or old.is_graph_output()):
            raise LeftError(f"its output {old.name!r} is used")
    node.graph.insert_before(node, builder.nodes)
    for old, new in pairs:
        if new is not None:
            name, new.type, new.shape = old.name, old.type or new.type, old.shape or new.shape
            old.name = None
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            new.name = name
    node.graph.remove(node, safe=True)
    return True


def input_at(node: ir.Node, number: int) -> ir.Value | None:
    """An optional input."""
    return node.inputs[number] if number < len(node.inputs) else None


def required(node: ir.Node, number: int) -> ir.Value:
    """An input that has to be there."""
    value = input_at(node, number)
    if value is None:
        raise LeftError(f"it lacks input {number}")
    return value


def number(node: ir.Node, name: str, default: float) -> float:
    """A float attribute."""
    return float(node.attributes.get_float(name, default))


def whole(node: ir.Node, name: str, default: int) -> int:
    """An int attribute."""
    return int(node.attributes.get_int(name, default))


def static_size(value: ir.Value, axis: int) -> int | None:
    """The size of an axis, if it is recorded and fixed."""
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None
