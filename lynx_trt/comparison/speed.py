"""Speed: every runner takes its turn in every round, and every sample is kept.

A round is a prefill and some decode steps of one runner after the other, the order turned by one each time, so that
what else the machine does meets all alike. All decode the same tokens, whatever they would have chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lynx_trt.comparison.runners import Runner
from lynx_trt.runtime.backend import Array

# The first steps after a prefill find cold caches and threads that sleep; not measured.
WARM_STEPS = 2


@dataclass
class Samples:
    """Seconds of every prefill and decode step, by runner and batch, in the order of rounds; mean active experts."""

    prefill: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    decode: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    active: dict[str, dict[int, list[float]]] = field(default_factory=dict)


def measure(
    runners: Mapping[str, Runner],
    ids: Array,
    batches: Sequence[int],
    *,
    prompt: int,
    steps: int,
    rounds: int,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Samples:
    """Measure decode and prefill.

    Args:
        runners: by name.
        ids: i64 [N,L] tokens, N at least the largest batch, L at least prompt + steps + WARM_STEPS.
        batches: sequences in a batch.
        prompt: tokens of a prefill.
        steps: measured decode steps in a round.
        rounds: of each batch size; one more comes first and is not measured.
        on_progress: called with the fraction done.
    """
    names = list(runners)
    samples = Samples({name: {} for name in names}, {name: {} for name in names})
    for done, batch in enumerate(batches):
        for turn in range(rounds + 1):
            order = names[turn % len(names) :] + names[: turn % len(names)]
            for name in order:
                _turn(runners[name], name, ids[:batch], samples if turn else Samples(), prompt, steps)
            on_progress((done + (turn + 1) / (rounds + 1)) / len(batches))
    return samples


def _turn(runner: Runner, name: str, ids: Array, samples: Samples, prompt: int, steps: int) -> None:
    batch = len(ids)
    start = time.perf_counter()
    runner.prefill(np.ascontiguousarray(ids[:, :prompt]))
    samples.prefill.setdefault(name, {}).setdefault(batch, []).append(time.perf_counter() - start)
    times, active = [], []
    for step in range(WARM_STEPS + steps):
        tokens = np.ascontiguousarray(ids[:, prompt + step])
        start = time.perf_counter()
        runner.decode(tokens)
        times.append(time.perf_counter() - start)
        if runner.active is not None:
            active.append(np.array(runner.active, np.float64))
    samples.decode.setdefault(name, {}).setdefault(batch, []).extend(times[WARM_STEPS:])
    if active:
        # Every round decodes the same tokens, so one round says it all.
        samples.active.setdefault(name, {})[batch] = np.mean(active, axis=0).tolist()
