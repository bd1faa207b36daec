"""The measurement is what decoding sees: a teacher-forced forward against real steps through the exported artifact."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from lynx_trt.budgets import Restriction
from lynx_trt.calibration.cost import cost_model
from lynx_trt.calibration.measure import Meter, count_active
from lynx_trt.calibration.model import Probed, Setting, Shape
from lynx_trt.calibration.text import Sequences
from lynx_trt.runtime.ort import OrtBackend
from lynx_trt.selection import PRESETS

BATCH, PROMPT, LENGTH = 6, 7, 24
FLOORS = {"lynx": 0.05, "lynx-accuracy": 0.2}


def random_ids(rows: int, length: int = LENGTH, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(3, 256, size=(rows, length))


def decoded(artifact: Any, ids: np.ndarray[Any, Any], setting: Setting) -> tuple[Any, Any]:
    """Logits [D,B,V] and active experts [D,N] of real decode steps after a prefill of PROMPT tokens."""
    backend = OrtBackend(artifact, slots=len(ids))
    dial, rows = setting.restriction, np.ones(len(ids), np.int64)
    backend.step(ids[:, :PROMPT], 0 * rows, PROMPT * rows, dial)
    steps = [backend.step(ids[:, t : t + 1], t * rows, rows, dial) for t in range(PROMPT, ids.shape[1])]
    return np.stack([step.logits.copy() for step in steps]), np.stack([step.active.copy() for step in steps])


def forced(model: Any, ids: np.ndarray[Any, Any], setting: Setting) -> tuple[Any, Any]:
    """The same from one teacher-forced forward."""
    probed = Probed(model)
    outcome = probed.run(torch.from_numpy(ids), Shape(BATCH, PROMPT), setting)
    logits = probed.logits(outcome.hidden.flatten(0, 1)).view(len(ids), -1, 256).transpose(0, 1)
    active = [count_active(outcome.index[n], BATCH, experts)[0] for n, experts in enumerate(probed.experts)]
    return logits.numpy(), np.stack(active, axis=1)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("qwen3_moe", "lynx"),  # the plain router
        ("phimoe", "lynx"),  # no known rule, so tokens only lose experts
        ("gemma4", "lynx"),  # a number an expert behind the selection; a language model beside eyes
        ("gpt_oss", "lynx"),  # biases, sinks, a sliding window, and interleaved, transposed weights
        pytest.param("qwen3_moe", "lynx-accuracy", marks=pytest.mark.slow),  # sensitive tokens
        pytest.param("qwen2_moe", "lynx", marks=pytest.mark.slow),  # not renormalised, beside a shared expert
        pytest.param("deepseek_v3", "lynx", marks=pytest.mark.slow),  # a bias and groups, after a dense layer
    ],
)
def test_equals_step_by_step_decoding(name: str, preset: str, artifact: Any) -> None:
    built = artifact(name, preset=preset)
    layers = built.manifest.model.moe_layers
    # Odd layers have a tight budget, even ones a floor that leaves some experts out, and the widest cap.
    restriction = Restriction(
        tuple(3 if n % 2 else layer.experts - 1 for n, layer in enumerate(layers)),
        tuple(0.0 if n % 2 else FLOORS[preset] for n in range(len(layers))),
    )
    setting = Setting(PRESETS[preset], restriction)
    ids = random_ids(BATCH)
    want, want_active = decoded(built, ids, setting)
    got, got_active = forced(tiny_models.random_model(name), ids, setting)
    np.testing.assert_array_equal(got_active, want_active)
    # Float32 in two engines: the bound is twice what the forward itself is off from float64.
    exact, exact_active = forced(tiny_models.random_model(name).double(), ids, setting)
    np.testing.assert_array_equal(exact_active, want_active)
    own_error = np.abs(got - exact).max()
    tiny = np.finfo(np.float32).eps * np.abs(exact).max()
    assert np.abs(want - exact).max() <= 2 * own_error + tiny
    # And the restriction did something, or equality says nothing.
    everything = Setting(PRESETS["off"], Restriction(tuple(layer.experts for layer in layers)))
    free, _ = forced(tiny_models.random_model(name), ids, everything)
    assert np.abs(free - got).max() > 100 * own_error
    assert (got_active < 8).any(axis=0).all()  # every layer, so the floors did


def meter(name: str = "qwen3_moe", rows: int = 12, **options: Any) -> Meter:
    ids = random_ids(rows, seed=5)
    model = options.pop("model", None) or tiny_models.random_model(name)
    probed = Probed(model)
    cost = cost_model("h100", [1000] * len(probed.layers), 5000)
    return Meter(probed, Sequences(ids, np.full_like(ids, 2)), prompt=PROMPT, cost=cost, **options)


def test_metrics_equal_a_plain_computation() -> None:
    """Every number of the summary, worked out the long way from full logits."""
    measured = meter(threads=2)
    setting = Setting(PRESETS["lynx"], Restriction((4, 7), (0.0, 0.05)))
    (result,) = measured.measure([setting], BATCH)
    ids = random_ids(12, seed=5)
    logits = {}
    for label, tried in (("restricted", setting), ("free", measured.unrestricted())):
        halves = [forced(tiny_models.random_model("qwen3_moe"), ids[i : i + BATCH, :-1], tried) for i in (0, BATCH)]
        logits[label] = torch.from_numpy(np.concatenate([half[0] for half in halves], axis=1)).double()
        logits[f"{label} active"] = np.concatenate([half[1] for half in halves])
    free, restricted = (logits[label].log_softmax(-1) for label in ("free", "restricted"))
    targets = torch.from_numpy(ids[:, PROMPT + 1 :].T.copy())
    kl = (free.exp() * (free - restricted)).sum(-1)
    nats = -restricted.gather(2, targets[..., None]).squeeze(-1)
    base = -free.gather(2, targets[..., None]).squeeze(-1)
    assert result.kl.mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert result.kl_p99.mean == pytest.approx(np.quantile(kl.numpy(), 0.99, method="higher"), rel=1e-4)
    assert result.agreement.mean == pytest.approx((free.argmax(-1) == restricted.argmax(-1)).double().mean().item())
    assert result.nats_a_token.mean == pytest.approx(nats.mean().item(), rel=1e-6)
    assert result.bits_a_byte.mean == pytest.approx(nats.mean().item() / math.log(2) / 2, rel=1e-6)
    assert result.perplexity_increase.mean == pytest.approx(math.expm1((nats - base).mean().item()), rel=1e-4)
    active = logits["restricted active"]
    assert result.active.mean == pytest.approx(active.mean(), abs=0.02)  # blocks of a step more or less
    assert result.active_by_layer == pytest.approx(active.mean(0), abs=0.02)
    assert result.active_max_by_layer == active.max(0).tolist()
    for interval in (result.kl, result.kl_p99, result.agreement, result.nats_a_token, result.active):
        assert interval.low <= interval.mean <= interval.high
        assert interval.low < interval.high
    assert result.expert_bytes_a_token.mean == pytest.approx(1000 * active.sum(1).mean() / BATCH, rel=5e-3)


def test_unrestricted_costs_nothing() -> None:
    """KL exactly 0, agreement exactly 1: a budget of E is the model's own routing, bit for bit."""
    measured = meter()
    (result,) = measured.measure([measured.unrestricted()], BATCH)
    assert result.kl == (0, 0, 0)
    assert result.agreement == (1, 1, 1)
    assert result.perplexity_increase.mean == 0
    assert result.active_by_layer == pytest.approx(measured.natural(BATCH).mean((1, 2)), abs=0.02)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_resuming_in_the_middle_changes_nothing(name: str) -> None:
    """A layer's own setting runs from that layer on; the numbers are those of the whole forward."""
    measured = meter(name, threads=1)
    alone = Setting(PRESETS["lynx"], Restriction((8, 3)))
    resumed, _ = measured.tokens([alone, alone], BATCH)
    assert measured.probed.first_restricted(alone) >= 1
    measured.probed.first_restricted = lambda _: 0  # type: ignore[method-assign]
    whole, _ = measured.tokens([alone, alone], BATCH)
    np.testing.assert_array_equal(resumed.kl, whole.kl)
    np.testing.assert_array_equal(resumed.active, whole.active)


