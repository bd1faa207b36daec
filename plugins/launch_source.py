"""The source of `launch_table.py`, as the tuner writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lynx_trt.plugins.launch import ExpertsKey, ExpertsLaunch, MatmulLaunch, SelectKey, SelectLaunch


def render_table(
    gpu: str, experts: Mapping[ExpertsKey, Mapping[int, ExpertsLaunch]], select: Mapping[SelectKey, SelectLaunch]
) -> str:
    """The source of `launch_table.py`."""
    matmul = "MatmulLaunch, " if experts else ""
    lines = [
        '"""Measured launches, written by `python -m lynx_trt.plugins.tune`: edit nothing here, run it again.',
        "",
        "EXPERTS is keyed by (SM, E, K, H, I, weights), then by tokens; SELECT by (SM, E, K, tokens).",
        f"Last measured on: {gpu}.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        f"from lynx_trt.plugins.launch import ExpertsKey, ExpertsLaunch, {matmul}SelectKey, SelectLaunch",
        "",
        f"EXPERTS: dict[ExpertsKey, dict[int, ExpertsLaunch]] = {_entries(experts)}",
        f"SELECT: dict[SelectKey, SelectLaunch] = {_entries(select)}",
    ]
    return "\n".join(lines) + "\n"


def _entries(table: Mapping[Any, object], indent: int = 4) -> str:
    margin = " " * indent
    rows = [f"{margin}{_source(key)}: {_source(value, indent)},\n" for key, value in sorted(table.items())]
    return "{\n" + "".join(rows) + margin[4:] + "}" if rows else "{}"


def _source(value: object, indent: int = 4) -> str:
    """A value as formatted Python source; of a launch, a line for each field that is not at its default."""
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, Mapping):
        return _entries(value, indent + 4)
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_source, value)) + ")"
    if isinstance(value, MatmulLaunch | ExpertsLaunch | SelectLaunch):
        shown = {each.name: getattr(value, each.name) for each in fields(value)}
        defaults = {each.name: each.default for each in fields(value)}
        margin = " " * indent
        lines = [
            f"{margin}    {name}={_source(each, indent + 4)},\n"
            for name, each in shown.items()
            if each != defaults[name]
        ]
        return f"{type(value).__name__}(\n{''.join(lines)}{margin})"
    return repr(value)
