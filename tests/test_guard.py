"""The guard: on a simulated model whose cost grows with the square of the floors, token by token at random."""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from test_serve_service import PROMPT, Served

from lynx_trt.artifact import Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.errors import UsageError
from lynx_trt.runtime.check import Check
from lynx_trt.runtime.control import Control
from lynx_trt.runtime.guard import WINDOW, Guard
from lynx_trt.runtime.pace import Target
from lynx_trt.runtime.scheduler import StepReport
from lynx_trt.serving.settings import Settings

EXPERTS = (32, 32)
ASKED = Restriction((32, 16), (0.04, 0.0))


def report(check: Check | None, restriction: Restriction = ASKED, kind: str = "decode") -> StepReport:
    return StepReport(kind, 4, 4, 4, 0.01, np.zeros(2), restriction, check=check)


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
            guard.on_step(report(check))
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
        guard.on_step(report(Check(4, 4 * 0.02, 3)))
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
    guard.on_step(report(Check(0, 0.0, 0)))
    for _ in range(20 * WINDOW // 4):
        guard.on_step(report(Check(4, 0.0, 4)))
    assert guard.share == 1.0


def test_the_way_back_from_nothing() -> None:
    """Of few experts so little may be left of a budget that it restricts none, which nobody checks: traffic that got
    harmless, or another limit, still ends that."""
    experts, asked, every = (8, 8), Restriction((4, 4)), 3
    guard = Guard(experts, 0.02, every)
    everything = Restriction(experts)

    def run(cost: dict[int, float], steps: int) -> None:
        for number in range(steps):
            restriction = guard.applied(asked)
            free = restriction == everything
            check = None if free or number % every else Check(4, 4 * cost[restriction.budgets[0]], 4)
            guard.on_step(report(check, restriction))
            guard.on_step(report(None, everything, "prefill"))

    run({4: 0.2, 5: 0.1, 6: 0.06, 7: 0.03}, 30_000)
    assert guard.applied(asked).budgets[0] >= 7
    run({4: 0.001, 5: 0.0005, 6: 0.0002, 7: 0.0001}, 20_000)
    assert guard.share == 1.0
    run(dict.fromkeys(range(4, 9), 9.0), 100_000)  # cost that doesn't go away with it
    assert guard.share >= 0.02
    guard.set_max_kl(100.0)
    run(dict.fromkeys(range(4, 9), 9.0), 10_000)
    assert guard.share == 1.0


def test_an_operator_and_a_step_at_once() -> None:
    """Two threads: what an operator has taken away is gone, whatever the other was doing at that moment."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    default, lowest = Restriction((128,) * 48), Restriction((32,) * 48, (0.04,) * 48)
    control = Control((128,) * 48, Target(default, lowest), 0.0, every=1)
    stopping = threading.Event()

    def steps() -> None:
        number = 0
        while not stopping.is_set():
            number += 1
            check = Check(WINDOW, WINDOW * 0.02, 4) if number % 3 else None
            seconds = 0.02 if number // 400 % 2 else 0.002
            control.on_step(StepReport("decode", 4, 4, 4, seconds, np.zeros(2), control.restriction, check=check))

    thread = threading.Thread(target=steps)
    thread.start()
    try:
        for _ in range(400):
            control.set(Target(default, lowest, 0.01), 0.01)
            time.sleep(0.001)
            control.set(Target(default, lowest), 0.0)
            time.sleep(0.001)
            assert (control.restriction, control.pace.position, control.guard.share) == (default, 0.0, 1.0)
    finally:
        stopping.set()
        thread.join()
        sys.setswitchinterval(before)


def test_served(text_artifact: Artifact, tmp_path: Path) -> None:
    """The default quality gets experts back; what a request asks for itself stays and counts for nothing."""
    dial = tmp_path / "dial.json"
    dial.write_text(json.dumps({"quality": "0.1", "max_kl": 100}))
    served = Served(text_artifact, Settings(slots=4, check=1), dial)

    def allow(max_kl: float) -> None:
        served.turn(json.dumps({"quality": "0.1", "max_kl": max_kl}))

    def active(**values: str) -> float:
        replies = [served.ask(text_input=PROMPT[n:], max_tokens=45, **values) for n in range(4)]
        return max(float(reply.wait().responses[-1]["active_experts"].max()) for reply in replies)

    try:
        few = active()
        allow(1e-6)
        for _ in range(6):
            active(quality="0.2")
        assert served.service._control.guard.share == 1.0
        for _ in range(6):
            active()
        assert served.service._control.guard.share < 0.5
        assert active() > few
        served.service._flush()
        assert served.sink.values["lynx_guard", None] == served.service._control.guard.share
        assert served.sink.values["lynx_quality_default", None] > 0.125
        allow(0)
        assert served.service._control.guard.share == 1.0
        assert active() == few
    finally:
        served.service.close()


def test_what_it_needs() -> None:
    with pytest.raises(UsageError, match=r"max-kl is 0\.02, and check is 0, so nothing would find"):
        Settings(check=0, max_kl=0.02)
