"""The whole measurement of one batch size: sensitivity, search, the check on held-out text, and what else there is.

Everything that a choice depends on is measured on one part of the text; everything that is reported as its quality,
and every comparison, on the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lynx_trt.budgets import Restriction
from lynx_trt.calibration.company import ALONE, Company, grouping, measure_company
from lynx_trt.calibration.dials import Dial, budget_dial, floor_dial
from lynx_trt.calibration.intervals import Array, Bootstrap, Interval
from lynx_trt.calibration.journal import Measured
from lynx_trt.calibration.measure import Measurement
from lynx_trt.calibration.model import Setting
from lynx_trt.calibration.plots import ONE_FLOOR
from lynx_trt.calibration.promise import Check, Promise
from lynx_trt.calibration.search import (
    BISECTIONS,
    Curves,
    Found,
    Goal,
    Search,
    Sensitivity,
    curves,
    measure_sensitivity,
)
from lynx_trt.selection import DEFAULT_PRESET, PRESETS, Selection

# A choice that saves less of the experts than this is none.
LEAST_SAVED = 0.01
# Uniform budgets at which presets are compared, as shares of the experts that the model uses by itself.
COMPARED = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# For --search-parameters: the guarantee k0, and tau, each tried around the selection's own.
GUARANTEES = (0, 1, 2)
SENSITIVITIES = (0.0, 0.1, 0.25)
# The shares of the natural active experts at which they are compared: the first that the selection's own reach.
PARAMETERS_AT = (0.6, 0.7, 0.8, 0.9)
# What a search asks for, about; only for the progress bar.
SEARCH_EXPECTED = 60


@dataclass
class Study:
    """What was found at one batch size."""

    batch: int
    natural: list[float]  # [N], mean experts active unrestricted
    unrestricted: Measurement
    selection: Selection
    sensitivity: Sensitivity
    company: Company  # how much more batches vary than sequences
    search: Found
    parameters: list[dict[str, Any]]  # what --search-parameters tried
    held_out: Measurement | None  # of what was chosen
    checks: list[Check]
    uniform: dict[str, list[Measurement]]  # by preset, at falling active experts
    frontier: list[Measurement]  # floors or budgets by layer, at falling active experts
    uses: dict[str, list[list[float]]]  # [N][E], tokens at the r-th busiest expert
    shared: Measurement | None = None  # held-out, under what several batch sizes share

    @property
    def chosen(self) -> Measurement | None:
        """What was chosen, as measured on the text that it was chosen on."""
        return self.search.best

    @property
    def kept(self) -> bool:
        """Whether held-out text keeps the promise."""
        return self.held_out is not None and all(check.kept for check in self.checks)

    def nearest(self) -> str:
        """In words, how near to the promise the mildest levels come that save enough to be chosen."""
        most = (1 - LEAST_SAVED) * sum(self.natural) / len(self.natural)
        saving = [step for step in self.search.steps if step["active"] <= most]
        mildest = min(saving, key=lambda step: float(step["strain"]), default=None)
        if mildest is None:
            return "nothing that was tried saves that much"
        return (
            f"the nearest that was tried comes to {mildest['strain']:.3g} times the limit (with room for chance) at "
            f"{mildest['active']:.2f} of {most / (1 - LEAST_SAVED):.2f} active experts"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""

        def plain(item: Measurement | None) -> dict[str, Any] | None:
            return item.to_dict() if item else None

        return {
            "batch": self.batch,
            "natural_active": self.natural,
            "unrestricted": self.unrestricted.to_dict(),
            "selection": asdict(self.selection),
            "sensitivity": asdict(self.sensitivity),
            "company": asdict(self.company),
            "search": {"best": plain(self.search.best), "steps": self.search.steps},
            "parameters": self.parameters,
            "held_out": plain(self.held_out),
            "checks": [check._asdict() for check in self.checks],
            "kept": self.kept,
            "uniform": {name: [item.to_dict() for item in items] for name, items in self.uniform.items()},
            "frontier": [item.to_dict() for item in self.frontier],
            "comparison": comparison([*self.frontier, *([self.held_out] if self.held_out else [])], self.uniform),
            "uses": self.uses,
            "shared": plain(self.shared),
        }


Phase = Callable[[str], Callable[[float], None]]


@dataclass(frozen=True)
class Parts:
    """The parts of the text, at one batch size: to choose on, and held out."""

    choose: Measured
    check: Measured
    more: Measured | None = None  # text of neither part, if there is enough


def run_study(
    parts: Parts,
    selection: Selection,
    promise: Promise,
    phase: Phase,
    *,
    dial_name: str = "floors",
    search_parameters: bool = False,
    compare: bool = True,
) -> Study:
    """Find floors or budgets that keep `promise` for `selection`, and measure what there is to compare them with."""
    choose, check = parts.choose, parts.check
    meter, label = choose.meter, f"batch {choose.batch}"
    with _Bar(phase(f"Unrestricted model, {label}"), choose, 2):
        natural = meter.natural(choose.batch)
        unrestricted = check.measure([check.meter.unrestricted()])[0]
    means, most = natural.mean((1, 2)), natural.max((1, 2))
    parameters: list[dict[str, Any]] = []
    if search_parameters:
        selection, parameters = _search_parameters(choose, selection, dial_name, means, phase, label)
    dial = _dial(choose, selection, dial_name, means, phase, label)
    with _Bar(phase(f"Each layer alone, {label}"), choose, len(dial.rungs) * len(dial.last)):
        sensitivity = measure_sensitivity(choose, dial, means)
    model = curves(sensitivity, dial, [int(value) for value in most], meter.cost.expert_bytes)
    new = check.meter.sequences // check.batch * check.batch
    company = _company(parts, dial, promise_goal(promise, new, ALONE), model, phase, label)
    goal = promise_goal(promise, new, company)
    with _Bar(phase(f"Search, {label}"), choose, SEARCH_EXPECTED):
        found = Search(choose, dial, model, goal).run()
        if found.best and found.best.active.mean > (1 - LEAST_SAVED) * float(means.mean()):
            found.best = None
        if found.best:
            (capped,) = choose.measure([with_caps(found.best)])
            found.best = capped if goal.strain(capped) <= 1 else found.best
    held_out = check.measure([found.best.setting])[0] if found.best else None
    uniform: dict[str, list[Measurement]] = {}
    frontier: list[Measurement] = []
    if compare:
        default = PRESETS[DEFAULT_PRESET]
        is_that = dial.name == "floors" and selection == default
        floors = dial if is_that else _dial(choose, default, "floors", means, phase, label)
        uniform = _uniform(check, floors, means, phase, label)
        with _Bar(phase(f"{dial.name.capitalize()} by layer, {label}"), check, len(COMPARED)):
            frontier = check.measure(_frontier(model, dial))
    return Study(
        batch=choose.batch,
        natural=[float(value) for value in means],
        unrestricted=unrestricted,
        selection=selection,
        sensitivity=sensitivity,
        company=company,
        search=found,
        parameters=parameters,
        held_out=held_out,
        checks=promise.checks(held_out, 1) if held_out else [],
        uniform=uniform,
        frontier=frontier,
        uses=_uses(check, found.best),
    )


class _Bar:
    """A phase whose bar follows how many settings were measured, of about `expected`."""

    def __init__(self, update: Callable[[float], None], measured: Measured, expected: int) -> None:
        self._update, self._measured, self._expected = update, measured, expected

    def __enter__(self) -> None:
        start = self._measured.count
        self._measured.on_progress = lambda done: self._update(min((done - start) / self._expected, 0.99))

    def __exit__(self, *_: object) -> None:
        self._measured.on_progress = None
        self._update(1.0)


def with_caps(item: Measurement) -> Setting:
    """The setting of `item` with its budgets lowered to the most experts that any step used: the bound on a step."""
    own = item.setting.restriction
    caps = tuple(min(pair) for pair in zip(own.budgets, item.active_max_by_layer, strict=True))
    return replace(item.setting, restriction=replace(own, budgets=caps))


def _company(parts: Parts, dial: Dial, goal: Goal, model: Curves, phase: Phase, label: str) -> Company:
    """How much batches differ at levels near to those that `goal` will find."""
    measured = parts.choose
    rounds = grouping(measured.meter.sequences, measured.batch)[1]
    with _Bar(phase(f"Other batches, {label}"), measured, BISECTIONS + rounds):
        scout = Search(measured, dial, model, goal)
        scout.run(0, polish=False)
        return measure_company(measured, parts.more, dial.setting(scout.centre()))


def promise_goal(promise: Promise, new_sequences: int, company: Company) -> Goal:
    """The least predicted time under a promise that `new_sequences` of the same kind will keep.

    A step's time rises with the bytes of experts and with nothing else that budgets change, so bytes are compared:
    of a small model's time they are a part too small to see progress in.
    """
    return Goal(
        lambda item: promise.strain(item, new_sequences, company),
        lambda item: item.expert_bytes_a_token.mean,
        saving=True,
    )


def bytes_goal(limit: float) -> Goal:
    """The least KL with at most `limit` bytes of experts a token."""
    return Goal(lambda item: item.expert_bytes_a_token.mean / limit, lambda item: item.kl.mean, saving=False)


def _dial(measured: Measured, selection: Selection, name: str, means: Array, phase: Phase, label: str) -> Dial:
    """The dial by its name, for the model and text at hand."""
    experts = measured.meter.probed.experts
    if name == "budgets":
        return budget_dial(selection, experts, means, _experts_per_token(measured))
    with _Bar(phase(f"Range of floors, {label}"), measured, 8):
        return floor_dial(measured, selection, experts, means)


def _experts_per_token(measured: Measured) -> int:
    return int(measured.meter.reference().index[0].shape[-1])


def uniform_settings(preset: str, experts: Sequence[int], width: int, natural: float) -> list[Setting]:
    """`preset` with the same budget in every layer, from many experts to few; OEA's dial is its guarantee."""
    selection = PRESETS[preset]
    if preset == "oea":
        nothing = Restriction((0,) * len(experts))
        return [Setting(replace(selection, guarantee=float(k0)), nothing) for k0 in range(width - 1, 0, -1)]
    budgets = sorted({max(1, round(share * natural)) for share in COMPARED}, reverse=True)
    return [Setting(selection, Restriction(tuple(min(budget, count) for count in experts))) for budget in budgets]


