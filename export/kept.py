"""Experts whose weights an artifact keeps in MXFP4, as the checkpoint stores them: a quarter of their size in bf16.

The parameters that hold such a weight in full stay in the model, where its shapes are read, and the graph doesn't use
them: LynxExperts is given the stored bytes, which are buffers of the experts' module under the checkpoint's own names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lynx_trt import mxfp4
from lynx_trt.export import moe
from lynx_trt.export.quantized.mxfp4 import Mxfp4Tensor
from lynx_trt.export.stored import Shards

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import PreTrainedModel

    from lynx_trt.export.quantized.methods import Quantization
    from lynx_trt.export.weights import CheckpointWeights

# Precisions that LynxExperts computes in with weights in MXFP4.
PRECISIONS = ("fp16", "bf16")


def keep_experts(
    model: PreTrainedModel,
    layers: Sequence[moe.MoeLayer],
    weights: CheckpointWeights,
    quantization: Quantization,
    precision: str,
    fake: FakeTensorMode,
) -> Quantization:
    """Keep the experts of all layers as they are stored, or none, so that a model's layers are of one form.

    Args:
        model: with parameters that are fake; of layers that are kept it gets the buffers.
        layers: its MoE layers; the form of those that are kept becomes that of their stored weights.
        weights: from which those layers' weights are then to be had as they are stored.
        quantization: how the checkpoint is quantized.
        precision: fp32, fp16 or bf16.
        fake: makes the buffers.

    Returns:
        `quantization` with how many weights are kept; with why none is, if some are in MXFP4.

    Raises:
        CheckpointError: a scale is no number.
    """
    names = {
        layer.name: [f"{layer.name}.{name}" for name in moe.projections(_module(model, layer))] for layer in layers
    }
    every = [name for pair in names.values() for name in pair]
    found = {name: tensor for name in every if isinstance(tensor := weights.stored(name), Mxfp4Tensor)}
    if not found:
        return quantization
    if obstacle := _obstacle(layers, every, found, precision):
        return replace(quantization, obstacle=obstacle)
    for layer in layers:
        experts = _module(model, layer)
        full = kept = 0
        for name in names[layer.name]:
            parts = {name + ending: part for ending, part in found[name].as_stored().items()}
            for key, part in parts.items():
                with fake:
                    stored = torch.empty(part.shape, dtype=torch.int8)
                experts.register_buffer(key.rpartition(".")[2], stored)
                kept += part.nbytes
            full += model.get_parameter(name).nbytes
            weights.keep(name, parts)
        layer.form = replace(layer.form, transposed=False, weights="mxfp4")
        layer.expert_bytes += (kept - full) // layer.experts
    return replace(quantization, kept=len(found))


def _module(model: PreTrainedModel, layer: moe.MoeLayer) -> torch.nn.Module:
    module: torch.nn.Module = model.get_submodule(layer.name)
    return module


def _obstacle(
    layers: Sequence[moe.MoeLayer], every: Sequence[str], found: Mapping[str, Mxfp4Tensor], precision: str
) -> str | None:
    """Why the weights can't be kept, a clause; None if they can.

    That H and I are multiples of 32 is not asked: what is stored has whole blocks of them.
    """
    if precision not in PRECISIONS:
        return f"LynxExperts has weights in MXFP4 in {' and '.join(PRECISIONS)} alone, and the precision is {precision}"
    if other := next((name for name in every if name not in found), None):
        return f"{other} is not stored in MXFP4, and all layers' experts are kept or none's"
    if across := next((layer.name for layer in layers if not layer.form.transposed), None):
        return f"those of {across} have their blocks across what LynxExperts sums over"
    for tensor in found.values():
        with Shards() as shards:  # one at a time: every page that was read stays mapped until they are closed
            beyond = tensor.scale_beyond(mxfp4.LARGEST_SCALE, shards)
        if beyond:
            key, scale, at = beyond
            return (
                f"{key} holds the scale {scale} at {at}, and the GPU kernels take scales up to {mxfp4.LARGEST_SCALE}, "
                "which are weights up to 12"
            )
    return None
