"""The selection against hand-worked examples, a literal transcription of its steps, and its invariants."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lynx_trt.errors import UsageError
from lynx_trt.selection import DEFAULT_PRESET, PRESETS, Selected, Selection, kept_set, select

Array = NDArray[Any]

# Derandomized: a run can be repeated. (With random seeds these found nothing over many thousands of examples.)
property_test = settings(max_examples=200, deadline=None, derandomize=True)

PLAIN = Selection(vote="count", guarantee=0, sensitivity=0.0, remap=True)


@dataclass(frozen=True)
class Batch:
    """The inputs of one layer, in the order of `select`."""

    choice: Array
    combine: Array
    topk_index: Array
    topk_weight: Array
    token_mask: Array | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        return (*self.choice.shape, self.topk_index.shape[1])  # T, E, K

    @property
    def counts(self) -> Array:
        """The rows that take part: no padding, every value finite."""
        counts = np.ones(len(self.choice), np.bool_) if self.token_mask is None else self.token_mask
        for values in (self.choice, self.combine, self.topk_weight):
            counts = counts & np.isfinite(values).all(axis=1)
        return counts

    def select(self, selection: Selection, budget: int, **rule: Any) -> Selected:
        inputs = (self.choice, self.combine, self.topk_index, self.topk_weight)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what NumPy thinks of NaN and zero sums is not for a caller
            return select(selection, *inputs, budget=budget, token_mask=self.token_mask, **rule)

    def kept_set(self, selection: Selection, budget: int, floor: float = 0.0) -> Array:
        inputs = (self.choice, self.combine, self.topk_index, self.topk_weight)
        return kept_set(selection, *inputs, budget=budget, floor=floor, token_mask=self.token_mask)

    def rows(self, rows: Any) -> Batch:
        """The same batch with these rows, in this order."""
        mask = None if self.token_mask is None else self.token_mask[rows]
        return Batch(self.choice[rows], self.combine[rows], self.topk_index[rows], self.topk_weight[rows], mask)


# ------------------------------------------------------------------------------------------- generated batches

# Each kind of value is there for a reason: ties and zeros; the ends of float32's range; broken rows; nothing special.
# Negative weights stay on a grid whose sums are exact: a float64 that cancels has no digits to compare.
_GRID = np.array([-1, 0, 0, 0.25, 0.5, 1], np.float32)
_EXTREME = np.array([0, 1e-45, 1e-38, 1, 3e38], np.float32)
_BROKEN = np.array([*[0, 0.5, 1] * 6, np.nan, np.inf, -np.inf], np.float32)


@st.composite
def batches(draw: st.DrawFn, min_tokens: int = 0) -> Batch:
    """Small batches, any of them odd: T=0, T=1, K=1, K=E, E=1, ties, zeros, masks, NaN and Inf."""
    # All from one seed: what Hypothesis draws by itself is empty, full or all alike in nine of ten batches.
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens, experts = int(rng.integers(min_tokens, 8)), int(rng.integers(1, 12))
    width = int(rng.integers(1, experts + 1)) if rng.random() < 0.3 else min(int(rng.integers(1, 4)), experts)

    def values(columns: int) -> Array:
        kind, shape = rng.integers(4), (tokens, columns)
        if kind == 3:
            return rng.random(shape).astype(np.float32)
        return rng.choice((_GRID, _EXTREME, _BROKEN)[kind], shape)

    choice = values(experts)
    combine = choice if rng.random() < 0.4 else values(experts)
    # The model's own routing follows `choice`, or (groups, jitter) does not.
    order = rng.random(choice.shape) if rng.random() < 0.5 else np.nan_to_num(choice)
    index = np.argsort(-order, axis=1, kind="stable")[:, :width]
    weight = np.take_along_axis(combine, index, axis=1) if rng.random() < 0.5 else values(width)
    mask = None
    if rng.random() < 0.5:
        mask = rng.random(tokens) < 0.6
        index = np.where(mask[:, None], index, rng.choice([-1, 0, experts]))  # padding may hold any index
    return Batch(choice, combine, index, weight, mask)


selections = st.sampled_from(list(PRESETS.values())) | st.builds(
    Selection,
    vote=st.sampled_from(["count", "weight", "affinity", "score"]),
    guarantee=st.sampled_from([0, 1, 2, 5, 0.3, 0.5]),
    sensitivity=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    remap=st.booleans(),
    power=st.sampled_from([0.5, 1.0, 3.0]),
    alpha=st.sampled_from([0.3, 1.0, 1 / math.log(2)]),
    beta=st.sampled_from([0, 1, 4]),
)
budgets = st.sampled_from(range(9))
# Votes for each voting token: none needed, some experts fall below, all do.
floors = st.sampled_from([0.0, 1e-6, 0.05, 0.25, 1 / 3, 0.5, 2.0])


# -------------------------------------------------------------------------------------------- worked by hand

# Three tokens, E=4, K=2. Counts: expert 0 has 2 votes, 1 has 1, 2 has 2, 3 has 1.
_SCORES = [[0.50, 0.30, 0.15, 0.05], [0.45, 0.05, 0.35, 0.15], [0.05, 0.15, 0.35, 0.45]]
WORKED = Batch(
    np.array(_SCORES, np.float32),
    np.array(_SCORES, np.float32),
    np.array([[0, 1], [0, 2], [3, 2]]),
    np.array([[0.625, 0.375], [0.5625, 0.4375], [0.5625, 0.4375]], np.float32),
)


def _weights(pairs: Any) -> Array:
    return np.array([[a / (a + b), b / (a + b)] for a, b in pairs])


@pytest.mark.parametrize(
    ("preset", "budget", "index", "weights"),
    [
        # Step 1: a budget of E changes nothing.
        ("off", 4, [[0, 1], [0, 2], [3, 2]], [(0.5, 0.3), (0.45, 0.35), (0.45, 0.35)]),
        # {0, 2}, two votes each. Token 0 lost expert 1, token 2 its best: slots are in the order of choice.
        ("lynx-latency", 2, [[0, 2], [0, 2], [2, 0]], [(0.5, 0.15), (0.45, 0.35), (0.35, 0.05)]),
        # Experts 0 and 2 tie for one place: the lower wins, and every second slot is empty.
        ("lynx-latency", 1, [[0, -1], [0, -1], [0, -1]], [(1, 0), (1, 0), (1, 0)]),
        # Experts 1 and 3 tie for the third place: again the lower.
        ("lynx-latency", 3, [[0, 1], [0, 2], [2, 1]], [(0.5, 0.3), (0.45, 0.35), (0.35, 0.15)]),
        ("lynx-latency", 0, [[-1, -1]] * 3, None),  # nobody may use anything
        # Confidence is 2m - 1: 0.25, 0.125, 0.125. Tokens 1 and 2 are sensitive and keep {0, 2, 3}; token 0 is not
        # *below* 0.25. A budget of 0 does not touch the sensitive ones.
        ("lynx-accuracy", 0, [[0, 2], [0, 2], [3, 2]], [(0.5, 0.15), (0.45, 0.35), (0.45, 0.35)]),
        # With room for a fourth, expert 1 is the only other with a vote.
        ("lynx-accuracy", 3, [[0, 2], [0, 2], [3, 2]], [(0.5, 0.15), (0.45, 0.35), (0.45, 0.35)]),
        # Each token's first expert is kept: {0, 3}, over the budget.
        ("lynx", 0, [[0, 3], [0, 3], [3, 0]], [(0.5, 0.05), (0.45, 0.15), (0.45, 0.05)]),
        # Then by squares: expert 2 has 2 * 0.4375^2 = 0.38, expert 1 has 0.375^2 = 0.14.
        ("lynx", 3, [[0, 2], [0, 2], [3, 2]], [(0.5, 0.15), (0.45, 0.35), (0.45, 0.35)]),
        # ln(0.3/0.5) and ln(0.35/0.45) are in bin -1: a vote of 1/3; expert 2 has two of them.
        ("lynx-affinity", 3, [[0, 2], [0, 2], [3, 2]], [(0.5, 0.15), (0.45, 0.35), (0.45, 0.35)]),
        # Half of K, 1, guaranteed and nothing else: {0, 3}; the others ride along.
        ("oea", 0, [[0, 3], [0, 3], [3, 0]], [(0.5, 0.05), (0.45, 0.15), (0.45, 0.05)]),
        # Scores: expert 1 has 0.5, expert 2 has 0.85.
        ("xshare", 3, [[0, 2], [0, 2], [3, 2]], [(0.5, 0.15), (0.45, 0.35), (0.45, 0.35)]),
    ],
)
def test_presets_worked_by_hand(preset: str, budget: int, index: Any, weights: Any) -> None:
    got = WORKED.select(PRESETS[preset], budget)
    np.testing.assert_array_equal(got.index, index)
    expected = np.zeros((3, 2)) if weights is None else _weights(weights)
    np.testing.assert_allclose(got.weight, expected, rtol=1e-6)
    np.testing.assert_array_equal(got.kept, sorted({e for row in index for e in row if e >= 0}))
    assert [a.dtype for a in got] == [np.int64, np.float32, np.int64]


def test_every_preset_is_worked_by_hand_and_the_default_is_one() -> None:
    assert set(PRESETS) == {"off", "lynx", "lynx-latency", "lynx-accuracy", "lynx-affinity", "oea", "xshare"}
    assert DEFAULT_PRESET == "lynx"


def test_drop_keeps_what_is_left_of_a_tokens_own() -> None:
    got = WORKED.select(replace(PLAIN, remap=False), 2)  # kept {0, 2}
    np.testing.assert_array_equal(got.index, [[0, -1], [0, 2], [2, -1]])
    np.testing.assert_allclose(got.weight, [[1.0, 0.0], [0.5625, 0.4375], [1.0, 0.0]])


def test_the_models_own_rule_of_weights() -> None:
    # Not renormalised, times 2.5: the changed rows get their combine, the unchanged one what the model gave.
    got = WORKED.select(PLAIN, 2, renormalize=False, scale=2.5)
    np.testing.assert_allclose(got.weight, [[1.25, 0.375], [0.5625, 0.4375], [0.875, 0.125]])
    # Renormalised, then times 2.
    got = WORKED.select(PLAIN, 1, scale=2.0)
    np.testing.assert_allclose(got.weight, [[2.0, 0.0]] * 3)


def test_negative_weights_follow_the_same_rule() -> None:
    # A router that weighs by its raw logits can have them; they are no votes, but -1 and -3 still share as 1 and 3.
    choice = np.array([[3, 2, 1], [3, 2, 1]], np.float32)
    combine = np.array([[-1, -3, 2], [0, 1, -1]], np.float32)
    batch = Batch(choice, combine, np.array([[0, 2], [0, 1]]), np.ones((2, 2)))
    got = batch.select(PLAIN, 2)  # {0, 1}
    np.testing.assert_array_equal(got.index, [[0, 1], [0, 1]])
    np.testing.assert_allclose(got.weight, [[0.25, 0.75], [1.0, 1.0]])  # the second row is unchanged
    np.testing.assert_array_equal(batch.kept_set(replace(PLAIN, vote="score"), 2), [False, True, True])
    # Weights that add up to 0 can't be divided by their sum.
    nothing = Batch(choice, combine * [1, 0, 0] + [0, 1, 0], np.array([[0, 2], [0, 1]]), np.ones((2, 2)))
    np.testing.assert_allclose(nothing.select(PLAIN, 2).weight, [[0.0, 0.0], [1.0, 1.0]])


def test_confidence_is_compared_as_float32() -> None:
    # Shares of 11/20 and 9/20: a confidence of 0.1, which is below 0.1 as a float32 and must not count as such.
    batch = Batch(np.zeros((1, 3)), np.zeros((1, 3)), np.array([[0, 1]]), np.array([[11, 9]]))
    assert not batch.kept_set(replace(PLAIN, sensitivity=0.1), 0).any()
    assert batch.kept_set(replace(PLAIN, sensitivity=0.1001), 0).sum() == 2


def test_ties_go_to_the_lower_expert_among_many() -> None:
    # Beyond the sizes at which any sort is stable.
    alike = np.ones((3, 64), np.float32)
    index = np.array([[5, 40], [63, 50], [40, 5]])
    batch = Batch(alike, alike, index, np.ones((3, 2), np.float32))
    np.testing.assert_array_equal(np.flatnonzero(batch.kept_set(PLAIN, 3)), [5, 40, 50])
    np.testing.assert_array_equal(batch.select(PLAIN, 3).index, [[5, 40], [5, 40], [40, 5]])
    np.testing.assert_array_equal(np.flatnonzero(batch.kept_set(replace(PLAIN, vote="score"), 3)), [0, 1, 2])


def test_power_lets_one_strong_preference_win_over_two_weak_ones() -> None:
    # Expert 1: 0.6 once. Expert 2: 0.35 twice. 0.6 < 0.7, but 0.36 > 0.245.
    weight = np.array([[0.6, 0.4], [0.65, 0.35], [0.65, 0.35]], np.float32)
    batch = Batch(np.zeros((3, 4)), np.zeros((3, 4)), np.array([[1, 0], [3, 2], [0, 2]]), weight)
    by_weight = replace(PLAIN, vote="weight")
    # Experts 3 and 0 have more than both with power 1 (0.65, and 0.4 + 0.65).
    np.testing.assert_array_equal(batch.kept_set(by_weight, 2), [True, False, True, False])
    np.testing.assert_array_equal(batch.kept_set(replace(by_weight, power=2.0), 3), [True, True, False, True])


@pytest.mark.parametrize(
    ("alpha", "beta", "combine", "expected"),
    [
        (1.0, 4, 0.5, -1),  # ln 0.5 = -0.69, down to -1
        (1.0, 4, 0.3, -2),  # ln 0.3 = -1.2
        (1.0, 1, 0.3, -1),  # no lower than -beta
        (1.0, 0, 0.3, 0),
        (1.0, 4, 1.0, 0),  # as good as the best
        (1.0, 4, 0.0, -4),
        (0.5, 4, 0.3, -1),  # alpha widens the bins: 0.5 * ln 0.3 = -0.6
        # One bin for each factor of 32: alpha as a float32 is a little over 1 / ln 32, which must not make it -2.
        (1 / math.log(32), 4, 1 / 32, -1),
    ],
)
def test_affinity_bins(alpha: float, beta: int, combine: float, expected: int) -> None:
    # Two tokens give expert B a vote of 2 ** bin each, and experts A and C, their best, one vote of 1 each. So B has
    # more than A, as much, or less for a bin of 0, -1 or below; of two experts with as much the lower is kept.
    affinity = Selection(vote="affinity", guarantee=0, sensitivity=0.0, remap=True, alpha=alpha, beta=beta)

    def best(a: int, b: int, c: int) -> int:
        weights = np.zeros((2, 3), np.float32)
        weights[0, a], weights[1, c], weights[:, b] = 1, 1, combine
        batch = Batch(weights, weights, np.array([[a, b], [c, b]]), np.ones((2, 2)))
        return int(batch.kept_set(affinity, 1).argmax())

    assert best(b=0, a=1, c=2) == (0 if expected >= -1 else 1)
    assert best(b=2, a=0, c=1) == (2 if expected == 0 else 0)


def test_the_voting_tokens_of_affinity_are_those_that_count() -> None:
    # As above, with a bin of -1 and padding: n stays 2, so that expert 0 ties with the others.
    weights = np.array([[0.5, 1, 0], [0.5, 0, 1], [1, 1, 1]], np.float32)
    batch = Batch(weights, weights, np.array([[1, 0], [2, 0], [0, 1]]), np.ones((3, 2)), np.array([True, True, False]))
    kept = batch.kept_set(replace(PRESETS["lynx-affinity"], guarantee=0), 1)
    np.testing.assert_array_equal(kept, [True, False, False])


def test_affinity_of_a_token_without_weights_is_that_of_a_count() -> None:
    affinity = replace(PRESETS["lynx-affinity"], guarantee=0)
    batch = replace(WORKED, combine=np.zeros((3, 4), np.float32))
    for budget in range(4):
        np.testing.assert_array_equal(batch.kept_set(affinity, budget), WORKED.kept_set(PLAIN, budget))


def test_scores_count_for_all_experts() -> None:
    # Expert 2 is nobody's own, but everybody's near miss.
    combine = np.array([[0.4, 0.15, 0.35, 0.1], [0.15, 0.4, 0.35, 0.1]], np.float32)
    batch = Batch(combine, combine, np.array([[0], [1]]), np.ones((2, 1), np.float32))
    np.testing.assert_array_equal(batch.kept_set(replace(PLAIN, vote="score"), 2), [True, False, True, False])
    np.testing.assert_array_equal(batch.select(replace(PLAIN, vote="score"), 2).index, [[0], [2]])


def test_guarantee_ties_go_to_the_lower_expert_not_the_first_slot() -> None:
    choice = np.array([[0.5, 0.5, 0.5, 0.1]], np.float32)
    batch = Batch(choice, choice, np.array([[2, 1]]), np.array([[0.5, 0.5]], np.float32))
    np.testing.assert_array_equal(batch.kept_set(replace(PLAIN, guarantee=1), 0), [False, True, False, False])


@pytest.mark.parametrize(
    ("guarantee", "width", "expected"),
    [
        (0, 8, 0),
        (3, 8, 3),
        (9, 8, 8),  # no more than it has
        (2.0, 8, 2),  # as JSON may write it
        (0.5, 8, 4),
        (0.5, 1, 1),  # rounded up
        (0.01, 8, 1),
        (0.28, 25, 7),  # 0.28 * 25 is 7.000000000000001
    ],
)
def test_guaranteed(guarantee: float, width: int, expected: int) -> None:
    got = replace(PLAIN, guarantee=guarantee).guaranteed(width)
    assert got == expected
    assert isinstance(got, int)


def test_a_vote_that_is_0_as_a_float32_is_none() -> None:
    # Shares of 1e-30 to the power 3 are 0 in float32; to the power 1 they are not.
    weight = np.array([[1.0, 1e-30]], np.float32)
    batch = Batch(np.zeros((1, 3)), np.zeros((1, 3)), np.array([[1, 2]]), weight)
    voting = Selection(vote="weight", guarantee=0, sensitivity=0.0, remap=True, power=3.0)
    np.testing.assert_array_equal(batch.kept_set(voting, 2), [False, True, False])
    np.testing.assert_array_equal(batch.kept_set(replace(voting, power=1.0), 2), [False, True, True])


def test_a_floor_is_votes_for_each_voting_token() -> None:
    # Experts 0 and 2 have two votes of three tokens, 1 and 3 one. A tie with the floor is not above it.
    for floor, kept in [
        (0.0, [0, 1, 2]),  # the budget alone: 1 and 3 tie for its last place
        (0.33, [0, 1, 2]),  # 0.99 votes
        (0.5, [0, 2]),
        (np.nextafter(np.float32(2 / 3), 1), []),  # over 2 votes: no expert is left
    ]:
        assert np.flatnonzero(WORKED.kept_set(PLAIN, 3, float(floor))).tolist() == kept, floor
    two = WORKED.rows([0, 1])
    assert np.flatnonzero(two.kept_set(PLAIN, 3, 0.5)).tolist() == [0]  # 1 vote is not above 0.5 * 2
    assert np.flatnonzero(two.kept_set(PLAIN, 3, 0.49)).tolist() == [0, 1, 2]
    # Padding doesn't vote: the same as without its rows.
    padded = replace(WORKED, token_mask=np.array([True, True, False]))
    assert np.flatnonzero(padded.kept_set(PLAIN, 3, 0.49)).tolist() == [0, 1, 2]
    # The budget is the cap, the guaranteed need no votes, and a budget of E is no cap: the floor alone decides.
    assert np.flatnonzero(WORKED.kept_set(PLAIN, 1, 0.33)).tolist() == [0]
    assert np.flatnonzero(WORKED.kept_set(replace(PLAIN, guarantee=1), 3, 2.0)).tolist() == [0, 3]
    assert np.flatnonzero(WORKED.kept_set(PLAIN, 4, 0.34)).tolist() == [0, 2]
    assert np.flatnonzero(WORKED.kept_set(PLAIN, 99, 0.34)).tolist() == [0, 2]
    assert WORKED.kept_set(PLAIN, 4).all()


def test_a_floor_is_compared_as_float32() -> None:
    # Three shares of about 0.1, and three times 0.1: not equal in float64.
    weight = np.array([[0.9, 0.1]] * 3, np.float32)
    batch = Batch(np.zeros((3, 3)), np.zeros((3, 3)), np.array([[0, 1]] * 3), weight)
    votes = np.float32(3 * (float(weight[0, 1]) / float(weight[0].astype(float).sum())))
    floor = np.float32(0.1)
    assert votes == floor * np.float32(3)  # a tie only as float32
    assert not batch.kept_set(replace(PLAIN, vote="weight"), 2, float(floor))[1]
    below = float(np.nextafter(floor, np.float32(0)))
    assert batch.kept_set(replace(PLAIN, vote="weight"), 2, below)[1]


def test_an_expert_with_no_vote_is_not_kept() -> None:
    assert WORKED.rows([0]).kept_set(PLAIN, 3).sum() == 2


def test_ties_do_not_depend_on_the_order_of_addition() -> None:
    # In float64 0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1; the experts' summed votes still tie: the lower one is kept.
    a, b, c = 0.1, 0.2, 0.3
    weight = np.array([[a, c, 1 - a - c], [b, b, 1 - b - b], [c, a, 1 - c - a]], np.float32)
    batch = Batch(np.zeros((3, 5)), np.zeros((3, 5)), np.array([[1, 0, 2], [1, 0, 3], [1, 0, 4]]), weight)
    np.testing.assert_array_equal(batch.kept_set(replace(PLAIN, vote="weight"), 1), [True, False, False, False, False])


# ----------------------------------------------------------------------------- a literal transcription of the steps


def _literal(
    s: Selection, batch: Batch, budget: int, renormalize: bool, scale: float, floor: float = 0.0
) -> tuple[Array, Array]:
    """The steps one by one, one token after another, with exact sums (`math.fsum`)."""
    f32 = np.float32
    tokens, experts, width = batch.sizes
    rows = [t for t in range(tokens) if batch.counts[t]]
    choice, combine = batch.choice.tolist(), batch.combine.tolist()
    own = {t: batch.topk_index[t].tolist() for t in rows}
    weight = {t: [max(w, 0.0) for w in batch.topk_weight[t].tolist()] for t in rows}

    def share(values: list[float]) -> list[float]:
        total = math.fsum(values)
        return [v / total if total > 0 else 0.0 for v in values]

    forced, votes = set(), [[] for _ in range(experts)]  # type: set[int], list[list[float]]
    for t in rows:
        best = sorted(own[t], key=lambda e: (-choice[t][e], e))
        forced |= set(best[: s.guaranteed(width)])
        confidence = (width * max(share(weight[t])) - 1) / (width - 1) if width > 1 else 1.0
        if s.sensitivity > 0 and f32(confidence) < f32(s.sensitivity):
            forced |= set(own[t])
        if s.vote == "score":
            for e, v in enumerate(share([max(c, 0.0) for c in combine[t]])):
                votes[e].append(v)
            continue
        top = max(combine[t][e] for e in own[t])
        for e, v in zip(own[t], share(weight[t]), strict=True):
            if s.vote == "count":
                vote = 1.0
            elif s.vote == "weight":
                vote = v ** float(f32(s.power))
            elif top <= 0:
                vote = 1.0
            elif combine[t][e] <= 0:
                vote = float(len(rows)) ** -s.beta
            else:
                level = f32(float(f32(s.alpha)) * math.log(combine[t][e] / top))
                vote = float(len(rows)) ** min(max(math.floor(level), -s.beta), 0)
            votes[e].append(vote)
    summed = [f32(math.fsum(v)) for v in votes]
    enough = f32(float(f32(floor)) * len(rows))
    others = sorted(
        (e for e in range(experts) if summed[e] > enough and e not in forced), key=lambda e: (-summed[e], e)
    )
    kept = forced | set(others[: max(budget - len(forced), 0)])

    index, weights = np.full((tokens, width), -1), np.zeros((tokens, width), f32)
    for t in rows:
        if (budget >= experts and floor == 0) or kept >= set(own[t]):
            index[t], weights[t] = own[t], batch.topk_weight[t]
            continue
        usable = kept if s.remap else kept & set(own[t])
        chosen = sorted(usable, key=lambda e: (-choice[t][e], e))[:width]
        total = math.fsum(combine[t][e] for e in chosen) if renormalize else 1.0
        index[t, : len(chosen)] = chosen
        with np.errstate(over="ignore"):
            weights[t, : len(chosen)] = [f32(combine[t][e] / total * f32(scale)) if total else 0.0 for e in chosen]
    return index, weights


@property_test
@given(selections, batches(), budgets, st.booleans(), st.sampled_from([1.0, 2.5]), floors)
def test_equals_a_literal_transcription(
    selection: Selection, batch: Batch, budget: int, renormalize: bool, scale: float, floor: float
) -> None:
    index, weight = _literal(selection, batch, budget, renormalize, scale, floor)
    got = batch.select(selection, budget, renormalize=renormalize, scale=scale, floor=floor)
    np.testing.assert_array_equal(got.index, index)
    np.testing.assert_allclose(got.weight, weight, rtol=1e-6, atol=1e-44)  # atol: float32's last denormal bits
    np.testing.assert_array_equal(got.kept, np.unique(index[index >= 0]))


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_a_literal_transcription_at_a_real_size(preset: str) -> None:
    # Qwen3-MoE's sizes: beyond what the generated batches reach, e.g. in the number of summed votes.
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(16, 128)).astype(np.float32)
    combine = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    index = np.argsort(-logits, axis=1)[:, :8]
    weight = np.take_along_axis(combine, index, axis=1)
    batch = Batch(logits, combine, index, weight / weight.sum(axis=1, keepdims=True))
    for floor in (0.0, 0.01, 0.1):
        expected = _literal(PRESETS[preset], batch, 40, True, 1.0, floor)
        got = batch.select(PRESETS[preset], 40, floor=floor)
        np.testing.assert_array_equal(got.index, expected[0])
        np.testing.assert_allclose(got.weight, expected[1], rtol=1e-6)


# ------------------------------------------------------------------------------------------------- invariants


def _same_bits(a: Array, b: Array) -> None:
    np.testing.assert_array_equal(a.astype(np.float32).view(np.uint32), b.astype(np.float32).view(np.uint32))


@property_test
@given(selections, batches(), budgets)
def test_masked_and_broken_rows_load_nothing(selection: Selection, batch: Batch, budget: int) -> None:
    got = batch.select(selection, budget)
    assert (got.index[~batch.counts] == -1).all()
    assert (got.weight[~batch.counts] == 0).all()


@property_test
@given(selections, batches(), st.integers(0, 2))
def test_a_full_budget_changes_no_bit(selection: Selection, batch: Batch, more: int) -> None:
    got = batch.select(selection, batch.choice.shape[1] + more, scale=3.0)
    rows = batch.counts
    np.testing.assert_array_equal(got.index[rows], batch.topk_index[rows])
    _same_bits(got.weight[rows], batch.topk_weight[rows])


@property_test
@given(selections, batches(), budgets)
def test_tokens_whose_own_are_kept_change_no_bit(selection: Selection, batch: Batch, budget: int) -> None:
    kept = batch.kept_set(selection, budget)
    got = batch.select(selection, budget, scale=3.0)
    rows = [t for t in np.flatnonzero(batch.counts) if kept[batch.topk_index[t]].all()]
    np.testing.assert_array_equal(got.index[rows], batch.topk_index[rows])
    _same_bits(got.weight[rows], batch.topk_weight[rows])


@property_test
@given(selections, batches(), budgets)
def test_a_restricted_token_uses_its_best_kept_experts(selection: Selection, batch: Batch, budget: int) -> None:
    kept = batch.kept_set(selection, budget)
    got = batch.select(selection, budget)
    for t in np.flatnonzero(batch.counts):
        own, used = batch.topk_index[t], got.index[t][got.index[t] >= 0]
        assert kept[used].all()
        if kept[own].all():
            continue
        usable = kept if selection.remap else kept & np.isin(np.arange(len(kept)), own)
        assert len(used) == min(len(own), usable.sum())
        assert (got.index[t][len(used) :] == -1).all()
        unused = np.setdiff1d(np.flatnonzero(usable), used)
        ranks = batch.choice[t]
        assert (np.diff(ranks[used]) <= 0).all()
        assert not len(unused) or not len(used) or ranks[used].min() >= ranks[unused].max()


@property_test
@given(selections, batches(), budgets)
def test_experts_in_use_stay_within_the_budget(selection: Selection, batch: Batch, budget: int) -> None:
    forced = batch.kept_set(selection, 0).sum()  # a budget of 0 keeps the guaranteed and the sensitive
    got = batch.select(selection, budget)
    assert len(got.kept) <= max(budget, forced)
    np.testing.assert_array_equal(got.kept, np.unique(got.index[got.index >= 0]))


@property_test
@given(selections, batches(min_tokens=1), budgets, st.sampled_from([1.0, 2.5]))
def test_renormalised_weights_sum_to_the_models_own(
    selection: Selection, batch: Batch, budget: int, scale: float
) -> None:
    assume(np.nan_to_num(batch.combine).min() >= 0)
    # The model's own rule gives `scale` in sum.
    total = np.take_along_axis(batch.combine, np.clip(batch.topk_index, 0, batch.sizes[1] - 1), axis=1).astype(float)
    with np.errstate(all="ignore"):
        own = (total / total.sum(axis=1, keepdims=True) * scale).astype(np.float32)
    batch = replace(batch, topk_weight=np.nan_to_num(own))
    got = batch.select(selection, budget, scale=scale)
    for t in np.flatnonzero(batch.counts):
        used = got.index[t][got.index[t] >= 0]
        expected = scale if batch.combine[t][used].any() else 0.0
        np.testing.assert_allclose(got.weight[t].astype(float).sum(), expected, rtol=1e-6)


@property_test
@given(selections, batches(), budgets, st.data())
def test_permuting_the_tokens_permutes_the_result(
    selection: Selection, batch: Batch, budget: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(batch.choice))))
    got, permuted = batch.select(selection, budget), batch.rows(list(order)).select(selection, budget)
    np.testing.assert_array_equal(permuted.index, got.index[list(order)])
    np.testing.assert_array_equal(permuted.weight, got.weight[list(order)])
    np.testing.assert_array_equal(permuted.kept, got.kept)


@property_test
@given(selections, batches())
def test_raising_the_budget_never_removes_an_expert(selection: Selection, batch: Batch) -> None:
    kept = [batch.kept_set(selection, budget) for budget in range(batch.choice.shape[1] + 2)]
    for smaller, larger in itertools.pairwise(kept):
        assert (larger | ~smaller).all()


@property_test
@given(selections, batches(), budgets)
def test_raising_the_floor_never_adds_an_expert(selection: Selection, batch: Batch, budget: int) -> None:
    kept = [batch.kept_set(selection, budget, floor) for floor in (0.0, 0.01, 0.1, 0.3, 0.6, 3e38)]
    for lower, higher in itertools.pairwise(kept):
        assert (lower | ~higher).all()
    np.testing.assert_array_equal(kept[-1], batch.kept_set(selection, 0))  # the guaranteed and the sensitive


@property_test
@given(selections, batches(), budgets, floors)
def test_rows_that_do_not_count_change_nothing(selection: Selection, batch: Batch, budget: int, floor: float) -> None:
    # Left out altogether, the others get the same.
    got = batch.select(selection, budget, floor=floor)
    alone = batch.rows(batch.counts).select(selection, budget, floor=floor)
    np.testing.assert_array_equal(got.index[batch.counts], alone.index)
    _same_bits(got.weight[batch.counts], alone.weight)
    np.testing.assert_array_equal(got.kept, alone.kept)


@property_test
@given(
    selections,
    batches(min_tokens=1),
    budgets,
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.sampled_from(["choice", "combine", "topk_weight"]),
    st.integers(0, 100),
)
def test_a_broken_value_is_the_same_as_padding(
    selection: Selection, batch: Batch, budget: int, value: float, where: str, place: int
) -> None:
    values = getattr(batch, where).copy()
    row = place % len(values)
    values[row, place % values.shape[1]] = value
    mask = np.ones(len(values), bool) if batch.token_mask is None else batch.token_mask.copy()
    mask[row] = False
    broken, padding = replace(batch, **{where: values}), replace(batch, token_mask=mask)
    got, expected = broken.select(selection, budget), padding.select(selection, budget)
    np.testing.assert_array_equal(got.index, expected.index)
    _same_bits(got.weight, expected.weight)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_tokens(preset: str) -> None:
    got = WORKED.rows([]).select(PRESETS[preset], 2)
    assert (got.index.shape, got.weight.shape, got.kept.shape) == ((0, 2), (0, 2), (0,))


def test_floats_of_other_types_are_taken_as_float32() -> None:
    # 1 + 1e-9 is 1 in float32: a tie, which goes to the lower expert. 1e300 is Inf: the row is masked.
    choice = np.array([[1.0, 1.0 + 1e-9], [1e300, 0.0]])
    batch = Batch(choice, np.ones((2, 2), np.float16), np.array([[1], [1]], np.int32), np.ones((2, 1)))
    got = batch.select(replace(PLAIN, vote="score"), 1)
    np.testing.assert_array_equal(got.index, [[0], [-1]])


# -------------------------------------------------------------------------------------------------- wrong inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice": np.zeros(4)}, r"choice has the shape \(4,\).*\[T,E\]"),
        ({"choice": np.zeros((3, 0)), "combine": np.zeros((3, 0))}, r"choice has the shape \(3, 0\)"),
        ({"combine": np.zeros((3, 5))}, r"combine has the shape \(3, 5\).*\(3, 4\)"),
        ({"topk_index": np.zeros((2, 2), int)}, r"topk_index has the shape \(2, 2\).*T = 3 and K in 1 to 4"),
        ({"topk_index": np.zeros((3, 5), int)}, r"topk_index has the shape \(3, 5\).*K in 1 to 4"),  # K > E
        ({"topk_index": np.zeros((3, 0), int)}, r"topk_index has the shape \(3, 0\)"),
        ({"topk_index": np.zeros((3, 2))}, "topk_index is of type float64"),
        ({"topk_weight": np.zeros((3, 1))}, r"topk_weight has the shape \(3, 1\).*\(3, 2\)"),
        ({"topk_index": np.array([[0, 1], [0, 4], [3, 2]])}, "topk_index holds 4 in row 1.*0 to 3"),
        ({"topk_index": np.array([[0, 1], [0, -1], [3, 2]])}, "topk_index holds -1 in row 1.*0 to 3"),
        ({"topk_index": np.array([[0, 1], [0, 2], [3, 3]])}, "topk_index holds 3 twice in row 2"),
        ({"token_mask": np.ones(2, bool)}, r"token_mask is bool of shape \(2,\).*\(3,\)"),
        ({"token_mask": np.ones(3)}, "token_mask is float64"),  # an additive mask means the opposite
    ],
)
def test_wrong_inputs_are_named(change: dict[str, Array], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(WORKED, **change).select(PLAIN, 2)


@pytest.mark.parametrize(
    ("budget", "message"),
    [(-1, "budget is -1.*from 0"), (1.5, "budget is 1.5"), ("4", "budget is '4'")],
)
def test_wrong_budgets(budget: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        WORKED.select(PLAIN, budget)
    with pytest.raises(UsageError, match=message):
        WORKED.kept_set(PLAIN, budget)


@pytest.mark.parametrize(
    ("floor", "message"),
    [(-0.1, "floor is -0.1.*from 0"), (math.nan, "floor is nan"), (math.inf, "floor is inf"), ("1", "floor is '1'")],
)
def test_wrong_floors(floor: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        WORKED.select(PLAIN, 2, floor=floor)
    with pytest.raises(UsageError, match=message):
        WORKED.kept_set(PLAIN, 2, floor)


def test_budgets_may_be_of_any_integer_type() -> None:
    np.testing.assert_array_equal(WORKED.select(PLAIN, np.array(2, np.int32)).kept, [0, 2])  # type: ignore[arg-type]


def test_wrong_scale() -> None:
    with pytest.raises(UsageError, match="scale is nan"):
        WORKED.select(PLAIN, 2, scale=math.nan)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vote", "votes", "vote is 'votes'.*count, weight, affinity, score"),
        ("guarantee", -1, "guarantee is -1"),
        ("guarantee", 1.5, "guarantee is 1.5"),
        ("guarantee", math.inf, "guarantee is inf"),
        ("guarantee", True, "guarantee is True"),
        ("sensitivity", -0.1, "sensitivity is -0.1.*0 to 1"),
        ("sensitivity", 1.1, "sensitivity is 1.1.*0 to 1"),
        ("sensitivity", math.nan, "sensitivity is nan"),
        ("remap", "drop", "remap is 'drop'"),
        ("power", 0, "power is 0.*above 0"),
        ("power", 1e-60, "power is 1e-60"),  # 0 as a node's attribute
        ("alpha", -1.0, "alpha is -1.0.*above 0"),
        ("alpha", 1e60, "alpha is 1e\\+60"),  # Inf as a node's attribute
        ("beta", -1, "beta is -1"),
        ("beta", 1.5, "beta is 1.5"),
    ],
)
def test_wrong_parameters_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(PLAIN, **{field: value})
