"""Is it right: logits against a reference through Polygraphy's comparators, greedy agreement, perplexity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lynx_trt.comparison.runners import Runner
from lynx_trt.runtime.backend import Array


def judge(
    runners: Mapping[str, Runner],
    ids: Array,
    *,
    prompt: int,
    reference: str,
    on_progress: Callable[[float], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """What each runner's logits are worth, over the same text, the first `prompt` tokens prefilled, the rest decoded.

    Args:
        runners: by name.
        ids: i64 [N,L], the text.
        prompt: tokens of the prefill.
        reference: the runner that the others are compared with.
        on_progress: called with the fraction done.

    Returns:
        By runner: max, rms, where (the largest difference), top1 and greedy (agreement, 0 to 1), perplexity.
    """
    names = [reference, *(name for name in runners if name != reference)]
    found: dict[str, dict[str, Any]] = {}
    forced: dict[str, Array] = {}
    free: dict[str, Array] = {}
    for number, name in enumerate(names):
        forced[name] = _forced(runners[name], ids, prompt)
        free[name] = _greedy(runners[name], ids[:, :prompt], ids.shape[1] - prompt)
        # `finite` says it of logits that are no numbers; NumPy need not as well.
        with np.errstate(invalid="ignore", over="ignore"):
            found[name] = {
                "reference": reference,
                **_difference(forced[reference], forced[name], reference, name),
                "top1": float((forced[name].argmax(-1) == forced[reference].argmax(-1)).mean()),
                "greedy": float((free[name] == free[reference]).mean()),
                "perplexity": _perplexity(forced[name], ids, prompt),
            }
        if name != reference:
            del forced[name]
        on_progress((number + 1) / len(names))
    return {name: found[name] for name in runners}


def _forced(runner: Runner, ids: Array, prompt: int) -> Array:
    """f32 [steps,N,V]: logits of every position from the prompt's last token on, the text's own tokens forced."""
    logits = [np.array(runner.prefill(np.ascontiguousarray(ids[:, :prompt])), np.float32)]
    for position in range(prompt, ids.shape[1] - 1):
        logits.append(np.array(runner.decode(np.ascontiguousarray(ids[:, position])), np.float32))
    return np.stack(logits)


def _greedy(runner: Runner, prompts: Array, count: int) -> Array:
    """i64 [N,count]: each sequence's own choices."""
    tokens = [runner.prefill(np.ascontiguousarray(prompts)).argmax(-1).astype(np.int64)]
    while len(tokens) < count:
        tokens.append(runner.decode(tokens[-1]).argmax(-1).astype(np.int64))
    return np.stack(tokens, axis=1)


def _difference(expected: Array, got: Array, expected_name: str, got_name: str) -> dict[str, Any]:
    """Largest and root-mean-square difference; the largest by Polygraphy's comparator, which also refuses NaN."""
    from polygraphy.comparator import CompareFunc
    from polygraphy.comparator.struct import IterationResult
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        compare = CompareFunc.simple(atol=0.0, rtol=0.0, check_error_stat="max")
        result = compare(
            IterationResult({"logits": got}, runner_name=got_name),
            IterationResult({"logits": expected}, runner_name=expected_name),
        )["logits"]
    difference = np.abs(got - expected)
    step, row, token = (int(part) for part in np.unravel_index(difference.argmax(), difference.shape))
    return {
        "finite": bool(np.isfinite(got).all()),
        "max": float(result.max_absdiff),
        "median": float(result.median_absdiff),
        "rms": float(np.sqrt(np.mean(difference**2, dtype=np.float64))),
        "where": {"step": step, "row": row, "token": token},
        "scale": float(np.abs(expected).max()),
    }


def _perplexity(logits: Array, ids: Array, prompt: int) -> float:
    """Of the tokens from `prompt` on."""
    total = 0.0
    # A position at a time: over a large vocabulary all of them at once in float64 would be gigabytes.
    for values, targets in zip(logits, ids[:, prompt:].T, strict=True):
        wide = values.astype(np.float64)
        wide -= wide.max(-1, keepdims=True)
        chosen = np.take_along_axis(wide, targets[:, None], -1)[:, 0]
        total += float((np.log(np.exp(wide).sum(-1)) - chosen).sum())
    return float(np.exp(total / ids[:, prompt:].size))
