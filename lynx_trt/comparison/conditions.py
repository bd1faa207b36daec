"""`--fail-if "decode_ratio<1.2"`: conditions on a report, for a CI."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lynx_trt.errors import UsageError

SPEED = (
    "decode_ratio",
    "first_token_ratio",
    "decode_tokens_per_second",
    "active_experts",
    "expert_bytes_a_token",
)
QUALITY = ("max", "rms", "top1", "greedy", "perplexity")
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
FORM = re.compile(r"\s*(\w+)(?:\[([^\],]*)(?:,\s*(\d+))?\])?\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*")


@dataclass(frozen=True)
class Condition:
    """A metric that, where it holds, fails the comparison. Without a runner: every candidate; without a batch: all."""

    text: str
    metric: str
    runner: str | None
    batch: int | None
    compare: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read `METRIC[RUNNER,BATCH] < NUMBER`; the part in brackets is optional.

        Raises:
            UsageError: it is no such condition.
        """
        match = FORM.fullmatch(text)
        try:
            metric, runner, batch, compare, limit = match.groups() if match else ("",) * 5
            value = float(limit)
        except ValueError:
            metric = ""
        if metric not in (*SPEED, *QUALITY):
            raise UsageError(
                f"--fail-if {text!r} is no condition; write METRIC<NUMBER or METRIC[RUNNER,BATCH]<NUMBER with <, <=, > "
                f"or >= and one of {', '.join((*SPEED, *QUALITY))}"
            )
        return cls(text, metric, runner or None, int(batch) if batch else None, compare, value)

    def failures(self, report: Mapping[str, Any]) -> list[str]:
        """One line for each value that meets the condition; a metric that nothing has is a failure too."""
        values = list(self._values(report))
        if not values:
            return [f"{self.text}: nothing in this comparison has that value"]
        return [
            f"{self.text}: {where} has {value:.4g}"
            for where, value in values
            # A NaN meets no comparison, and is never what a CI hoped for.
            if value != value or OPERATORS[self.compare](value, self.limit)
        ]

    def _values(self, report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        candidates = {item["name"] for item in report["runners"] if not item["baseline"]}
        wanted = {self.runner} if self.runner else candidates
        if self.metric in SPEED:
            for row in report["summary"]:
                fits = row["runner"] in wanted and self.batch in (None, row["batch"])
                if fits and row[self.metric] is not None:
                    yield f"{row['runner']} at batch {row['batch']}", row[self.metric]
        else:
            for name, item in report["right"].items():
                if name in wanted:
                    yield name, item[self.metric]
