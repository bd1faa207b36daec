"""Running a region on made-up numbers, to see what it computes.

ONNX's reference implementation runs it, in float64, so that an answer is right to a dozen digits or wrong. Blocks of
real models are made smaller first: a region only moves and multiplies, so it does the same at H = 20 as at H = 4096,
and the sizes to change are known (`Sizes`).
"""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from lynx_trt.export.patterns.block import RefusedError
from lynx_trt.export.regions.closure import Region
from lynx_trt.export.relayout import sizes_of

Array = np.ndarray[Any, np.dtype[Any]]

# Blocks of up to this many elements of weights are run as they are.
_AS_IS = 1 << 21
_SMALL_INNER = 12
# Elements that one run may gather from the weights, where the region gathers them for each token.
_GATHERED = 1 << 24
_SPREAD = (0.1, 0.3, 1.0, 3.0, 8.0)


@dataclass(frozen=True)
class Sizes:
    """H, I and the rows of the first layer, and what the probe has in their place."""

    hidden: int
    inner: int
    rows: int
    experts: int
    count: int

    @property
    def elements(self) -> int:
        """Of all experts' weights."""
        return self.experts * (self.rows + self.inner) * self.hidden

    def smaller(self) -> dict[int, int]:
        """What to replace each size by; empty if the block is small, or one of its sizes also means something else."""
        if self.elements <= _AS_IS or min(self.hidden, self.inner) <= 64:
            return {}
        inner = max(_SMALL_INNER, self.count + 3)
        if 2 * self.hidden == self.inner:
            inner += inner % 2 + 2 * self.count
        same = {self.inner: inner, 2 * self.inner: 2 * inner, self.inner // 2: inner // 2}
        hidden = same.get(self.hidden, 2 * inner + 4)
        replaced = {self.inner: inner, self.rows: inner * (self.rows // self.inner), self.hidden: hidden}
        for factor in {self.experts, self.count}:
            replaced |= {factor * size: factor * small for size, small in list(replaced.items()) if factor > 1}
        return {} if self.experts in replaced or self.count in replaced else replaced


class CantRunError(RefusedError):
    """A region that stumbles over the numbers it is fed."""


def evaluate(region: Region, feeds: dict[str, Array]) -> dict[str, Array]:
    """Every value of a region by name.

    Raises:
        CantRunError: it can't be run; what it stumbled over is named.
    """
    from onnx.reference import ReferenceEvaluator

    try:
        with np.errstate(all="ignore"), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            results: Any = ReferenceEvaluator(region.model).run(None, feeds, intermediate=True)
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CantRunError(f"what it computes can't be tried out: {first[:200]}") from None
    return {name: np.asarray(array) for name, array in results.items() if name}


def scalars(region: Region) -> list[float]:
    """Single constants of a region: limits, slopes, offsets and scales are among them."""
    tensors = list(region.model.graph.initializer)
    tensors += [a.t for node in region.model.graph.node for a in node.attribute if a.HasField("t")]
    found = []
    for tensor in tensors:
        if tensor.data_type == onnx.TensorProto.DOUBLE and int(np.prod(tensor.dims)) == 1:
            found.append(float(onnx.numpy_helper.to_array(tensor).reshape(-1)[0]))
    return list(dict.fromkeys(value for value in found if np.isfinite(value)))


class Observed:
    """What a region gave for N tokens, in one run or in several."""

    def __init__(self, runs: list[dict[str, Array]], tokens: int) -> None:
        """Results by name, of runs of `tokens` tokens each."""
        self.runs = runs
        self._tokens = tokens

    def get(self, name: str, columns: int) -> Array | None:
        """A value [N,columns], whatever axes it has for the tokens; None where it isn't of that size."""
        parts = []
        for results in self.runs:
            array = results.get(name)
            if array is None or array.shape[-1:] != (columns,) or array.size != self._tokens * columns:
                return None
            parts.append(array.reshape(self._tokens, columns))
        return np.concatenate(parts)

    def raw(self, name: str) -> Array | None:
        """A value of the first run as it was."""
        return self.runs[0].get(name)


class Prober:
    """Feeds a region: tokens, logits, weights, and inputs of which only the shape counts."""

    def __init__(
        self, region: Region, hidden: ir.Value, logits: ir.Value, sizes: Sizes, scale: dict[int, int], rank: int
    ) -> None:
        """Ready for tokens of `rank` - 1 axes and H."""
        self.region = region
        self._hidden, self._logits, self._sizes, self._scale, self._rank = hidden, logits, sizes, scale, rank
        self._generator = np.random.default_rng(0)
        self._lead = self._leading_axes()
        self.tokens = int(np.prod(self._lead))
        self._named = self._names()
        self.weights = {name: self._weight(value) for name, value in region.weights.items()}

    def _size(self, size: int) -> int:
        return self._scale.get(size, size)

    def _leading_axes(self) -> tuple[int, ...]:
        """Sizes of the axes before H: static ones as they are, two dynamic ones so that they can be told apart."""
        sizes = self._sizes
        per_token = sizes.count * (sizes.rows + sizes.inner) * sizes.hidden if not self._scale else 1
        wanted = max(2 * sizes.experts, 2 * sizes.count + 4, 12)
        wanted = max(min(wanted + wanted % 2, _GATHERED // per_token), 4)
        shape = self._hidden.shape
        if shape is None or len(shape) != self._rank:
            return (2, wanted // 2) if self._rank > 2 else (wanted,)
        made = [size if isinstance(size, int) else 2 for size in shape[:-1]]
        dynamic = [at for at, size in enumerate(shape[:-1]) if not isinstance(size, int)]
        if dynamic:
            others = int(np.prod([size for at, size in enumerate(made) if at != dynamic[-1]]))
            made[dynamic[-1]] = max(wanted // max(others, 1), 3)
        return tuple(made)

    def _names(self) -> dict[str, int]:
        """Sizes of dynamic dimensions by name."""
        shape = self._hidden.shape
        if shape is None or len(shape) != self._rank:
            return {}
        pairs = zip(shape, self._lead, strict=False)
        return {str(size.value): made for size, made in pairs if isinstance(size, ir.SymbolicDim) and size.value}

    def _weight(self, value: ir.Value) -> Array:
        assert value.const_value is not None
        shape = [self._size(size) for size in sizes_of(value.const_value)]
        array: Array = self._generator.standard_normal(shape)
        if shape == [self._sizes.experts]:  # a correction of the router's scores, which must not decide alone
            return array * 0.02
        return array / np.sqrt(shape[-1]) if len(shape) > 1 else array

    def observe(self, hidden: Array, logits: Array) -> Observed:
        """Run on hidden [N,H] and logits [N,E], in as many runs as it takes; N is a multiple of `tokens`.

        Raises:
            RefusedError: the region can't be run; what it stumbled over is named.
        """
        runs = []
        for start in range(0, len(hidden), self.tokens):
            part = slice(start, start + self.tokens)
            runs.append(self._run(hidden[part], logits[part]))
        return Observed(runs, self.tokens)

    def _run(self, hidden: Array, logits: Array) -> dict[str, Array]:
        feeds = dict(self.weights)
        for name, value in self.region.given.items():
            source, lead = (hidden, self._lead) if value is self._hidden else (logits, self._lead_of(value))
            feeds[name] = source.reshape(*lead, source.shape[-1])
        for name, value in self.region.shapes_of.items():
            feeds[name] = np.zeros(self.shape(value))
        return evaluate(self.region, feeds)

    def _lead_of(self, value: ir.Value) -> tuple[int, ...]:
        """The logits' axes before E: those of the tokens, or all tokens in one."""
        rank = 2 if value.shape is None else len(value.shape)
        if rank == 2:
            return (self.tokens,)
        return self._lead if rank == len(self._lead) + 1 else self._two_axes()

    def _two_axes(self) -> tuple[int, int]:
        return (2, self.tokens // 2) if self.tokens % 2 == 0 else (1, self.tokens)

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """A shape for a value of which nothing else is needed."""
        if value.shape is None:
            return (*self._lead, self._size(self._sizes.hidden))
        guessed = self._guess(value.shape)
        sizes = []
        for at, size in enumerate(value.shape):
            if isinstance(size, int):
                sizes.append(self._size(size))
                continue
            made = guessed[at] if at < len(guessed) else 1
            sizes.append(self._named.setdefault(str(size.value), made) if size.value else made)
        return tuple(sizes)

    def _guess(self, shape: ir.Shape) -> tuple[int, ...]:
        """The tokens' axes of a shape: those before H, if it ends with H, else sequences and tokens."""
        ends_with_hidden = len(shape) > 1 and shape[-1] == self._sizes.hidden
        axes = len(shape) - 1 if ends_with_hidden else len(shape)
        if axes == 1:
            return (self.tokens,)
        return self._lead if len(self._lead) > 1 else self._two_axes()

    def all_experts(self) -> tuple[Array, Array]:
        """Tokens that between them use every expert as their first: hidden [N,H], logits [N,E]."""
        experts = self._sizes.experts
        count = -(-max(2 * experts, 2 * self._sizes.count + 4, 12) // self.tokens) * self.tokens
        logits = self._generator.standard_normal((count, experts))
        logits[np.arange(count), np.arange(count) % experts] += 5.0
        return self._hidden_states(count), logits

    def few_experts(self) -> tuple[Array, Array]:
        """Tokens that all use the same K experts, so that all others stay without a token."""
        experts, count = self._sizes.experts, self._sizes.count
        logits = self._generator.standard_normal((self.tokens, experts))
        logits[:, self._generator.permutation(experts)[:count]] += 20.0
        return self._hidden_states(self.tokens), logits

    def _hidden_states(self, count: int) -> Array:
        """Of several magnitudes, so that clamps are reached and curves told apart."""
        hidden = self._generator.standard_normal((count, self._size(self._sizes.hidden)))
        hidden *= np.resize(_SPREAD, count)[:, None]
        return hidden
