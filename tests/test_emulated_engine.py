"""Text by the TensorRT backend whose plugins, kernels and draws run on an emulated GPU: that of ONNX Runtime."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
from emulated_engine import EmulatedHost, draws_blob, tensorrt_with_plugins
from test_trt_backend import PROMPTS, texts, with_engine

from lynx_trt.artifact import DRAWS, Artifact
from lynx_trt.plugins import python_plugin
from lynx_trt.runtime.ort import OrtBackend
from lynx_trt.runtime.sampling import Sampling
from lynx_trt.runtime.trt import TensorRTBackend
from lynx_trt.tensorrt import loader


@pytest.fixture(scope="module")
def trt() -> Any:
    for wheel in loader.RTX_WHEELS:
        try:
            importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{wheel} is not installed: {loader.INSTALL_CPU}")
    module = loader.load("rtx").module
    python_plugin.register(module)
    return module


@pytest.mark.parametrize("sm", [120, pytest.param(90, marks=pytest.mark.slow)])
def test_same_text_as_onnx_runtime(text_artifact: Artifact, trt: Any, tmp_path: Path, sm: int) -> None:
    """Restricted by budgets and by floors; greedy, and drawn on the GPU."""
    engined = with_engine(text_artifact, tmp_path / "artifact", compute_capabilities=[sm])
    engined.path(DRAWS).write_bytes(draws_blob(engined, sm))
    gpu = EmulatedHost(sm)
    backend = TensorRTBackend(engined, 3, gpu=gpu, tensorrt=tensorrt_with_plugins(engined, gpu, trt))
    reference = OrtBackend(engined, 3, threads=1)
    ways: list[dict[str, Any]] = [{"budget": 3}, {"budget": 8, "floor": 0.1}]
    ways.append({"budget": 4, "sampling": Sampling(0.8, 0.9, seed=4, top_k=20)})
    for way in ways:
        gpu.emulated.launched.clear()
        assert texts(engined, backend, PROMPTS[:3], new=8, **way) == texts(engined, reference, PROMPTS[:3], new=8, **way)
        launched = {name for name, _ in gpu.emulated.launched}
        assert {"gate_up_decode_kernel", "down_decode_kernel", "combine_kernel", "draw_kernel"} < launched
