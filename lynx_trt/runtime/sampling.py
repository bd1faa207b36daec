"""From logits to the next token: greedy, temperature, top-k, top-p, min-p; one seeded generator a sequence.

`draw` is what it means, and what runs on the host; a GPU draws by `lynx_trt.plugins.draw_kernel`. Both compute
exp((logit - best) / temperature) in float32 and add in float64: they differ only where a draw is on a token's edge.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lynx_trt.errors import UsageError
from lynx_trt.runtime.backend import NOT_FINITE, NOT_WANTED, Array, Draws, RowEdits

# The likeliest tokens are looked for among so many first; they are in order, which all are too many to be.
LEADING = (256, 8192)
# As in OpenAI's API, which has no penalty of repetition.
MOST_PENALTY, MOST_BIAS = 2.0, 100.0
LEAST_REPETITION, MOST_REPETITION = 0.1, 10.0  # far from any that is of use, and near enough for float32


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. A temperature of 0 is greedy: the most likely token, ties to the lower id.

    Attributes:
        temperature: of the softmax.
        top_p: draw from the fewest likeliest tokens that reach this probability (Holtzman et al. 2020, section 3.1),
            of those that `top_k` leaves.
        seed: of the draws.
        top_k: draw from so many likeliest tokens, ties to the lower id; 0: from all.
        min_p: draw no token of less than this share of the likeliest's probability, before the others' limits.
        repetition_penalty: logits of tokens in prompt and answer are divided by it, or multiplied where below 0
            (Keskar et al. 2019, section 4.1).
        presence_penalty: is taken from the logits of tokens that the answer has.
        frequency_penalty: is taken from them as often as it has them.
        logit_bias: (token, what is added to its logit), -100 to 100.

    Raises UsageError if a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"the temperature is {self.temperature}; it must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.top_k < 1 << 31:
            raise UsageError(f"top-k is {self.top_k}; it must be 0 (no limit) or a number of tokens")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min-p is {self.min_p}; it must be from 0 (no limit) to 1")
        if not LEAST_REPETITION <= self.repetition_penalty <= MOST_REPETITION:
            raise UsageError(
                f"the repetition penalty is {self.repetition_penalty}; it must be from {LEAST_REPETITION:g} to "
                f"{MOST_REPETITION:g}, and 1 is none"
            )
        for name in ("presence", "frequency"):
            value = getattr(self, f"{name}_penalty")
            if not -MOST_PENALTY <= value <= MOST_PENALTY:
                raise UsageError(
                    f"the {name} penalty is {value}; it must be from {-MOST_PENALTY:g} to {MOST_PENALTY:g}"
                )
        for token, bias in self.logit_bias:
            if not -MOST_BIAS <= bias <= MOST_BIAS:
                raise UsageError(
                    f"the logit bias of token {token} is {bias}; it must be from {-MOST_BIAS:g} to {MOST_BIAS:g}"
                )

    @property
    def edits(self) -> bool:
        """Whether logits are changed before a token is drawn; see lynx_trt.runtime.edits."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalties or any(bias for _, bias in self.logit_bias)

    def generator(self, sequence: int) -> np.random.Generator:
        """The generator of one sequence: it depends on the seed and its number, not on what else is in the batch."""
        return np.random.default_rng([self.seed, sequence])


RECOMMENDED = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float}


def recommended(folder: Path) -> dict[str, float]:
    """What a checkpoint's generation config says of these values; what can't be used is left out."""
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    made: dict[str, float] = {}
    for name, kind in RECOMMENDED.items():
        value = found.get(name) if isinstance(found, dict) else None
        with contextlib.suppress(UsageError, TypeError, ValueError, OverflowError):
            made[name] = getattr(Sampling(**{name: kind(value)}), name)
    return made


def draws_of(
    batch: int, rows: Iterable[tuple[int, Sampling, np.random.Generator]], edits: Mapping[int, RowEdits] | None = None
) -> Draws:
    """The draws of a step of `batch` rows: (row, how, its generator) of each that wants one; `edits`: see Draws."""
    draws = Draws(
        np.zeros(batch, np.bool_), np.zeros(batch), np.ones(batch), np.zeros(batch, np.int32), np.zeros(batch),
        np.zeros(batch), edits or {},
    )  # fmt: skip
    for row, sampling, generator in rows:
        draws.wanted[row] = True
        draws.temperature[row] = sampling.temperature
        draws.top_p[row], draws.top_k[row], draws.min_p[row] = sampling.top_p, sampling.top_k, sampling.min_p
        if sampling.temperature > 0:
            draws.uniform[row] = generator.random()
    return draws


def draw(logits: Array, draws: Draws) -> Array:
    """The next tokens i64 [B] from logits f32 [B,V]; see `NextTokens`."""
    tokens = np.full(len(logits), NOT_WANTED, np.int64)
    rows = np.flatnonzero(draws.wanted)
    # argmax takes the first NaN there is, so one look at its choice finds any.
    best = (logits if len(rows) == len(logits) else logits[rows]).argmax(1)
    scale = draws.scale
    for row, token in zip(rows.tolist(), best, strict=True):
        values, largest = logits[row], logits[row, token]
        if math.isfinite(largest) and row in draws.edits:
            values = draws.edits[row].apply(values)
            token = values.argmax()
            largest = values[token]
        if not math.isfinite(largest):
            tokens[row] = NOT_FINITE
        elif scale[row] == 0:
            tokens[row] = token
        else:
            # Probabilities, but for a factor. Next to no temperature takes the others far below every number.
            with np.errstate(over="ignore"):
                weights = np.exp((values - largest) * scale[row])
            how = draws.top_p[row], int(draws.top_k[row]), draws.uniform[row]
            if draws.min_p[row] or row in draws.edits:
                # Often few are left, and what is looked for among them needn't go through all.
                left = np.flatnonzero((weights >= draws.min_p[row]) & (weights > 0))
                tokens[row] = left[_from(values[left], weights[left], *how)]
            else:
                tokens[row] = _from(values, weights, *how)
    return tokens


def _from(logits: Array, weights: Array, top_p: float, top_k: int, uniform: float) -> int:
    if top_p == 1 and not 0 < top_k < len(logits):
        return _at(weights, uniform)
    tokens = _nucleus(logits, weights, top_p, top_k)
    return int(tokens[_at(weights[tokens], uniform)])


def _at(weights: Array, uniform: float) -> int:
    """Where `uniform` of the weights' sum is reached; never at a weight of 0."""
    ends = np.cumsum(weights, dtype=np.float64)
    # Just below the sum, and not the sum that a uniform next to 1 may round to.
    target = min(uniform * ends[-1], np.nextafter(ends[-1], 0))
    return int(np.searchsorted(ends, target, side="right"))


def _nucleus(logits: Array, weights: Array, top_p: float, top_k: int) -> Array:
    """The tokens that top-k and then top-p leave, the likeliest first."""
    for most in (top_k,) if top_k else (*LEADING, len(logits)):
        tokens = _likeliest(logits, min(most, len(logits)))
        ends = np.cumsum(weights[tokens], dtype=np.float64)
        wanted = top_p * (ends[-1] if top_k else weights.sum(dtype=np.float64))
        if ends[-1] >= wanted:
            break
    return np.asarray(tokens[ends - weights[tokens] < wanted])


def _likeliest(logits: Array, count: int) -> Array:
    """The `count` tokens of the largest logits, those first, ties to the lower id."""
    least = np.partition(logits, -count)[-count]
    tokens = np.flatnonzero(logits >= least)
    return np.asarray(tokens[np.argsort(-logits[tokens], kind="stable")][:count])
