"""The guard: on a simulated model whose cost grows with the square of the floors, token by token at random."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
from test_serve_service import PROMPT, Served

from lynx_trt.artifact import Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.errors import UsageError
from lynx_trt.runtime.check import Check
from lynx_trt.runtime.guard import WINDOW, Guard
from lynx_trt.serving.settings import Settings

EXPERTS = (32, 32)
ASKED = Restriction((32, 16), (0.04, 0.0))


class Traffic:
    """Checks of four tokens; `cost` nats is what a token pays for all of the restriction, four times that off."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def check(self, cost: float, restriction: Restriction) -> Check:
        strength = restriction.floors[0] / ASKED.floors[0]
        sigma = np.sqrt(np.log(1 + 4**2))
        noise = self._random.lognormal(-(sigma**2) / 2, sigma, 4)
        return Check(4, float((cost * strength**2 * noise).sum()), 4)

    def run(self, guard: Guard, cost: float, tokens: int) -> list[float]:
        """The mean cost of each window."""
        costs = []
        for _ in range(tokens // 4):
            check = self.check(cost, guard.applied(ASKED))
            costs.append(check.kl / check.tokens)
            guard.on_check(check)
        return costs


@pytest.mark.parametrize("seed", range(5))
def test_a_promise_is_kept(seed: int) -> None:
    traffic, guard = Traffic(seed), Guard(EXPERTS, 0.01)
    traffic.run(guard, 0.003, 40 * WINDOW)
    assert guard.share == 1.0
    assert guard.applied(ASKED) is ASKED
    traffic.run(guard, 0.05, 10 * WINDOW)  # other text comes, which pays five times what may be
    assert 0.003 < statistics.mean(traffic.run(guard, 0.05, 100 * WINDOW)) < 0.0105
    assert 0.25 < guard.share < 0.6
    traffic.run(guard, 0.003, 30 * WINDOW)
    assert guard.share == 1.0


def test_what_it_leaves() -> None:
    guard = Guard(EXPERTS, 0.01)
    for _ in range(WINDOW // 4):
        guard.on_check(Check(4, 4 * 0.02, 3))
    assert guard.share == pytest.approx((0.8 * 0.01 / 0.02) ** 0.5)
    left = guard.applied(ASKED)
    assert left.budgets == (32, 22)
    assert left.floors == pytest.approx((0.04 * guard.share, 0.0))
    assert guard.applied(ASKED) is left  # its arrays are made once
    other = guard.applied(Restriction((16, 16)))
    assert other.budgets == (22, 22)
    guard.set_max_kl(0.0)
    assert guard.applied(ASKED) is ASKED


def test_without_a_limit_nothing_moves() -> None:
    guard = Guard(EXPERTS)
    Traffic().run(guard, 5.0, 4 * WINDOW)
    assert guard.applied(ASKED) is ASKED


def test_no_cost_at_all() -> None:
    """And no tokens: rows that were no numbers."""
    guard = Guard(EXPERTS, 0.01)
    guard.share = 0.5
    guard.on_check(Check(0, 0.0, 0))
    for _ in range(20 * WINDOW // 4):
        guard.on_check(Check(4, 0.0, 4))
    assert guard.share == 1.0


def test_served(text_artifact: Artifact, tmp_path: Path) -> None:
    """The default quality gets experts back; what a request asks for itself stays and counts for nothing."""
    dial = tmp_path / "dial.json"
    dial.write_text(json.dumps({"quality": "0.1", "max_kl": 100}))
    served = Served(text_artifact, Settings(slots=4, check=1), dial)

    def allow(max_kl: float) -> None:
        text = json.dumps({"quality": "0.1", "max_kl": max_kl})
        dial.write_text(text)
        end = time.monotonic() + 5
        while served.service._dial_text != text:
            assert time.monotonic() < end
            time.sleep(0.02)

    def active(**values: str) -> float:
        replies = [served.ask(text_input=PROMPT[n:], max_tokens=45, **values) for n in range(4)]
        return max(float(reply.wait().responses[-1]["active_experts"].max()) for reply in replies)

    try:
        few = active()
        allow(1e-6)
        for _ in range(6):
            active(quality="0.2")
        assert served.service._guard.share == 1.0
        for _ in range(6):
            active()
        assert served.service._guard.share < 0.5
        assert active() > few
        served.service._flush()
        assert served.sink.values["lynx_guard", None] == served.service._guard.share
        assert served.sink.values["lynx_quality_default", None] > 0.125
        allow(0)
        assert served.service._guard.share == 1.0
        assert active() == few
    finally:
        served.service.close()


def test_what_it_needs() -> None:
    with pytest.raises(UsageError, match=r"max-kl is 0\.02, and check is 0, so nothing would find"):
        Settings(check=0, max_kl=0.02)
