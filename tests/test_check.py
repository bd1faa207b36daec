"""Decode steps that are done with all experts too: what is counted, and that nothing else changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_scheduler import LIMITS, FakeBackend, Seen, expected, finish, sequence
from test_serve_service import PROMPT, Served
from test_trt_backend import backend_of, with_engine

from lynx_trt.artifact import TOKENIZER, Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.runtime.check import ROWS, Check, Checks
from lynx_trt.runtime.open import limits_of
from lynx_trt.runtime.ort import OrtBackend
from lynx_trt.runtime.sampling import Sampling, draws_of
from lynx_trt.runtime.scheduler import Policy, Scheduler
from lynx_trt.runtime.sequence import Generated, Request
from lynx_trt.runtime.text import Tokenizer
from lynx_trt.serving.settings import Settings


def test_what_is_counted() -> None:
    """Against PyTorch's own KL in float64; rows that are no numbers are left out."""
    rng = np.random.default_rng(0)
    full = (4 * rng.standard_normal((5, 300)) + 50).astype(np.float32)
    own = full + (0.5 * rng.standard_normal((5, 300))).astype(np.float32) - 9
    own[1] = full[1] + 3  # the same distribution
    own[3, 7], full[4, 0] = np.nan, np.inf
    rows = [0, 1, 2]
    logs = [torch.tensor(x[rows], dtype=torch.float64).log_softmax(1) for x in (own, full)]
    wanted = torch.nn.functional.kl_div(*logs, log_target=True, reduction="sum").item()
    check = Check.of(full, own)
    assert check.tokens == 3
    assert check.kl == pytest.approx(wanted, rel=1e-4)
    assert check.agreed == int((full[rows].argmax(1) == own[rows].argmax(1)).sum())
    assert Check.of(full, full) == Check(4, 0.0, 4)
    assert Check.of(full[4:], own[4:]) == Check(0, 0.0, 0)
    full[:, 5] = own[:, 5] = -np.inf  # a token that the model never gives
    logs = [torch.tensor(np.delete(x[rows], 5, 1), dtype=torch.float64).log_softmax(1) for x in (own, full)]
    wanted = torch.nn.functional.kl_div(*logs, log_target=True, reduction="sum").item()
    assert Check.of(full, own).tokens == 3
    assert Check.of(full, own).kl == pytest.approx(wanted, rel=1e-4)
    own[0, 5] = 0.0  # one that the selection alone gives, or doesn't
    assert Check.of(full, own).tokens == 2


def run(backend: FakeBackend, restriction: Restriction, check: int, sequences: int = 3) -> Seen:
    """Decode some sequences, each of which has to be what it is alone."""
    seen = Seen()
    scheduled = Scheduler(backend, LIMITS, restriction=restriction, policy=Policy(check=check), observer=seen)
    made = [sequence([3 + n, 4, 5], 12) for n in range(sequences)]
    for one in made:
        scheduled.submit(one)
    finish(scheduled)
    for n, one in enumerate(made):
        assert one.tokens == expected([3 + n, 4, 5], 12)
    return seen


RESTRICTED = Restriction((2, 2, 1))
EVERYTHING = Restriction(LIMITS.experts)


def test_one_in_so_many() -> None:
    backend = FakeBackend(3)
    seen = run(backend, RESTRICTED, check=4)
    decodes = [step for step in seen.steps if step.kind == "decode"]
    checked = [number for number, step in enumerate(decodes, 1) if step.check]
    assert checked == list(range(4, len(decodes) + 1, 4))
    assert len(checked) >= 2
    assert all(step.check is None for step in seen.steps if step.kind == "prefill")
    # With all experts, then twice as it is; the last is what counts, for the active experts too.
    assert len(backend.steps) == len(seen.steps) + 2 * len(checked)
    full = [budgets == list(LIMITS.experts) for budgets in backend.budgets]
    assert sum(full) == len(checked) + sum(step.kind == "prefill" for step in seen.steps)
    first = decodes[3].check
    assert first is not None
    assert 0 < first.seconds < decodes[3].seconds
    # This model's tokens hang on no expert.
    assert dataclasses.replace(first, seconds=0) == Check(decodes[3].rows, 0.0, decodes[3].rows)


