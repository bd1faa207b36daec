"""A small batch through any backend: forced tokens, and greedy ones. NumPy alone, so that it runs on a GPU machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lynx_trt.budgets import Restriction
from lynx_trt.runtime.sampling import Sampling, draw, draws_of

# Votes for each voting token; one token's own experts but its first have fewer in a batch of four.
FLOOR = 0.1
# A ragged batch: one row fills the prefill's width, one is a single token, two are in between.
PROMPTS = (9, 5, 12, 1)
STEPS = 16
WAYS = (Sampling(), Sampling(1.0), Sampling(0.8, 0.9, top_k=20), Sampling(0.5, 0.95))

Array = np.ndarray[Any, Any]


def restrictions(layers: Sequence[Any]) -> dict[str, Restriction]:
    """What the batch is decoded under, for some MoE layers: all experts, half of them, and a floor with no cap."""
    every = tuple(layer.experts for layer in layers)
    return {
        "all": Restriction(every),
        "half": Restriction(tuple(max(2 * layer.experts_per_token, layer.experts // 4) for layer in layers)),
        "floor": Restriction(tuple(every), (FLOOR,) * len(every)),
    }


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Ids [B,S] of the prompts, zeros behind the shorter ones, and their lengths [B]."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    ids = np.zeros((len(prompts), int(lengths.max())), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return ids, lengths


def prefill(backend: Any, prompts: Sequence[Sequence[int]], restriction: Restriction) -> Array:
    """Logits [B,V] after the prompts, in one ragged step."""
    ids, lengths = padded(prompts)
    return np.array(backend.step(ids, np.zeros_like(lengths), lengths, restriction).logits)


def decode(backend: Any, tokens: Array, past: Array, restriction: Restriction) -> tuple[Array, Array]:
    """Logits [B,V] and active experts [N] of one decode step."""
    result = backend.step(tokens[:, None], past, np.ones_like(past), restriction)
    return np.array(result.logits), np.array(result.active)


def forced_logits(backend: Any, prompts: Sequence[Sequence[int]], tokens: Array, restriction: Restriction) -> Array:
    """[steps + 1, B, V]: logits after the prompts, and after each of tokens [steps, B]."""
    past = np.array([len(prompt) for prompt in prompts], np.int64)
    outputs = [prefill(backend, prompts, restriction)]
    for number, step in enumerate(tokens):
        outputs.append(decode(backend, step, past + number, restriction)[0])
    return np.stack(outputs).astype(np.float64)


def draws(
    backend: Any, prompts: Sequence[Sequence[int]], tokens: Array, restriction: Restriction
) -> tuple[Array, Array, Array]:
    """What the backend draws after the prompts and after each of tokens [steps, B], and what its logits give by `draw`.

    Returns:
        Tokens [steps + 1, B] of the one, of the other, and whether the draw was greedy; rows take turns in the ways.
    """
    ids, lengths = padded(prompts)
    inputs = [(ids, np.zeros_like(lengths), lengths)]
    inputs += [(step[:, None], lengths + number, np.ones_like(lengths)) for number, step in enumerate(tokens)]
    got, expected, greedy = [], [], []
    for number, step in enumerate(inputs):
        ways = [WAYS[(number + row) % len(WAYS)] for row in range(len(prompts))]
        how = draws_of(len(ways), [(row, way, np.random.default_rng([number, row])) for row, way in enumerate(ways)])
        expected.append(draw(np.array(backend.step(*step, restriction).logits), how))
        got.append(np.array(backend.next_tokens(*step, restriction, how).tokens))
        greedy.append([way.temperature == 0 for way in ways])
    return np.stack(got), np.stack(expected), np.array(greedy)


def greedy_tokens(backend: Any, prompts: Sequence[Sequence[int]], restriction: Restriction) -> tuple[Array, Array]:
    """Tokens [steps, B], and the active experts [steps, N] of the steps that take them."""
    past = np.array([len(prompt) for prompt in prompts], np.int64)
    logits, tokens, active = prefill(backend, prompts, restriction), [], []
    for number in range(STEPS):
        tokens.append(logits.argmax(axis=1))
        logits, used = decode(backend, tokens[-1], past + number, restriction)
        active.append(used)
    return np.stack(tokens).astype(np.int64), np.stack(active)