def _uniform(measured: Measured, floors: Dial, means: Array, phase: Phase, label: str) -> dict[str, list[Measurement]]:
    experts, width = measured.meter.probed.experts, _experts_per_token(measured)
    tried = {name: uniform_settings(name, experts, width, float(means.mean())) for name in PRESETS if name != "off"}
    tried[ONE_FLOOR] = one_level(floors)
    every = [setting for settings in tried.values() for setting in settings]
    with _Bar(phase(f"Presets with uniform budgets, {label}"), measured, len(every)):
        measured.measure(every)
    return {name: measured.measure(settings) for name, settings in tried.items()}


def one_level(dial: Dial) -> list[Setting]:
    """The same level in every layer, at every rung."""
    return [dial.setting([min(level, last) for last in dial.last]) for level in dial.rungs]


def _frontier(model: Curves, dial: Dial) -> list[Setting]:
    """Levels by layer at the shares of `COMPARED`, as the curves of layers alone would have them."""
    # The search has scaled the curves to what it saw near its own outcome, which says nothing about other shares.
    model = Curves(model.kl, model.active, model.expert_bytes)
    natural = model.bytes_at([len(line) - 1 for line in model.active])
    return [dial.setting(model.solve(model.price_for(share * natural))) for share in COMPARED[::-1]]


