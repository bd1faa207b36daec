"""Restrictions: what each MoE layer may load in a decode step, from what a person writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lynx_trt.errors import UsageError
from lynx_trt.selection import Selection

if TYPE_CHECKING:
    from numpy.typing import NDArray

HOW = "write a number of experts, a fraction such as 0.5, or a JSON file with a list of one number for each MoE layer"
# Of an even share of the votes: the floor of an artifact that was not calibrated.
EVEN_SHARE = 0.25
HOW_FLOOR = "write votes for each voting token, such as 0.01, or 0 for none"


@dataclass(frozen=True)
class Restriction:
    """What each of N MoE layers may load in a decode step.

    Attributes:
        budgets: the most experts [N] besides the guaranteed ones; E and above are no limit.
        floors: votes [N] for each voting token that an expert needs; 0: any vote will do. Left out: 0 in every layer.
    """

    budgets: tuple[int, ...]
    floors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.floors:
            object.__setattr__(self, "floors", (0.0,) * len(self.budgets))

    @cached_property
    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Budgets i32 [N] and floors f32 [N], the graph's inputs."""
        return np.array(self.budgets, np.int32), np.array(self.floors, np.float32)

    def to_dict(self) -> dict[str, Any]:
        """`budgets` and `floors` as lists, for JSON."""
        return {"budgets": list(self.budgets), "floors": list(self.floors)}

    @property
    def mean_floor(self) -> float:
        """Mean of the floors over the layers."""
        return sum(self.floors) / len(self.floors)

    @staticmethod
    def mildest(several: Iterable[Restriction]) -> Restriction:
        """In each layer the largest of the budgets and the lowest of the floors."""
        several = list(several)
        return several[0] if len(several) == 1 else Restriction._by_layer(several, max, min)

    @staticmethod
    def strictest(several: Iterable[Restriction]) -> Restriction:
        """In each layer the smallest of the budgets and the highest of the floors."""
        return Restriction._by_layer(list(several), min, max)

    @staticmethod
    def _by_layer(
        several: Sequence[Restriction], budget: Callable[..., int], floor: Callable[..., float]
    ) -> Restriction:
        return Restriction(
            tuple(budget(layer) for layer in zip(*(each.budgets for each in several), strict=True)),
            tuple(floor(layer) for layer in zip(*(each.floors for each in several), strict=True)),
        )

    def towards(self, other: Restriction, share: float) -> Restriction:
        """In each layer so far (0: this one, 1: the other) from this one's budget and floor to the other's."""
        return Restriction(
            tuple(math.ceil(a + share * (b - a)) for a, b in zip(self.budgets, other.budgets, strict=True)),
            tuple(a + share * (b - a) for a, b in zip(self.floors, other.floors, strict=True)),
        )


def in_words(restriction: Restriction, experts: Sequence[int]) -> dict[str, str]:
    """`budgets` and `floors` for a person, those that restrict any of the layers of `experts` [N] experts."""
    restricting: dict[str, Sequence[float]] = {}
    if restriction.budgets != tuple(experts):
        restricting["budgets"] = restriction.budgets
    if any(restriction.floors):
        restricting["floors"] = restriction.floors
    return {
        name: f"{values[0]:.4g} in every MoE layer" if len(set(values)) == 1 else ", ".join(f"{v:.4g}" for v in values)
        for name, values in restricting.items()
    }


def default_restriction(selection: Selection, experts: Sequence[int], experts_per_token: int) -> Restriction:
    """A restriction to begin with: rules of thumb and no promise about quality.

    Where tokens vote by weight and each is guaranteed an expert: a floor of a quarter of an even share of the votes,
    that is of the K^(1-p) / E that each expert gets from a token, on average, if all are used alike (p the power). It
    cost about the same at every batch size, on lynx-tiny a KL of 0.006 to 0.014 nats a token (docs/calibration.md).

    Otherwise a budget of a quarter of the experts, and at least two tokens' worth of them: published settings that
    stay within noise lie around a quarter of 128 (OEA, XShare), and a quarter of few would leave a token no choice.
    """
    if selection.vote == "weight" and selection.guaranteed(experts_per_token):
        share = EVEN_SHARE * experts_per_token ** (1 - selection.power)
        return Restriction(tuple(experts), tuple(share / count for count in experts))
    return Restriction(tuple(min(count, max(math.ceil(count / 4), 2 * experts_per_token)) for count in experts))


def parse_budget(text: str, experts: Sequence[int]) -> Restriction:
    """What `--budget` says, for MoE layers of `experts` [N] experts each; floors are those of a file that has some.

    Raises:
        UsageError: the text is none of the three forms, or a value lies outside of what the model has.
    """
    if _is_file(text):
        return _from_file(Path(text), experts)
    return Restriction(tuple(_same_everywhere(text, experts)))


