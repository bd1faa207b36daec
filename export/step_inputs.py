"""What the selection has to know of a step, derived from the inputs that a foreign graph already has.

Phase: a step is a decode step where its token ids (or embeddings) [B,S,..] have S <= 1; budgets and floors apply there
alone. A graph without such an input doesn't say, so they apply to every step, and the caller passes E and 0 for a
prefill.

Padding: a row of the batch whose attention mask [B,..] is 0 throughout is padding. (Not its last column alone: exports
with a cache of fixed length have masks of that length, whose last columns are 0 for real tokens as well.) A graph
without such a mask gets an input `token_mask` of the shape of its tokens.

While the selection is off (a prefill, or a budget of E and no floor) nothing is masked: the model then gives what the
original gave, for padding too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

BUDGETS = "budgets"
FLOORS = "floors"
TOKEN_MASK = "token_mask"  # noqa: S105 - a tensor's name
ACTIVE = "active_experts"
# As for graphs from checkpoints: steps of up to this many tokens a sequence are decode steps.
DECODE_MAX_LENGTH = 1

_IDS = ("input_ids", "token_ids", "decoder_input_ids", "tokens", "ids")
_EMBEDDINGS = ("inputs_embeds", "input_embeds", "inputs_embeddings", "hidden_states")
_WHOLE = (ir.DataType.INT64, ir.DataType.INT32)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class AddedInput:
    """A graph input that the original didn't have; dimensions are sizes or names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str


