"""What the ops mean for ONNX Runtime: a function body for each set of attributes.

With these a lynx graph runs in ONNX Runtime as it is; there they are the reference, and what runs where no faster form
fits, so both bodies are short (a node costs about a microsecond) and load only the experts in use. The semantics are
those of `lynx_trt.selection.select` and `lynx_trt.experts.experts`; the indices are equal, not close.

A body is text made for one set of attributes and the presence of biases; nodes that differ in either carry
different overloads. `lynx_trt.export.ops` has the signatures. Quantized weights are looked up in tables, of the experts
in use alone and at every step: ONNX Runtime on the CPU has no op for 4-bit floats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray

from lynx_trt import fp8, int4, mxfp4
from lynx_trt.errors import ExportError
from lynx_trt.experts import FORMATS, WEIGHTS
from lynx_trt.export.ops import (
    CAUSAL_CONV,
    DOMAIN,
    EXPERTS,
    LINEAR_ATTENTION,
    OPSET,
    SELECT,
    VERSION,
    Attributes,
)
from lynx_trt.export.state_functions import (
    CONV_BIAS,
    CONV_INPUTS,
    LINEAR_INPUTS,
    STATE_OUTPUTS,
    causal_conv_body,
    linear_attention_body,
)
from lynx_trt.selection import TINY

# Functions with overloads came with this version of the format.
_IR_VERSION = 10

_OPS = (SELECT, EXPERTS, CAUSAL_CONV, LINEAR_ATTENTION)
_CONTRIB = "com.microsoft"  # ONNX Runtime's own ops

_SELECT_INPUTS = ("choice", "combine", "topk_index", "topk_weight", "budget", "floor", "token_mask")
_EXPERTS_INPUTS = ("hidden", "index", "weight", "gate_up", "down")
# Of quantized weights.
_SCALES = ("gate_up_scale", "down_scale")
_BIASES = ("gate_up_bias", "down_bias")

# Tables by byte: both values of it and the scale that it is, or its one value. Too long for a body's text, which has no
# NaN either.
_TABLES = {
    "mxfp4": {"pairs": mxfp4.PAIRS, "powers": mxfp4.SCALES[:, None]},
    "nvfp4": {"pairs": mxfp4.PAIRS},
    "fp8": {"numbers": fp8.VALUES},
    **{
        int4.name_of(block, zeros=zeros): {"pairs": int4.PAIRS if zeros else int4.PAIRS - int4.ZERO}
        for block in int4.BLOCKS
        for zeros in (False, True)
    },
}

# In the bodies: FLOAT = 1, INT32 = 6, INT64 = 7, DOUBLE = 11 (TensorProto.DataType).


def add_functions(model: onnx.ModelProto) -> int:
    """Give every lynx node of the model, also those in subgraphs, the function that defines it.

    The first variant of an op has the overload "", others "1", "2", ...; lynx functions that were there are replaced.
    After an error the model is as it was.

    Returns:
        How many nodes have a function now.

    Raises:
        ExportError: the model has another opset; a node is of no known op, lacks an attribute, or has other inputs
            than its attributes want.
    """
    nodes = list(_lynx_nodes(model.graph))
    variants = [_variant(node) for node in nodes]
    functions: dict[_Variant, onnx.FunctionProto] = {}
    for variant in variants:
        if variant not in functions:
            function = _variant_function(variant)
            before = sum(other.name == variant.op for other in functions.values())
            function.overload = str(before) if before else ""
            functions[variant] = function
    others = [function for function in model.functions if function.domain != DOMAIN]
    if nodes:
        _declare(model, functions.values())
    del model.functions[:]
    model.functions.extend([*others, *functions.values()])
    for node, variant in zip(nodes, variants, strict=True):
        node.overload = functions[variant].overload
    return len(nodes)


class _Variant(NamedTuple):
    """What tells one body from another."""

    op: str
    bias: bool
    attributes: tuple[tuple[str, str | int | float], ...]


def _variant(node: onnx.NodeProto) -> _Variant:
    if node.op_type not in _OPS:
        raise ExportError(f"Node {node.name!r} is {DOMAIN}.{node.op_type}: known are {', '.join(_OPS)}.")
    attributes = {attribute.name: _value(attribute) for attribute in node.attribute}
    return _Variant(node.op_type, _has_bias(node, attributes), tuple(sorted(attributes.items())))


def _variant_function(variant: _Variant) -> onnx.FunctionProto:
    attributes = dict(variant.attributes)
    if variant.op == SELECT:
        return select_function(attributes)
    if variant.op == EXPERTS:
        return experts_function(attributes, bias=variant.bias)
    if variant.op == CAUSAL_CONV:
        return causal_conv_function(attributes, bias=variant.bias)
    return linear_attention_function(attributes)


def _declare(model: onnx.ModelProto, bodies: Iterable[onnx.FunctionProto]) -> None:
    """State the versions that functions with overloads and our domain need."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset = versions.get("", versions.get("ai.onnx"))
    # ONNX Runtime inlines a body as if it were of the model's opset, whatever opset the body asks for.
    if opset != OPSET:
        raise ExportError(
            f"The model has opset {opset}, the bodies of the lynx ops need {OPSET}: convert the model first "
            "(onnx.version_converter.convert_version)."
        )
    model.ir_version = max(model.ir_version, _IR_VERSION)
    if DOMAIN not in versions:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
    if _CONTRIB not in versions and any(_CONTRIB in _domains(body) for body in bodies):
        model.opset_import.append(onnx.helper.make_opsetid(_CONTRIB, 1))


