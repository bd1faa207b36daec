"""`--provider cuda` without a GPU: its path over CPU memory and kernels, and what is said where CUDA fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from lynx_trt.artifact import Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.compare import app
from lynx_trt.comparison import runners
from lynx_trt.comparison.against import changes
from lynx_trt.comparison.page import page
from lynx_trt.comparison.runners import Spec, baseline_of, open_runner, specs, try_out
from lynx_trt.comparison.summary import summarize
from lynx_trt.errors import ArtifactError, LynxError
from lynx_trt.runtime import ort, ort_graphs
from lynx_trt.runtime.lowering import Form
from lynx_trt.runtime.ort import OrtBackend

Array = np.ndarray[Any, np.dtype[Any]]


def in_host_memory(array: Array, _: str) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array.copy(), "cpu", 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device `cuda` is the CPU: its OrtValues, bindings and graphs, but another one's memory and kernels."""
    monkeypatch.setitem(ort_graphs.PROVIDERS, "cuda", "CPUExecutionProvider")
    monkeypatch.setattr(ort_graphs, "on_device", in_host_memory)


def copy_when_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on inputs are copied as they are bound, as ONNX Runtime does it to another device's memory."""
    bind, kept = ort._bind, []

    def copying(to: Any, name: str, array: Array) -> None:
        if to.__name__ == "bind_input":
            array = array.copy()
            kept.append(array)  # the binding has only the address
        bind(to, name, array)

    monkeypatch.setattr(ort, "_bind", copying)


def steps(backend: OrtBackend) -> list[tuple[Array, Array]]:
    """Logits and active experts of a prefill of four slots, steps of all, and steps of the two in the middle."""
    generator = np.random.default_rng(5)
    two, full = Restriction((2, 2)), Restriction((8, 8))
    past, lengths = np.zeros(4, np.int64), np.array([5, 2, 4, 5])
    results = [backend.step(generator.integers(3, 256, (4, 5)), past, lengths, full)]
    past = lengths
    for first, batch, dial in ((0, 4, two), (0, 4, full), (1, 2, two), (1, 2, two), (0, 4, two)):
        rows, ones = slice(first, first + batch), np.ones(batch, np.int64)
        results.append(backend.step(generator.integers(3, 256, (batch, 1)), past[rows], ones, dial, first=first))
        past = past + np.isin(np.arange(4), np.arange(first, first + batch))
    return [(result.logits, result.active) for result in results]


