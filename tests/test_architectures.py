"""Every promised architecture, exported and run in ONNX Runtime, against Hugging Face eager.

The bound is not a number that was found to pass: the exported model's error against a float64 run may be at most
twice the error of float32 eager itself (plus what float32 can't tell from zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from lynx_trt.budgets import Restriction
from lynx_trt.runtime.lowering import Form
from lynx_trt.runtime.ort import OrtBackend

# A ragged batch: one row fills the width, one is short, one in between.
PROMPTS = (9, 5, 12)
STEPS = 8
LATENT = ("deepseek_v2", "deepseek_v3")
SEEING = ("gemma4", "qwen3_vl_moe", "glm4v_moe", "mistral3", "kimi_k25")
PROMISED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "glm4_moe", "deepseek_v3", "gpt_oss")


# transformers' other architectures of this kind, from its own configs made small; docs/models.md lists them.
OTHERS = (
    "afmoe",
    "aria_text",
    "axk1",
    "cohere2_moe",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "glm4_moe_lite",
    "granitemoe_swa",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "kolibri1",
    "laguna",
    "mellum",
    "mimo_v2_flash",
    "minimax_m2",
    "solar_open",
)


# Layers with a state in place of keys and values.
HYBRID = ("qwen3_next", "nemotron_h", "lfm2_moe", "kimi_linear", "qwen3_5_moe", "granitemoehybrid", "bailing_hybrid")
# Attention to the rows that an indexer chooses, fewer than there are.
CHOOSING = ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "mistral_large4", "dots3_note_text")
SLOW = (*HYBRID[3:], *CHOOSING[1:], *OTHERS)


@dataclass(frozen=True)
class Batch:
    """Token ids of each sequence, prompt and continuation together; the continuation is forced on every model."""

    rows: list[list[int]]

    @classmethod
    def random(cls) -> Batch:
        generator = np.random.default_rng(7)
        return cls([generator.integers(3, 256, size=length + STEPS).tolist() for length in PROMPTS])


def eager_logits(model: Any, batch: Batch) -> np.ndarray[Any, Any]:
    """[steps + 1, B, V]: logits after each prompt and after each forced token, a sequence at a time, no cache."""
    outputs = []
    with torch.no_grad():
        for row, prompt in zip(batch.rows, PROMPTS, strict=True):
            logits = model(input_ids=torch.tensor([row])).logits[0]
            outputs.append(logits[prompt - 1 : prompt + STEPS].double().numpy())
    return np.stack(outputs, axis=1)


def exported_logits(artifact: Any, batch: Batch, budgets: list[int] | None = None) -> np.ndarray[Any, Any]:
    """The same from the artifact: one ragged prefill of the batch, then decode steps through the cache."""
    backend = OrtBackend(artifact, slots=len(PROMPTS))
    layers = artifact.manifest.model.moe_layers
    dial = Restriction(tuple(budgets or [layer.experts for layer in layers]))
    lengths = np.array(PROMPTS, dtype=np.int64)
    ids = np.zeros((len(PROMPTS), max(PROMPTS)), dtype=np.int64)
    for row, prompt in enumerate(PROMPTS):
        ids[row, :prompt] = batch.rows[row][:prompt]
    outputs = [backend.step(ids, np.zeros_like(lengths), lengths, dial).logits.copy()]
    for step in range(STEPS):
        tokens = np.array([[batch.rows[row][prompt + step]] for row, prompt in enumerate(PROMPTS)])
        outputs.append(backend.step(tokens, lengths + step, np.ones_like(lengths), dial).logits.copy())
    return np.stack(outputs).astype(np.float64)


@pytest.mark.parametrize(
    "name", [*PROMISED, *SEEING, *HYBRID[:3], CHOOSING[0], *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
)
def test_logits_equal_eager(name: str, artifact: Any) -> None:
    batch = Batch.random()
    reference = eager_logits(tiny_models.random_model(name).double(), batch)
    eager_error = np.abs(eager_logits(tiny_models.random_model(name), batch) - reference)
    error = np.abs(exported_logits(artifact(name, preset="lynx"), batch) - reference)
    tiny = np.finfo(np.float32).eps * np.abs(reference).max()
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error.max() <= 2 * eager_error.max() + tiny, f"max error {error.max():.2e} at (step, row, token) {worst}"
    assert np.sqrt((error**2).mean()) <= 2 * np.sqrt((eager_error**2).mean()) + tiny


@pytest.mark.parametrize("name", PROMISED)
def test_greedy_text_equals_eager(name: str, artifact: Any) -> None:
    """32 tokens chosen greedily by each side from its own previous ones."""
    model = tiny_models.random_model(name)
    backend = OrtBackend(artifact(name, preset="lynx"), slots=1)
    prompt = Batch.random().rows[0][:9]
    everything = Restriction(tuple(layer.experts for layer in artifact(name, preset="lynx").manifest.model.moe_layers))
    own, expected = list(prompt), list(prompt)
    logits = backend.step(np.array([own]), np.array([0]), np.array([len(own)]), everything).logits
    for _ in range(32):
        own.append(int(logits[0].argmax()))
        with torch.no_grad():
            expected.append(int(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
        logits = backend.step(np.array([[own[-1]]]), np.array([len(own) - 1]), np.array([1]), everything).logits
    assert own == expected


@pytest.mark.parametrize("name", PROMISED)
def test_every_block_is_rewritten(name: str, artifact: Any) -> None:
    """As many lynx nodes of each kind as the model has MoE blocks; the dense first layers don't count."""
    import onnx

    built = artifact(name, preset="lynx")
    nodes = onnx.load(built.path("model.onnx"), load_external_data=False).graph.node
    dense = {"glm4_moe": 1, "deepseek_v3": 1}.get(name, 0)
    expected = built.manifest.model.layers - dense
    for op in ("LynxSelect", "LynxExperts"):
        assert sum(node.op_type == op for node in nodes) == expected


