"""The engine's part of `make gpu`, as far as it goes without a GPU: what the kit holds, and what is checked with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
from host_gpu import SM, HostGpu, tensorrt_for

from lynx_trt.artifact import Artifact, open_artifact, read
from lynx_trt.console import Progress
from lynx_trt.errors import TensorRTError, UsageError
from lynx_trt.runtime.ort import OrtBackend
from lynx_trt.runtime.trt import TensorRTBackend
from lynx_trt.tensorrt import gpu, loader

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu_build
import gpu_end_to_end
import gpu_engine
import gpu_kit
import gpu_targets
from gpu_build import Machine
from gpu_models import PROMPTS

WHERE = Machine(SM, "rtx", "1.7.1")


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    with Progress(quiet=True) as progress:
        gpu_kit.make(gpu_kit.Entry("mixtral", "fp32"), folder / "mixtral-fp32", progress)
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


def check(folder: Path, make: Callable[..., Any]) -> gpu_engine.Row:
    """An entry's checks with something else in the place of its engine, which is not built then."""
    return gpu_engine.check(folder, read, make)


def test_kit_holds_what_an_engine_is_built_of(kit: Path) -> None:
    """And none: an engine of one product or for one GPU is of no use to another."""
    assert {path.name for path in kit.iterdir()} == {"mixtral-fp32"}
    artifact = open_artifact(kit / "mixtral-fp32")  # its sums fit
    assert artifact.manifest.engine is None
    assert {"model.onnx", "weights.safetensors", "expected.npz"} <= set(artifact.manifest.files)
    assert not {"engine.plan", "draws.kernels"} & {path.name for path in artifact.folder.iterdir()}


def test_from_the_kit_to_a_checked_engine(kit: Path, tmp_path: Path) -> None:
    """All that is done on the GPU machine, with a real engine of TensorRT, but one: what runs is the GPU's stand-in."""
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (kit / "mixtral-fp32").iterdir())
    built: list[Artifact] = []

    def build(folder: Path) -> Artifact:
        built.append(gpu_build.add_planned_engine(folder, WHERE))
        assert (folder / "engine.plan").stat().st_size > 100_000
        return built[-1]

    def make(artifact: Artifact, graphs: bool) -> TensorRTBackend:
        gpu = HostGpu()
        return TensorRTBackend(
            artifact, len(PROMPTS), gpu=gpu, tensorrt=tensorrt_for(artifact, gpu, plan=b""), graphs=graphs
        )

    row = gpu_engine.check(kit / "mixtral-fp32", build, make)
    assert row.passed, (row.checks, row.error)
    assert row.checks.keys() >= {"logits", "draws", "text, half", "text, floor", "CUDA graphs", "same bits in graphs"}
    engine = built[0].manifest.engine
    assert engine
    assert (engine.flavor, engine.compute_capabilities) == ("rtx", [SM])
    shapes = {profile["name"]: profile["shapes"]["input_ids"] for profile in engine.profiles}
    assert [shapes[name][-1] for name in ("decode", "prefill")] == [(16, 1), (4, 32)]  # as the kit says
    assert row.figures["plan_bytes"] == engine.plan_bytes
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (kit / "mixtral-fp32").iterdir()) == before


