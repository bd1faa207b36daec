"""Statistics of a served model, as Prometheus metrics of the server.

Setting a metric costs a message to the server's process, so nothing is set while tokens are made: sums are kept here,
and `flush` hands over once a second what has changed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lynx_trt.budgets import Restriction
from lynx_trt.runtime.quality import Dial
from lynx_trt.runtime.scheduler import StepReport
from lynx_trt.runtime.sequence import Generated

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Spec:
    """One metric: its kind (counter, gauge or histogram), what it says, and the label that tells its series apart."""

    name: str
    kind: str
    help: str
    label: str | None = None


SPECS = (
    Spec("lynx_active_experts", "gauge", "Active experts of a MoE layer, mean over the last decode steps", "layer"),
    Spec("lynx_active_experts_total", "counter", "Sum of active experts over all decode steps", "layer"),
    Spec("lynx_decode_steps_total", "counter", "Decode steps"),
    Spec("lynx_decode_seconds_total", "counter", "Seconds spent in decode steps"),
    Spec("lynx_prefill_seconds_total", "counter", "Seconds spent in prefill steps"),
    Spec("lynx_output_tokens_total", "counter", "Tokens written"),
    Spec("lynx_prompt_tokens_total", "counter", "Tokens of prompts that went through the model"),
    Spec("lynx_prompt_tokens_reused_total", "counter", "Tokens of prompts that another prompt had put into the cache"),
    Spec("lynx_requests_total", "counter", "Requests that ended, by how", "finish"),
    Spec("lynx_batch_size", "gauge", "Sequences in a decode step, mean over the last ones"),
    Spec("lynx_tokens_per_second", "gauge", "Tokens written in the last second"),
    Spec("lynx_running", "gauge", "Slots in use"),
    Spec("lynx_waiting", "gauge", "Requests that wait for a slot"),
    Spec("lynx_quality_in_force", "gauge", "Budgets of the last decode steps as a fraction of all experts"),
    Spec("lynx_quality_default", "gauge", "Budgets of requests that ask for none, as a fraction of all experts"),
    Spec("lynx_pace", "gauge", "How far the default quality is turned towards the lowest to keep --tpot: 0 to 1"),
    Spec("lynx_guard", "gauge", "How much of the default's restriction --max-kl leaves: 1 is all of it, 0 none"),
    Spec("lynx_floor_in_force", "gauge", "Votes for each voting token that an expert needed in the last decode steps"),
    Spec("lynx_floor_default", "gauge", "The same, of requests that ask for no quality"),
    Spec("lynx_checked_tokens_total", "counter", "Tokens whose next one was looked at with all experts too"),
    Spec("lynx_kl_total", "counter", "KL of their distributions with all experts from those with the selection, nats"),
    Spec("lynx_agreed_tokens_total", "counter", "Of them those whose likeliest next token is the same"),
    Spec("lynx_queue_seconds", "histogram", "Time a request waited for a slot"),
    Spec("lynx_first_token_seconds", "histogram", "Time from a request's arrival to its first token"),
    Spec("lynx_token_seconds", "histogram", "Mean time of each further token of a request"),
)


# How a request ends: see Generated.finish; the last two were not taken.
FINISHES = ("end", "stop", "length", "deadline", "cancelled", "error", "busy", "invalid")
CHECKED = ("lynx_checked_tokens_total", "lynx_kl_total", "lynx_agreed_tokens_total")


class Sink(Protocol):
    """Where metrics go; the server's own in production."""

    def add(self, name: str, label: str | None, amount: float) -> None:
        """Add to a counter."""
        ...

    def set(self, name: str, label: str | None, value: float) -> None:
        """Set a gauge."""
        ...

    def observe(self, name: str, value: float) -> None:
        """Put a value into a histogram."""
        ...