def _domains(function: onnx.FunctionProto) -> set[str]:
    return {entry.domain for entry in function.opset_import}


def causal_conv_function(attributes: Attributes, *, bias: bool) -> onnx.FunctionProto:
    """The body of a `LynxCausalConv` with these attributes (`ops.causal_conv_attributes`).

    Raises:
        ExportError: an attribute is missing or not known.
    """
    _require(attributes, CAUSAL_CONV, "activation")
    inputs = (*CONV_INPUTS, CONV_BIAS) if bias else CONV_INPUTS
    return _function(CAUSAL_CONV, inputs, STATE_OUTPUTS, causal_conv_body(attributes, bias=bias), attributes)


def linear_attention_function(attributes: Attributes) -> onnx.FunctionProto:
    """The body of a `LynxLinearAttention` with these attributes (`ops.linear_attention_attributes`).

    Raises:
        ExportError: an attribute is missing or not known.
    """
    _require(attributes, LINEAR_ATTENTION, "key_heads value_heads update_rule scale epsilon")
    return _function(LINEAR_ATTENTION, LINEAR_INPUTS, STATE_OUTPUTS, linear_attention_body(attributes), attributes)


def select_function(attributes: Attributes) -> onnx.FunctionProto:
    """The body of a `LynxSelect` with these attributes (`ops.select_attributes`).

    Raises:
        ExportError: an attribute is missing.
    """
    _require(attributes, SELECT, "vote guarantee sensitivity remap power alpha beta renormalize scale")
    body = f"""
        {_SELECT_CONSTANTS}
        {_SELECT_ROWS}
        # Step 1. The selection's nodes are skipped, not run and ignored: prefill is the long batch.
        index, weight = If (unlimited) <
            then_branch = all_experts () => (own_index, own_weight) {{
                own_index = Where (row, topk_index, nowhere)
                own_weight = Where (row, topk_weight, zero)
            }},
            else_branch = some_experts () => (new_index, new_weight) {{
                {_select_votes(attributes)}
                {_SELECT_KEPT}
                {_select_reroute(attributes)}
            }}
        >
        {_SELECT_ACTIVE}
    """
    return _function(SELECT, _SELECT_INPUTS, ("index", "weight", "active"), body, attributes)


_SELECT_CONSTANTS = f"""
    first = Constant<value_ints = [0]> ()
    last = Constant<value_ints = [1]> ()
    flat = Constant<value_ints = [-1]> ()
    nowhere = Constant<value_int = -1> ()
    expert0 = Constant<value_int = 0> ()
    zero = Constant<value_float = 0.0> ()
    minus_inf = Constant<value_float = -inf> ()
    zero64 = Constant<value = double {{0}}> ()
    one64 = Constant<value = double {{1}}> ()
    inf64 = Constant<value = double {{inf}}> ()
    tiny64 = Constant<value = double {{{TINY!r}}}> ()
    largest_float = Constant<value_float = {float(np.finfo(np.float32).max)!r}> ()
"""

