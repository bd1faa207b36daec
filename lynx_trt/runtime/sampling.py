"""From logits to the next token: greedy, temperature, top-p; one seeded generator a sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lynx_trt.errors import GenerationError, UsageError
from lynx_trt.runtime.backend import Array


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. A temperature of 0 is greedy: the most likely token, ties to the lower id.

    Raises UsageError if a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"the temperature is {self.temperature}; it must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}; it must be above 0 and at most 1")

    def generator(self, sequence: int) -> np.random.Generator:
        """The generator of one sequence: it depends on the seed and its number, not on what else is in the batch."""
        return np.random.default_rng([self.seed, sequence])


def next_token(logits: Array, sampling: Sampling, generator: np.random.Generator) -> int:
    """Draw from logits [V] f32.

    Raises:
        GenerationError: the logits are not numbers (the weights or a step before were broken).
    """
    best = int(logits.argmax())
    # argmax takes the first NaN there is, so one look at its choice finds any.
    if not math.isfinite(logits[best]):
        raise GenerationError(
            "the model gave logits that are no numbers (NaN or infinite); its weights or its precision are broken"
        )
    if sampling.temperature == 0:
        return best
    scaled = logits.astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled[best])
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        probabilities = _nucleus(probabilities, sampling.top_p)
    return int(generator.choice(len(probabilities), p=probabilities))


def _nucleus(probabilities: Array, top_p: float) -> Array:
    """The smallest set of tokens that reaches `top_p`, renormalised (Holtzman et al. 2020, section 3.1)."""
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept: Array = np.zeros_like(probabilities)
    chosen = order[before < top_p]
    kept[chosen] = probabilities[chosen]
    return np.asarray(kept / kept.sum())
