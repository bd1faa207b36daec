"""Two reports of two runs: what changed. Each run is measured by its own baseline, never by the other's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lynx_trt.comparison.run import SCHEMA
from lynx_trt.comparison.runners import baseline_of
from lynx_trt.errors import UsageError


def read_report(path: Path) -> dict[str, Any]:
    """Read a report.json, or the one in a folder.

    Raises:
        UsageError: there is none, or it is of another version.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} can't be read as a report: {error}") from None
    version = report.get("schema") if isinstance(report, dict) else None
    if version != SCHEMA:
        raise UsageError(f"{file} is no report of this version (schema {version}, not {SCHEMA}); measure it again")
    found: dict[str, Any] = report
    return found


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each runner and batch that both have: ratio to its own run's baseline, and perplexity, of both.

    Ratios are left out (None) where they are to different baselines.
    """
    old = {(row["runner"], row["batch"]): row for row in before["summary"]}
    rows = []
    for row in after["summary"]:
        past = old.get((row["runner"], row["batch"]))
        if past is None:
            continue
        same = _baseline(before, row["runner"]) == _baseline(after, row["runner"])
        rows.append(
            {
                "runner": row["runner"],
                "batch": row["batch"],
                "decode_ratio": [past["decode_ratio"], row["decode_ratio"]] if same else None,
                "perplexity": [report["right"][row["runner"]]["perplexity"] for report in (before, after)],
            }
        )
    return rows


def _baseline(report: Mapping[str, Any], runner: str) -> str | None:
    return baseline_of(runner, report["baseline"], report["samples"]["decode"])