def with_floor(restriction: Restriction, floor: float | None) -> Restriction:
    """The restriction with what `--floor` says, in every layer; None leaves it as it is.

    Raises:
        UsageError: the floor is negative or not finite.
    """
    if floor is None:
        return restriction
    floors = [floor] * len(restriction.budgets)
    return Restriction(restriction.budgets, tuple(check_floors(floors, len(floors), what=f"the floor is {floor}")))


def _same_everywhere(text: str, experts: Sequence[int]) -> list[int]:
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"the budget {text!r} is neither a number nor a file that exists; {HOW}") from None
    if not math.isfinite(value):
        raise UsageError(f"the budget is {text}, which is no number of experts: {HOW}")
    if value < 0:
        raise UsageError(f"the budget is {text}; it can't be below 0: {HOW}")
    if not text.strip().lstrip("+").isdigit():
        if value > 1:
            raise UsageError(f"the budget is {text}; a fraction is at most 1.0: {HOW}")
        return [math.ceil(value * count) for count in experts]
    if value > max(experts):
        raise UsageError(f"the budget is {text}, but {_all_of(experts)}")
    return [min(int(text), count) for count in experts]


def selection_in(text: str) -> Selection | None:
    """The selection's parameters, where `text` is a budget file that brings its own (calibration.json does).

    Raises:
        UsageError: the file can't be read, or its parameters are none of the selection's.
    """
    if not _is_file(text):
        return None
    value = _read(Path(text))
    parameters = value.get("selection") if isinstance(value, dict) else None
    if parameters is None:
        return None
    try:
        return Selection(**parameters)
    except TypeError:
        raise UsageError(f"the budget file {text} has a 'selection' that is none: {parameters}") from None


def check_budgets(budgets: Sequence[int], experts: Sequence[int], *, what: str) -> list[int]:
    """`budgets` capped at each layer's experts.

    Raises:
        UsageError: there are not as many as MoE layers, one is negative, or all are above what the model has.
    """
    if len(budgets) != len(experts):
        raise UsageError(f"{what}: {len(budgets)} budgets for {len(experts)} MoE layers; give one for each")
    if min(budgets) < 0:
        raise UsageError(f"{what}: {min(budgets)} is below 0; {HOW}")
    if max(budgets) > max(experts):
        at = budgets.index(max(budgets))
        raise UsageError(f"{what}: {budgets[at]} for MoE layer {at + 1} of {len(experts)}, but {_all_of(experts)}")
    return [min(budget, count) for budget, count in zip(budgets, experts, strict=True)]


def _all_of(experts: Sequence[int]) -> str:
    most = max(experts)
    return f"the model has {most} experts a layer; use {most} (or --preset off at build time) for all of them"


def check_floors(floors: Sequence[float], layers: int, *, what: str) -> list[float]:
    """`floors` as floats.

    Raises:
        UsageError: there are not as many as MoE layers, or one is negative or not finite.
    """
    if len(floors) != layers:
        raise UsageError(f"{what}: {len(floors)} floors for {layers} MoE layers; give one for each")
    wrong = [value for value in floors if not 0 <= value < math.inf]  # NaN is not either
    if wrong:
        raise UsageError(f"{what}: {wrong[0]} is no number of votes from 0; {HOW_FLOOR}")
    return [float(value) for value in floors]


def check_leaves_experts(restriction: Restriction, selection: Selection, experts_per_token: int) -> None:
    """Refuse what may keep no expert at all: every token would lose its whole MoE block.

    Raises:
        UsageError: a budget of 0, or a floor above 0, where nothing is guaranteed.
    """
    if selection.guaranteed(experts_per_token):
        return
    if max(restriction.floors) > 0:
        raise UsageError(
            f"a floor of {max(restriction.floors)} can keep no expert at all, since this preset guarantees none; "
            "use 0, or a preset that guarantees experts (lynx, oea)"
        )
    if min(restriction.budgets) == 0:
        raise UsageError(
            "a budget of 0 keeps no expert at all, since this preset guarantees none; "
            "use 1 or more, or a preset that guarantees experts (lynx, oea)"
        )


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # longer than any name: a list where a file was meant
        return False


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"the budget file {path} can't be read as JSON: {error}") from None


def _from_file(path: Path, experts: Sequence[int]) -> Restriction:
    value: Any = _read(path)
    floors: Any = None
    if isinstance(value, dict):
        if value.get("kept") is False and value.get("budgets") is None:
            raise UsageError(f"the budget file {path} is of a calibration that found none; give another")
        value, floors = value.get("budgets"), value.get("floors")
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise UsageError(f"the budget file {path} holds no list of whole numbers (or an object with one as 'budgets')")
    budgets = check_budgets(value, experts, what=f"the budget file {path}")
    if floors is None:
        return Restriction(tuple(budgets))
    if not isinstance(floors, list) or not all(
        isinstance(item, int | float) and not isinstance(item, bool) for item in floors
    ):
        raise UsageError(f"the budget file {path} has 'floors' that are no list of numbers")
    return Restriction(tuple(budgets), tuple(check_floors(floors, len(experts), what=f"the budget file {path}")))
