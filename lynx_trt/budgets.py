"""Budgets: how many experts each MoE layer may load in a decode step, from what a person writes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lynx_trt.errors import UsageError
from lynx_trt.selection import Selection

HOW = "write a number of experts, a fraction such as 0.5, or a JSON file with a list of one number for each MoE layer"


def default_budgets(experts: Sequence[int], experts_per_token: int) -> list[int]:
    """Budgets to begin with: a quarter of the experts, and at least two tokens' worth of them.

    A rule of thumb and no promise about quality: published settings that stay within noise lie around a quarter of
    128 experts (OEA, XShare), and a quarter of few experts would leave a token without a choice.
    """
    return [min(count, max(math.ceil(count / 4), 2 * experts_per_token)) for count in experts]


def parse_budget(text: str, experts: Sequence[int]) -> list[int]:
    """Budgets [N] for MoE layers of `experts` [N] experts each.

    Raises:
        UsageError: the text is none of the three forms, or a value lies outside of what the model has.
    """
    if Path(text).is_file():
        return _from_file(Path(text), experts)
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"the budget {text!r} is neither a number nor a file that exists; {HOW}") from None
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"the budget is {text}; it can't be below 0: {HOW}")
    if not text.strip().lstrip("+").isdigit():
        if value > 1:
            raise UsageError(f"the budget is {text}; a fraction is at most 1.0: {HOW}")
        return [math.ceil(value * count) for count in experts]
    return check_budgets([int(text)] * len(experts), experts, what=f"the budget is {text}")


def selection_in(text: str) -> Selection | None:
    """The selection's parameters, where `text` is a budget file that brings its own (calibration.json does).

    Raises:
        UsageError: the file can't be read, or its parameters are none of the selection's.
    """
    if not Path(text).is_file():
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
        raise UsageError(
            f"{what}, but the model has {max(experts)} experts a layer; "
            f"use {max(experts)} (or --preset off at build time) for all of them"
        )
    return [min(budget, count) for budget, count in zip(budgets, experts, strict=True)]


def check_leaves_experts(budgets: Sequence[int], selection: Selection, experts_per_token: int) -> None:
    """Refuse budgets of 0 where nothing else keeps an expert: every token would lose its whole MoE block.

    Raises:
        UsageError: such a budget.
    """
    if min(budgets) == 0 and selection.guaranteed(experts_per_token) == 0:
        raise UsageError(
            "a budget of 0 keeps no expert at all, since this preset guarantees none; "
            "use 1 or more, or a preset that guarantees experts (lynx, oea)"
        )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"the budget file {path} can't be read as JSON: {error}") from None


def _from_file(path: Path, experts: Sequence[int]) -> list[int]:
    value = _read(path)
    if isinstance(value, dict):
        value = value.get("budgets")
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise UsageError(f"the budget file {path} holds no list of whole numbers (or an object with one as 'budgets')")
    return check_budgets(value, experts, what=f"the budget file {path}")
