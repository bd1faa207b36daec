"""Half precision: every promised architecture in fp16 in ONNX Runtime and TensorRT, bf16 and fp32 in TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from test_architectures import PROMISED, Batch, eager_logits, exported_logits
from trt_graphs import handed_over

from lynx_trt.artifact import Artifact


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "bf16"), pytest.param(torch.float16, "fp16", marks=pytest.mark.slow), (torch.float32, "fp16")],
)
def test_the_checkpoint_s_own_is_the_default(
    dtype: torch.dtype, precision: str, build_quietly: Callable[..., Artifact], tmp_path: Path
) -> None:
    """A few tensors in float32, as DeepSeek-V3's biases are, decide nothing."""
    folder = tiny_models.save(tiny_models.random_model("qwen3_moe", dtype=dtype), tmp_path / "own")
    tensors = load_file(folder / "model.safetensors")
    tensors = {key: value.float() if value.dim() == 1 else value for key, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    built = build_quietly(folder, tmp_path / "artifact", precision=None)
    assert built.manifest.model.precision == precision
    assert build_quietly(folder, tmp_path / "other", precision="fp32").manifest.model.precision == "fp32"


# Each is built by TensorRT, so most of them are slow.
QUICK = ("qwen3_moe", "gpt_oss", "granitemoe")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in PROMISED if n not in QUICK)]
)
def test_fp16(name: str, artifact: Callable[..., Artifact]) -> None:
    """Built by TensorRT, and in ONNX Runtime no further from float64 than twice Hugging Face's own fp16.

    Root mean squares: one near-tie in a router may flip in one of the two, which is no error of either.
    """
    built = artifact(name, precision="fp16", tensorrt="auto", prefill_length="1:16:32")
    assert built.manifest.engine
    moe = len(built.manifest.model.moe_layers)
    assert built.manifest.engine.plugin_layers == {"LynxSelect": moe, "LynxExperts": moe}
    assert handed_over((built.folder / "engine.plan").read_bytes()) == [1] * (4 * moe)  # two ops, two profiles
    batch = Batch.random()
    reference = eager_logits(tiny_models.random_model(name).double(), batch)
    eager = eager_logits(tiny_models.random_model(name).half(), batch) - reference
    ours = exported_logits(built, batch) - reference
    assert np.sqrt((ours**2).mean()) <= 2 * np.sqrt((eager**2).mean())
    assert np.median(np.abs(ours)) <= 2 * np.median(np.abs(eager))


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("mixtral", "bf16"),  # the plain case
        # attention without a fused kernel, which TensorRT has to decompose
        pytest.param("mixtral", "fp32", marks=pytest.mark.slow),
        ("deepseek_v3", "bf16"),  # one cache a layer, folded heads, float32 islands in the router
        pytest.param("gpt_oss", "bf16", marks=pytest.mark.slow),  # sinks, biases
        ("gpt_oss", "fp32"),  # an explicit mask in decomposed attention
    ],
)
def test_tensorrt_takes_other_precisions(name: str, precision: str, artifact: Callable[..., Artifact]) -> None:
    built = artifact(name, precision=precision, tensorrt="auto", prefill_length="1:16:32")
    assert built.manifest.engine
    name = f"past_{built.manifest.model.caches[0].name}"
    caches: list[Any] = [tensor for tensor in built.manifest.engine.tensors if tensor["name"] == name]
    assert caches[0]["dtype"] == {"bf16": "bfloat16", "fp32": "float32"}[precision]


@pytest.mark.slow
def test_a_cache_longer_than_fused_attention_takes(
    build_quietly: Callable[..., Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is decomposed; what that may take is said."""
    model = tiny_models.random_model("mixtral", dtype=torch.bfloat16, max_position_embeddings=32768)
    folder = tiny_models.save(model, tmp_path / "long")
    built = build_quietly(folder, tmp_path / "artifact", precision=None, tensorrt="auto", max_length=32768)
    assert built.manifest.engine
    # 4 heads, 8 prompts of 512 tokens, 32768 rows, 2 bytes each.
    assert (
        "more than 24512 rows; then it keeps all scores of a step, up to 1.1 GB of scratch" in capsys.readouterr().err
    )
