"""Which experts, which weights and which rule give what a region gave.

A block's output is a sum over a token's experts, so a form of the experts is the right one if the output lies in the
span of what that form's experts give for the token; the coefficients are then the weights that the block used.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lynx_trt.experts import ExpertsForm, experts
from lynx_trt.export.regions.probe import Array

# Relative. The probe computes in float64, so what is off is a constant that the exporter rounded to the graph's type
# (gelu's 1/sqrt(2), say); one wrong term is of order 1.
TOLERANCES = {"FLOAT": 1e-5, "DOUBLE": 1e-5, "FLOAT16": 5e-3, "BFLOAT16": 3e-2}
# Forms that fit so well are told apart no further; the plainest is taken.
_EXACT = 1e-9
_NOTHING = 1e-10
# Constants that appear in published activations, tried besides those found in the region.
_ALPHAS = (1.0, 1.702)
_OFFSETS = (0.0, 1.0)


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of one probe. first: gate and up together [E,R,H], or gate [E,I,H] and up [E,I,H] in either order."""

    first: tuple[Array, ...]
    second: Array  # [E,H,I]
    first_bias: tuple[Array, ...] | None  # [E,R] each
    second_bias: Array | None  # [E,H]

    def reordered(self, order: tuple[int, ...]) -> ExpertWeights:
        """The same experts, `order[e]` in the place of e."""
        picked = list(order)
        return ExpertWeights(
            tuple(first[picked] for first in self.first),
            self.second[picked],
            None if self.first_bias is None else tuple(bias[picked] for bias in self.first_bias),
            None if self.second_bias is None else self.second_bias[picked],
        )


@dataclass(frozen=True)
class Fitted:
    """The form, whether up comes before gate, the weights [T,K] of the experts in `index` order, what they leave."""

    form: ExpertsForm
    swapped: bool
    weight: Array
    error: float


def fit_form(
    weights: ExpertWeights, hidden: Array, index: Array, output: Array, scalars: Sequence[float], tolerance: float
) -> Fitted | None:
    """The form that explains output [T,H] for hidden [T,H] and index [T,K] best, or None if none does.

    Args:
        weights: the experts.
        hidden: what they were given.
        index: which were chosen.
        output: what the region gave.
        scalars: constants of the region, of which one may be a limit, a slope or an offset.
        tolerance: how much of a token's output may stay unexplained.
    """
    if not np.isfinite(output).all() or not np.any(output):
        return None
    few = np.unique(np.linspace(0, len(hidden) - 1, 5).astype(int))
    best: tuple[float, Fitted] | None = None
    for form, swapped in _forms(weights, scalars):
        if coefficients(weights, form, swapped, hidden[few], index[few], output[few], tolerance) is None:
            continue
        found = coefficients(weights, form, swapped, hidden, index, output, tolerance)
        if found is not None and (best is None or found.error < best[0] / 3):
            best = (found.error, Fitted(form, swapped, found.weight, found.error))
            if found.error <= _EXACT:
                break
    return None if best is None else best[1]


def _forms(weights: ExpertWeights, scalars: Sequence[float]) -> Iterator[tuple[ExpertsForm, bool]]:
    """Plain ones first. A clamp that is never reached fits like none, so the probe's numbers reach far."""
    inner = weights.second.shape[2]
    gated = len(weights.first) == 2 or weights.first[0].shape[1] == 2 * inner
    if not gated and weights.first[0].shape[1] != inner:
        return
    positive = sorted({abs(value) for value in scalars if 0 < abs(value) < 1e4})
    alphas = [alpha for alpha in dict.fromkeys((*_ALPHAS, *positive)) if alpha <= 10]
    limits = (0.0, *positive)
    for limit, activation in itertools.product(limits, ("silu", "gelu", "gelu_tanh", "relu", "relu2")):
        for alpha in alphas if activation == "silu" else (1.0,):
            if not gated:
                yield ExpertsForm(activation, gated=False, alpha=alpha, limit=limit), False
                continue
            layouts = ((False, False), (False, True)) if len(weights.first) == 2 else _FUSED
            for offset, (interleaved, swapped) in itertools.product(_OFFSETS, layouts):
                form = ExpertsForm(activation, True, False, interleaved, alpha, limit, offset)
                yield form, swapped


# (interleaved, up before gate) of products that give gate and up together.
_FUSED = ((False, False), (True, False), (False, True), (True, True))


def gate_up(weights: ExpertWeights, form: ExpertsForm, swapped: bool) -> tuple[Array, Array | None]:
    """[E,2I,H] and [E,2I] (ungated: I) in the order of `form`, gate first."""
    if not form.gated:
        return weights.first[0], weights.first_bias[0] if weights.first_bias else None
    joined = [_gate_first(weights.first, form.interleaved, swapped)]
    if weights.first_bias is not None:
        joined.append(_gate_first(weights.first_bias, form.interleaved, swapped))
    return joined[0], joined[1] if len(joined) > 1 else None


def _gate_first(parts: tuple[Array, ...], interleaved: bool, swapped: bool) -> Array:
    if len(parts) == 2:
        return np.concatenate(parts[::-1] if swapped else parts, axis=1)
    (whole,) = parts
    if not swapped:
        return whole
    half = whole.shape[1] // 2
    if interleaved:
        return whole.reshape(whole.shape[0], half, 2, *whole.shape[2:])[:, :, ::-1].reshape(whole.shape)
    return np.concatenate([whole[:, half:], whole[:, :half]], axis=1)


