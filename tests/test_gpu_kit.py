"""The engine's part of `make gpu`, as far as it goes without a GPU: what the kit holds, and what is checked with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_gpu import HostGpu, tensorrt_for

from lynx_trt.artifact import Artifact, open_artifact
from lynx_trt.console import Progress
from lynx_trt.errors import TensorRTError
from lynx_trt.runtime.ort import OrtBackend

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu_end_to_end
import gpu_engine
import gpu_kit
from gpu_models import PROMPTS


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    with Progress(quiet=True) as progress:
        gpu_kit.make(gpu_kit.Entry("mixtral", "fp32"), folder / "mixtral-fp32", "90", progress)
    return folder


class Stand(OrtBackend):
    """ONNX Runtime in the engine's place."""

    graphs_refused: str | None = None
    shift = 0.0

    def step(self, *arguments: Any, **options: Any) -> Any:
        result = super().step(*arguments, **options)
        result.logits[:, 7] += self.shift
        return result

    def close(self) -> None:
        pass


def test_kit_holds_the_engine_and_no_more(kit: Path) -> None:
    assert {path.name for path in kit.iterdir()} == {"mixtral-fp32"}
    artifact = open_artifact(kit / "mixtral-fp32")  # its sums fit
    assert artifact.manifest.engine
    assert artifact.manifest.engine.compute_capabilities == [90]
    assert {"engine.plan", "draws.kernels", "expected.npz"} <= set(artifact.manifest.files)
    assert not {"model.onnx", "weights.safetensors"} & set(artifact.manifest.files)


def test_right_numbers_pass(kit: Path, artifact: Callable[..., Artifact], tmp_path: Path) -> None:
    reference, said = artifact("mixtral"), []
    output = tmp_path / "engine.json"

    def one(folder: Path) -> gpu_engine.Row:
        return gpu_engine.check(folder, lambda *_: Stand(reference, len(PROMPTS), threads=1))

    (row,) = gpu_engine.check_kit(kit, one, said.append, output)
    assert row.passed, (row.checks, row.error)
    for name in ("half", "floor"):
        assert row.checks[f"text, {name}"]
        assert row.figures[f"equal_greedy_tokens_{name}"] == 1
        assert row.figures[f"active_experts_{name}"] < row.figures["active_experts_all"]
    assert said == ["TensorRT runs here: 1 of 1 engines gave numbers"]
    assert json.loads(output.read_text())["rows"][0]["passed"]
    assert "passed" in gpu_engine.table([row])


def test_wrong_numbers_are_named(kit: Path, artifact: Callable[..., Artifact]) -> None:
    """A backend whose logits are off, and one without graphs."""
    reference = artifact("mixtral")

    def make(_: Artifact, graphs: bool) -> Stand:
        backend = Stand(reference, len(PROMPTS), threads=1)
        backend.shift = 0.5
        backend.graphs_refused = "cuStreamEndCapture failed" if graphs else None
        return backend

    row = gpu_engine.check(kit / "mixtral-fp32", make)
    assert not row.passed
    assert not row.checks["logits"]
    assert not row.checks["CUDA graphs"]
    assert row.figures["largest_error_at"]["token"] == 7
    assert "failed: logits" in gpu_engine.table([row])


def test_wrong_draws_are_named(kit: Path, artifact: Callable[..., Artifact]) -> None:
    """The logits are right, and what is drawn from them is the token after."""
    reference = artifact("mixtral")

    class Late(Stand):
        def next_tokens(self, *arguments: Any, **options: Any) -> Any:
            result = super().next_tokens(*arguments, **options)
            result.tokens[1:] += 1
            return result

    row = gpu_engine.check(kit / "mixtral-fp32", lambda *_: Late(reference, len(PROMPTS), threads=1))
    assert [name for name, passed in row.checks.items() if not passed] == ["draws"]
    assert row.figures["equal_draws"] == 0.25


