"""What else runs an MoE layer on the same inputs: transformers' grouped matmul, all experts densely, vLLM's kernel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import gpu_vllm
import torch
from gpu_layer import Batch, Layer, Run
from gpu_timing import AbsentError
from torch import Tensor

from lynx_trt.plugins.twins import activate_twin

# The dense layer keeps a row of 2 I and one of H for every expert and token; beyond this it is left out.
DENSE_BYTES = 8e9


def peers(layer: Layer, batches: Sequence[Batch], vllm: Path | None) -> tuple[dict[str, Run], dict[str, str]]:
    """What can be run here, and why the others can't; on weights in full, where ours are quantized."""
    layer = layer.in_full
    makers = {
        "grouped_mm": lambda: grouped_mm(layer, batches),
        "dense": lambda: dense(layer, batches),
        "vllm": lambda: gpu_vllm.fused_moe(layer, batches, vllm),
    }
    found: dict[str, Run] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except (ImportError, AbsentError) as error:
            absent[name] = str(error)
    return found, absent


def grouped_mm(layer: Layer, batches: Sequence[Batch]) -> Run:
    """The `grouped_mm` experts of transformers: sort, two grouped matmuls, weigh, sum. Its own code, not ours."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    spec = layer.experts
    # Slots that lost their expert are what transformers calls sentinels: the number past the last expert.
    indices = [torch.where(batch.index < 0, spec.experts, batch.index) for batch in batches]
    module = SimpleNamespace(
        num_experts=spec.experts,
        has_gate=spec.form.gated,
        has_bias=spec.bias,
        is_transposed=spec.form.transposed,
        has_post_expert_norm=False,
        _is_expert_parallel=any(bool((batch.index < 0).any()) for batch in batches),
        _apply_gate=lambda gate_up: activate_twin(spec.form, gate_up),
        gate_up_proj=layer.weights["gate_up"],
        gate_up_proj_bias=layer.weights.get("gate_up_bias"),
        down_proj=layer.weights["down"],
        down_proj_bias=layer.weights.get("down_bias"),
    )
    weights = [batch.weight.to(batch.hidden.dtype) for batch in batches]

    @torch.no_grad()
    def run() -> list[Tensor]:
        return [
            grouped_mm_experts_forward(module, batch.hidden, index, weight)
            for batch, index, weight in zip(batches, indices, weights, strict=True)
        ]

    return run


def dense(layer: Layer, batches: Sequence[Batch]) -> Run:
    """What an engine without a sparse dispatch does: every expert on every token, the weights of the unused ones 0."""
    spec = layer.experts
    rows = spec.inner * (2 if spec.form.gated else 1)
    needed = 2.0 * spec.experts * len(batches[0].hidden) * (rows + spec.inner + 2 * spec.hidden)
    if needed > DENSE_BYTES:
        raise AbsentError(f"all experts on {len(batches[0].hidden)} tokens at once need {needed / 1e9:.0f} GB")
    gate_up, down = layer.weights["gate_up"], layer.weights["down"]
    if not spec.form.transposed:
        gate_up, down = gate_up.mT, down.mT

    def one(batch: Batch) -> Tensor:
        product = torch.bmm(batch.hidden.expand(spec.experts, -1, -1), gate_up)
        if spec.bias:
            product = product + layer.weights["gate_up_bias"][:, None]
        inner = activate_twin(spec.form, product.flatten(0, 1)).unflatten(0, product.shape[:2])
        output = torch.bmm(inner, down)
        if spec.bias:
            output = output + layer.weights["down_bias"][:, None]
        scale = torch.zeros((len(batch.hidden), spec.experts + 1), dtype=output.dtype, device=output.device)
        index = torch.where(batch.index < 0, spec.experts, batch.index)
        scale.scatter_(1, index, batch.weight.to(output.dtype))
        # A batched product over the experts, so that no third copy of the output is made.
        return torch.bmm(scale[:, None, :-1], output.transpose(0, 1)).squeeze(1)

    return lambda: [one(batch) for batch in batches]