def test_threads_and_company_change_nothing() -> None:
    """The same numbers with one thread or three, alone or among other settings."""
    settings = [Setting(PRESETS["lynx"], Restriction((budget, 8))) for budget in (2, 3, 4)]
    alone = meter(threads=1).measure(settings[1:2], 4)[0]
    together = meter(threads=3).measure(settings, 4)[1]
    assert alone == together


def test_threads_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5})
    assert meter()._threads == 3
    assert meter(threads=1)._threads == 1


def test_batches_do_not_see_each_other() -> None:
    """The first batch's numbers don't depend on what is in the second."""
    setting = Setting(PRESETS["lynx"], Restriction((3, 3)))
    one, two = (meter(rows=rows).tokens([setting], BATCH)[0] for rows in (BATCH, 2 * BATCH))
    np.testing.assert_allclose(one.kl, two.kl[:BATCH], rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(one.active, two.active[:, :1])


def test_a_measurement_survives_json() -> None:
    import json

    from lynx_trt.calibration.measure import Measurement

    measured = meter()
    tried = Setting(PRESETS["xshare"], Restriction((3, 5), (0.0, 0.1)))
    (result,) = measured.measure([tried], 4)
    assert Measurement.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert result.setting == tried


def test_memory_is_for_a_fixed_number_of_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many settings are asked for, per-token numbers of at most 32 exist at a time."""
    measured, alive = meter(), []
    tokens = measured.tokens

    def counting(settings: Any, batch: int, **rest: Any) -> Any:
        alive.append(len(settings))
        return tokens(settings, batch, **rest)

    monkeypatch.setattr(measured, "tokens", counting)
    settings = [Setting(PRESETS["lynx"], Restriction((a, b))) for a in range(1, 8) for b in range(1, 8)]
    results = measured.measure(settings, 4)
    assert [item.setting for item in results] == settings
    assert alive == [32, 17]