def test_an_engine_that_fails_is_a_row(kit: Path) -> None:
    def refuse(*_: Any) -> Any:
        raise TensorRTError("TensorRT can't load engine.plan: not for this SM")

    rows = gpu_engine.check_kit(kit, lambda folder: gpu_engine.check(folder, refuse), print, None)
    assert gpu_engine.first_answer(rows).endswith("the first one: TensorRT can't load engine.plan: not for this SM")
    row = gpu_engine.check(kit / "mixtral-fp32", lambda *_: 1 / 0)
    assert row.error == "ZeroDivisionError: division by zero"
    assert gpu_engine.first_answer([]) == "TensorRT runs no engine here; the first one: the kit is empty"


def test_a_process_that_dies_is_a_row(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT may abort, or hang."""
    script = tmp_path / "dies.py"
    monkeypatch.setattr(gpu_engine, "__file__", str(script))
    script.write_text("import os, sys; print('terminate called', file=sys.stderr, flush=True); os.abort()")
    assert gpu_engine.in_a_process(kit, None).error == "its process ended with signal 6: terminate called"
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(gpu_engine, "SECONDS", 1)
    assert gpu_engine.in_a_process(kit, None).error == "it was not done after 1 seconds"


def test_without_a_gpu_it_says_so(kit: Path) -> None:
    """The command itself, in its own processes."""
    from lynx_trt.tensorrt.gpu import compute_capabilities

    if compute_capabilities():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, gpu_engine.__file__, "--kit", str(kit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "TensorRT runs no engine here; the first one: " in done.stdout
    assert "CUDA driver" in done.stdout or "cuda-python" in done.stdout


def test_end_to_end_on_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph without weights, made-up ones, the engine built by TensorRT, and the measurement on host memory."""
    import tiny_models

    config = tiny_models.CONFIGS["qwen3_moe"]()
    config.architectures = ["Qwen3MoeForCausalLM"]
    folder = tmp_path / gpu_end_to_end.LARGE
    gpu_kit.make_large(folder, Progress(quiet=True), config, precision="fp32", max_length=64)
    assert not (folder / "weights.safetensors").exists()
    monkeypatch.setattr(gpu_end_to_end, "BATCHES", (1, 4))
    monkeypatch.setattr(gpu_end_to_end, "CONTEXT", 8)
    monkeypatch.setattr(gpu_end_to_end, "PREFILL", (1, 16, 32))
    artifact = gpu_end_to_end.build(folder, 90, print)
    assert artifact.manifest.engine
    assert len(artifact.manifest.engine.external) == 4  # gate_up and down of two layers
    stored = np.memmap(folder / "weights.safetensors", np.float32, "r", artifact.manifest.engine.external[0]["offset"])
    assert not stored[:100].any()  # the experts stay a hole
    gpu = HostGpu()
    backend = gpu_end_to_end.backend_of(artifact, 4, gpu=gpu, tensorrt=tensorrt_for(artifact, gpu, plan=b""))
    item = artifact.manifest.engine.external[0]
    assert gpu.view(backend._experts[item["name"]], item["length"]).any()
    rows = gpu_end_to_end.measure(backend, artifact, rounds=3)
    assert [(row["batch"], row["share"]) for row in rows] == [(b, s) for b in (1, 4) for s in (1.0, 0.75, 0.5, 0.25)]
    assert all(len(row["seconds"]) == 3 and np.isfinite(row["median_seconds"]) for row in rows)
    assert rows[-1]["active_experts"] < rows[4]["active_experts"]
    assert rows[-1]["weight_bytes_read"] < rows[4]["weight_bytes_read"]
    assert len(gpu_end_to_end.table(rows, 1e12).splitlines()) == 9
    drawn = gpu_end_to_end.measure_draws(backend, artifact, rounds=2)
    assert [row["batch"] for row in drawn] == [1] * 4 + [4] * 4
    assert all(len(row["seconds"]) == 2 for row in drawn)
    assert set(gpu.driver.drawn) == {"draw_blocks_kernel", "draw_kernel"}
    assert len(gpu_end_to_end.draws_table(drawn).splitlines()) == 3
    json.dumps(rows + drawn)
