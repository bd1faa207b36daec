"""The selection: which experts of an MoE layer one batch may load, and what each token then uses.

Every published policy is one setting of the same few parameters (`PRESETS`). This is the NumPy reference; the
function body for ONNX Runtime and the TensorRT plugin are held to it, the indices exactly.

Exactness is by construction: whatever depends on the order in which a backend adds (summed votes, confidences,
affinities) is computed in float64 and rounded to float32 before it is compared, so neither a tie nor a
threshold hangs on the last bit of a float64.

T tokens, E experts, K experts a token uses.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lynx_trt.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.floating[Any]]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

VOTES = ("count", "weight", "affinity", "score")

# Below any sum of positive float32 (the smallest is 1.4e-45) and above 0: x / max(sum, TINY) is 0 where all x are 0.
TINY = 1e-300

# A fraction times K is rounded up, but 0.28 * 25 is 7.000000000000001 and means 7.
_ROUNDING = 1e-9


def _require(condition: bool | np.bool_, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _float32(value: float) -> float:
    """The value that a node's attribute or a plugin's field holds."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


@dataclass(frozen=True)
class Selection:
    """The parameters of the selection.

    Attributes:
        vote: what a token gives its experts: `count` (1), `weight` (its share of the token's topk weights, to the
            power `power`) or `affinity` (see `alpha`); or `score`: its share of `combine`, to all E experts.
        guarantee: how many of each token's own best experts are kept whatever the budget (k0): a whole number, or
            a fraction of K below 1, rounded up.
        sensitivity: a token whose confidence is below this keeps all its experts (tau, 0 to 1; 0: no token does).
        remap: a token that lost an expert takes its best among those kept; otherwise its slot stays empty.
        power: above 1 lets the strong preferences count for more (`weight` only).
        alpha: affinity bins per factor of e below the token's best (`affinity` only: the vote is n ** bin, with n
            voting tokens and bin = clamp(floor(alpha * ln(combine / best combine)), -beta, 0)).
        beta: the lowest bin is -beta (`affinity` only).

    Raises:
        UsageError: a parameter is out of its range.
    """

    vote: str
    guarantee: float
    sensitivity: float
    remap: bool
    power: float = 1.0
    alpha: float = 1.0
    beta: int = 4

    def __post_init__(self) -> None:
        _require(self.vote in VOTES, f"vote is {self.vote!r}: it has to be one of {', '.join(VOTES)}.")
        _require(
            _is_number(self.guarantee) and self.guarantee >= 0 and (self.guarantee < 1 or self.guarantee % 1 == 0),
            f"guarantee is {self.guarantee!r}: it has to be a whole number of experts from 0, or a fraction of K "
            "between 0 and 1.",
        )
        _require(
            _is_number(self.sensitivity) and 0 <= self.sensitivity <= 1,
            f"sensitivity is {self.sensitivity!r}: it has to lie in 0 to 1 (0: no token is sensitive).",
        )
        _require(isinstance(self.remap, bool), f"remap is {self.remap!r}: it has to be True (remap) or False (drop).")
        for name in ("power", "alpha"):
            value = getattr(self, name)
            # Above 0 as a float32 too: that is what a node's attribute and a plugin's field hold.
            in_range = _is_number(value) and 0 < _float32(value) < math.inf
            _require(in_range, f"{name} is {value!r}: it has to be a number above 0.")
        _require(_is_whole(self.beta) and self.beta >= 0, f"beta is {self.beta!r}: it has to be a whole number from 0.")

    def guaranteed(self, experts_per_token: int) -> int:
        """k0: how many of a token's own K experts are kept whatever the budget."""
        if self.guarantee < 1:
            return math.ceil(self.guarantee * experts_per_token - _ROUNDING)
        return min(int(self.guarantee), experts_per_token)