# Step 0: the rows that count, no padding and every value finite. (NaN <= x is false; a maximum can lose a NaN.)
_SELECT_ROWS = """
    values = Concat<axis = 1> (choice, combine, topk_weight)
    sizes = Abs (values)
    finite = LessOrEqual (sizes, largest_float)
    sound = ReduceMin<keepdims = 0> (finite, last)
    counts = And (sound, token_mask)
    row = Unsqueeze (counts, last)
    experts = Shape<start = 1, end = 2> (choice)
    budget64 = Cast<to = 7> (budget)
    room = Min (budget64, experts)
    no_limit = Equal (room, experts)
    no_floor = LessOrEqual (floor, zero)
    unlimited = And (no_limit, no_floor)
"""

# Steps 2 and 3 come as votes of infinity. Experts are ranked by the sum as float32; one that has too few votes is -1.
_SELECT_KEPT = """
    ballots32 = Cast<to = 1> (counts)
    voting32 = ReduceSum<keepdims = 0> (ballots32)
    enough = Mul (floor, voting32)
    positions = Reshape (own, flat)
    voices = Reshape (voice, flat)
    votes = ScatterElements<axis = 0, reduction = "add"> (others_votes, positions, voices)
    votes32 = Cast<to = 1> (votes)
    wanted = Greater (votes32, enough)
    unwanted = ConstantOfShape<value = float[1] {-1}> (experts)
    ranking = Where (wanted, votes32, unwanted)
    best_votes, best_experts = TopK<axis = 0> (ranking, room)
    within = ScatterElements<axis = 0> (unwanted, best_experts, best_votes)
    affordable = GreaterOrEqual (within, zero)
    forced_experts = IsInf (votes)
    kept = Or (affordable, forced_experts)
"""

# An empty slot's -1 is the last of E + 1 counters, which the slice leaves out.
_SELECT_ACTIVE = """
    slots = Reshape (index, flat)
    one_more = Add (experts, last)
    unused = ConstantOfShape<value = int32[1] {0}> (one_more)
    slots_shape = Shape (slots)
    ones = ConstantOfShape<value = int32[1] {1}> (slots_shape)
    marks = ScatterElements<axis = 0> (unused, slots, ones)
    used = Slice (marks, first, experts)
    active = ReduceSum<keepdims = 0> (used)
"""


def _select_votes(attributes: Attributes) -> str:
    """Steps 2 to 4: `voice` [T,K], float64, infinite for what is kept anyway, to be added to `others_votes` [E]."""
    vote, sensitive = attributes["vote"], _float32(attributes["sensitivity"]) > 0
    no_votes = "others_votes = ConstantOfShape<value = double[1] {0}> (experts)"
    shares = _shares("share", "topk_weight") if vote == "weight" or sensitive else ""
    if vote == "count":
        votes = f"""
            {no_votes}
            ballot = Cast<to = 11> (row)
            slots_of_rows = Shape (topk_index)
            vote = Expand (ballot, slots_of_rows)
        """
    elif vote == "weight":
        votes = f"""
            {no_votes}
            power = Constant<value = double {{{_float32(attributes["power"])!r}}}> ()
            vote = Pow (share, power)
        """
    elif vote == "affinity":
        votes = f"""
            {no_votes}
            {_affinities(attributes)}
        """
    elif vote == "score":
        votes = f"""
            {_shares("score", "combine")}
            others_votes = ReduceSum<keepdims = 0> (score, first)
            slots_of_rows = Shape (topk_index)
            vote = ConstantOfShape<value = double[1] {{0}}> (slots_of_rows)
        """
    else:
        raise ExportError(f"{SELECT} has vote = {vote!r}: it has to be count, weight, affinity or score.")
    return f"""
        # Rows that don't count give their votes, all 0, to expert 0.
        own = Where (row, topk_index, expert0)
        width = Shape<start = 1, end = 2> (topk_index)
        {shares}
        {votes}
        {_forced(int(attributes["guarantee"]), _float32(attributes["sensitivity"]))}
    """


