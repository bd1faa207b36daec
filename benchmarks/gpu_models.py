"""A small batch through any backend: forced tokens, and greedy ones. NumPy alone, so that it runs on a GPU machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# A ragged batch: one row fills the prefill's width, one is a single token, two are in between.
PROMPTS = (9, 5, 12, 1)
STEPS = 16

Array = np.ndarray[Any, Any]


def prefill(backend: Any, prompts: Sequence[Sequence[int]], budgets: Sequence[int]) -> Array:
    """Logits [B,V] after the prompts, in one ragged step."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    ids = np.zeros((len(prompts), int(lengths.max())), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return np.array(backend.step(ids, np.zeros_like(lengths), lengths, np.array(budgets, np.int32)).logits)


def decode(backend: Any, tokens: Array, past: Array, budgets: Sequence[int]) -> tuple[Array, Array]:
    """Logits [B,V] and active experts [N] of one decode step."""
    result = backend.step(tokens[:, None], past, np.ones_like(past), np.array(budgets, np.int32))
    return np.array(result.logits), np.array(result.active)


def forced_logits(backend: Any, prompts: Sequence[Sequence[int]], tokens: Array, budgets: Sequence[int]) -> Array:
    """[steps + 1, B, V]: logits after the prompts, and after each of tokens [steps, B]."""
    past = np.array([len(prompt) for prompt in prompts], np.int64)
    outputs = [prefill(backend, prompts, budgets)]
    for number, step in enumerate(tokens):
        outputs.append(decode(backend, step, past + number, budgets)[0])
    return np.stack(outputs).astype(np.float64)


def greedy_tokens(backend: Any, prompts: Sequence[Sequence[int]], budgets: Sequence[int]) -> tuple[Array, Array]:
    """Tokens [steps, B], and the active experts [steps, N] of the steps that take them."""
    past = np.array([len(prompt) for prompt in prompts], np.int64)
    logits, tokens, active = prefill(backend, prompts, budgets), [], []
    for number in range(STEPS):
        tokens.append(logits.argmax(axis=1))
        logits, used = decode(backend, tokens[-1], past + number, budgets)
        active.append(used)
    return np.stack(tokens).astype(np.int64), np.stack(active)
