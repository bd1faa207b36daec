"""Programmatic dependent launch: what the source of every kernel has to do so that no launch reads too early."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap

import pytest

from lynx_trt.plugins.plan import MODULES

pytest.importorskip("triton")

WAITS = {"wait_for_earlier", "let_next_start"}


def _calls(statement: ast.stmt) -> list[str]:
    """Which of the two a statement calls, wherever in it."""
    return [
        node.func.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in WAITS
    ]


@pytest.mark.parametrize("function", MODULES)
def test_a_kernel_waits_and_only_then_lets_the_next_one_start(function: str) -> None:
    """In every program, once, in this order, before it can return or write anything.

    A program that ended without waiting would let the next launch begin before the one before its own has ended.
    """
    kernel = getattr(importlib.import_module(f"lynx_trt.plugins.{MODULES[function]}"), function)
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body
    assert isinstance(body, ast.FunctionDef)
    if "PROGRAMMATIC" not in [each.arg for each in body.args.args]:
        assert not _calls(body)
        return
    at = {name: number for number, statement in enumerate(body.body) for name in _calls(statement)}
    assert [name for statement in body.body for name in _calls(statement)] == ["wait_for_earlier", "let_next_start"]
    for name, number in at.items():
        assert isinstance(body.body[number], ast.Expr), f"{name} is not called by every program"
    before = [node for statement in body.body[: at["let_next_start"]] for node in ast.walk(statement)]
    assert not any(isinstance(node, ast.Return) for node in before)
    unwaited = [node for statement in body.body[: at["wait_for_earlier"]] for node in ast.walk(statement)]
    assert not any(isinstance(node, ast.Attribute) and node.attr == "store" for node in unwaited)
