"""What this machine has, and what is said where a model doesn't fit it: before anything is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lynx_trt import machine, serve
from lynx_trt.artifact import DRAWS, Artifact, EngineRecord, record_files
from lynx_trt.errors import ArtifactError, CheckpointError, ServingError
from lynx_trt.export import loaded
from lynx_trt.export.checkpoint import open_checkpoint
from lynx_trt.export.loaded import load_model
from lynx_trt.preflight import engine_problems, preflight
from lynx_trt.runtime.open import open_backend
from lynx_trt.serving.settings import Settings
from lynx_trt.tensorrt import gpu, loader

# Two GPUs, of SM 89 with 24 GB and of SM 120 with 96 GB.
DRIVER = """
#include <stddef.h>
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = 7 + ordinal; return 0; }
int cuDeviceGetAttribute(int* value, int kind, int device) {
    *value = device == 7 ? (kind == 75 ? 8 : 9) : (kind == 75 ? 12 : 0);
    return 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = (size_t)(device == 7 ? 24 : 96) << 30; return 0; }
"""


@pytest.mark.parametrize(("driver", "said"), [(DRIVER, f"[89, 120] {24 << 30}"), (None, "[] None")])
def test_gpus_as_the_driver_reports_them(driver: str | None, said: str, tmp_path: Path) -> None:
    if driver is None and gpu.compute_capabilities():
        pytest.skip("this machine has a GPU")
    if driver and not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    if driver:
        (tmp_path / "driver.c").write_text(driver)
        made = ["gcc", "-shared", "-fPIC", str(tmp_path / "driver.c"), "-o", str(tmp_path / "libcuda.so.1")]
        subprocess.run(made, check=True)
    script = "from lynx_trt.tensorrt import gpu; print(gpu.compute_capabilities(), gpu.memory_bytes())"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == said


def test_memory_is_what_a_container_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    monkeypatch.setattr(machine, "LIMITS", limits)
    all_of_it = machine.memory_bytes()
    assert all_of_it > 1 << 30
    for text, bytes_ in (("max\n", all_of_it), ("1073741824\n", 1 << 30), (f"{1 << 63}\n", all_of_it)):
        limits[0].write_text(text)
        assert machine.memory_bytes() == bytes_
    limits[1].write_text("536870912\n")
    assert machine.memory_bytes() == 1 << 29


def test_weights_that_do_not_fit_the_memory(text_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would end the process without a word: said before the graph is loaded, and by inspect."""
    need = 4 * text_artifact.manifest.model.parameters
    monkeypatch.setattr(machine, "memory_bytes", lambda: need)
    open_backend(text_artifact, 1, name="onnxruntime")
    monkeypatch.setattr(machine, "memory_bytes", lambda: need - 1)
    with pytest.raises(ArtifactError, match="GB of memory; run it on a GPU that its engine is for, or on a larger"):
        open_backend(text_artifact, 1, name="onnxruntime")
    (note,) = [note for note in preflight(text_artifact).notes if "can't run it here" in note]
    assert note.startswith("ONNX Runtime can't run it here: its weights take 0.0 GB in float32, in which ONNX Runtime")
    with pytest.raises(ServingError, match="can't be served here: its weights take"):
        serve._opened(text_artifact.folder, Settings(), verify=False, here=True)
    serve._opened(text_artifact.folder, Settings(), verify=False, here=False)  # another machine will serve it


def test_a_checkpoint_that_does_not_fit_the_memory(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration and comparison have all of it in memory, as transformers' own model."""
    opened = open_checkpoint(checkpoint("qwen3_moe"))
    load_model(opened, torch.bfloat16)
    monkeypatch.setattr(loaded, "memory_bytes", lambda: 10_000)
    with pytest.raises(CheckpointError, match=r"takes 0\.0 GB as bfloat16, all of which has to be in memory, and this"):
        load_model(opened, torch.bfloat16)


def test_weights_that_do_not_fit_the_gpu(
    text_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / DRAWS).write_bytes(b"kernels")
    engine = EngineRecord.model_construct(flavor="rtx", tensorrt="1.7.1", compute_capabilities=[89])
    files = {**text_artifact.manifest.files, **record_files(tmp_path)}
    manifest = text_artifact.manifest.model_copy(update={"engine": engine, "files": files})
    built = Artifact(text_artifact.folder, manifest)
    monkeypatch.setattr(gpu, "compute_capabilities", lambda: [89])
    monkeypatch.setattr(loader, "describe", lambda: {"full": None, "rtx": "1.7.1", "gpus": 1, "auto": "rtx"})
    need = manifest.model.weight_bytes
    monkeypatch.setattr(gpu, "memory_bytes", lambda: need)
    assert engine_problems(built) == []
    monkeypatch.setattr(gpu, "memory_bytes", lambda: need - 1)
    (problem,) = engine_problems(built)
    assert problem.startswith("the weights take 0.0 GB, and this GPU has 0.0 GB of memory")
    assert preflight(built, verify=False).problems == [problem]


def test_where_neither_can_run_it(text_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineRecord.model_construct(compute_capabilities=[89])
    built = Artifact(text_artifact.folder, text_artifact.manifest.model_copy(update={"engine": engine}))
    monkeypatch.setattr(gpu, "compute_capabilities", list)
    for memory, words in ((1 << 40, "; ONNX Runtime on the CPU can"), (1, "")):
        monkeypatch.setattr(machine, "memory_bytes", lambda memory=memory: memory)
        notes = preflight(built, verify=False).notes
        assert f"no GPU here, so the engine can't run{words}" in notes
        assert any("can't run it here" in note for note in notes) == (memory == 1)
