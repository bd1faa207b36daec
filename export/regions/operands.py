"""A weight as a matrix product sees it, traced back to the tensor that is stored.

Between the two there are only ops that move elements (Transpose, Split, Slice, Squeeze, Reshape, a Gather by constant
or by the router's index). They are followed as steps on the stored tensor's axes; nothing is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from lynx_trt.export.regions.constants import Constants
from lynx_trt.export.relayout import View, sizes_of

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)

Scale = Callable[[int], int]


@dataclass(frozen=True)
class Operand:
    """A weight operand: views of stored tensors, and which of their axes the operand's axes are.

    Attributes:
        views: one view, or one for each expert where the experts' tensors are joined in the graph.
        axes: for each axis of the operand the axis of the view; None for one of size 1 or made by an index; JOINED for
            the one along which `views` are joined.
        index: the index by which rows of experts were gathered, if they were.
        gathered: the view's axis that it gathered, or JOINED.
    """

    views: tuple[View, ...]
    axes: tuple[int | None, ...]
    index: ir.Value | None = None
    gathered: int | None = None

    @property
    def view(self) -> View:
        """Any of the views; they have one shape."""
        return self.views[0]

    def size(self, axis: int) -> int:
        """Size of an axis of the operand, 1 for those that an index made."""
        at = self.axes[axis]
        if at is None:
            return 1
        return len(self.views) if at == JOINED else self.view.shape[at]

    def map(self, change: Callable[[View], View | None]) -> Operand | None:
        """The operand with its views changed alike."""
        changed = [change(view) for view in self.views]
        views = tuple(view for view in changed if view is not None)
        return replace(self, views=views) if len(views) == len(changed) else None

    def matrices(self, rows: int, columns: int) -> list[View] | None:
        """The matrices [rows,columns] of all experts by axes of the operand; a single one for an operand of one expert.

        None where a third axis has a size, or the experts' axis isn't told.
        """
        return self._experts([self.axes[rows], self.axes[columns]])

    def vectors(self, entries: int) -> list[View] | None:
        """The vectors of all experts, for biases."""
        return self._experts([self.axes[entries]])

    def _experts(self, kept: list[int | None]) -> list[View] | None:
        if any(axis is None or axis == JOINED for axis in kept):
            return None
        wanted = [axis for axis in kept if axis is not None]
        others = [axis for axis, size in enumerate(self.view.shape) if axis not in wanted and size != 1]
        if len(self.views) > 1:
            return [_only(view, wanted) for view in self.views] if not others else None
        if not others:
            # An experts' axis of size 1 that is indexed is still one.
            return [_only(self.view, wanted)]
        if len(others) > 1:
            return None
        (axis,) = others
        return [_only(self.view.take(axis, e, e + 1), wanted) for e in range(self.view.shape[axis])]


JOINED = -1


def _only(view: View, axes: list[int]) -> View:
    """The named axes in that order; all others have size 1."""
    others = [axis for axis in range(len(view.shape)) if axis not in axes]
    moved = view.transpose([*axes, *others])
    for _ in others:
        moved = moved.drop(len(axes))
    return moved


class Tracer:
    """Traces weight operands; with `scale`, as if the sizes it names were smaller (`probe.py` has the reason)."""

    def __init__(self, constants: Constants, scale: Scale = lambda size: size) -> None:
        """Shapes and bounds come from `constants`, each number passed through `scale`."""
        self._constants = constants
        self._scale = scale
        self._known: dict[ir.Value, Operand | None] = {}

    def trace(self, value: ir.Value | None) -> Operand | None:
        """The operand behind a value, or None if it is no stored weight."""
        if value is None:
            return None
        if value not in self._known:
            self._known[value] = None
            self._known[value] = self._trace(value)
        return self._known[value]

    def _trace(self, value: ir.Value) -> Operand | None:
        tensor = ir.convenience.get_const_tensor(value) if _is_stored(value) else None
        if tensor is not None:
            if tensor.dtype not in _FLOATS or len(tensor.shape) < 1:
                return None
            shape = tuple(self._scale(size) for size in sizes_of(tensor))
            whole = View.whole(tensor)
            stand_in: Any = Scaled(tensor, shape)
            view = whole if shape == whole.shape else View.whole(stand_in)
            return Operand((view,), tuple(range(len(shape))))
        node = value.producer()
        if node is None or node.domain != "":
            return None
        if node.op_type == "Concat":
            return self._join(node)
        follow = _STEPS.get(node.op_type)
        source = self.trace(node.inputs[0]) if follow is not None and node.inputs else None
        return follow(self, node, source, value) if follow is not None and source is not None else None

    def ints(self, value: ir.Value | None) -> list[int] | None:
        """A constant vector with its sizes scaled."""
        numbers = self._constants.ints(value)
        return None if numbers is None else [self._scale(number) for number in numbers]

    def _join(self, node: ir.Node) -> Operand | None:
        """Concat of one tensor an expert, each with an axis of size 1 there."""
        parts = [self.trace(item) for item in node.inputs]
        first = parts[0]
        axis = node.attributes.get_int("axis", 0)
        if first is None or axis is None:
            return None
        axis %= len(first.axes)
        views = []
        for part in parts:
            plain = part is not None and part.axes == first.axes and len(part.views) == 1 and part.index is None
            if not plain or part is None or part.size(axis) != 1 or part.view.shape != first.view.shape:
                return None
            views.append(part.view)
        axes = list(first.axes)
        axes[axis] = JOINED
        return Operand(tuple(views), tuple(axes))


@dataclass(frozen=True)
class Scaled:
    """A stored tensor as the probe has it: smaller, and without data."""

    tensor: ir.TensorProtocol
    shape: tuple[int, ...]


def _is_stored(value: ir.Value) -> bool:
    node = value.producer()
    constant = node is not None and node.op_type == "Constant" and node.domain == ""
    return constant or (node is None and value.const_value is not None)


def _same(_: Tracer, __: ir.Node, source: Operand, ___: ir.Value) -> Operand | None:
    return source


def _cast(_: Tracer, node: ir.Node, source: Operand, __: ir.Value) -> Operand | None:
    to = node.attributes.get_int("to")
    return source if to in [int(dtype) for dtype in _FLOATS] else None


def _transpose(_: Tracer, node: ir.Node, source: Operand, __: ir.Value) -> Operand | None:
    order = node.attributes.get_ints("perm", tuple(reversed(range(len(source.axes)))))
    if len(order) != len(source.axes):
        return None
    return replace(source, axes=tuple(source.axes[axis] for axis in order))


def _unsqueeze(tracer: Tracer, node: ir.Node, source: Operand, _: ir.Value) -> Operand | None:
    at = tracer._constants.ints(node.inputs[1]) if len(node.inputs) > 1 else None
    if at is None:
        return None
    rank = len(source.axes) + len(at)
    places = {axis % rank for axis in at}
    rest = iter(source.axes)
    return replace(source, axes=tuple(None if axis in places else next(rest) for axis in range(rank)))


def _squeeze(tracer: Tracer, node: ir.Node, source: Operand, _: ir.Value) -> Operand | None:
    rank = len(source.axes)
    at = tracer._constants.ints(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if at is None:
        return None
    places = {axis % rank for axis in at}
    if any(source.axes[axis] is not None and source.size(axis) != 1 for axis in places):
        return None
    return replace(source, axes=tuple(axis for place, axis in enumerate(source.axes) if place not in places))


def _expand(tracer: Tracer, node: ir.Node, source: Operand, _: ir.Value) -> Operand | None:
    shape = tracer.ints(node.inputs[1])
    rank = len(source.axes) if shape is None else max(len(shape), len(source.axes))
    if shape is None:
        return None
    return replace(source, axes=(*([None] * (rank - len(source.axes))), *source.axes))


def _slice(tracer: Tracer, node: ir.Node, source: Operand, _: ir.Value) -> Operand | None:
    bounds = [tracer.ints(item) if item is not None else None for item in node.inputs[1:]]
    starts, ends = bounds[0], bounds[1]
    if starts is None or ends is None or any(given is None and item is not None for given, item in zip(bounds, node.inputs[1:], strict=True)):  # fmt: skip  # noqa: E501
        return None
    axes = (bounds[2] if len(bounds) > 2 else None) or list(range(len(starts)))
    steps = (bounds[3] if len(bounds) > 3 else None) or [1] * len(starts)
    result: Operand | None = source
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if result is None or step < 1:
            return None
        size = result.size(axis % len(result.axes))
        first, last = (max(0, min(size, bound + size if bound < 0 else bound)) for bound in (start, end))
        result = _take(result, axis % len(result.axes), first, last, step)
    return result


def _split(tracer: Tracer, node: ir.Node, source: Operand, value: ir.Value) -> Operand | None:
    axis = (node.attributes.get_int("axis", 0) or 0) % len(source.axes)
    size, number = source.size(axis), value.index()
    sizes = tracer.ints(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if sizes is None:
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            return None
        part = -(-size // len(node.outputs))
        sizes = [max(0, min(part, size - at * part)) for at in range(len(node.outputs))]
    assert number is not None
    start = sum(sizes[:number])
    return _take(source, axis, start, start + sizes[number], 1)


def _gather(tracer: Tracer, node: ir.Node, source: Operand, _: ir.Value) -> Operand | None:
    axis = (node.attributes.get_int("axis", 0) or 0) % len(source.axes)
    index = node.inputs[1]
    chosen = tracer._constants.get(index)
    if chosen is None:
        return _by_index(source, axis, index, _rank(index, 1))
    numbers = [int(number) % source.size(axis) for number in chosen.reshape(-1)]
    if len(numbers) != 1:
        contiguous = numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else False
        return _take(source, axis, numbers[0], numbers[-1] + 1, 1) if contiguous and chosen.ndim == 1 else None
    taken = _take(source, axis, numbers[0], numbers[0] + 1, 1)
    if taken is None:
        return None
    made: tuple[int | None, ...] = (taken.axes[axis],) if chosen.ndim else ()
    return replace(taken, axes=(*taken.axes[:axis], *made, *taken.axes[axis + 1 :])) if chosen.ndim < 2 else None


def _gather_nd(tracer: Tracer, node: ir.Node, source: Operand, _: ir.Value) -> Operand | None:
    """GatherND by an index [..,1], which is a Gather along the first axis."""
    index = node.inputs[1]
    if node.attributes.get_int("batch_dims", 0) or tracer._constants.get(index) is not None:
        return None
    return _by_index(source, 0, index, _rank(index, 2) - 1)


def _rank(index: ir.Value | None, otherwise: int) -> int:
    return otherwise if index is None or index.shape is None else len(index.shape)


def _by_index(source: Operand, axis: int, index: ir.Value | None, made: int) -> Operand | None:
    """Rows of experts by the router's index; the axes that the index makes stand where the experts' axis stood."""
    if source.index is not None or source.axes[axis] is None:
        return None
    axes = (*source.axes[:axis], *([None] * made), *source.axes[axis + 1 :])
    return replace(source, axes=axes, index=index, gathered=source.axes[axis])


def _reshape(tracer: Tracer, node: ir.Node, source: Operand, _: ir.Value) -> Operand | None:
    shape = tracer.ints(node.inputs[1])
    if shape is None:
        return _keeps_matrix(source, None)
    if source.index is not None or len(source.views) > 1:
        return _keeps_matrix(source, shape)
    sizes = [source.size(axis) for axis in range(len(source.axes))]
    shape = [sizes[at] if size == 0 and at < len(sizes) else size for at, size in enumerate(shape)]
    whole, known = 1, 1
    for size in sizes:
        whole *= size
    for size in shape:
        known *= size if size != -1 else 1
    shape = [whole // max(known, 1) if size == -1 else size for size in shape]
    moved = _only(source.view, [axis for axis in source.axes if axis is not None])
    reshaped = moved.reshape(shape)
    return None if reshaped is None else Operand((reshaped,), tuple(range(len(shape))))


def _keeps_matrix(source: Operand, shape: list[int] | None) -> Operand | None:
    """A reshape that only joins the axes before the last two, as after a gather [B,S,K,rows,columns]."""
    if shape is None or len(shape) < 2 or len(source.axes) < 2:
        return None
    last = [source.size(len(source.axes) - 2), source.size(len(source.axes) - 1)]
    leading_none = all(axis is None for axis in source.axes[:-2])
    if shape[-2:] != last or not leading_none:
        return None
    return replace(source, axes=(*([None] * (len(shape) - 2)), *source.axes[-2:]))


def _take(source: Operand, axis: int, start: int, stop: int, step: int) -> Operand | None:
    at = source.axes[axis]
    if at is None:
        return source if (start, stop) == (0, 1) else None
    if at == JOINED:
        kept = source.views[start:stop:step]
        if len(kept) > 1:
            return replace(source, views=kept)
        axes = tuple(None if place == axis else other for place, other in enumerate(source.axes))
        return replace(source, views=kept, axes=axes) if kept else None
    return source.map(lambda view: view.take(at, start, stop, step))


_Step = Callable[[Tracer, ir.Node, Operand, ir.Value], "Operand | None"]
_STEPS: dict[str, _Step] = {
    "Cast": _cast,
    "Expand": _expand,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Identity": _same,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