def test_build_only(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is the kit whole? Asked where there is no GPU; an entry whose graph is damaged is named."""
    whole = Path(shutil.copytree(kit, tmp_path / "kit"))
    shutil.copytree(whole / "mixtral-fp32", whole / "other")
    (whole / "other" / "weights.safetensors").unlink()
    rows = gpu_engine.build_only(whole, 86)
    assert [row.passed for row in rows] == [True, False]
    assert "weights.safetensors" in str(rows[1].error)
    assert "1 of 2 engines built by TensorRT for RTX 1.7.1.116 on SM 86; none was run" in capsys.readouterr().out
    (row,) = gpu_engine.build_only(kit, 90)
    assert "not on SM 90" in str(row.error)
    (whole / "other" / "model.onnx").unlink()  # as in a kit made before, which held engines
    with pytest.raises(UsageError, match=r"has no model\.onnx of other, .*make gpu-kit again"):
        gpu_engine.check_kit(whole, WHERE, lambda _: pytest.fail("it began"), print, None)


def test_right_numbers_pass(kit: Path, artifact: Callable[..., Artifact], tmp_path: Path) -> None:
    reference, said = artifact("mixtral"), []
    output = tmp_path / "engine.json"

    def one(folder: Path) -> gpu_engine.Row:
        return check(folder, lambda *_: Stand(reference, len(PROMPTS), threads=1))

    (row,) = gpu_engine.check_kit(kit, WHERE, one, said.append, output)
    assert row.passed, (row.checks, row.error)
    for name in ("half", "floor"):
        assert row.checks[f"text, {name}"]
        assert row.figures[f"equal_greedy_tokens_{name}"] == 1
        assert row.figures[f"active_experts_{name}"] < row.figures["active_experts_all"]
    assert said == [f"TensorRT for RTX 1.7.1 on SM {SM} runs: 1 of 1 engines gave numbers"]
    record = json.loads(output.read_text())
    assert record["rows"][0]["passed"]
    assert record["answer"] == said[0]
    assert "passed" in gpu_engine.table([row])


def test_wrong_numbers_are_named(kit: Path, artifact: Callable[..., Artifact]) -> None:
    """A backend whose logits are off, and one without graphs."""
    reference = artifact("mixtral")

    def make(_: Artifact, graphs: bool) -> Stand:
        backend = Stand(reference, len(PROMPTS), threads=1)
        backend.shift = 0.5
        backend.graphs_refused = "cuStreamEndCapture failed" if graphs else None
        return backend

    row = check(kit / "mixtral-fp32", make)
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

    row = check(kit / "mixtral-fp32", lambda *_: Late(reference, len(PROMPTS), threads=1))
    assert [name for name, passed in row.checks.items() if not passed] == ["draws"]
    assert row.figures["equal_draws"] == 0.25


def test_an_engine_that_fails_is_a_row(kit: Path) -> None:
    def refuse(*_: Any) -> Any:
        raise TensorRTError("TensorRT can't load engine.plan: it is damaged")

    rows = gpu_engine.check_kit(kit, WHERE, lambda folder: check(folder, refuse), print, None)
    assert gpu_engine.first_answer(WHERE, rows).endswith(
        "the first one: TensorRT can't load engine.plan: it is damaged"
    )
    row = check(kit / "mixtral-fp32", lambda *_: 1 / 0)
    assert row.error == "ZeroDivisionError: division by zero"
    assert gpu_engine.first_answer(WHERE, []).endswith("runs no engine; the first one: the kit is empty")
    row = gpu_engine.check(kit / "mixtral-fp32", refuse, lambda *_: pytest.fail("it was not built"))
    assert row.error == "TensorRT can't load engine.plan: it is damaged"


def test_a_process_that_dies_is_a_row(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT may abort, or hang."""
    script = tmp_path / "dies.py"
    monkeypatch.setattr(gpu_engine, "__file__", str(script))
    script.write_text("import os, sys; print('terminate called', file=sys.stderr, flush=True); os.abort()")
    assert gpu_engine.in_a_process(kit, WHERE, None).error == "its process ended with signal 6: terminate called"
    monkeypatch.setattr(gpu_build, "__file__", str(script))
    assert gpu_build.ask() == "the process that loads TensorRT ended with signal 6: terminate called"
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(gpu_engine, "SECONDS", 1)
    monkeypatch.setattr(gpu_build, "SECONDS", 1)
    assert gpu_engine.in_a_process(kit, WHERE, None).error == "it was not done after 1 seconds"
    assert gpu_build.ask() == "TensorRT was not loaded after 1 seconds"


def on_a_machine_with(
    monkeypatch: pytest.MonkeyPatch, sms: list[int], flavor: Literal["full", "rtx"], passed_over: str | None = None
) -> None:
    loaded = loader.Loaded(ModuleType("tensorrt"), flavor, "1.2.3", "somewhere", passed_over)
    monkeypatch.setattr(gpu_build, "compute_capabilities", lambda: sms)
    monkeypatch.setattr(gpu, "compute_capabilities", lambda: sms)
    monkeypatch.setattr(loader, "load", lambda _: loaded)


@pytest.mark.parametrize(
    ("sms", "flavor", "words"),
    [
        ([], "rtx", "there is no GPU that the CUDA driver reports"),
        ([75], "full", "this GPU is SM 75, and kernels are made for SM 80, 86, 89, 90, 100, 120"),
        (
            [90],
            "rtx",
            r"TensorRT for RTX 1.2.3 does not run on this GPU: .*not on SM 90; .* tensorrt \(.*no such",
        ),
        ([100], "rtx", "not on SM 100; "),
    ],
)
def test_a_machine_that_will_not_do(
    sms: list[int], flavor: Literal["full", "rtx"], words: str, kit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked before 57 GB of weights are made up, and once, not for each engine."""
    on_a_machine_with(monkeypatch, sms, flavor, "no such module")
    with pytest.raises(TensorRTError, match=words):
        gpu_build.machine()
    monkeypatch.setattr(gpu_end_to_end, "copy_bandwidth", lambda: pytest.fail("it began"))
    with pytest.raises(TensorRTError, match=words):
        gpu_end_to_end.main(kit, None, 1)


def test_a_machine_that_will(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_machine_with(monkeypatch, [90], "full")
    assert str(gpu_build.machine()) == "TensorRT 1.2.3 on SM 90"
    on_a_machine_with(monkeypatch, [89, 90], "rtx")  # it is GPU 0 that is used
    assert gpu_build.machine() == Machine(89, "rtx", "1.2.3")


def test_the_part_ends_with_one_line_where_tensorrt_does_not_run(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason is the answer, no engine is built, and the table of targets has it."""
    reason = "engines of TensorRT for RTX run on SM 80, 86, 89, 120 and later, not on SM 90"
    monkeypatch.setattr(gpu_engine, "ask", lambda: reason)
    monkeypatch.setattr(gpu_engine, "in_a_process", lambda *_: pytest.fail("an engine was tried"))
    assert gpu_engine.check_all(kit, None, tmp_path / "engine.json") == []
    assert capsys.readouterr().out == f"TensorRT runs no engine here: {reason}\n"
    record = json.loads((tmp_path / "engine.json").read_text())
    assert record == {"answer": f"TensorRT runs no engine here: {reason}", "rows": []}
    answer, engines = gpu_targets.engine({"result": record})
    assert (answer.measured, answer.passed) == (record["answer"], None)
    assert (engines.measured, engines.passed) == ("not measured", None)


def test_without_a_gpu_it_says_so(kit: Path) -> None:
    """The command itself, in its own processes."""
    from lynx_trt.tensorrt.gpu import compute_capabilities

    if compute_capabilities():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, gpu_engine.__file__, "--kit", str(kit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("TensorRT runs no engine here: there is no GPU that the CUDA driver reports\n")


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
    artifact = gpu_end_to_end.build(folder, WHERE, print)
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
