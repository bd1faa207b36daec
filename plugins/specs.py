"""What kernels are made for: one node's op, as plain data, read from its attributes and shapes.

A spec's `key` is one word that says all of it, the same for equal nodes of different layers. An engine's kernels are
stored under these keys, and a plugin finds its own by making the key from its fields and its inputs' shapes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lynx_trt.errors import UsageError
from lynx_trt.experts import FORMATS, ExpertsForm
from lynx_trt.export.ops import CONV_ACTIVATIONS, UPDATE_RULES
from lynx_trt.selection import VOTES

Value = int | float | str | bool

# The kernels' names for the contract's FLOAT_TYPES, and bytes of an element.
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def float32(value: float) -> float:
    """The value that a plugin's field holds."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def key_of(op: str, values: Mapping[str, Value]) -> str:
    """`op;name=value;...`: floats by the bits of the float32 in hexadecimal, so that any language writes the same."""
    words = [op]
    for name, value in values.items():
        if isinstance(value, float):
            words.append(f"{name}={struct.unpack('<I', struct.pack('<f', value))[0]:08x}")
        else:
            words.append(f"{name}={int(value) if isinstance(value, bool) else value}")
    return ";".join(words)


@dataclass(frozen=True)
class SelectSpec:
    """A LynxSelect: E, K and the attributes of the node; floats are those of float32.

    `dispatch_taken`: the metadata is an output of the node; otherwise it stays in the workspace, unfinished.

    Raises:
        UsageError: sizes or a vote that no kernel is made for.
    """

    experts: int
    experts_per_token: int
    vote: str
    guarantee: int
    sensitivity: float
    remap: bool
    power: float = 1.0
    alpha: float = 1.0
    beta: int = 4
    renormalize: bool = True
    scale: float = 1.0
    dispatch_taken: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self.experts, self.experts_per_token)
        if self.vote not in VOTES:
            raise UsageError(f"vote is {self.vote!r}: it has to be one of {', '.join(VOTES)}.")
        for each in ("sensitivity", "power", "alpha", "scale"):
            object.__setattr__(self, each, float32(getattr(self, each)))

    @classmethod
    def from_attributes(
        cls, attributes: Mapping[str, Value], *, experts: int, experts_per_token: int, dispatch_taken: bool = False
    ) -> SelectSpec:
        """From the attributes of a node (`export.ops.select_attributes`); those that are no fields are ignored."""
        values = _fields(cls, attributes)
        return cls(experts, experts_per_token, dispatch_taken=dispatch_taken, **values)  # type: ignore[arg-type]

    @property
    def key(self) -> str:
        """One word for the whole spec."""
        return key_of("select", {each.name: getattr(self, each.name) for each in fields(self)})


@dataclass(frozen=True)
class ExpertsSpec:
    """A LynxExperts: E, K, H, I, the precision of weights and activations, and the form.

    `dispatch_given`: the node has the metadata of LynxSelect as an input, and need not make it from `index`.

    Raises:
        UsageError: sizes or a precision that no kernel is made for.
    """

    experts: int
    experts_per_token: int
    hidden: int
    inner: int
    dtype: str
    form: ExpertsForm
    bias: bool = False
    dispatch_given: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self.experts, self.experts_per_token)
        _check_precision(self.dtype)
        if min(self.hidden, self.inner) < 1:
            raise UsageError(f"hidden and inner are {self.hidden} and {self.inner}: they have to be 1 or more.")
        if self.form.quantized and self.dtype == "float32":
            raise UsageError(f"dtype is float32: weights in {self.form.weights} need float16 or bfloat16 beside them.")
        block = FORMATS[self.form.weights].block if self.form.quantized else 1
        if self.hidden % block or self.inner % block:
            raise UsageError(
                f"hidden and inner are {self.hidden} and {self.inner}: in {self.form.weights} they have to be "
                f"multiples of {block}."
            )

    @classmethod
    def from_attributes(
        cls,
        attributes: Mapping[str, Value],
        *,
        experts: int,
        experts_per_token: int,
        hidden: int,
        inner: int,
        dtype: str,
        bias: bool = False,
        dispatch_given: bool = False,
    ) -> ExpertsSpec:
        """From the attributes of a node (`export.ops.experts_attributes`); those that are no fields are ignored."""
        form = ExpertsForm(**_fields(ExpertsForm, attributes))  # type: ignore[arg-type]
        return cls(experts, experts_per_token, hidden, inner, dtype, form, bias, dispatch_given)

    @property
    def weight_bytes(self) -> float:
        """Bytes of a weight, its share of a scale included."""
        if not self.form.quantized:
            return BYTES[self.dtype]
        return FORMATS[self.form.weights].bytes_a_value

    @property
    def key(self) -> str:
        """One word for the whole spec."""
        sizes: dict[str, Value] = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "form"}
        form: dict[str, Value] = {
            each.name: float(getattr(self.form, each.name)) if each.type == "float" else getattr(self.form, each.name)
            for each in fields(self.form)
        }
        return key_of("experts", {**sizes, **form})


@dataclass(frozen=True)
class DrawSpec:
    """The draw of the next token from each row of an engine's logits: V, and whether a row may have a top-k or top-p.

    Raises:
        UsageError: a vocabulary that no kernel is made for.
    """

    vocabulary: int
    nucleus: bool

    def __post_init__(self) -> None:
        # The lower half of a key is the token, and the blocks' leading tokens are sorted by one program.
        if not 1 <= self.vocabulary <= 1 << 20:
            raise UsageError(f"this model has {self.vocabulary} tokens: the kernels take 1 to {1 << 20}.")

    @property
    def key(self) -> str:
        """One word for the whole spec."""
        return key_of("draw", {each.name: getattr(self, each.name) for each in fields(self)})


