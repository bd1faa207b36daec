"""The experts' form (activation and weight layout) and the NumPy reference of `LynxExperts`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lynx_trt import fp8, int4, mxfp4, nvfp4
from lynx_trt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.floating[Any]]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class Format:
    """How quantized weights are stored, along what a matrix sums over."""

    per_byte: int  # values
    block: int  # values that share a scale
    scale_type: str  # int8 | float32 | float, which is the graph's own precision, of 16 bits
    dequantize: Callable[[NDArray[Any], NDArray[Any]], NDArray[np.float32]]  # values and scales to what they mean
    zeros: bool = False  # whether the zero points of a row's blocks come behind its scales

    def scales(self, width: int) -> int:
        """How many numbers are beside a row of that many values."""
        return width // self.block * (2 if self.zeros else 1)

    @property
    def bytes_a_value(self) -> float:
        """What a weight takes, with its part of what is beside it."""
        return 1 / self.per_byte + self.scales(self.block) * _BYTES[self.scale_type] / self.block


_BYTES = {"int8": 1, "float32": 4, "float": 2}

FORMATS = {
    "mxfp4": Format(2, mxfp4.BLOCK, "int8", mxfp4.dequantize),
    "fp8": Format(1, fp8.BLOCK, "float32", fp8.dequantize),
    "nvfp4": Format(2, nvfp4.BLOCK, "float", nvfp4.dequantize),
    **{
        int4.name_of(block, zeros=zeros): Format(
            2, block, "float", partial(int4.dequantize, block=block, zeros=zeros), zeros
        )
        for block in int4.BLOCKS
        for zeros in (False, True)
    },
}
# Or as numbers of the graph's own precision.
WEIGHTS = ("float", *FORMATS)


def values_an_element(weights: str) -> int:
    """How many values lie in an element of a matrix as it is stored, `weights` being one of WEIGHTS."""
    return FORMATS[weights].per_byte if weights in FORMATS else 1


def weights_in_words(weights: str) -> str:
    """What people call one of FORMATS."""
    stored = FORMATS[weights]
    if not weights.startswith("int4"):
        return weights.upper()
    return f"int4 (blocks of {stored.block}{', zero points' if stored.zeros else ''})"


_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ExpertsForm:
    """How an expert turns its input into its output; the same for all experts of a layer.

    gate, up = gate_up @ x + bias; gate is clamped to at most `limit`, up to -limit..limit (0: neither is);
    act(gate) * (up + up_offset) @ down + bias. Ungated experts have no gate: act(up) @ down + bias.

    Raises:
        UsageError: a field is out of its range, or is about a gate that ungated experts don't have, or quantized
            weights are transposed.
    """

    activation: str = "silu"  # silu: z * sigmoid(alpha * z) | gelu | gelu_tanh | relu | relu2 (relu squared)
    gated: bool = True
    transposed: bool = False  # gate_up is [E,H,2I], not [E,2I,H]; down is [E,I,H], not [E,H,I]
    interleaved: bool = False  # gate and up alternate along 2I instead of one half each
    alpha: float = 1.0  # of silu; 1.702 makes it the quick form of gelu
    limit: float = 0.0
    up_offset: float = 0.0
    weights: str = "float"  # one of WEIGHTS

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UsageError(f"activation is {self.activation!r}: it has to be one of {', '.join(ACTIVATIONS)}.")
        for name in ("gated", "transposed", "interleaved"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} is {getattr(self, name)!r}: it has to be True or False.")
        if not 0 < self.alpha <= _FLOAT32_MAX:
            raise UsageError(f"alpha is {self.alpha!r}: it has to be a number above 0.")
        if not 0 <= self.limit <= _FLOAT32_MAX:
            raise UsageError(f"limit is {self.limit!r}: it has to be a number above 0, or 0 for no limit.")
        if not abs(self.up_offset) <= _FLOAT32_MAX:
            raise UsageError(f"up_offset is {self.up_offset!r}: it has to be a finite number.")
        if self.weights not in WEIGHTS:
            raise UsageError(f"weights is {self.weights!r}: it has to be one of {', '.join(WEIGHTS)}.")
        if self.quantized and self.transposed:
            raise UsageError(f"transposed is True: weights in {self.weights} have to lie along what is summed over.")
        if not self.gated and (self.interleaved or self.up_offset):
            raise UsageError("gated is False, so there is nothing to be interleaved with or to add up_offset to.")

    @property
    def quantized(self) -> bool:
        """Whether the weights have scales beside them."""
        return self.weights != "float"


def experts(
    form: ExpertsForm,
    hidden: ArrayLike,
    index: ArrayLike,
    weight: ArrayLike,
    gate_up: ArrayLike,
    down: ArrayLike,
    gate_up_bias: ArrayLike | None = None,
    down_bias: ArrayLike | None = None,
    gate_up_scale: ArrayLike | None = None,
    down_scale: ArrayLike | None = None,
) -> Floats:
    """The weighted sum of each token's experts: what `LynxExperts` computes.

    Only the experts in `index` are read. The sums are float64 for a float64 `hidden`, else float32.

    Args:
        form: activation and layout. `[A|B]` below: A, or B for `transposed` forms; ungated ones have I for 2I.
            Quantized weights have the shapes that mxfp4.py, nvfp4.py, fp8.py and int4.py give for [E,2I,H] and [E,H,I].
        hidden: float [T,H].
        index: int [T,K], -1 for an empty slot.
        weight: float [T,K].
        gate_up: float [E,2I,H | E,H,2I].
        down: float [E,H,I | E,I,H].
        gate_up_bias: float [E,2I].
        down_bias: float [E,H].
        gate_up_scale: of quantized weights alone: [E,2I,H/32] int8 in mxfp4, [E,2I,H/128] float32 in fp8, and as
            nvfp4.py and int4.py say.
        down_scale: of quantized weights alone: of [E,H,I] as that of [E,2I,H].

    Returns:
        [T,H] of hidden's dtype; a token with no expert gets zeros.

    Raises:
        UsageError: shapes that don't fit each other, or an expert index of E or more.
    """
    hidden, index, weight, gate_up, down = (np.asarray(a) for a in (hidden, index, weight, gate_up, down))
    biases = [None if bias is None else np.asarray(bias) for bias in (gate_up_bias, down_bias)]
    scales = [None if scale is None else np.asarray(scale) for scale in (gate_up_scale, down_scale)]
    _check(form, hidden, index, weight, gate_up, down, *biases, *scales)
    dtype = np.float64 if hidden.dtype == np.float64 else np.float32

    def linear(x: Floats, weights: Floats, scale: Floats | None, bias: Floats | None, expert: int) -> Floats:
        own = weights[expert]
        matrix: Floats = (own if scale is None else FORMATS[form.weights].dequantize(own, scale[expert])).astype(dtype)
        y: Floats = x @ (matrix if form.transposed else matrix.T)
        return y if bias is None else y + bias[expert].astype(dtype)

    result = np.zeros(hidden.shape, dtype)
    for expert in np.unique(index[index >= 0]):
        tokens, slots = np.nonzero(index == expert)
        inner = _activate(form, linear(hidden[tokens].astype(dtype), gate_up, scales[0], biases[0], expert))
        output = linear(inner, down, scales[1], biases[1], expert) * weight[tokens, slots, None].astype(dtype)
        np.add.at(result, tokens, output)
    with np.errstate(over="ignore"):  # beyond float16 is Inf, as it is for every backend
        return result.astype(hidden.dtype)


def _activate(form: ExpertsForm, gate_up: Floats) -> Floats:
    """[.,2I] (ungated: [.,I]) to [.,I]."""
    activation = _ACTIVATIONS[form.activation]
    limit = form.limit or np.inf
    if not form.gated:
        return activation(np.clip(gate_up, -limit, limit), form.alpha)
    if form.interleaved:
        gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
    else:
        gate, up = np.split(gate_up, 2, axis=1)
    acted = activation(np.minimum(gate, limit), form.alpha)
    return acted * (np.clip(up, -limit, limit) + form.up_offset)


def _silu(z: Floats, alpha: float) -> Floats:
    small = np.exp(-np.abs(alpha * z))  # at most 1: exp(alpha * z) could overflow
    activated: Floats = z * np.where(z >= 0, 1.0, small) / (1.0 + small)
    return activated


def _gelu(z: Floats, _alpha: float) -> Floats:
    erf = np.vectorize(math.erf, otypes=[np.float64])(z / math.sqrt(2.0)).astype(z.dtype)
    activated: Floats = 0.5 * z * (1.0 + erf)
    return activated


def _gelu_tanh(z: Floats, _alpha: float) -> Floats:
    return 0.5 * z * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z * z * z)))


def _relu(z: Floats, _alpha: float) -> Floats:
    positive: Floats = np.maximum(z, 0.0)
    return positive


def _relu2(z: Floats, _alpha: float) -> Floats:
    return _relu(z, 1.0) ** 2


_ACTIVATIONS: dict[str, Callable[[Floats, float], Floats]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
}


def _check(
    form: ExpertsForm,
    hidden: Floats,
    index: Floats,
    weight: Floats,
    gate_up: Floats,
    down: Floats,
    gate_up_bias: Floats | None,
    down_bias: Floats | None,
    gate_up_scale: Floats | None,
    down_scale: Floats | None,
) -> None:
    if hidden.ndim != 2 or down.ndim != 3:
        raise UsageError(f"hidden and down have the shapes {hidden.shape} and {down.shape}: they have to be 2D and 3D.")
    tokens, width = hidden.shape
    packed, stored = values_an_element(form.weights), FORMATS.get(form.weights)
    number, inner = down.shape[0], down.shape[1 if form.transposed else 2] * packed
    rows = 2 * inner if form.gated else inner
    shapes = {
        "index": (index, (tokens, *index.shape[1:2])),
        "weight": (weight, index.shape),
        "gate_up": (gate_up, (number, width, rows) if form.transposed else (number, rows, width // packed)),
        "down": (down, (number, inner, width) if form.transposed else (number, width, inner // packed)),
        "gate_up_bias": (gate_up_bias, (number, rows)),
        "down_bias": (down_bias, (number, width)),
        "gate_up_scale": (gate_up_scale, (number, rows, stored.scales(width) if stored else 0)),
        "down_scale": (down_scale, (number, width, stored.scales(inner) if stored else 0)),
    }
    for name, (array, shape) in shapes.items():
        if name.endswith("_scale") and (array is not None) != form.quantized:
            raise UsageError(f"{name} has to be {'given' if form.quantized else 'left out'} of {form.weights} weights.")
        if array is not None and array.shape != shape:
            raise UsageError(
                f"{name} has the shape {array.shape}: with this form and these inputs it has to be {shape}."
            )
    if stored and (width % stored.block or inner % stored.block):
        raise UsageError(
            f"H and I are {width} and {inner}: in {form.weights} they have to be multiples of {stored.block}."
        )
    if index.ndim != 2 or not np.issubdtype(index.dtype, np.integer):
        raise UsageError(f"index is {index.dtype} of shape {index.shape}: it has to be whole numbers [T,K].")
    if index.size and not -1 <= index.min() <= index.max() < number:
        raise UsageError(f"index spans {index.min()} to {index.max()}: it has to lie in -1 to {number - 1}.")