@pytest.mark.parametrize(
    ("restriction", "check", "rewinds"),
    [(EVERYTHING, 1, 64), (RESTRICTED, 0, 64), (RESTRICTED, 1, 0)],
    ids=["nothing is restricted", "off", "states"],
)
def test_none_where_there_is_nothing_to_see(restriction: Restriction, check: int, rewinds: int) -> None:
    backend = FakeBackend(3)
    backend.rewinds = rewinds
    seen = run(backend, restriction, check)
    assert len(backend.steps) == len(seen.steps)
    assert not [step for step in seen.steps if step.check]


def test_rows_take_turns() -> None:
    """Of a large batch a few rows each time, and all of them in the end."""
    backend, rows = FakeBackend(10), []
    step = backend.step

    def noted(ids: Any, past: Any, lengths: Any, restriction: Restriction, **options: Any) -> Any:
        result = step(ids, past, lengths, restriction, **options)
        if ids.shape[1] == 1 and restriction == EVERYTHING:
            result.logits[:, 0] = np.arange(len(ids)) / 100  # tells the rows apart

        return result

    backend.step = noted  # type: ignore[method-assign]
    original = Check.of

    def of(full: Any, own: Any) -> Check:
        rows.append([round(float(value) * 100) for value in full[:, 0]])
        return original(full, own)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Check, "of", of)
        run(backend, RESTRICTED, check=1, sequences=10)
    assert all(len(some) <= ROWS for some in rows)
    assert {row for some in rows for row in some} == set(range(10))


@pytest.mark.parametrize("quality", ["max", "0.1"])
def test_served(quality: str, text_artifact: Artifact) -> None:
    """The same text with and without, and what a tenth of the experts costs is more than nothing."""
    texts = {}
    for check in (0, 2):
        served = Served(text_artifact, Settings(slots=4, quality=quality, check=check))
        replies = [served.ask(text_input=PROMPT[n:], max_tokens=40, temperature=0.8, seed=n) for n in range(3)]
        texts[check] = [reply.wait().text for reply in replies]
        served.service._flush()
        served.service.close()
    assert texts[0] == texts[2]
    tokens, kl, agreed = (
        served.sink.values.get((f"lynx_{name}_total", None), 0) for name in ("checked_tokens", "kl", "agreed_tokens")
    )
    if quality == "max":
        assert (tokens, kl, agreed) == (0, 0, 0)
    else:
        assert tokens > 30
        assert kl > 1e-4 * tokens
        assert 0 < agreed < tokens


@pytest.mark.parametrize("kind", ["onnxruntime", "tensorrt"])
def test_with_a_real_model(kind: str, text_artifact: Artifact, tmp_path: Path) -> None:
    """Each step looked at, rows of captured sizes, slots that are moved and used again: the same tokens; the same costs
    of both backends."""
    artifact = with_engine(text_artifact, tmp_path / "engined")
    limits, tokenizer = limits_of(artifact.manifest), Tokenizer(artifact.path(TOKENIZER))
    found, costs = {}, {}
    for check in (0, 1):
        backend = OrtBackend(artifact, 3, threads=1) if kind == "onnxruntime" else backend_of(artifact, 3)
        seen = Seen()
        scheduled = Scheduler(
            backend, limits, restriction=Restriction((2, 2)), policy=Policy(check=check), observer=seen
        )
        made = []
        for number in range(5):
            sampling = Sampling(0.7, 0.9, seed=number)
            request = Request(8 + 5 * number, sampling)
            made.append(Generated(tokenizer.encode(PROMPT[number:]), request, tokenizer.stream()))
            scheduled.submit(made[-1])
        finish(scheduled)
        found[check] = [one.tokens for one in made]
        costs[check] = [step.check.kl for step in seen.steps if step.check]
    assert found[0] == found[1]
    assert costs[0] == []
    assert sum(costs[1]) > 0.01
    # One model, so what one backend finds the other does.
    other = OrtBackend(artifact, 3, threads=1)
    ids, past = np.array([[5, 6, 7]]), np.zeros(1, np.int64)
    other.step(ids, past, np.array([3]), Restriction(limits.experts))
    backend.step(ids, past, np.array([3]), Restriction(limits.experts))
    draws = draws_of(1, [(0, Sampling(), np.random.default_rng(0))])
    step = np.array([[8]]), np.array([3]), np.array([1])
    checks = [Checks(each, limits.experts, 1).step(*step, Restriction((1, 1)), draws)[1] for each in (backend, other)]
    assert checks[0] is not None
    assert checks[1] is not None
    assert checks[0].kl == pytest.approx(checks[1].kl, rel=1e-3)