@dataclass(frozen=True)
class CausalConvSpec:
    """A LynxCausalConv: C, W, the precision of all tensors, and whether there is a bias.

    Raises:
        UsageError: sizes, a precision or an activation that no kernel is made for.
    """

    channels: int
    width: int
    dtype: str
    bias: bool
    activation: str

    def __post_init__(self) -> None:
        _check_precision(self.dtype)
        if self.channels < 1:
            raise UsageError(f"this model's convolutions have {self.channels} channels: they need 1 or more.")
        if not 2 <= self.width <= 16:
            raise UsageError(f"this model's convolutions are {self.width} wide: the kernels take 2 to 16.")
        if self.activation not in CONV_ACTIVATIONS:
            raise UsageError(f"activation is {self.activation!r}: it has to be one of {', '.join(CONV_ACTIVATIONS)}.")

    @classmethod
    def from_attributes(
        cls, attributes: Mapping[str, Value], *, channels: int, width: int, dtype: str, bias: bool
    ) -> CausalConvSpec:
        """From the attributes of a node (`export.ops.causal_conv_attributes`)."""
        return cls(channels, width, dtype, bias, **_fields(cls, attributes))  # type: ignore[arg-type]

    @property
    def key(self) -> str:
        """One word for the whole spec."""
        return key_of("causal_conv", {each.name: getattr(self, each.name) for each in fields(self)})


@dataclass(frozen=True)
class LinearAttentionSpec:
    """A LynxLinearAttention: D, M, the precision of queries, keys and values, and the attributes of the node.

    `decays` is the width of the decay: N, or N D for one of each key. Floats are those of float32.

    Raises:
        UsageError: sizes, a precision or an update rule that no kernel is made for.
    """

    keys: int
    values: int
    dtype: str
    decays: int
    key_heads: int
    value_heads: int
    update_rule: str
    scale: float
    epsilon: float

    def __post_init__(self) -> None:
        _check_precision(self.dtype)
        if not (1 <= self.keys <= 1024 and self.values >= 1):
            raise UsageError(
                f"this model's states are of {self.keys} keys by {self.values} values: the kernels take 1 to 1024 keys "
                "by 1 value or more."
            )
        if self.key_heads < 1 or self.value_heads < 1 or self.value_heads % self.key_heads:
            raise UsageError(
                f"key_heads and value_heads are {self.key_heads} and {self.value_heads}: the latter has to be a "
                "multiple of the former."
            )
        if self.decays not in (self.value_heads, self.value_heads * self.keys):
            raise UsageError(
                f"a token has {self.decays} decays: it has to be {self.value_heads}, one for each head, or "
                f"{self.value_heads * self.keys}, one for each key."
            )
        if self.update_rule not in UPDATE_RULES:
            raise UsageError(f"update_rule is {self.update_rule!r}: it has to be one of {', '.join(UPDATE_RULES)}.")
        if not self.epsilon >= 0:
            raise UsageError(f"epsilon is {self.epsilon}: it has to be 0 or more.")
        for each in ("scale", "epsilon"):
            object.__setattr__(self, each, float32(getattr(self, each)))

    @classmethod
    def from_attributes(
        cls, attributes: Mapping[str, Value], *, keys: int, values: int, dtype: str, decays: int
    ) -> LinearAttentionSpec:
        """From the attributes of a node (`export.ops.linear_attention_attributes`)."""
        return cls(keys, values, dtype, decays, **_fields(cls, attributes))  # type: ignore[arg-type]

    @property
    def per_key(self) -> bool:
        """Whether each key decays by itself."""
        return self.decays != self.value_heads

    @property
    def key(self) -> str:
        """One word for the whole spec."""
        return key_of("linear_attention", {each.name: getattr(self, each.name) for each in fields(self)})


MoeSpec = SelectSpec | ExpertsSpec
StateSpec = CausalConvSpec | LinearAttentionSpec
Spec = MoeSpec | DrawSpec | StateSpec


@dataclass(frozen=True)
class Op:
    """An op of an engine: its spec, and the ranges (both ends included) of the engine's profiles.

    Of T; of an op whose sequences have states, of the tokens of one.
    """

    spec: Spec
    ranges: tuple[tuple[int, int], ...]


def _fields(kind: type[Any], attributes: Mapping[str, Value]) -> dict[str, Value]:
    """The attributes that are fields; whole numbers become bools where a field is one."""
    names = {each.name: each.type for each in fields(kind)}
    return {
        name: bool(value) if names[name] == "bool" else value for name, value in attributes.items() if name in names
    }


def _check_precision(dtype: str) -> None:
    if dtype not in POINTERS:
        raise UsageError(f"dtype is {dtype!r}: it has to be one of {', '.join(POINTERS)}.")


def _check_sizes(experts: int, experts_per_token: int) -> None:
    # A kernel holds a row of E in the registers of one program.
    if not 1 <= experts <= 1024:
        raise UsageError(f"this model has {experts} experts a layer: the kernels take 1 to 1024.")
    if not 1 <= experts_per_token <= min(experts, 64):
        raise UsageError(f"this model uses {experts_per_token} of {experts} experts a token: the kernels take 1 to 64.")