@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_stays_in_its_latents(name: str, artifact: Any) -> None:
    """A layer's one cache is key and value of all heads: nothing has its rows, or is made of them row by row."""
    import onnx

    built = artifact(name, preset="lynx")
    graph = onnx.load(built.path("model.onnx"), load_external_data=False).graph
    known = {value.name: value.type.tensor_type.shape.dim for value in (*graph.input, *graph.value_info)}
    model = built.manifest.model
    assert [(cache.name, cache.heads, cache.size) for cache in model.caches] == [
        (f"key_values.{layer}.latent", 1, 32 + 8) for layer in range(model.layers)
    ]
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    for node, cache in zip(attentions, model.caches, strict=True):
        assert node.input[1] == node.input[2] == f"present_{cache.name}"
    shapes = {v.name: [size.dim_value for size in known[v.name]] for v in graph.value_info if len(known[v.name]) > 0}
    assert [name for name, (batch, *shape) in shapes.items() if batch == 0 and model.cache_rows in shape[:-1]] == []


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("form", [None, "auto"])  # as exported, as it is run
def test_latent_attention_of_chunks_equals_eager(name: str, form: Form | None, artifact: Any) -> None:
    """Prompts of unequal length in chunks of four tokens, the last ones padded or empty, then decode steps."""
    batch = Batch.random()
    reference = eager_logits(tiny_models.random_model(name).double(), batch)
    bound = 2 * np.abs(eager_logits(tiny_models.random_model(name), batch) - reference).max()
    built = artifact(name, preset="lynx")
    backend = OrtBackend(built, slots=len(PROMPTS), form=form)
    everything = Restriction(tuple(layer.experts for layer in built.manifest.model.moe_layers))
    prompts = np.array(PROMPTS)
    expected = {length: row for row, length in enumerate(PROMPTS)}
    seen = 0
    for start in range(0, max(PROMPTS), 4):
        past = np.minimum(start, prompts)
        lengths = np.clip(prompts - start, 0, 4)
        ids = np.zeros((len(PROMPTS), 4), np.int64)
        for row, length in enumerate(lengths):
            ids[row, :length] = batch.rows[row][start : start + length]
        logits = backend.step(ids, past, lengths, everything).logits
        for length, row in expected.items():
            if start < length <= start + 4:
                assert np.abs(logits[row] - reference[0, row]).max() <= bound
                seen += 1
    assert seen == len(PROMPTS)
    for step in range(STEPS):
        ids = np.array([[row[length + step]] for row, length in zip(batch.rows, PROMPTS, strict=True)])
        logits = backend.step(ids, prompts + step, np.ones_like(prompts), everything).logits
        assert np.abs(logits - reference[step + 1]).max() <= bound


def test_another_expansion_is_left_alone() -> None:
    """One with a bias, and one that is not DeepSeek-V3's word for word."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    from lynx_trt.export import attention

    class Scaled(DeepseekV3Attention):
        def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> Any:
            return super().expand_kv(2 * kv_nope, k_rot)

    config = tiny_models.random_model("deepseek_v3").config
    plain, biased, scaled = DeepseekV3Attention(config, 0), DeepseekV3Attention(config, 0), Scaled(config, 0)
    biased.kv_b_proj.bias = torch.nn.Parameter(torch.zeros(biased.kv_b_proj.out_features))
    assert attention.keep_latents(torch.nn.ModuleList([plain, biased, scaled])) == {0}
    assert ["expand_kv" in vars(each) for each in (plain, biased, scaled)] == [True, False, False]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("mixtral", "softmax, renormalised"),
        ("qwen2_moe", "softmax"),
        ("qwen3_moe", "softmax, renormalised"),
        ("olmoe", "softmax"),
        ("granitemoe", "softmax, renormalised"),
        ("phimoe", None),
        ("glm4_moe", "sigmoid, + correction bias, renormalised"),
        ("deepseek_v3", "sigmoid, + correction bias, 2 of 4 groups, renormalised, x 2.5"),
        ("gpt_oss", "softmax, renormalised"),
    ],
)
def test_routing_rule_is_found(name: str, rule: str | None, artifact: Any) -> None:
    layers = artifact(name, preset="lynx").manifest.model.moe_layers
    assert {layer.rule for layer in layers} == {rule}