# Sources: LYNX, arXiv 2411.08982 (versions 1 and 3); OEA, arXiv 2511.02237; XShare, arXiv 2602.07265.
PRESETS: dict[str, Selection] = {
    # Used with a budget of E, where no parameter matters.
    "off": Selection(vote="count", guarantee=0, sensitivity=0.0, remap=True),
    "lynx": Selection(vote="weight", guarantee=1, sensitivity=0.0, remap=True, power=2.0),
    "lynx-latency": Selection(vote="count", guarantee=0, sensitivity=0.0, remap=True),
    "lynx-accuracy": Selection(vote="count", guarantee=0, sensitivity=0.25, remap=True),
    "lynx-affinity": Selection(vote="affinity", guarantee=1, sensitivity=0.0, remap=True),
    "oea": Selection(vote="count", guarantee=0.5, sensitivity=0.0, remap=True),
    "xshare": Selection(vote="score", guarantee=1, sensitivity=0.0, remap=True),
}
DEFAULT_PRESET = "lynx"


class Selected(NamedTuple):
    """What the tokens use: `index` int64 [T,K] (-1: an empty slot), `weight` float32 [T,K] (0 there).

    `kept` int64 are the experts in use: the sorted distinct ones of `index`.
    """

    index: Ints  # type: ignore[assignment]  # hides tuple.index
    weight: Floats
    kept: Ints


def select(
    selection: Selection,
    choice: ArrayLike,
    combine: ArrayLike,
    topk_index: ArrayLike,
    topk_weight: ArrayLike,
    *,
    budget: int,
    floor: float = 0.0,
    token_mask: ArrayLike | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
) -> Selected:
    """Restrict one layer's routing to the experts that the batch needs most.

    Args:
        selection: the parameters.
        choice: [T,E], what the model ranks experts by.
        combine: [T,E], the weight an expert would get before renormalisation.
        topk_index: int [T,K], the model's own routing: K distinct experts a token.
        topk_weight: [T,K], its weights.
        budget: the number of experts to keep; E and above are no limit.
        floor: votes that an expert needs for each voting token, beside its place among the first `budget`: it is kept
            if its votes are above floor * (number of voting tokens). Guaranteed experts and those of sensitive tokens
            need none. 0: any vote will do. No limit and a floor of 0 change nothing.
        token_mask: bool [T], False for padding. Such a row, and one with a value that is not finite, never votes
            and loads nothing.
        renormalize: the model divides the weights of the chosen experts by their sum.
        scale: the model multiplies the weights by this.

    Floats are taken as float32, the type of the op's inputs.

    Raises:
        UsageError: shapes that don't fit each other, a negative budget, a floor that is negative or not finite, an
            expert index out of range or twice in a row.
    """
    batch = _batch(choice, combine, topk_index, topk_weight, token_mask)
    _require(math.isfinite(scale), f"scale is {scale!r}: it has to be finite.")
    kept = _kept_set(selection, batch, _budget(budget), _floor(floor))
    # Padding rows may hold any index: those of `batch.index` are safe to look up.
    unchanged = (batch.counts & kept[batch.index].all(axis=1))[:, None]
    allowed = batch.counts[:, None] & kept
    if not selection.remap:
        allowed &= _own(batch)
    index, weight = _reroute(batch, allowed, renormalize, scale)
    index = np.where(unchanged, batch.index, index)
    return Selected(index, np.where(unchanged, batch.weight, weight), np.unique(index[index >= 0]))


def kept_set(
    selection: Selection,
    choice: ArrayLike,
    combine: ArrayLike,
    topk_index: ArrayLike,
    topk_weight: ArrayLike,
    *,
    budget: int,
    floor: float = 0.0,
    token_mask: ArrayLike | None = None,
) -> Bools:
    """The experts that a restricted token may use, bool [E]; arguments and errors are those of `select`.

    `Selected.kept` is the part of it that is used: a kept expert can go unused when the tokens that voted for it
    prefer others.
    """
    batch = _batch(choice, combine, topk_index, topk_weight, token_mask)
    return _kept_set(selection, batch, _budget(budget), _floor(floor))


@dataclass(frozen=True)
class _Batch:
    """The inputs as the op's types; a row that does not count holds zeros."""

    choice: Floats
    combine: Floats
    index: Ints
    weight: Floats
    counts: Bools  # [T]: no padding, and every value finite


