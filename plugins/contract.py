"""The build-time contract of the TensorRT plugins, as plain data: what both launchers must agree on.

A plugin is found by (name, version, namespace); its fields are the attributes of the ONNX node; TensorRT asks it
for the types and shapes of its outputs, for the formats it takes and for its workspace. All of that is here, with
no TensorRT import, so that the Python plugin, the C++ plugin and the tests read one source.

Types are named as NumPy names them, plus "bfloat16". A tensor of type "float" has the graph's own precision: one of
FLOAT_TYPES, the same for all such tensors of a node. Dimensions are symbols of the glossary (T tokens, E experts,
K experts a token, H hidden, I expert intermediate; R is I times 2 with gated experts, I without; P and Q are H and I
in bytes of two values, G and J in numbers beside their blocks; D is in COMPUTED; of the ops that keep states B are
sequences, C channels, W weights a channel and V one less, N states of F by M values, A and U all keys and values of a
token, Y its decays). What is quantized is int8 for
its bits: of TensorRT for RTX 1.7.1 the parser makes int32 of uint8 constants, and the builder takes no uint8 input of
a plugin.

TensorRT's plugins do take int64 (tried with TensorRT for RTX 1.7 under the 11.4 API: a plugin that supports nothing
else for `index` is built into an engine), so `index` keeps the type that ONNX's TopK gives it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lynx_trt.experts import ACTIVATIONS, FORMATS, WEIGHTS, ExpertsForm
from lynx_trt.export.ops import (
    CAUSAL_CONV,
    CONV_ACTIVATIONS,
    DOMAIN,
    EXPERTS,
    LINEAR_ATTENTION,
    SELECT,
    UPDATE_RULES,
    VERSION,
)
from lynx_trt.selection import VOTES

FieldType = Literal["int32", "float32", "char", "int8"]
Value = int | float | str

FLOAT_TYPES = ("float32", "float16", "bfloat16")

# How kernels get into an engine. TensorRT stores the fields of each node once a profile, so only one node of a graph,
# the carrier, has the kernels themselves (the blob of `blob.Kernels.to_bytes`); all have their id, by which a launcher
# finds them among those of the process. A field that is empty is not stored, and not required.
KERNELS_ID = "kernels_id"
KERNELS = "kernels"


@dataclass(frozen=True)
class Field:
    """A field of a plugin, filled from the node's attribute of the same name.

    `default` is taken where the node lacks the attribute; None: the attribute is required. `choices` are the values
    allowed, () if any is.
    """

    name: str
    type: FieldType
    default: Value | None = None
    choices: tuple[Value, ...] = ()


# Whether LynxSelect hands the metadata of `dispatch_kernel.py` to LynxExperts, which then does not make it: a field of
# these two nodes, of which one has one output more and the other one input more. No exporter writes it; `prepare` does.
DISPATCH = "dispatch"
_DISPATCH_FIELD = Field(DISPATCH, "int32", 0, (0, 1))

# The field that says in what the weights are; other than "float", their tensors are those of QUANTIZED.
WEIGHTS_FIELD = "weights"

# Dimensions that are equal to none of an input: sums of products of symbols and numbers.
Terms = tuple[tuple[int | str, ...], ...]
COMPUTED: dict[str, Terms] = {"D": (("T", "K"), (2, "E"), (2,))}
# The same with inputs' dimensions, each as (input, axis), in the symbols' place.
Sources = tuple[tuple[int | tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Rule:
    """What a size of an input has to be: `factor` times the dimension `symbol` is `terms`, of other symbols.

    And `symbol` is a multiple of `each`.
    """

    symbol: str
    factor: int
    terms: Terms
    each: int = 1

    def __str__(self) -> str:
        left = self.symbol if self.factor == 1 else f"{self.factor} {self.symbol}"
        return f"{left} has to be {' + '.join(' '.join(map(str, term)) for term in self.terms)}"


KERNEL_FIELDS = (Field(KERNELS_ID, "char", ""), Field(KERNELS, "int8", ""))


@dataclass(frozen=True)
class Tensor:
    """An input or output: its name in the op's signature, its type and its symbolic shape, () for a scalar."""

    name: str
    type: str
    shape: tuple[str, ...]