def _shares(name: str, values: str) -> str:
    """Each value over the sum of its row, float64; negative ones and rows that don't count are 0."""
    return f"""
        {name}_of_rows = Where (row, {values}, zero)
        {name}_positive = Relu ({name}_of_rows)
        {name}_wide = Cast<to = 11> ({name}_positive)
        {name}_sum = ReduceSum<keepdims = 1> ({name}_wide, last)
        {name}_divisor = Max ({name}_sum, tiny64)
        {name} = Div ({name}_wide, {name}_divisor)
    """


def _affinities(attributes: Attributes) -> str:
    """`vote` = n ** bin, bin = clamp(floor(alpha * ln(combine / best)), -beta, 0); the ratio is at most 1."""
    return f"""
        alpha = Constant<value = double {{{_float32(attributes["alpha"])!r}}}> ()
        lowest = Constant<value = double {{{-float(attributes["beta"])!r}}}> ()
        weighing = GatherElements<axis = 1> (combine, own)
        weighing_of_rows = Where (row, weighing, zero)
        weighing_positive = Relu (weighing_of_rows)
        affinity = Cast<to = 11> (weighing_positive)
        favourite = ReduceMax<keepdims = 1> (affinity, last)
        has_favourite = Greater (favourite, zero64)
        quotient = Div (affinity, favourite)
        ratio = Where (has_favourite, quotient, one64)
        logarithm = Log (ratio)
        level = Mul (alpha, logarithm)
        level32 = Cast<to = 1> (level)
        bin32 = Floor (level32)
        bin64 = Cast<to = 11> (bin32)
        bin = Max (bin64, lowest)
        ballots = Cast<to = 11> (counts)
        ballots_sum = ReduceSum<keepdims = 0> (ballots)
        voting = Max (ballots_sum, one64)
        strength = Pow (voting, bin)
        vote = Where (row, strength, zero64)
    """


def _forced(guarantee: int, sensitivity: float) -> str:
    """`voice`: the vote, but infinite for the k0 best of a token and for all experts of a sensitive token."""
    best = f"""
        # The rank of a slot among its token's K: how many are ahead of it, ties to the lower expert.
        middle = Constant<value_ints = [1]> ()
        end = Constant<value_ints = [2]> ()
        own_choice = GatherElements<axis = 1> (choice, own)
        choice_ahead = Unsqueeze (own_choice, middle)
        choice_here = Unsqueeze (own_choice, end)
        expert_ahead = Unsqueeze (own, middle)
        expert_here = Unsqueeze (own, end)
        higher = Greater (choice_ahead, choice_here)
        equal = Equal (choice_ahead, choice_here)
        lower = Less (expert_ahead, expert_here)
        tie_ahead = And (equal, lower)
        ahead = Or (higher, tie_ahead)
        ahead64 = Cast<to = 7> (ahead)
        rank = ReduceSum<keepdims = 0> (ahead64, end)
        guarantee = Constant<value_int = {guarantee}> ()
        best = Less (rank, guarantee)
    """
    sensitive = f"""
        tau = Constant<value_float = {sensitivity!r}> ()
        width64 = Cast<to = 11> (width)
        share_max = ReduceMax<keepdims = 1> (share, last)
        share_scaled = Mul (width64, share_max)
        excess = Sub (share_scaled, one64)
        others = Sub (width64, one64)
        confidence64 = Div (excess, others)
        confidence = Cast<to = 1> (confidence64)
        unsure = Less (confidence, tau)
        # With K of 1 the one expert stands out, whatever 0 / 0 gives.
        alternatives = Greater (width64, one64)
        sensitive = And (unsure, alternatives)
    """
    if guarantee and sensitivity > 0:
        forced = f"{best} {sensitive} forced = Or (best, sensitive)"
    elif guarantee:
        forced = f"{best} forced = Identity (best)"
    elif sensitivity > 0:
        forced = f"{sensitive} forced = Identity (sensitive)"
    else:
        return "voice = Identity (vote)"
    return f"""
        {forced}
        forced_of_rows = And (forced, row)
        voice = Where (forced_of_rows, inf64, vote)
    """