def _batch(
    choice: ArrayLike,
    combine: ArrayLike,
    topk_index: ArrayLike,
    topk_weight: ArrayLike,
    token_mask: ArrayLike | None,
) -> _Batch:
    with np.errstate(over="ignore", invalid="ignore"):  # a float64 beyond float32 becomes Inf: its row is masked
        scores, weighing, weight = (np.asarray(a).astype(np.float32) for a in (choice, combine, topk_weight))
    index = np.asarray(topk_index)
    mask = np.ones(index.shape[:1], np.bool_) if token_mask is None else np.asarray(token_mask)
    _check_shapes(scores, weighing, index, weight, mask)
    counts = (
        mask & np.isfinite(scores).all(axis=1) & np.isfinite(weighing).all(axis=1) & np.isfinite(weight).all(axis=1)
    )
    _check_index(index, counts, experts=scores.shape[1])
    column = counts[:, None]
    zero = np.float32(0)
    return _Batch(
        np.where(column, scores, zero),
        np.where(column, weighing, zero),
        np.where(column, index, 0).astype(np.int64),
        np.where(column, weight, zero),
        counts,
    )


def _kept_set(selection: Selection, batch: _Batch, budget: int, floor: np.float32) -> Bools:
    """Steps 1 to 5 of the selection, bool [E]."""
    experts = batch.choice.shape[1]
    if budget >= experts and floor == 0:
        return np.ones(experts, np.bool_)
    own_forced = batch.counts[:, None] & (_guaranteed(selection, batch) | _sensitive(selection, batch)[:, None])
    forced = np.zeros(experts, np.bool_)
    forced[batch.index[own_forced]] = True
    # Ranked, and held to the floor, as float32 (see the module's docstring). The product is rounded once.
    votes = _votes(selection, batch).astype(np.float32)
    with np.errstate(over="ignore"):
        enough = votes > floor * np.float32(batch.counts.sum())
    # lexsort is stable, so a tie goes to the lower expert.
    order = np.lexsort((-votes, ~enough, ~forced))
    kept = np.zeros(experts, np.bool_)
    kept[order[:budget]] = True
    return forced | (kept & enough)


def _guaranteed(selection: Selection, batch: _Batch) -> Bools:
    """Which of a token's own experts are among its k0 best by `choice`, ties to the lower expert; [T,K]."""
    own_choice = np.take_along_axis(batch.choice, batch.index, axis=1)
    order = np.lexsort((batch.index, -own_choice), axis=1)
    best = np.zeros(batch.index.shape, np.bool_)
    np.put_along_axis(best, order[:, : selection.guaranteed(batch.index.shape[1])], True, axis=1)
    return best


def _sensitive(selection: Selection, batch: _Batch) -> Bools:
    """The tokens that no expert stands out for, [T]: confidence (K m - 1) / (K - 1) below tau, m the largest share."""
    tokens, width = batch.index.shape
    # With K of 1 that expert has all the weight: confidence 1, never below tau.
    if selection.sensitivity == 0 or width == 1:
        return np.zeros(tokens, np.bool_)
    confidence = (width * _shares(batch.weight).max(axis=1) - 1) / (width - 1)
    below: Bools = confidence.astype(np.float32) < np.float32(selection.sensitivity)
    return below


def _votes(selection: Selection, batch: _Batch) -> Floats:
    """The votes for each expert over the batch, float64 [E]."""
    if selection.vote == "score":
        scores: Floats = _shares(batch.combine).sum(axis=0)
        return scores
    if selection.vote == "count":
        own: Floats = np.ones(batch.index.shape)
    elif selection.vote == "weight":
        own = _shares(batch.weight) ** _float32(selection.power)
    else:
        own = _affinities(selection, batch)
    votes = np.zeros(batch.choice.shape[1])
    np.add.at(votes, batch.index, np.where(batch.counts[:, None], own, 0.0))
    return votes


def _shares(values: Floats) -> Floats:
    """Each value over the sum of its row, float64; a negative one counts as 0, and a row of zeros gives zeros."""
    positive = np.maximum(values.astype(np.float64), 0.0)
    shares: Floats = positive / np.maximum(positive.sum(axis=1, keepdims=True), TINY)
    return shares


