"""What the ops of layers with a state mean for ONNX Runtime: the bodies that `functions.py` gives them.

Both end in ONNX Runtime's own op of that kind, which knows neither padding nor half precision on the CPU. `past_state`
has one reader in each body, on which everything else depends: it may be the same memory as `present_state`.
"""

from __future__ import annotations

from lynx_trt.errors import ExportError
from lynx_trt.export.ops import CAUSAL_CONV, CONV_ACTIVATIONS, LINEAR_ATTENTION, UPDATE_RULES, Attributes

CONV_INPUTS = ("values", "weight", "past_state", "lengths")
CONV_BIAS = "bias"
LINEAR_INPUTS = ("query", "key", "value", "decay", "beta", "past_state", "lengths")
STATE_OUTPUTS = ("output", "present_state")

# In the bodies: FLOAT = 1 (TensorProto.DataType).

_SEQUENCES = """
    sequences = Shape (lengths)
    first = Constant<value_ints = [0]> ()
    second = Constant<value_ints = [1]> ()
    third = Constant<value_ints = [2]> ()
    rest = Constant<value_ints = [-1]> ()
"""


def causal_conv_body(attributes: Attributes, *, bias: bool) -> str:
    """The body of a LynxCausalConv with these attributes.

    Raises:
        ExportError: an activation that is none of CONV_ACTIVATIONS.
    """
    _one_of(CAUSAL_CONV, attributes, "activation", CONV_ACTIVATIONS)
    activation = attributes["activation"]
    return f"""
        {_SEQUENCES}
        channels = Shape<start = 1, end = 2> (values)
        apart = Concat<axis = 0> (sequences, rest, channels)
        here = Reshape (values, apart)
        rows = Concat<axis = 1> (past_state, here)
        width = Shape<start = 1, end = 2> (past_state)
        before = Slice (rows, first, width, second)
        here_wide = Cast<to = 1> (here)
        before_wide = Cast<to = 1> (before)
        taps = Unsqueeze (weight, second)
        taps_wide = Cast<to = 1> (taps)
        {"bias_wide = Cast<to = 1> (bias)" if bias else ""}
        result, unused = com.microsoft.CausalConvWithState<channels_last = 1, activation = "{activation}">
            (here_wide, taps_wide, {"bias_wide" if bias else ""}, before_wide)
        narrow = CastLike (result, values)
        flat = Shape (values)
        output = Reshape (narrow, flat)
        # The last rows that are real: those before this step and its tokens lie in a row.
        zero = Constant<value_int = 0> ()
        one = Constant<value_int = 1> ()
        number = Squeeze (width)
        steps = Range (zero, number, one)
        ends = Unsqueeze (lengths, second)
        places = Add (ends, steps)
        index = Unsqueeze (places, third)
        present_state = GatherND<batch_dims = 1> (rows, index)
    """


def linear_attention_body(attributes: Attributes) -> str:
    """The body of a LynxLinearAttention with these attributes.

    Raises:
        ExportError: a rule that is none of UPDATE_RULES.
    """
    _one_of(LINEAR_ATTENTION, attributes, "update_rule", UPDATE_RULES)
    gated = attributes["update_rule"] == "gated"
    return f"""
        {_SEQUENCES}
        tokens = Shape<start = 0, end = 1> (query)
        length = Div (tokens, sequences)
        apart = Concat<axis = 0> (sequences, length, rest)
        zero = Constant<value_int = 0> ()
        one = Constant<value_int = 1> ()
        nothing = Constant<value_float = 0.0> ()
        number = Squeeze (length)
        offsets = Range (zero, number, one)
        ends = Unsqueeze (lengths, second)
        within = Less (offsets, ends)
        real = Unsqueeze (within, third)
        {_heads("query", attributes)}
        {_heads("key", attributes)}
        value_wide = Cast<to = 1> (value)
        value_apart = Reshape (value_wide, apart)
        decay_apart = Reshape (decay, apart)
        decay_real = Where (real, decay_apart, nothing)
        beta_apart = Reshape (beta, apart)
        beta_real = Where (real, beta_apart, nothing)
        {_WEIGHED if gated else "value_used = Identity (value_apart)"}
        result, present_state = com.microsoft.LinearAttention<
            q_num_heads = {attributes["key_heads"]}, kv_num_heads = {attributes["value_heads"]},
            update_rule = "{attributes["update_rule"]}", scale = {float(attributes["scale"])!r}
        > (query_used, key_used, value_used, past_state, decay_real, beta_real)
        result_real = Where (real, result, nothing)
        narrow = CastLike (result_real, value)
        flat = Shape (value)
        output = Reshape (narrow, flat)
    """


# Values times beta, which is one for each head.
_WEIGHED = """
    heads = Shape<start = 1, end = 2> (past_state)
    by_head = Concat<axis = 0> (sequences, length, heads, rest)
    value_heads = Reshape (value_apart, by_head)
    beta_heads = Unsqueeze (beta_real, rest)
    value_weighed = Mul (value_heads, beta_heads)
    value_used = Reshape (value_weighed, apart)
"""


def _heads(name: str, attributes: Attributes) -> str:
    """`NAME_used` [B,S,G D]: float32, and of length 1 a head if there is an epsilon."""
    epsilon = float(attributes["epsilon"])
    if not epsilon:
        return f"""
            {name}_wide = Cast<to = 1> ({name})
            {name}_used = Reshape ({name}_wide, apart)
        """
    return f"""
        {name}_by_head = Constant<value_ints = [0, {attributes["key_heads"]}, -1]> ()
        {name}_wide = Cast<to = 1> ({name})
        {name}_heads = Reshape ({name}_wide, {name}_by_head)
        {name}_squares = ReduceSumSquare<keepdims = 1> ({name}_heads, third)
        {name}_epsilon = Constant<value_float = {epsilon!r}> ()
        {name}_sum = Add ({name}_squares, {name}_epsilon)
        {name}_length = Sqrt ({name}_sum)
        {name}_unit = Div ({name}_heads, {name}_length)
        {name}_used = Reshape ({name}_unit, apart)
    """


def _one_of(op: str, attributes: Attributes, name: str, choices: tuple[str, ...]) -> None:
    if attributes[name] not in choices:
        raise ExportError(f"{op} has {name} = {attributes[name]!r}: it has to be one of {', '.join(choices)}.")
