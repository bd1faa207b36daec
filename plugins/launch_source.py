"""The source of `launch_table.py`, as the tuner writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lynx_trt.plugins.launch import ExpertsLaunch, MatmulLaunch, SelectLaunch

ExpertsKey = tuple[int, str, int, int, int, int]
SelectKey = tuple[int, int, int, int]


def render_table(gpu: str, experts: dict[ExpertsKey, ExpertsLaunch], select: dict[SelectKey, SelectLaunch]) -> str:
    """The source of `launch_table.py`."""
    lines = [
        '"""Measured launches, written by `python -m lynx_trt.plugins.tune`: edit nothing here, run it again.',
        "",
        "EXPERTS is keyed by (SM, dtype, E, H, I, tokens per expert bucket), SELECT by (SM, E, K, tokens bucket). Last",
        f"measured on: {gpu}.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        f"from lynx_trt.plugins.launch import ExpertsLaunch, {'MatmulLaunch, ' if experts else ''}SelectLaunch",
        "",
        f"EXPERTS: dict[tuple[int, str, int, int, int, int], ExpertsLaunch] = {_entries(experts)}",
        f"SELECT: dict[tuple[int, int, int, int], SelectLaunch] = {_entries(select)}",
    ]
    return "\n".join(lines) + "\n"


def _entries(table: Mapping[Any, object]) -> str:
    rows = [f"    {_source(key)}: {_source(launch)},\n" for key, launch in sorted(table.items())]
    return "{\n" + "".join(rows) + "}" if rows else "{}"


def _source(value: object, indent: int = 4) -> str:
    """A value as formatted Python source; of a launch, a line for each field that is not at its default."""
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
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
