"""TensorRT candidates of a comparison: the runner against a backend that is prepared for few sizes, and an engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lynx_trt.artifact import Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.comparison import runners
from lynx_trt.comparison.runners import BackendRunner, Spec, open_runner, specs
from lynx_trt.errors import ArtifactError
from lynx_trt.runtime.backend import StepSizes
from lynx_trt.runtime.ort import OrtBackend


class Narrow(OrtBackend):
    """Takes steps as an engine does: some decode sizes, prompts in pieces; notes what it was given."""

    closed = False

    def __init__(self, artifact: Artifact, slots: int) -> None:
        super().__init__(artifact, slots, threads=1)
        self.sizes = StepSizes((1, 4), prefill_rows=2, prefill_length=3)
        self.steps: list[tuple[int, ...]] = []

    def step(self, input_ids: Any, *others: Any, **more: Any) -> Any:
        self.steps.append(input_ids.shape)
        return super().step(input_ids, *others, **more)

    def close(self) -> None:
        self.closed = True


def test_steps_that_the_backend_is_prepared_for(text_artifact: Artifact) -> None:
    """Three sequences of 7 tokens: 2 rows and 3 tokens a prefill step, one idle row a decode step; the same logits."""
    ids = np.random.default_rng(0).integers(32, 120, (3, 9))
    narrow = Narrow(text_artifact, 4)
    one, other = (
        BackendRunner(backend, text_artifact, Restriction((2, 2), (0.05, 0.0)))
        for backend in (narrow, OrtBackend(text_artifact, 3, threads=1))
    )
    for step in (lambda r: r.prefill(ids[:, :7]), lambda r: r.decode(ids[:, 7]), lambda r: r.decode(ids[:, 8])):
        got, expected = step(one), step(other)
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    assert narrow.steps == [(2, 3), (2, 3), (2, 1), (1, 3), (1, 3), (1, 1), (4, 1), (4, 1)]
    assert one.active is not None
    assert other.active is not None
    assert one.active.tolist() == other.active.tolist()  # the idle row loads no expert
    one.close()
    other.close()
    assert narrow.closed


def names(artifact: Artifact) -> list[str]:
    return [spec.name for spec in specs(artifact, baselines=[], budgets=["off", "2"], checkpoint=None)]


def test_a_candidate_for_each_budget_where_the_engine_runs(
    text_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def open_backend(artifact: Artifact, slots: int, *, name: str) -> OrtBackend:
        opened.append((slots, name))
        return Narrow(artifact, slots)

    monkeypatch.setattr(runners, "_no_tensorrt", lambda _: None)
    monkeypatch.setattr(runners, "open_backend", open_backend)
    assert names(text_artifact) == ["lynx@off", "lynx@2", "tensorrt@off", "tensorrt@2"]
    spec = specs(text_artifact, baselines=[], budgets=["2"], checkpoint=None)[-1]
    assert spec.restriction == Restriction((2, 2))
    assert isinstance(open_runner(text_artifact, spec, 3, 1).runner, BackendRunner)
    assert opened == [(3, "tensorrt")]


def test_an_engine_that_refuses_is_named(text_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine doesn't take so many sequences, say: one line, and the rest goes on."""

    def refuse(*_: Any, **__: Any) -> OrtBackend:
        raise ArtifactError("9 sequences at a time, and the engine decodes 8 at most")

    monkeypatch.setattr(runners, "open_backend", refuse)
    opened = open_runner(text_artifact, Spec("tensorrt@off", "", False, "tensorrt", (8, 8)), 9, 1)
    assert opened.runner is None
    assert opened.absent == "9 sequences at a time, and the engine decodes 8 at most"


def test_why_there_is_no_tensorrt(text_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(artifact: Artifact) -> str | None:
        return specs(artifact, baselines=[], budgets=["off"], checkpoint=None)[-1].absent

    assert "the artifact has no engine" in str(reason(text_artifact))
    # Only whether there is one matters here, not what is in it.
    manifest = text_artifact.manifest.model_copy(update={"engine": object()})
    engined = replace(text_artifact, manifest=manifest)
    monkeypatch.setattr(runners, "backend_available", lambda _: False)
    assert "no GPU on this machine" in str(reason(engined))
    monkeypatch.setattr(runners, "backend_available", lambda _: True)
    monkeypatch.setattr(runners, "engine_problems", lambda _: ["it was built by another TensorRT"])
    assert reason(engined) == "it was built by another TensorRT"
    monkeypatch.setattr(runners, "engine_problems", lambda _: [])
    assert reason(engined) is None