def _select_reroute(attributes: Attributes) -> str:
    """Step 6: `new_index` and `new_weight` [T,K]; a row that doesn't count may use nothing, so it gets -1 and 0."""
    allowed = "allowed = And (row, kept)"
    if not attributes["remap"]:
        allowed = """
            table = Shape (choice)
            nobodys = ConstantOfShape<value = bool[1] {0}> (table)
            slots_of_own = Shape (own)
            yes = ConstantOfShape<value = bool[1] {1}> (slots_of_own)
            owned = ScatterElements<axis = 1> (nobodys, own, yes)
            kept_of_rows = And (row, kept)
            allowed = And (kept_of_rows, owned)
        """
    factor = "factor = Identity (scale)"
    if attributes["renormalize"]:
        factor = """
            weight_sum = ReduceSum<keepdims = 1> (wide, last)
            weightless = Equal (weight_sum, zero64)
            scale_over_sum = Div (scale, weight_sum)
            factor = Where (weightless, zero64, scale_over_sum)
        """
    return f"""
        {allowed}
        ranked = Where (allowed, choice, minus_inf)
        best_choice, best_index = TopK<axis = 1> (ranked, width)
        empty = IsInf (best_choice)
        filled_index = Where (empty, nowhere, best_index)
        combined = GatherElements<axis = 1> (combine, best_index)
        filled = Where (empty, zero, combined)
        wide = Cast<to = 11> (filled)
        scale = Constant<value = double {{{_float32(attributes["scale"])!r}}}> ()
        {factor}
        weighed = Mul (wide, factor)
        filled_weight = Cast<to = 1> (weighed)
        own_kept = Gather<axis = 0> (kept, own)
        all_kept = ReduceMin<keepdims = 1> (own_kept, last)
        unchanged = And (all_kept, row)
        new_index = Where (unchanged, topk_index, filled_index)
        new_weight = Where (unchanged, topk_weight, filled_weight)
    """


def experts_function(attributes: Attributes, *, bias: bool) -> onnx.FunctionProto:
    """The body of a `LynxExperts` with these attributes (`ops.experts_attributes`).

    It loops over the experts in use alone, and accumulates in float32 whatever the type of `hidden` and the weights.
    A token's experts have to be distinct.

    Raises:
        ExportError: an attribute is missing or not known, or quantized weights are transposed.
    """
    _require(attributes, EXPERTS, "activation gated transposed interleaved alpha limit up_offset weights")
    inputs = _experts_inputs(attributes) + (_BIASES if bias else ())
    kind = str(attributes["weights"])
    if kind != "float" and attributes["transposed"]:
        raise ExportError(f"{EXPERTS} has transposed weights in {kind}, which no body is written for.")
    body = f"""
        {_EXPERTS_SLOTS}
        result = Loop (active, , nothing) <
            body = one_expert (int64 i, bool go, float[t, h] sum) => (bool on, float[t, h] new_sum) {{
                expert = Gather<axis = 0> (used, i)
                hits = Equal (index, expert)
                where = NonZero (hits)
                tokens_slots = Transpose<perm = [1, 0]> (where)
                tokens = Gather<axis = 1> (tokens_slots, first)
                inputs = GatherND (wide_hidden, tokens)
                {_linear("inner", "inputs", "gate_up", attributes, bias=bias)}
                {_activate(attributes)}
                {_linear("outputs", "activated", "down", attributes, bias=bias)}
                weight_here = GatherND (wide_weight, tokens_slots)
                weighed = Mul (outputs, weight_here)
                new_sum = ScatterND<reduction = "add"> (sum, tokens, weighed)
                on = Identity (go)
            }}
        >
        output = CastLike (result, hidden)
    """
    return _function(EXPERTS, inputs, ("output",), body, attributes, _TABLES.get(kind))


def _experts_inputs(attributes: Attributes) -> tuple[str, ...]:
    """The inputs of a LynxExperts without biases."""
    weights = attributes["weights"]
    if weights not in WEIGHTS:
        raise ExportError(f"{EXPERTS} has weights = {weights!r}: it has to be one of {', '.join(WEIGHTS)}.")
    return _EXPERTS_INPUTS if weights == "float" else _EXPERTS_INPUTS + _SCALES