class Step:
    """The values that all rewritten blocks share, made at the start of the graph."""

    def __init__(self, graph: ir.Graph) -> None:
        """Add the nodes and the inputs to `graph`; the inputs' shapes that depend on the blocks come with `finish`."""
        self._graph = graph
        self._nodes: list[ir.Node] = []
        self._taken = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
        self._taken |= {output.name for node in graph for output in node.outputs}
        self.notes: list[str] = []
        self.added: list[AddedInput] = []
        self.active: list[ir.Value] = []
        tokens = tokens_input(graph)
        self.budgets = self._input(BUDGETS, ir.DataType.INT32)
        self.floors = self._input(FLOORS, ir.DataType.FLOAT)
        self._decode = self._phase(tokens)
        self._rows = self._mask(tokens)
        graph.inputs.extend((self.budgets, self.floors))
        if self._nodes:
            graph.insert_before(graph[0], self._nodes)
        self._nodes = []

    @property
    def phase_known(self) -> bool:
        """Whether a prefill is told from a decode step by the graph itself."""
        return self._decode is not None

    def layer(self, op: Any, number: int, experts: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Budget [] i32, floor [] f32 and token mask [T] bool of MoE block `number`, as nodes of `op`."""
        position = op.Constant(value_int=number)
        budget, floor = op.Gather(self.budgets, position, axis=0), op.Gather(self.floors, position, axis=0)
        everything = op.Constant(value=ir.tensor(np.array(experts, np.int32)))
        none = op.Constant(value_float=0.0)
        if self._decode is not None:
            budget, floor = op.Where(self._decode, budget, everything), op.Where(self._decode, floor, none)
        off = op.And(op.GreaterOrEqual(budget, everything), op.LessOrEqual(floor, none))
        return budget, floor, op.Or(self._rows, off)

    def finish(self, experts: list[int]) -> None:
        """Shape the dials for blocks of `experts` [N] experts each, and make the output `active_experts` [N] i32."""
        self.budgets.shape = self.floors.shape = ir.Shape([len(experts)])
        applies = (
            "a decode step (one token a sequence)" if self.phase_known else "every step (the caller tells prefill)"
        )
        self.added[:0] = [
            AddedInput(
                str(self.budgets.name),
                "int32",
                (len(experts),),
                f"experts that each MoE block may load in {applies}; the number of experts is no limit",
            ),
            AddedInput(
                str(self.floors.name),
                "float32",
                (len(experts),),
                f"votes for each voting token that an expert needs in {applies}; 0: any vote will do",
            ),
        ]
        one_each = [self._node("Unsqueeze", value, self._constant([0])) for value in self.active]
        joined = ir.node("Concat", one_each, {"axis": 0}) if len(one_each) > 1 else ir.node("Identity", one_each)
        (output,) = joined.outputs
        output.name, output.dtype, output.shape = self._free(ACTIVE), ir.DataType.INT32, ir.Shape([len(experts)])
        self._graph.extend([*self._nodes, joined])
        self._graph.outputs.append(output)

    def _phase(self, tokens: ir.Value | None) -> ir.Value | None:
        if tokens is None:
            self.notes.append(
                "no input says how many tokens a sequence has in a step, so prefill can't be told from decode: the "
                "budgets and floors apply to every step; pass the number of experts and 0 for a prefill"
            )
            return None
        length = self._node("Shape", tokens, start=1, end=2)
        limit = self._constant([DECODE_MAX_LENGTH])
        return self._node("Squeeze", self._node("LessOrEqual", length, limit), self._constant([0]))

    def _mask(self, tokens: ir.Value | None) -> ir.Value:
        """[T] bool: which tokens are no padding."""
        mask = next(_masks(self._graph), None)
        if mask is None or tokens is None:
            return self._mask_input(tokens)
        real = mask
        if mask.dtype != ir.DataType.BOOL:
            zero = self._node("Constant", value=ir.tensor(np.zeros(1, _numpy(mask.dtype))))
            real = self._node("Not", self._node("Equal", mask, zero))
        counts = self._node("Cast", real, to=int(ir.DataType.INT32))
        any_real = self._node("ReduceMax", counts, self._constant([1]), keepdims=1)
        rows = self._node("Cast", any_real, to=int(ir.DataType.BOOL))
        spread = self._node("Expand", rows, self._node("Shape", tokens, start=0, end=2))
        return self._node("Reshape", spread, self._constant([-1]))

    def _mask_input(self, tokens: ir.Value | None) -> ir.Value:
        given = self._input(TOKEN_MASK, ir.DataType.BOOL)
        shape: list[int | str] = ["tokens"]
        if tokens is not None:
            assert tokens.shape is not None
            sizes = [size if isinstance(size, int) else size.value for size in tokens.shape]
            shape = [
                size if size is not None else name for size, name in zip(sizes, ("batch", "sequence"), strict=False)
            ]
        given.shape = ir.Shape(shape)
        self._graph.inputs.append(given)
        meaning = "false for tokens that are padding; they don't vote and load no expert while the selection is on"
        self.added.append(AddedInput(str(given.name), "bool", tuple(shape), meaning))
        self.notes.append(f"no attention mask of the batch was found: padding is told by the new input {given.name!r}")
        return self._node("Reshape", given, self._constant([-1]))

    def _input(self, name: str, dtype: ir.DataType) -> ir.Value:
        return ir.Value(name=self._free(name), type=ir.TensorType(dtype), shape=None)

    def _free(self, name: str) -> str:
        found = next(
            n for n in (name, f"lynx_{name}", *(f"lynx_{name}_{i}" for i in range(9999))) if n not in self._taken
        )
        self._taken.add(found)
        return found

    def _constant(self, values: list[int]) -> ir.Value:
        return self._node("Constant", value=ir.tensor(np.array(values, np.int64)))

    def _node(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        (output,) = node.outputs
        output.name = self._free(f"lynx_step_{op_type.lower()}")
        self._nodes.append(node)
        return output


def tokens_input(graph: ir.Graph) -> ir.Value | None:
    """The input that has the step's tokens along its first two axes [B,S]: ids, else embeddings, else None."""
    inputs = [value for value in graph.inputs if not value.is_initializer()]
    ids = [value for value in inputs if _rank(value) == 2 and value.dtype in _WHOLE]
    embedded = [value for value in inputs if _rank(value) == 3 and value.dtype in _FLOATS]
    for values, names in ((ids, _IDS), (embedded, _EMBEDDINGS)):
        named = sorted((names.index(v.name), v.name, v) for v in values if v.name in names)
        if named:
            return named[0][2]
    looked_up = [value for value in ids if any(_looks_up(node, at) for node, at in value.uses())]
    if len(looked_up) == 1:
        return looked_up[0]
    return embedded[0] if len(embedded) == 1 and not looked_up else None


def _looks_up(node: ir.Node, at: int) -> bool:
    """Whether it is an embedding: a Gather of rows of a stored table."""
    table = node.inputs[0] if node.inputs else None
    return node.op_type == "Gather" and at == 1 and table is not None and table.is_initializer() and _rank(table) == 2


def _masks(graph: ir.Graph) -> Iterator[ir.Value]:
    for value in graph.inputs:
        fits = _rank(value) == 2 and value.dtype in (*_WHOLE, *_FLOATS, ir.DataType.BOOL)
        if fits and value.name is not None and value.name.endswith("attention_mask"):
            yield value


def _numpy(dtype: ir.DataType | None) -> Any:
    assert dtype is not None
    return dtype.numpy()


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)