class Metrics:
    """An observer of the scheduler that keeps the sums; `flush` is called on another thread."""

    def __init__(self, sink: Sink, layers: Sequence[str], dial: Dial) -> None:
        """`layers` [N] are the MoE layers' names."""
        self._sink, self._layers, self._dial = sink, layers, dial
        self._lock = threading.Lock()
        # There from the start: of a series that begins at 1 no rate sees the first.
        self._sums: dict[tuple[str, str | None], float] = {(name, None): 0.0 for name in CHECKED}
        self._sums |= {("lynx_requests_total", finish): 0.0 for finish in FINISHES}
        self._values: list[tuple[str, float]] = []
        self._active = np.zeros(len(layers))
        self._steps = self._rows = 0
        self._restriction: Restriction | None = None
        self._shown: dict[tuple[str, str | None], float] = {}
        self._recent: deque[tuple[float, int]] = deque()  # (time, tokens) of the last second's flushes

    def on_step(self, report: StepReport) -> None:
        """See Observer."""
        with self._lock:
            self._add(f"lynx_{report.kind}_seconds_total", None, report.seconds)
            if report.kind == "prefill":
                self._add("lynx_prompt_tokens_total", None, report.tokens)
                return
            self._steps, self._rows = self._steps + 1, self._rows + report.rows
            self._active += report.active
            self._restriction = report.restriction
            if report.check is not None:
                check = report.check
                for name, value in zip(CHECKED, (check.tokens, check.kl, check.agreed), strict=True):
                    self._add(name, None, value)

    def on_end(self, sequence: Generated) -> None:
        """See Observer."""
        times, tokens = sequence.times, len(sequence.tokens)
        with self._lock:
            self._add("lynx_requests_total", sequence.finish, 1)
            self._add("lynx_output_tokens_total", None, tokens)
            self._add("lynx_prompt_tokens_reused_total", None, sequence.reused)
            if times.submitted is None or times.started is None:
                return
            self._values.append(("lynx_queue_seconds", times.started - times.submitted))
            if times.first_token is None or times.ended is None:
                return
            self._values.append(("lynx_first_token_seconds", times.first_token - times.submitted))
            if tokens > 1:
                self._values.append(("lynx_token_seconds", (times.ended - times.first_token) / (tokens - 1)))

    def rejected(self, why: str) -> None:
        """A request was not taken: `invalid` or `busy`."""
        with self._lock:
            self._add("lynx_requests_total", why, 1)

    def _add(self, name: str, label: str | None, amount: float) -> None:
        self._sums[name, label] = self._sums.get((name, label), 0.0) + amount

    def flush(self, *, running: int, waiting: int, default: Restriction, pace: float, guard: float) -> None:
        """Hand everything over to the sink."""
        with self._lock:
            sums, self._sums = self._sums, {}
            values, self._values = self._values, []
            active, self._active = self._active, np.zeros_like(self._active)
            (steps, rows), self._steps, self._rows = (self._steps, self._rows), 0, 0
            restriction = self._restriction
        if steps:
            sums["lynx_decode_steps_total", None] = steps
            for layer, total in zip(self._layers, active.tolist(), strict=True):
                sums["lynx_active_experts_total", layer] = total
                self._set("lynx_active_experts", layer, total / steps)
        for (name, label), amount in sums.items():
            self._sink.add(name, label, amount)
        for name, value in values:
            self._sink.observe(name, value)
        gauges = {
            "lynx_batch_size": rows / steps if steps else 0,
            "lynx_tokens_per_second": self._rate(rows),
            "lynx_running": running,
            "lynx_waiting": waiting,
            "lynx_quality_default": self._dial.share(default),
            "lynx_floor_default": default.mean_floor,
            "lynx_pace": pace,
            "lynx_guard": guard,
        }
        if restriction:
            gauges["lynx_quality_in_force"] = self._dial.share(restriction)
            gauges["lynx_floor_in_force"] = restriction.mean_floor
        for name, value in gauges.items():
            self._set(name, None, value)

    def _set(self, name: str, label: str | None, value: float) -> None:
        if self._shown.get((name, label)) != value:
            self._shown[name, label] = value
            self._sink.set(name, label, value)

    def _rate(self, tokens: int) -> float:
        now = time.monotonic()
        self._recent.append((now, tokens))
        while len(self._recent) > 1 and self._recent[1][0] < now - 1:
            self._recent.popleft()
        span = now - self._recent[0][0]
        return sum(count for _, count in list(self._recent)[1:]) / span if span else 0.0


class ServerSink:
    """Metrics of the server, through its Python backend's `MetricFamily`."""

    def __init__(self, utils: Any, labels: Mapping[str, str]) -> None:
        """`utils` is the backend's module; `labels` (model and version) are put on every series."""
        self._labels = dict(labels)
        self._specs = {spec.name: spec for spec in SPECS}
        self._metrics: dict[tuple[str, str | None], Any] = {}
        kinds = {kind: getattr(utils.MetricFamily, kind.upper(), None) for kind in ("counter", "gauge", "histogram")}
        # Servers before 24.08 have no histograms; the rest is worth having there.
        self._families = {
            spec.name: utils.MetricFamily(name=spec.name, description=spec.help, kind=kinds[spec.kind])
            for spec in SPECS
            if kinds[spec.kind] is not None
        }

    def _do(self, name: str, label: str | None, action: Callable[[Any], None]) -> None:
        family, spec = self._families.get(name), self._specs[name]
        if family is None:
            return
        if (name, label) not in self._metrics:
            labels = {**self._labels, **({spec.label: label} if spec.label and label else {})}
            extra = {"buckets": list(SECONDS)} if spec.kind == "histogram" else {}
            self._metrics[name, label] = family.Metric(labels=labels, **extra)
        action(self._metrics[name, label])

    def add(self, name: str, label: str | None, amount: float) -> None:
        """See Sink."""
        self._do(name, label, lambda metric: metric.increment(amount))

    def set(self, name: str, label: str | None, value: float) -> None:
        """See Sink."""
        self._do(name, label, lambda metric: metric.set(value))

    def observe(self, name: str, value: float) -> None:
        """See Sink."""
        self._do(name, None, lambda metric: metric.observe(value))
