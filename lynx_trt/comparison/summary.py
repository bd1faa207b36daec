"""Every number of the report that isn't a sample, computed from the samples alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lynx_trt.comparison.runners import baseline_of


def summarize(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each runner and batch; times in seconds, rates in tokens a second.

    A ratio is the median over samples of baseline seconds over this runner's, taken in pairs (the same round and
    step): above 1 is faster than the baseline. Both sides always come from the same run, on the same kind of device.
    """
    rows = []
    samples = report["samples"]
    for name, batches in samples["decode"].items():
        baseline = baseline_of(name, report["baseline"], samples["decode"])
        for batch, decode in batches.items():
            prefill = samples["prefill"][name][batch]
            row = {
                "runner": name,
                "batch": int(batch),
                "decode_seconds": percentiles(decode),
                "first_token_seconds": percentiles(prefill),
                "decode_tokens_per_second": int(batch) / float(np.median(decode)),
                "decode_ratio": _ratio(samples["decode"], baseline, batch, decode),
                "first_token_ratio": _ratio(samples["prefill"], baseline, batch, prefill),
            }
            active = samples["active"].get(name, {}).get(batch)
            row["active_experts"] = float(np.mean(active)) if active else None
            row["expert_bytes_a_token"] = _expert_bytes(report, active, int(batch))
            rows.append(row)
    return rows


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p10, median and p90."""
    low, middle, high = np.percentile(values, [10, 50, 90])
    return {"p10": float(low), "median": float(middle), "p90": float(high), "count": len(values)}


def _ratio(samples: Mapping[str, Any], baseline: str | None, batch: Any, values: Sequence[float]) -> float | None:
    if baseline is None or batch not in samples.get(baseline, {}):
        return None
    return float(np.median(np.array(samples[baseline][batch]) / np.array(values)))


def _expert_bytes(report: Mapping[str, Any], active: Sequence[float] | None, batch: int) -> float | None:
    if not active:
        return None
    sizes = report["artifact"]["expert_bytes"]
    return float(np.dot(active, sizes)) / batch