@dataclass(frozen=True)
class Coefficients:
    """Weights [T,K] with which experts add up to an output, and the largest share of a token's that they leave.

    A token whose experts give nothing (relu can) says nothing about their weights: its row is NaN.
    """

    weight: Array
    error: float


def coefficients(
    weights: ExpertWeights,
    form: ExpertsForm,
    swapped: bool,
    hidden: Array,
    index: Array,
    output: Array,
    tolerance: float,
) -> Coefficients | None:
    """How the chosen experts' outputs add up to `output`, or None if they don't."""
    up, up_bias = gate_up(weights, form, swapped)
    tokens, count = index.shape
    flat = index.reshape(-1)
    # Each (token, slot) as an expert of its own, so that one call gives all of them.
    biases: tuple[Array | None, Array | None] = (None, None)
    if up_bias is not None or weights.second_bias is not None:
        zeros = (np.zeros((len(up), up.shape[1])), np.zeros((len(up), output.shape[1])))
        given = (up_bias if up_bias is not None else zeros[0], weights.second_bias)
        biases = (given[0][flat], (given[1] if given[1] is not None else zeros[1])[flat])
    own = np.arange(len(flat))[:, None]
    with np.errstate(all="ignore"):
        outputs = experts(
            form,
            np.repeat(hidden, count, axis=0),
            own,
            np.ones((len(flat), 1)),
            up[flat],
            weights.second[flat],
            *biases,
        )
    outputs = outputs.reshape(tokens, count, -1)
    found = np.full((tokens, count), np.nan)
    worst = 0.0
    for token in range(tokens):
        scale = np.abs(outputs[token]).max(axis=1)
        silent = not scale.all()
        scale = np.where(scale == 0, 1.0, scale)
        if not np.isfinite(scale).all():
            return None
        columns = (outputs[token] / scale[:, None]).T
        solution, _, rank, _ = np.linalg.lstsq(columns, output[token], rcond=None)
        error = np.abs(columns @ solution - output[token]).max() / max(np.abs(output[token]).max(), 1e-12)
        if (rank < count and not silent) or not error <= tolerance:
            return None
        if not silent and (np.abs(solution) <= _NOTHING * np.abs(solution).max()).any():
            return None  # an expert that gives nothing wasn't chosen, whatever the index says
        worst = max(worst, float(error))
        if not silent:
            found[token] = solution / scale
    return None if np.isnan(found).all() else Coefficients(found, worst)


@dataclass(frozen=True)
class RuleFit:
    """weight = scale * f(source)[chosen], over their sum if `renormalize`; f is identity, softmax or sigmoid."""

    source: str  # name of a value of the region
    transform: str
    renormalize: bool
    scale: float


def fit_rule(
    weight: Array,
    index: Array,
    sources: Sequence[tuple[str, Array]],
    scalars: Sequence[float],
    tolerance: float = 1e-5,
) -> RuleFit | None:
    """How weight [T,K] comes from one of `sources` [T,E] (earliest first), or None if it is none of the known ways."""
    told = ~np.isnan(weight).any(axis=1)
    weight, index = weight[told], index[told]
    sources = [(name, source[told]) for name, source in sources]
    for transform, renormalize in itertools.product(("identity", "softmax", "sigmoid"), (False, True)):
        for name, source in sources:
            with np.errstate(all="ignore"):
                scores = _TRANSFORMS[transform](source)
                chosen = np.take_along_axis(scores, index, axis=1)
                # A value that is 0 for all but the chosen says nothing about the others.
                if not np.isfinite(chosen).all() or _only_chosen(scores, index):
                    continue
                predicted = chosen / chosen.sum(axis=1, keepdims=True) if renormalize else chosen
            scale = _ratio(weight, predicted, tolerance)
            if scale is not None:
                return RuleFit(name, transform, renormalize, _snap(scale, scalars))
    return None


def predict(rule: RuleFit, index: Array, sources: dict[str, Array]) -> Array | None:
    """The weights [T,K] that a rule gives, None if its source isn't there."""
    if rule.source not in sources:
        return None
    with np.errstate(all="ignore"):
        chosen = np.take_along_axis(_TRANSFORMS[rule.transform](sources[rule.source]), index, axis=1)
        weights: Array = rule.scale * (chosen / chosen.sum(axis=1, keepdims=True) if rule.renormalize else chosen)
    return weights


def _only_chosen(scores: Array, index: Array) -> bool:
    if index.shape[1] == scores.shape[1]:
        return False
    others = scores.copy()
    np.put_along_axis(others, index, np.nan, axis=1)
    rest = others[~np.isnan(others)]
    return bool(len(rest) == 0 or (rest == rest[0]).all())


def _ratio(weight: Array, predicted: Array, tolerance: float) -> float | None:
    if not np.isfinite(predicted).all() or not np.any(predicted):
        return None
    scale = float((weight * predicted).sum() / (predicted * predicted).sum())
    error = np.abs(weight - scale * predicted).max()
    return scale if scale > 0 and error <= tolerance * np.abs(weight).max() else None


def _snap(scale: float, scalars: Sequence[float]) -> float:
    """The model's own number, if it has one, and not its reconstruction."""
    return next((value for value in (1.0, *scalars) if abs(value - scale) <= 1e-4 * abs(scale)), scale)


def _softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    result: Array = powers / powers.sum(axis=1, keepdims=True)
    return result


def _sigmoid(scores: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-scores))
    return result


_TRANSFORMS = {"identity": lambda scores: scores, "softmax": _softmax, "sigmoid": _sigmoid}