def _search_parameters(
    measured: Measured, selection: Selection, dial_name: str, means: Array, phase: Phase, label: str
) -> tuple[Selection, list[dict[str, Any]]]:
    """The k0 and tau with the least KL at equal active experts, with one level for all layers."""
    # Floors can leave a token without any expert where none is guaranteed (see options.dial_name).
    guarantees = [k0 for k0 in GUARANTEES if k0 or dial_name != "floors"]
    variants = [replace(selection, guarantee=float(k0), sensitivity=tau) for k0 in guarantees for tau in SENSITIVITIES]
    if selection not in variants:
        variants.insert(0, selection)
    dials = [_dial(measured, variant, dial_name, means, phase, label) for variant in variants]
    settings = [one_level(dial) for dial in dials]
    with _Bar(phase(f"Parameters, {label}"), measured, sum(len(row) for row in settings)):
        measured.measure([setting for row in settings for setting in row])
    own = measured.measure(settings[variants.index(selection)])
    counts = [share * float(means.mean()) for share in PARAMETERS_AT]
    active = next((count for count in counts if kl_at(own, count)), counts[-1])
    reached = [kl_at(measured.measure(row), active) for row in settings]
    tried = [
        {"guarantee": variant.guarantee, "sensitivity": variant.sensitivity, "active": active, "kl": found}
        for variant, found in zip(variants, reached, strict=True)
    ]
    scores = [found.mean if found else math.inf for found in reached]
    return variants[scores.index(min(scores))], tried


