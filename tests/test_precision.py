"""Half precision: every promised architecture in fp16 in ONNX Runtime and TensorRT, bf16 and fp32 in TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_models
from test_architectures import PROMISED, Batch, eager_logits, exported_logits
from trt_graphs import handed_over

from lynx_trt.artifact import Artifact


@pytest.mark.parametrize("name", PROMISED)
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
        ("mixtral", "fp32"),  # attention without a fused kernel, which TensorRT has to decompose
        ("deepseek_v3", "bf16"),  # one cache a layer, folded heads, float32 islands in the router
        ("gpt_oss", "bf16"),  # sinks, biases
        ("gpt_oss", "fp32"),  # an explicit mask in decomposed attention
    ],
)
def test_tensorrt_takes_other_precisions(name: str, precision: str, artifact: Callable[..., Artifact]) -> None:
    built = artifact(name, precision=precision, tensorrt="auto", prefill_length="1:16:32")
    assert built.manifest.engine
    name = f"past_{built.manifest.model.caches[0].name}"
    caches: list[Any] = [tensor for tensor in built.manifest.engine.tensors if tensor["name"] == name]
    assert caches[0]["dtype"] == {"bf16": "bfloat16", "fp32": "float32"}[precision]