_EXPERTS_SLOTS = """
    first = Constant<value_ints = [0]> ()
    second = Constant<value_ints = [1]> ()
    last = Constant<value_ints = [-1]> ()
    expert0 = Constant<value_int = 0> ()
    slots = Reshape (index, last)
    filled = GreaterOrEqual (slots, expert0)
    filled_slots = Compress<axis = 0> (slots, filled)
    used = Unique (filled_slots)
    active = Size (used)
    shape = Shape (hidden)
    nothing = ConstantOfShape<value = float[1] {0}> (shape)
    wide_hidden = Cast<to = 1> (hidden)
    weight32 = Cast<to = 1> (weight)
    wide_weight = Unsqueeze (weight32, last)
"""


def _linear(result: str, values: str, weights: str, attributes: Attributes, *, bias: bool) -> str:
    """`result` = values @ this expert's matrix of `weights`, and its bias."""
    added = (
        f"""
            {weights}_bias_here = Gather<axis = 0> ({weights}_bias, expert)
            {weights}_added = Cast<to = 1> ({weights}_bias_here)
        """
        if bias
        else ""
    )
    inputs = f"{values}, {weights}_wide" + (f", {weights}_added" if bias else "")
    kind = str(attributes["weights"])
    wide = f"{weights}_wide = Cast<to = 1> ({weights}_here)" if kind == "float" else _dequantized(weights, kind)
    return f"""
        {weights}_here = Gather<axis = 0> ({weights}, expert)
        {wide}
        {added}
        {result} = Gemm<transB = {0 if attributes["transposed"] else 1}> ({inputs})
    """


def _dequantized(weights: str, kind: str) -> str:
    """`wide` [R,D] of an expert's bytes `here`. A byte counts from the end of a table where it is negative."""
    stored = FORMATS[kind]
    table = "numbers" if stored.per_byte == 1 else "pairs"
    if kind == "mxfp4":
        beside = f"""
            {weights}_scale_places = Cast<to = 6> ({weights}_scale_here)
            {weights}_beside = Gather<axis = 0> (powers, {weights}_scale_places)
        """
    else:
        beside = f"""
            {weights}_last = Constant<value_ints = [-1]> ()
            {weights}_scale_wide = Cast<to = 1> ({weights}_scale_here)
            {weights}_beside = Unsqueeze ({weights}_scale_wide, {weights}_last)
        """
    scaled = f"{weights}_scaled = Mul ({weights}_blocks, {weights}_beside)"
    if stored.zeros:
        scaled = f"""
            {weights}_factors, {weights}_points = Split<axis = 1, num_outputs = 2> ({weights}_beside)
            {weights}_numbers = Sub ({weights}_blocks, {weights}_points)
            {weights}_scaled = Mul ({weights}_numbers, {weights}_factors)
        """
    return f"""
        {weights}_places = Cast<to = 6> ({weights}_here)
        {weights}_values = Gather<axis = 0> ({table}, {weights}_places)
        {weights}_in_blocks = Constant<value_ints = [0, -1, {stored.block}]> ()
        {weights}_blocks = Reshape ({weights}_values, {weights}_in_blocks)
        {weights}_scale_here = Gather<axis = 0> ({weights}_scale, expert)
        {beside}
        {scaled}
        {weights}_in_rows = Constant<value_ints = [0, -1]> ()
        {weights}_wide = Reshape ({weights}_scaled, {weights}_in_rows)
    """


def _activate(attributes: Attributes) -> str:
    """`activated` [.,I] of `inner` [.,2I] (or [.,I], ungated), as `ExpertsForm` says."""
    limit, offset = _float32(attributes["limit"]), _float32(attributes["up_offset"])
    clamp = f"""
        limit = Constant<value_float = {limit!r}> ()
        minus_limit = Constant<value_float = {-limit!r}> ()
    """
    clamp_up = f"{clamp} up = Clip (raw_up, minus_limit, limit)" if limit else "up = Identity (raw_up)"
    if not attributes["gated"]:
        return f"""
            raw_up = Identity (inner)
            {clamp_up}
            {_activation(attributes, "up", "activated")}
        """
    split = "raw_gate, raw_up = Split<axis = -1, num_outputs = 2> (inner)"
    if attributes["interleaved"]:
        split = """
            end = Constant<value_ints = [9223372036854775807]> ()
            stride = Constant<value_ints = [2]> ()
            raw_gate = Slice (inner, first, end, last, stride)
            raw_up = Slice (inner, second, end, last, stride)
        """
    shift = "factor = Identity (up)"
    if offset:
        shift = f"""
            up_offset = Constant<value_float = {offset!r}> ()
            factor = Add (up, up_offset)
        """
    return f"""
        {split}
        {clamp_up}
        {"gate = Min (raw_gate, limit)" if limit else "gate = Identity (raw_gate)"}
        {shift}
        {_activation(attributes, "gate", "acted")}
        activated = Mul (acted, factor)
    """