def _uses(measured: Measured, chosen: Measurement | None) -> dict[str, list[list[float]]]:
    """How uneven a batch is: tokens at the r-th busiest expert, mean over steps, without and with what was chosen."""
    found = {"unrestricted": measured.meter.uses(measured.batch, None)}
    if chosen:
        found["chosen"] = measured.meter.uses(measured.batch, chosen.setting)
    return found


def kl_at(items: Sequence[Measurement], active: float) -> Interval | None:
    """KL at a number of active experts between two that were measured: log KL interpolated linearly, draw by draw."""
    line = _line(items, Bootstrap(len(items[0].kl_by_sequence), 0), active)
    return None if line is None else _as_interval(line)


def _line(items: Sequence[Measurement], draws: Bootstrap, active: float) -> Array | None:
    """KL at `active`, [1 + draws]: first the measured one. None outside of what was measured."""
    ordered = sorted(items, key=lambda item: item.active.mean)
    reached = [item.active.mean for item in ordered]
    if len(ordered) == 1 or not reached[0] <= active <= reached[-1]:
        return None
    above = min(max(int(np.searchsorted(reached, active)), 1), len(ordered) - 1)
    low, high = ordered[above - 1], ordered[above]
    share = (active - reached[above - 1]) / max(reached[above] - reached[above - 1], 1e-12)
    logs = [np.log(np.maximum(draws.with_mean(np.array(item.kl_by_sequence)), 1e-12)) for item in (low, high)]
    line: Array = np.exp((1 - share) * logs[0] + share * logs[1])
    return line


def _p99_at(items: Sequence[Measurement], active: float) -> float:
    """The 99th percentile of active experts where their mean is `active`, interpolated."""
    ordered = sorted(items, key=lambda item: item.active.mean)
    return float(np.interp(active, [item.active.mean for item in ordered], [item.active_p99 for item in ordered]))


def _as_interval(values: Array) -> Interval:
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return Interval(float(values[0]), float(low), float(high))


def comparison(points: Sequence[Measurement], uniform: dict[str, list[Measurement]]) -> list[dict[str, Any]]:
    """Each of `points` against every uniform policy at the same number of active experts.

    One row for each policy that reaches it: its KL and 99th percentile of active experts there, and the ratio of the
    point's KL to its, with intervals on common draws.
    """
    rows = []
    for point in points:
        draws = Bootstrap(len(point.kl_by_sequence), 0)
        ours = draws.with_mean(np.array(point.kl_by_sequence))
        for name, items in uniform.items():
            theirs = _line(items, draws, point.active.mean)
            if theirs is not None:
                rows.append(
                    {
                        "active": point.active.mean,
                        "active_p99": _p99_at(items, point.active.mean),
                        **point.setting.restriction.to_dict(),
                        "preset": name,
                        "kl": _as_interval(theirs),
                        "by_layer_kl": point.kl,
                        "ratio": _as_interval(ours / np.maximum(theirs, 1e-12)),
                    }
                )
    return rows