def _affinities(selection: Selection, batch: _Batch) -> Floats:
    """The vote n ** bin for each of a token's own experts, float64 [T,K] (AffinityBinning of LYNX v3)."""
    own = np.maximum(np.take_along_axis(batch.combine, batch.index, axis=1).astype(np.float64), 0.0)
    best = own.max(axis=1, keepdims=True, initial=0.0)
    # No weight at all is no preference: ratio 1. ln 0 is -inf, the lowest bin.
    ratio = np.divide(own, best, out=np.ones_like(own), where=best > 0)
    logarithm = np.log(ratio, out=np.full_like(ratio, -np.inf), where=ratio > 0)
    # Rounded before floor: with alpha = 1/ln 2, half the best weight is bin -1 in every backend, whatever its log
    # says in the last bit.
    bins = np.floor((_float32(selection.alpha) * logarithm).astype(np.float32)).astype(np.float64)
    voting = max(int(batch.counts.sum()), 1)
    affinities: Floats = float(voting) ** np.clip(bins, -float(selection.beta), 0.0)
    return affinities


def _own(batch: _Batch) -> Bools:
    """A token's own experts, bool [T,E]."""
    own = np.zeros(batch.choice.shape, np.bool_)
    np.put_along_axis(own, batch.index, True, axis=1)
    return own


def _reroute(batch: _Batch, allowed: Bools, renormalize: bool, scale: float) -> tuple[Ints, Floats]:
    """Each token's K best allowed experts and their weights under the model's own rule (step 6)."""
    ranked = np.where(allowed, batch.choice, -np.inf)
    index = np.argsort(-ranked, axis=1, kind="stable")[:, : batch.index.shape[1]]
    empty = ~np.take_along_axis(allowed, index, axis=1)
    weight = np.where(empty, 0.0, np.take_along_axis(batch.combine, index, axis=1).astype(np.float64))
    factor = np.full((len(index), 1), _float32(scale))
    if renormalize:
        total = weight.sum(axis=1, keepdims=True)
        factor = np.divide(factor, total, out=np.zeros_like(factor), where=total != 0)
    with np.errstate(over="ignore"):
        return np.where(empty, -1, index), (weight * factor).astype(np.float32)


def _check_shapes(choice: Floats, combine: Floats, index: NDArray[Any], weight: Floats, mask: NDArray[Any]) -> None:
    _require(choice.ndim == 2 and choice.shape[1] > 0, f"choice has the shape {choice.shape}: it has to be [T,E].")
    _require(
        combine.shape == choice.shape,
        f"combine has the shape {combine.shape}: it has to be that of choice, {choice.shape}.",
    )
    tokens, experts = choice.shape
    _require(
        index.ndim == 2 and index.shape[0] == tokens and 1 <= index.shape[1] <= experts,
        f"topk_index has the shape {index.shape}: it has to be [T,K] with T = {tokens} and K in 1 to {experts}.",
    )
    _require(
        weight.shape == index.shape,
        f"topk_weight has the shape {weight.shape}: it has to be that of topk_index, {index.shape}.",
    )
    _require(
        np.issubdtype(index.dtype, np.integer), f"topk_index is of type {index.dtype}: it has to hold whole numbers."
    )
    _require(
        mask.shape == (tokens,) and mask.dtype == np.bool_,
        f"token_mask is {mask.dtype} of shape {mask.shape}: it has to be bool of shape ({tokens},).",
    )


def _check_index(index: NDArray[Any], counts: Bools, *, experts: int) -> None:
    outside = ((index < 0) | (index >= experts)) & counts[:, None]
    if outside.any():
        row, slot = np.argwhere(outside)[0]
        raise UsageError(
            f"topk_index holds {index[row, slot]} in row {row}: an expert index has to lie in 0 to {experts - 1}."
        )
    ordered = np.sort(index, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & counts[:, None]
    if twice.any():
        row, slot = np.argwhere(twice)[0]
        raise UsageError(
            f"topk_index holds {ordered[row, slot]} twice in row {row}: a token's K experts have to be distinct."
        )


def _budget(budget: int) -> int:
    try:
        value = operator.index(budget)
    except TypeError:
        raise UsageError(f"budget is {budget!r}: it has to be a whole number of experts from 0.") from None
    _require(value >= 0, f"budget is {value}: it has to be a whole number of experts from 0.")
    return value


def _floor(floor: float) -> np.float32:
    _require(
        _is_number(floor) and 0 <= _float32(floor) < math.inf,
        f"floor is {floor!r}: it has to be a number of votes for each voting token, from 0 (any vote will do).",
    )
    return np.float32(floor)
