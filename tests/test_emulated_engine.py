"""The TensorRT backend with its plugins, kernels and draws on an emulated GPU gives what ONNX Runtime gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_engine import EmulatedHost, draws_blob, tensorrt_with_plugins
from test_states import PROMPTS as MORE_PROMPTS
from test_states import run_all
from test_trt_backend import PROMPTS, stored_in, texts, with_engine

from lynx_trt.artifact import DRAWS, Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.runtime.ort import OrtBackend
from lynx_trt.runtime.sampling import Sampling
from lynx_trt.runtime.trt import TensorRTBackend

slow = pytest.mark.slow


def emulated(artifact: Artifact, folder: Path, trt: Any, sm: int, slots: int) -> tuple[Artifact, Any, EmulatedHost]:
    """The artifact with an engine, its backend, and the GPU that runs the engine's kernels."""
    flavor = "full" if sm in (90, 100) else "rtx"
    engined = with_engine(artifact, folder, compute_capabilities=[sm], flavor=flavor)
    engined.path(DRAWS).write_bytes(draws_blob(engined, sm))
    gpu = EmulatedHost(sm)
    return engined, TensorRTBackend(engined, slots, gpu=gpu, tensorrt=tensorrt_with_plugins(engined, gpu, trt)), gpu


@pytest.mark.parametrize("sm", [120, *(pytest.param(sm, marks=slow) for sm in (80, 90, 100))])
def test_same_text_as_onnx_runtime(text_artifact: Artifact, trt: Any, tmp_path: Path, sm: int) -> None:
    """Restricted by budgets and by floors; greedy, and drawn on the GPU."""
    engined, backend, gpu = emulated(text_artifact, tmp_path / "artifact", trt, sm, 3)
    reference = OrtBackend(engined, 3, threads=1)
    ways: list[dict[str, Any]] = [{"budget": 3}, {"budget": 8, "floor": 0.1}]
    ways.append({"budget": 4, "sampling": Sampling(0.8, 0.9, seed=4, top_k=20)})
    for way in ways:
        gpu.emulated.launched.clear()
        got = texts(engined, backend, PROMPTS[:3], new=8, **way)
        assert got == texts(engined, reference, PROMPTS[:3], new=8, **way)
        launched = {name for name, _ in gpu.emulated.launched}
        assert {"gate_up_decode_kernel", "down_decode_kernel", "combine_kernel", "draw_kernel"} < launched


@pytest.mark.parametrize(
    "name", ["qwen3_next", *(pytest.param(each, marks=slow) for each in ("nemotron_h", "kimi_linear"))]
)
def test_states_in_place(
    name: str,
    byte_checkpoint: Callable[[str], Path],
    build_quietly: Callable[..., Artifact],
    trt: Any,
    tmp_path: Path,
) -> None:
    """Layers with a state, which the kernels write where they read it; chunks of prompts, slots that are used again."""
    built = build_quietly(byte_checkpoint(name), tmp_path / "built")
    engined, backend, gpu = emulated(built, tmp_path / "artifact", trt, 120, 3)
    expected = run_all(engined, OrtBackend(engined, 3, threads=1), MORE_PROMPTS[:4], 3, chunk=8)
    assert run_all(engined, backend, MORE_PROMPTS[:4], 3, chunk=8) == expected
    assert {"causal_conv_kernel", "linear_attention_kernel"} <= {name for name, _ in gpu.emulated.launched}


@pytest.mark.parametrize(
    ("weights", "sm"),
    [("fp8", 120), *(pytest.param(each, 120, marks=slow) for each in ("mxfp4", "int4_g128", "int4_g32_zeros"))],
)
def test_quantized_experts(
    weights: str,
    sm: int,
    checkpoint: Callable[[str], Path],
    build_quietly: Callable[..., Artifact],
    trt: Any,
    tmp_path: Path,
) -> None:
    """The logits of a prefill and of a decode step in float16, beside those that ONNX Runtime computes in float32."""
    stored = stored_in(weights, checkpoint, tmp_path)
    built = build_quietly(stored, tmp_path / "built", precision="fp16", preset="lynx")
    engined, backend, gpu = emulated(built, tmp_path / "artifact", trt, sm, 2)
    reference = OrtBackend(engined, 2, threads=1)
    layers = built.manifest.model.moe_layers
    restriction = Restriction((layers[0].experts,) * len(layers))
    ids, past, lengths = np.array([[65, 66, 67, 68], [5, 6, 7, 0]]), np.zeros(2, np.int64), np.array([4, 3])
    for step in ((ids, past, lengths), (ids[:, :1], lengths, np.ones(2, np.int64))):
        found, right = (each.step(*step, restriction).logits.copy() for each in (backend, reference))
        assert float(np.linalg.norm(found - right) / np.linalg.norm(right)) < 5e-3
    assert "gate_up_decode_kernel" in {name for name, _ in gpu.emulated.launched}
