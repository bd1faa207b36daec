"""The search, on made-up models whose best budgets are known; and the promise's arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lynx_trt.budgets import Restriction
from lynx_trt.calibration.company import ALONE
from lynx_trt.calibration.cost import BANDWIDTH, EFFICIENCY, cost_model
from lynx_trt.calibration.dials import Budgets, Dial, Floors, budget_dial, floor_dial
from lynx_trt.calibration.intervals import Bootstrap, Interval, bound_for_new_text, student_t
from lynx_trt.calibration.measure import Measurement
from lynx_trt.calibration.model import Setting
from lynx_trt.calibration.promise import Promise
from lynx_trt.calibration.search import Goal, Search, curves, measure_sensitivity
from lynx_trt.calibration.study import bytes_goal, kl_at, promise_goal, with_caps
from lynx_trt.errors import UsageError
from lynx_trt.selection import PRESETS

NATURAL = 16.0
EXPERTS = 24
LYNX = PRESETS["lynx"]
FEWEST = 2.0  # what is guaranteed, where floors are tried


class MadeUp:
    """Layers whose KL falls by a factor of e every `decay` experts, times what the others lost already.

    A floor of `top` leaves what is guaranteed, and each halving of it one expert more.
    """

    def __init__(
        self,
        height: Sequence[float],
        decay: Sequence[float],
        together: float = 0.0,
        noise: float = 0.0,
        top: float = 0.03,
    ) -> None:
        self.height, self.decay, self.together, self.noise, self.top = height, decay, together, noise, top
        self.asked: set[Setting] = set()

    def active(self, setting: Setting) -> list[float]:
        """Experts of each layer."""
        pairs = zip(setting.restriction.budgets, setting.restriction.floors, strict=True)
        return [min(budget, self.above(floor)) for budget, floor in pairs]

    def above(self, floor: float) -> float:
        """Experts with more votes than a floor."""
        return NATURAL if floor == 0 else min(max(FEWEST + math.log2(self.top / floor), FEWEST), NATURAL)

    def kl(self, budgets: Sequence[float]) -> float:
        alone = [
            0.0 if budget >= NATURAL else height * (math.exp(-budget / decay) - math.exp(-NATURAL / decay))
            for budget, height, decay in zip(budgets, self.height, self.decay, strict=True)
        ]
        # The first layers' losses make the last ones' worse.
        return sum(value * (1 + self.together * number) for number, value in enumerate(alone))

    def measure(self, settings: Sequence[Setting]) -> list[Measurement]:
        return [self._measure(setting) for setting in settings]

    def _measure(self, setting: Setting) -> Measurement:
        self.asked.add(setting)
        active = self.active(setting)
        generator = np.random.default_rng(abs(hash(setting.restriction)) % 2**32)
        factor = 1.0 if sum(count < NATURAL for count in active) > 1 else 1 / (1 + self.together)  # alone hurts less
        kl = self.kl(active) * factor * (1 + self.noise * generator.standard_normal())
        return made_up_measurement(setting, max(kl, 0.0), [min(count, NATURAL) for count in active])


def made_up_measurement(setting: Setting, kl: float, active: list[float]) -> Measurement:
    spread = np.linspace(0.9, 1.1, 16)
    mean = sum(active) / len(active)
    single = Interval(0.0, 0.0, 0.0)
    return Measurement(
        batch=8,
        setting=setting,
        kl=Interval(kl, 0.9 * kl, 1.1 * kl),
        kl_p99=single,
        agreement=Interval(1 - kl, 1 - kl, 1 - kl),
        nats_a_token=single,
        bits_a_byte=single,
        perplexity=single,
        perplexity_increase=Interval(math.expm1(kl), 0.0, 1.0),
        active=Interval(mean, mean, mean),
        active_p99=max(active),
        active_by_layer=active,
        active_max_by_layer=[math.ceil(count) + 2 for count in active],
        expert_bytes_a_token=Interval(sum(active) / 8, 0.0, 1.0),
        step_seconds=Interval(1 + sum(active), 0.0, 1.0),
        kl_by_sequence=list(kl * spread),
        nats_added_by_sequence=list(kl * spread),
        agreement_by_sequence=list(1 - kl * spread),
    )


def dial_of(model: MadeUp, name: str) -> Dial:
    layers = len(model.height)
    natural = np.full(layers, NATURAL)
    if name == "budgets":
        return budget_dial(LYNX, [EXPERTS] * layers, natural, 4)
    return floor_dial(model, LYNX, [EXPERTS] * layers, natural)


def search(model: MadeUp, goal: Goal, name: str = "budgets") -> Measurement | None:
    dial, layers = dial_of(model, name), len(model.height)
    found = measure_sensitivity(model, dial, np.full(layers, NATURAL))
    lines = curves(found, dial, [int(NATURAL)] * layers, [1] * layers)
    return Search(model, dial, lines, goal).run().best


MODELS = {
    "alike": MadeUp([1.0] * 4, [2.0] * 4),
    "first-sensitive": MadeUp([3.0, 0.3, 1.0, 0.1], [3.0, 2.0, 2.5, 1.5]),
    "worse-together": MadeUp([1.0, 0.5, 0.5, 0.4], [3.0, 2.0, 2.5, 3.5], together=1.0),
    "noisy": MadeUp([3.0, 0.3, 1.0, 0.1], [3.0, 2.0, 2.5, 1.5], noise=0.02),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("total", [20, 32, 44])
def test_search_is_near_the_best_there_is(name: str, total: int) -> None:
    """Against all budgets there are, for a limit on bytes: within 10% of the least KL, and not above uniform's."""
    model = MODELS[name]
    best = search(model, bytes_goal(total / 8))
    assert best is not None
    assert sum(best.active_by_layer) <= total
    single = np.array(
        [[model.kl([b if n == layer else EXPERTS for n in range(4)]) for b in range(17)] for layer in range(4)]
    )
    grids = np.meshgrid(*single, indexing="ij")
    least = sum(grids)[sum(np.meshgrid(*[np.arange(17)] * 4, indexing="ij")) <= total].min()
    assert model.kl(best.setting.restriction.budgets) <= 1.1 * least + 1e-6
    assert model.kl(best.setting.restriction.budgets) <= model.kl([total // 4] * 4) * (1 + 4 * model.noise)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("total", [20, 32, 44])
def test_floors_are_near_the_best_there_is(name: str, total: int) -> None:
    """The same for floors, which are finer: against all that whole experts can do."""
    model = MODELS[name]
    best = search(model, bytes_goal(total / 8), "floors")
    assert best is not None
    assert sum(best.active_by_layer) <= total
    counts = range(2, 17)
    single = np.array(
        [[model.kl([b if n == layer else EXPERTS for n in range(4)]) for b in counts] for layer in range(4)]
    )
    grids = np.meshgrid(*single, indexing="ij")
    least = sum(grids)[sum(np.meshgrid(*[np.array(counts)] * 4, indexing="ij")) <= total].min()
    assert model.kl(best.active_by_layer) <= 1.1 * least + 1e-6


@pytest.mark.parametrize("top", [0.6, 0.03, 2e-5], ids=["few experts", "some", "very many"])
def test_floors_are_looked_for_where_they_matter(top: float) -> None:
    """From what leaves nothing but the guaranteed to what leaves nearly all, whatever votes a model has."""
    model = MadeUp([1.0] * 3, [8.0] * 3, top=top)
    dial = dial_of(model, "floors")
    assert isinstance(dial, Floors)
    assert model.above(dial.values[0]) == FEWEST
    assert dial.values[0] <= 4 * top or dial.values[0] == 1
    assert model.above(dial.values[-1]) >= 0.97 * NATURAL
    assert model.above(4.01 * dial.values[-1]) < 0.97 * NATURAL  # and not further down than need be
    ratios = np.array(dial.values[:-1]) / np.array(dial.values[1:])
    np.testing.assert_allclose(ratios, 2**0.25, rtol=2e-3)
    assert len(dial.rungs) <= 10
    assert len(model.asked) <= 17


def test_floors_end_where_nothing_is_lost() -> None:
    """Experts that hardly count keep the search from no rung: at 10 of 16 experts a thousandth of the KL is left."""
    model = MadeUp([1.0] * 3, [1.0] * 3)
    dial = dial_of(model, "floors")
    assert isinstance(dial, Floors)
    lowest, little = dial.values[-1], 1e-3 * model.kl([FEWEST] * 3)
    assert model.kl([model.above(lowest)] * 3) <= little < model.kl([model.above(4.01 * lowest)] * 3)
    assert model.above(lowest) < 0.9 * NATURAL


def test_levels_mean_what_they_say() -> None:
    """The last level restricts nothing; another has a floor, without a cap."""
    floors = Floors(LYNX, (8, 24), (0.5, 0.25))
    assert floors.last == (2, 2)
    assert floors.setting((0, 2)) == Setting(LYNX, Restriction((8, 24), (0.5, 0.0)))
    budgets = Budgets(LYNX, (8, 24), [1, 4])
    assert budgets.setting((3, 24)) == Setting(LYNX, Restriction((3, 24), (0.0, 0.0)))
    assert budgets.last == (8, 24)


def test_caps_are_what_was_used() -> None:
    """The most of any step, never above a budget that is there."""
    floors = (0.1, 0.1, 0.0, 0.1)
    item = made_up_measurement(Setting(LYNX, Restriction((24, 24, 24, 6), floors)), 0.1, [9.5, 23.0, 7.0, 6.0])
    item.active_max_by_layer[:] = [12, 24, 9, 8]
    assert with_caps(item) == Setting(LYNX, Restriction((12, 24, 9, 6), floors))


@pytest.mark.parametrize("dial", ["budgets", "floors"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("limit", [0.3, 0.03, 0.003])
def test_search_keeps_a_promise_cheaply(name: str, limit: float, dial: str) -> None:
    """The bound holds with room for chance, and nothing that is the same in all layers does better."""
    model, promise = MODELS[name], Promise(max_kl=limit)
    best = search(model, promise_goal(promise, 16, ALONE), dial)
    assert best is not None
    assert promise.will_be_kept(best, 16)
    levels = dial_of(model, dial)
    uniform = model.measure([levels.setting((level,) * 4) for level in range(levels.last[0] + 1)])
    allowed = [item.step_seconds.mean for item in uniform if promise.will_be_kept(item, 16)]
    assert best.step_seconds.mean <= min(allowed)


@pytest.mark.parametrize("dial", ["budgets", "floors"])
def test_search_asks_little(dial: str) -> None:
    """Three rounds of four layers: far fewer settings than the 17**4 there are."""
    model = MadeUp([3.0, 0.3, 1.0, 0.1], [3.0, 2.0, 2.5, 1.5])
    search(model, promise_goal(Promise(max_kl=0.03), 16, ALONE), dial)
    assert len(model.asked) < 140


def test_a_promise_has_several_parts() -> None:
    promise = Promise(max_kl=0.02, max_perplexity_increase=0.01, min_agreement=0.97)
    good = made_up_measurement(Setting(LYNX, Restriction((1,))), 0.005, [1.0])
    assert promise.is_kept(good)
    assert promise.will_be_kept(good, 16)
    by_one = made_up_measurement(Setting(LYNX, Restriction((1,))), 0.012, [1.0])  # perplexity rises by 1.2%
    assert not promise.is_kept(by_one)
    assert promise.strain(by_one, 16) > 1
    assert str(promise) == "KL at most 0.02, perplexity at most 1% above, agreement at least 0.97"


def test_room_is_left_for_chance() -> None:
    """A mean just below the limit is not enough: the next text may be worse."""
    near = made_up_measurement(Setting(LYNX, Restriction((1,))), 0.0199, [1.0])
    promise = Promise(max_kl=0.02)
    assert promise.is_kept(near)
    assert not promise.will_be_kept(near, 16)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({}, "nothing is promised"),
        ({"max_kl": 0.0}, "--max-kl is 0; it must be above 0"),
        ({"max_kl": math.nan}, "--max-kl is nan"),
        ({"max_perplexity_increase": -0.1}, "--max-perplexity-increase is -0.1"),
        ({"min_agreement": 1.0}, "--min-agreement is 1; it must lie between 0 and 1"),
        ({"min_agreement": 98.0}, "--min-agreement is 98"),
    ],
)
def test_promises_that_mean_nothing(limits: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Promise(**limits)


def test_bound_covers_what_it_says() -> None:
    """Of many texts, the mean of the next one is above the 99% bound about once in a hundred."""
    generator = np.random.default_rng(0)
    above = 0
    for _ in range(2000):
        values = generator.gamma(4.0, size=24)  # skewed, as KL is
        above += values[12:].mean() > bound_for_new_text(values[:12], 12, 0.99)
    assert above / 2000 < 0.03
    assert bound_for_new_text(np.array([1.0, 2.0]), 5, 0.99) == math.inf


@pytest.mark.parametrize(("freedom", "value"), [(4, 3.747), (10, 2.764), (31, 2.453), (1000, 2.330)])
def test_student_t_against_tables(freedom: int, value: float) -> None:
    assert student_t(0.99, freedom) == pytest.approx(value, rel=0.02)


def test_bootstrap_against_theory() -> None:
    """The interval of a mean is about 1.96 standard errors wide on each side."""
    values = np.random.default_rng(1).normal(5.0, 2.0, size=200)
    interval = Bootstrap(200, seed=0).mean(values)
    error = values.std() / math.sqrt(200)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert Bootstrap(200, seed=0).mean(values) == interval


def test_upper_quantile_is_the_plain_one() -> None:
    values = np.random.default_rng(2).gamma(1.0, size=(20, 57))
    interval = Bootstrap(20, seed=0).upper_quantile(values, 0.99)
    assert interval.mean == np.sort(values.reshape(-1))[-1 - int(0.01 * values.size)]
    assert interval.low < interval.mean < interval.high


def test_kl_between_measured_points() -> None:
    """Halfway between two, the geometric mean; outside nothing is claimed."""
    points = [made_up_measurement(Setting(LYNX, Restriction((b,))), kl, [float(b)]) for b, kl in ((4, 0.4), (8, 0.1))]
    between = kl_at(points, 6.0)
    assert between is not None
    assert between.mean == pytest.approx(0.2, rel=1e-6)
    assert kl_at(points, 8.5) is None
    assert kl_at(points, 3.5) is None


def test_cost_model_is_bytes_over_bandwidth() -> None:
    """OEA's own measurement on an H100, arXiv 2511.02237: 34 us + 2.9 us for each expert of 9.4 MB."""
    cost = cost_model("H100", [9_437_184], 0)
    assert cost.bandwidth == BANDWIDTH["h100"] * EFFICIENCY
    assert cost.step_seconds([48.8]) == pytest.approx(175.7e-6, rel=0.2)
    slope = cost.step_seconds([2.0]) - cost.step_seconds([1.0])
    assert slope == pytest.approx(2.9e-6, rel=0.2)
    measured = cost_model("h100", [1000, 3000], 5000, bandwidth=2.0, layer_seconds=0.0)
    assert measured.step_seconds([1.5, 2.0]) == pytest.approx((1500 + 6000 + 5000) / 2e12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hardware": "h300"}, "--hardware is 'h300'; known are h100"),
        ({"bandwidth": 0.0}, "--bandwidth is 0 TB/s"),
        ({"bandwidth": math.nan}, "--bandwidth is nan"),
        ({"bandwidth": 3.35e12}, "--bandwidth is 3.35e\\+12 TB/s"),  # bytes instead of terabytes
        ({"layer_seconds": -1e-6}, "fixed cost of a MoE layer is -1 us"),
    ],
)
def test_costs_that_mean_nothing(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        cost_model(**{"hardware": "h100", "expert_bytes": [1], "other_bytes": 0, **options})