def _activation(attributes: Attributes, values: str, result: str) -> str:
    activation = attributes["activation"]
    if activation == "silu":
        return f"{result} = Swish<alpha = {_float32(attributes['alpha'])!r}> ({values})"
    if activation == "gelu":
        return f"{result} = Gelu ({values})"
    if activation == "gelu_tanh":
        return f'{result} = Gelu<approximate = "tanh"> ({values})'
    if activation == "relu":
        return f"{result} = Relu ({values})"
    if activation == "relu2":
        return f"""
            {result}_root = Relu ({values})
            {result} = Mul ({result}_root, {result}_root)
        """
    raise ExportError(f"{EXPERTS} has activation = {activation!r}: it has to be silu, gelu, gelu_tanh, relu or relu2.")


def _function(
    op: str,
    inputs: Iterable[str],
    outputs: Iterable[str],
    body: str,
    attributes: Attributes,
    tables: Mapping[str, NDArray[Any]] | None = None,
) -> onnx.FunctionProto:
    """`tables` are constants that the body reads by their names."""
    imports = f'"": {OPSET}, "{_CONTRIB}": 1' if f"{_CONTRIB}." in body else f'"": {OPSET}'
    text = f"""
        <domain: "{DOMAIN}", opset_import: [{imports}]>
        {op} <{", ".join(attributes)}> ({", ".join(inputs)}) => ({", ".join(outputs)}) {{ {body} }}
    """
    function = onnx.parser.parse_function(text)
    for name, table in (tables or {}).items():
        value = onnx.numpy_helper.from_array(table)
        function.node.insert(0, onnx.helper.make_node("Constant", [], [name], value=value))
    return function


def _lynx_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        if node.domain == DOMAIN:
            yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _lynx_nodes(subgraph)


def _has_bias(node: onnx.NodeProto, attributes: Attributes) -> bool:
    """Whether a lynx node has biases; also checks how many inputs it has."""
    if node.op_type == EXPERTS:
        _require(attributes, EXPERTS, "weights")
        plain = _experts_inputs(attributes)
        allowed = [len(plain), len(plain) + len(_BIASES)]
    elif node.op_type == CAUSAL_CONV:
        allowed = [len(CONV_INPUTS), len(CONV_INPUTS) + 1]
    else:
        allowed = [len(_SELECT_INPUTS if node.op_type == SELECT else LINEAR_INPUTS)]
    present = sum(1 for name in node.input if name)
    if present not in allowed or present != len(node.input):
        kind = f" with {attributes['weights']} weights" if node.op_type == EXPERTS else ""
        raise ExportError(
            f"Node {node.name!r} ({node.op_type}) has the inputs {list(node.input)}: it has to have "
            f"{' or '.join(map(str, allowed))}{kind}, none of them empty."
        )
    return len(allowed) > 1 and present == allowed[-1]


def _value(attribute: onnx.AttributeProto) -> str | int | float:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, int | float):
        return value
    raise ExportError(f"Attribute {attribute.name!r} of a lynx node is no text and no number: {value!r}.")


def _require(attributes: Attributes, op: str, names: str) -> None:
    missing = [name for name in names.split() if name not in attributes]
    if missing:
        raise ExportError(f"{op} lacks {', '.join(missing)}; it has {', '.join(attributes) or 'no attributes'}.")


def _float32(value: str | int | float) -> float:
    """The value that the node's attribute holds."""
    return float(np.float32(value))