@pytest.mark.parametrize("form", [None, "auto", "grouped", "baseline"])
@pytest.mark.usefixtures("cuda")
def test_steps_are_the_cpus(form: Form | None, text_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """`None` is the same graph; the others differ in attention, which CUDA has no other node for in float32."""
    expected = steps(OrtBackend(text_artifact, 4, threads=1, form=form))
    copy_when_bound(monkeypatch)
    backend = OrtBackend(text_artifact, 4, threads=1, form=form, device="cuda")
    assert all(isinstance(cache, onnxruntime.OrtValue) for cache in backend._caches.values())
    for (logits, active), (got, got_active) in zip(expected, steps(backend), strict=True):
        assert got_active.tolist() == active.tolist()
        bound = 0 if form is None else 64 * np.finfo(np.float32).eps * np.abs(logits).max()
        assert np.abs(got - logits).max() <= bound


@pytest.mark.usefixtures("cuda")
def test_slots_are_copied_and_cleared(text_artifact: Artifact) -> None:
    full = Restriction((8, 8))

    def after(backend: OrtBackend, slot: int) -> Array:
        """Logits of a slot that has three tokens in its cache."""
        step = backend.step(np.array([[70]]), np.array([3]), np.ones(1, np.int64), full, first=slot)
        return step.logits[0]

    backend = OrtBackend(text_artifact, 3, threads=1, device="cuda")
    backend.step(np.array([[65, 66, 67]]), np.zeros(1, np.int64), np.array([3]), full, first=0)
    empty = after(backend, 2)
    backend.copy_slot(0, 2, 3)
    assert np.array_equal(after(backend, 2), after(backend, 0))
    assert not np.array_equal(after(backend, 0), empty)
    backend.clear_slot(0)
    assert np.array_equal(after(backend, 0), empty)
    assert not np.array_equal(after(backend, 2), empty)


def command(artifact: Artifact, folder: Path, *arguments: str) -> Any:
    small = ["--prompt", "6", "--steps", "3", "--rounds", "2", "--sequences", "2", "--batch", "2", "--threads", "1"]
    result = CliRunner().invoke(app, [str(artifact.folder), "-o", str(folder), "--no-memory", *small, *arguments])
    if result.exception and isinstance(result.exception, LynxError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("cuda")
def test_both_providers_in_one_report(text_artifact: Artifact, tmp_path: Path) -> None:
    report = command(text_artifact, tmp_path, "--provider", "cpu", "--provider", "cuda", "--budget", "off")
    names = ["ort-moe", "ort-moe/cuda", "ort-plain", "ort-plain/cuda", "lynx@off", "lynx@off/cuda"]
    assert list(report["samples"]["decode"]) == names
    assert report["reference"] == "ort-plain"
    assert all(item["max"] <= 1e-4 * item["scale"] for item in report["right"].values())
    assert summarize(report) == report["summary"]
    decode = report["samples"]["decode"]
    for row in report["summary"]:
        # Each to the baseline on its own device.
        other = "ort-moe/cuda" if row["runner"].endswith("/cuda") else "ort-moe"
        ratio = np.median(np.array(decode[other]["2"]) / np.array(decode[row["runner"]]["2"]))
        assert row["decode_ratio"] == pytest.approx(ratio)
    assert set(report["layers"]["seconds"]) == {"ort-moe", "ort-plain", "lynx@off"}
    assert "on CUDA" in page(report)


@pytest.mark.usefixtures("cuda")
def test_cuda_alone(text_artifact: Artifact, tmp_path: Path) -> None:
    report = command(text_artifact, tmp_path, "--provider", "cuda", "--budget", "off", "--baseline", "ort-moe")
    assert list(report["samples"]["decode"]) == ["ort-moe/cuda", "lynx@off/cuda"]
    assert report["baseline"] == "ort-moe"
    assert all(row["decode_ratio"] for row in report["summary"])
    assert changes(report, report)[0]["decode_ratio"]
    assert page(report).count("<svg") == 3


def test_whose_ratio_it_is() -> None:
    there = {"ort-moe", "ort-moe/cuda"}
    assert baseline_of("lynx@off", "ort-moe", there) == "ort-moe"
    assert baseline_of("lynx@off/cuda", "ort-moe", there) == "ort-moe/cuda"
    assert baseline_of("tensorrt@off", "ort-moe", there) == "ort-moe/cuda"
    assert baseline_of("tensorrt@off", "ort-moe", {"ort-moe"}) == "ort-moe"
    assert baseline_of("lynx@off/cuda", "ort-moe", {"ort-moe"}) is None  # never the CPU's
    assert baseline_of("hf-eager", "ort-moe", {"ort-moe/cuda"}) is None
    assert baseline_of("lynx@off", None, there) is None


# --- What isn't there, or fails, is one line.


def cuda_spec(artifact: Artifact) -> Spec:
    (spec,) = [
        spec
        for spec in specs(artifact, baselines=[], budgets=["off"], checkpoint=None, providers=["cuda"])
        if spec.kind == "ort"
    ]
    return spec


def test_without_the_provider(text_artifact: Artifact, tmp_path: Path) -> None:
    report = command(text_artifact, tmp_path, "--provider", "cpu", "--provider", "cuda", "--baseline", "ort-moe")
    said = [line for line in report["problems"] if "cuda" in line]
    assert len(said) == 1
    assert "has no CUDAExecutionProvider" in said[0]
    assert set(report["samples"]["decode"]) == {"ort-moe", "lynx@off", "lynx@own"}
    with pytest.raises(LynxError, match="nothing can be compared: provider cuda: this onnxruntime"):
        command(text_artifact, tmp_path, "--provider", "cuda")


def test_without_a_gpu(text_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider is there, and the first copy to a GPU fails."""
    has = [*onnxruntime.get_available_providers(), "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: has)
    report = command(text_artifact, tmp_path, "--provider", "cpu", "--provider", "cuda", "--baseline", "ort-moe")
    said = [line for line in report["problems"] if "cuda" in line]
    assert len(said) == 1
    assert "can't use a GPU here: " in said[0]
    with pytest.raises(ArtifactError, match=r"can't run on cuda: onnxruntime .* can't use a GPU here"):
        OrtBackend(text_artifact, 1, device="cuda")


def test_a_provider_that_leaves_all_to_the_cpu_in_silence(
    text_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without CUDA's libraries: a session comes, and has the CPU only. Its speed is not CUDA's."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort_graphs, "on_device", in_host_memory)
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"):
        opened = open_runner(text_artifact, cuda_spec(text_artifact), 2, 1)
    assert opened.runner is None
    assert "could not set up CUDAExecutionProvider" in str(opened.absent)


def test_nodes_left_to_the_cpu_are_counted(
    text_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider that is there and has none of the kernels."""
    monkeypatch.setitem(ort_graphs.PROVIDERS, "cuda", "AzureExecutionProvider")
    monkeypatch.setattr(ort_graphs, "on_device", in_host_memory)
    report = command(text_artifact, tmp_path, "--provider", "cuda", "--budget", "off", "--baseline", "ort-moe")
    notes = {item["name"]: item["notes"] for item in report["runners"]}
    (line,) = notes["ort-moe/cuda"]
    left, _, count = line.split()[:3]
    assert left == count
    assert int(left) > 20
    assert "2 MoE" in line
    assert line in page(report)
    assert len(notes["lynx@off/cuda"]) == 3  # and those without selection and for one token
    assert notes["tensorrt"] == []


@pytest.mark.usefixtures("cuda")
def test_a_session_that_fails(text_artifact: Artifact, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def fail(*_: Any, **options: Any) -> None:
        assert options["enable_fallback"] == 0  # else it prints, and tries the CPU
        raise RuntimeError("CUDA failure 2: out of memory\n at line 7")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    opened = open_runner(text_artifact, cuda_spec(text_artifact), 2, 1)
    assert opened.runner is None
    assert str(opened.absent).endswith("CUDA failure 2: out of memory")
    assert capfd.readouterr().out == ""


@pytest.mark.usefixtures("cuda")
def test_a_step_that_fails(text_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that refuses a shape: its runner is named, the CPU's are compared."""
    step: Callable[..., Any] = OrtBackend.step

    def refusing(self: OrtBackend, *arguments: Any, **options: Any) -> Any:
        if self._device == "cuda":
            raise RuntimeError("Attention: softcap is not supported\nat line 7")
        return step(self, *arguments, **options)

    monkeypatch.setattr(OrtBackend, "step", refusing)
    report = command(
        text_artifact, tmp_path, "--provider", "cpu", "--provider", "cuda", "--budget", "off", "--baseline", "ort-moe"
    )
    assert "lynx@off/cuda: a step fails: Attention: softcap is not supported" in report["problems"]
    assert set(report["samples"]["decode"]) == {"ort-moe", "lynx@off"}


def test_only_new_devices_are_tried(text_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's failures are bugs and stay loud."""
    (spec, *_) = specs(text_artifact, baselines=[], budgets=["off"], checkpoint=None)
    opened = open_runner(text_artifact, spec, 1, 1)
    monkeypatch.setattr(runners.BackendRunner, "prefill", lambda *_: 1 / 0)
    try_out(opened, np.ones((1, 2), np.int64))
    assert opened.absent is None