_DISPATCH_TENSOR = Tensor(DISPATCH, "int32", ("D",))


@dataclass(frozen=True)
class Contract:
    """What TensorRT is told about one plugin. The inputs named `optional` are given all together or not at all.

    `of_node` is the contract of a node: with the field `dispatch` 1 the metadata is its last output (`hands_over`) or
    its last input; with quantized weights these are of other types and shapes, and their scales come after them.
    `rules` hold besides that a symbol is one size in all inputs.
    """

    name: str
    fields: tuple[Field, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    hands_over: bool = False
    optional: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = tuple(Rule(symbol, 1, terms) for symbol, terms in COMPUTED.items())
    version: str = str(VERSION)
    namespace: str = DOMAIN

    def of_node(self, values: Mapping[str, Value]) -> Contract:
        """The contract of a node with such fields."""
        inputs, outputs, rules = self.inputs, self.outputs, self.rules
        if _WEIGHTS[0] in inputs:
            place = inputs.index(_WEIGHTS[0])
            weights, sizes = _weights_of(values)
            inputs = (*inputs[:place], *weights, *inputs[place + len(_WEIGHTS) :])
            rules = (*rules, *sizes)
        if self.name == LINEAR_ATTENTION:
            heads = Rule("N", 1, ((int(values["value_heads"]),),))
            rules = (*rules, heads, Rule("A", 1, ((int(values["key_heads"]), "F"),)))
        if values.get(DISPATCH) and self.hands_over:
            outputs = (*outputs, _DISPATCH_TENSOR)
        elif values.get(DISPATCH):
            inputs = (*inputs, _DISPATCH_TENSOR)
        return replace(self, inputs=inputs, outputs=outputs, rules=rules)

    @property
    def stored_fields(self) -> tuple[Field, ...]:
        """All fields in the order in which they are stored: the attributes, then the kernels' two."""
        return (*self.fields, *KERNEL_FIELDS)

    @property
    def has_dispatch(self) -> bool:
        """Whether nodes of this op have the field `dispatch`."""
        return _DISPATCH_FIELD in self.fields

    def counts(self, shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
        """T and B of a step from its inputs' shapes; B is 0 for an op that knows of no sequences.

        Raises ValueError: the tokens are not as many for each sequence.
        """
        tokens = shapes[0][0]
        place = next((number for number, tensor in enumerate(self.inputs) if tensor.shape[:1] == ("B",)), None)
        sequences = 0 if place is None else shapes[place][0]
        if sequences and tokens % sequences:
            raise ValueError(f"{self.name}: T = {tokens} is no multiple of B = {sequences}")
        return tokens, sequences

    @property
    def input_counts(self) -> tuple[int, ...]:
        """The numbers of inputs a node may have, ascending."""
        every = len(self.inputs)
        return (every - len(self.optional), every) if self.optional else (every,)

    def inputs_of(self, n_inputs: int) -> tuple[Tensor, ...]:
        """The inputs of a node that has so many. Raises ValueError: it can't have so many."""
        if n_inputs not in self.input_counts:
            counts = " or ".join(map(str, self.input_counts))
            handed = f" with {DISPATCH} = 1" if _DISPATCH_TENSOR in self.inputs else ""
            raise ValueError(f"{self.name} has {n_inputs} inputs; it takes {counts}{handed}")
        if n_inputs == len(self.inputs):
            return self.inputs
        return tuple(tensor for tensor in self.inputs if tensor.name not in self.optional)

    def output_types(self, input_types: Sequence[str]) -> list[str]:
        """The outputs' types; a "float" output has the type of the first "float" input."""
        precision = next((got for want, got in zip(self.inputs, input_types, strict=False) if want.type == "float"), "")
        return [precision if output.type == "float" else output.type for output in self.outputs]

    def output_sources(self) -> list[tuple[Sources, ...]]:
        """For each output, for each of its dimensions: the sum of products of inputs' dimensions that it is."""
        return [tuple(self._sources(symbol) for symbol in output.shape) for output in self.outputs]

    def output_shapes(self, input_shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The outputs' shapes for concrete input shapes."""
        return [tuple(_size(dim, input_shapes) for dim in dims) for dims in self.output_sources()]

    def _sources(self, symbol: str) -> Sources:
        where: dict[str, tuple[int, int]] = {}
        for number, tensor in enumerate(self.inputs):
            for axis, each in enumerate(tensor.shape):
                where.setdefault(each, (number, axis))
        terms = COMPUTED.get(symbol, ((symbol,),))
        return tuple(tuple(where[each] if isinstance(each, str) else each for each in term) for term in terms)

    def supports(self, position: int, types: Sequence[str], n_inputs: int, *, linear: bool = True) -> bool:
        """Whether the tensor at `position` (inputs first, then outputs) may have types[position], given those before.

        Only the linear (row-major) format is taken, so TensorRT reformats at the boundary if it has to.
        """
        if not linear or n_inputs not in self.input_counts:
            return False
        tensors = (*self.inputs_of(n_inputs), *self.outputs)
        want = tensors[position].type
        if want != "float":
            return types[position] == want
        first = next(number for number, tensor in enumerate(tensors) if tensor.type == "float")
        return types[position] in FLOAT_TYPES and types[position] == types[first]

    def check_types(self, types: Sequence[str]) -> None:
        """Raise ValueError, naming the input, unless a node with inputs of such types can be this op."""
        precision: tuple[str, ...] = FLOAT_TYPES
        for tensor, kind in zip(self.inputs_of(len(types)), types, strict=True):
            allowed = precision if tensor.type == "float" else (tensor.type,)
            if kind not in allowed:
                raise ValueError(f"{self.name}: {tensor.name} is {kind}; allowed: {', '.join(allowed)}")
            if tensor.type == "float":
                precision = (kind,)

    def check_ranks(self, ranks: Sequence[int]) -> None:
        """Raise ValueError, naming the input, unless each has its number of dimensions."""
        for tensor, rank in zip(self.inputs_of(len(ranks)), ranks, strict=True):
            if rank != len(tensor.shape):
                shape = f"[{', '.join(tensor.shape)}]"
                raise ValueError(f"{self.name}: {tensor.name} has {rank} dimensions; it must be {shape}")

    def check_sizes(self, shapes: Sequence[Sequence[int]]) -> None:
        """Raise ValueError, naming the input, unless its sizes fit the others'; -1 is one that is not known yet."""
        known: dict[str, tuple[str, int]] = {}
        for tensor, shape in zip(self.inputs_of(len(shapes)), shapes, strict=True):
            for symbol, size in zip(tensor.shape, shape, strict=True):
                if size < 0:
                    continue
                name, first = known.setdefault(symbol, (tensor.name, size))
                if size != first:
                    raise ValueError(f"{self.name}: {tensor.name} has {symbol} = {size}, and {name} has {first}")
        sizes = {symbol: size for symbol, (_, size) in known.items()}
        for rule in self.rules:
            symbols = {each for term in rule.terms for each in term if isinstance(each, str)}
            if not {rule.symbol, *symbols} <= sizes.keys():
                continue
            right = sum(
                math.prod(sizes[each] if isinstance(each, str) else each for each in term) for term in rule.terms
            )
            if rule.factor * sizes[rule.symbol] != right:
                name, size = known[rule.symbol]
                raise ValueError(f"{self.name}: {name} has {rule.symbol} = {size}, and {rule}, which is {right}")
            if sizes[rule.symbol] % rule.each:
                name, size = known[rule.symbol]
                raise ValueError(
                    f"{self.name}: {name} has {rule.symbol} = {size}, which has to be a multiple of {rule.each}"
                )

    def parse_fields(self, given: dict[str, Value]) -> dict[str, Value]:
        """The value of every field, defaults filled in; attributes that are no fields are ignored.

        Raises ValueError: a required one is missing, or one has a value that is not allowed, alone or with another's.
        """
        values: dict[str, Value] = {}
        for spec in self.fields:
            value = given.get(spec.name, spec.default)
            if value is None:
                raise ValueError(f"{self.name} needs the attribute {spec.name}, and the node has none")
            if spec.choices and value not in spec.choices:
                allowed = ", ".join(map(str, spec.choices))
                raise ValueError(f"{self.name}: {spec.name} is {value!r}; allowed: {allowed}")
            values[spec.name] = value
        if values.get("transposed") and values[WEIGHTS_FIELD] != "float":
            kind = values[WEIGHTS_FIELD]
            raise ValueError(
                f"{self.name}: transposed is 1, and weights in {kind} have to lie along what is summed over"
            )
        return values


def _size(sources: Sources, shapes: Sequence[Sequence[int]]) -> int:
    """A dimension of concrete shapes."""
    return sum(
        math.prod(each if isinstance(each, int) else shapes[each[0]][each[1]] for each in term) for term in sources
    )


_FORM = ExpertsForm()

_WEIGHTS = (
    Tensor("gate_up", "float", ("E", "R", "H")),
    Tensor("down", "float", ("E", "H", "I")),
)
# With transposed = 1.
_TRANSPOSED = (
    Tensor("gate_up", "float", ("E", "H", "R")),
    Tensor("down", "float", ("E", "I", "H")),
)


def _quantized(kind: str) -> tuple[Tensor, ...]:
    """What stands in their place where they are quantized."""
    stored = FORMATS[kind]
    width, inner = ("H", "I") if stored.per_byte == 1 else ("P", "Q")
    return (
        Tensor("gate_up", "int8", ("E", "R", width)),
        Tensor("down", "int8", ("E", "H", inner)),
        Tensor("gate_up_scale", stored.scale_type, ("E", "R", "G")),
        Tensor("down_scale", stored.scale_type, ("E", "H", "J")),
    )


def _quantized_rules(kind: str, rows: int) -> tuple[Rule, ...]:
    """What has to hold between their dimensions, an expert having gate_up of `rows` times I rows."""
    stored = FORMATS[kind]
    scales = stored.scales(stored.block)  # numbers a block
    width, inner = ("H", "I") if stored.per_byte == 1 else ("H", "Q")
    packed = () if stored.per_byte == 1 else (Rule("P", stored.per_byte, (("H",),)),)
    return (
        Rule("R", 1, (_times(rows * stored.per_byte, inner),)),
        *packed,
        Rule("G", stored.block, (_times(scales, width),), scales),
        Rule("J", stored.block, (_times(scales * stored.per_byte, inner),), scales),
    )


def _times(factor: int, symbol: str) -> tuple[int | str, ...]:
    return (symbol,) if factor == 1 else (factor, symbol)


# By the field `weights`.
QUANTIZED = {kind: _quantized(kind) for kind in FORMATS}


def _weights_of(values: Mapping[str, Value]) -> tuple[tuple[Tensor, ...], tuple[Rule, ...]]:
    """The tensors of a node's weights, and what has to hold between their dimensions."""
    kind, rows = str(values.get(WEIGHTS_FIELD)), 1 if values.get("gated") == 0 else 2
    if kind in QUANTIZED:
        return QUANTIZED[kind], _quantized_rules(kind, rows)
    return _TRANSPOSED if values.get("transposed") else _WEIGHTS, (Rule("R", 1, (_times(rows, "I"),)),)


SELECT_CONTRACT = Contract(
    name=SELECT,
    fields=(
        Field("vote", "char", choices=VOTES),
        Field("guarantee", "int32"),
        Field("sensitivity", "float32"),
        Field("remap", "int32", choices=(0, 1)),
        Field("power", "float32", 1.0),
        Field("alpha", "float32", 1.0),
        Field("beta", "int32", 4),
        Field("renormalize", "int32", choices=(0, 1)),
        Field("scale", "float32", 1.0),
        _DISPATCH_FIELD,
    ),
    inputs=(
        Tensor("choice", "float32", ("T", "E")),
        Tensor("combine", "float32", ("T", "E")),
        Tensor("topk_index", "int64", ("T", "K")),
        Tensor("topk_weight", "float32", ("T", "K")),
        Tensor("budget", "int32", ()),
        Tensor("floor", "float32", ()),
        Tensor("token_mask", "bool", ("T",)),
    ),
    outputs=(
        Tensor("index", "int64", ("T", "K")),
        Tensor("weight", "float32", ("T", "K")),
        Tensor("active", "int32", ()),
    ),
    hands_over=True,
)

EXPERTS_CONTRACT = Contract(
    name=EXPERTS,
    fields=(
        Field("activation", "char", _FORM.activation, ACTIVATIONS),
        Field("gated", "int32", int(_FORM.gated), (0, 1)),
        Field("transposed", "int32", int(_FORM.transposed), (0, 1)),
        Field("interleaved", "int32", int(_FORM.interleaved), (0, 1)),
        Field("alpha", "float32", _FORM.alpha),
        Field("limit", "float32", _FORM.limit),
        Field("up_offset", "float32", _FORM.up_offset),
        Field(WEIGHTS_FIELD, "char", _FORM.weights, WEIGHTS),
        _DISPATCH_FIELD,
    ),
    inputs=(
        Tensor("hidden", "float", ("T", "H")),
        Tensor("index", "int64", ("T", "K")),
        Tensor("weight", "float32", ("T", "K")),
        *_WEIGHTS,
        Tensor("gate_up_bias", "float", ("E", "R")),
        Tensor("down_bias", "float", ("E", "H")),
    ),
    outputs=(Tensor("output", "float", ("T", "H")),),
    optional=("gate_up_bias", "down_bias"),
)

CAUSAL_CONV_CONTRACT = Contract(
    name=CAUSAL_CONV,
    fields=(Field("activation", "char", choices=CONV_ACTIVATIONS),),
    inputs=(
        Tensor("values", "float", ("T", "C")),
        Tensor("weight", "float", ("C", "W")),
        Tensor("past_state", "float", ("B", "V", "C")),
        Tensor("lengths", "int64", ("B",)),
        Tensor("bias", "float", ("C",)),
    ),
    outputs=(Tensor("output", "float", ("T", "C")), Tensor("present_state", "float", ("B", "V", "C"))),
    optional=("bias",),
    rules=(Rule("W", 1, (("V",), (1,))),),
)

LINEAR_ATTENTION_CONTRACT = Contract(
    name=LINEAR_ATTENTION,
    fields=(
        Field("key_heads", "int32"),
        Field("value_heads", "int32"),
        Field("update_rule", "char", choices=UPDATE_RULES),
        Field("scale", "float32"),
        Field("epsilon", "float32"),
    ),
    inputs=(
        Tensor("query", "float", ("T", "A")),
        Tensor("key", "float", ("T", "A")),
        Tensor("value", "float", ("T", "U")),
        Tensor("decay", "float32", ("T", "Y")),
        Tensor("beta", "float32", ("T", "N")),
        Tensor("past_state", "float32", ("B", "N", "F", "M")),
        Tensor("lengths", "int64", ("B",)),
    ),
    outputs=(Tensor("output", "float", ("T", "U")), Tensor("present_state", "float32", ("B", "N", "F", "M"))),
    rules=(Rule("U", 1, (("N", "M"),)),),
)

# The workspace follows from the kernels that the engine carries (`launcher.workspace_bytes`); without any it is 0.
CONTRACTS: dict[str, Contract] = {
    each.name: each for each in (SELECT_CONTRACT, EXPERTS_CONTRACT, CAUSAL_CONV_CONTRACT, LINEAR_ATTENTION_CONTRACT)
}
