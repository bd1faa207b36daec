"""Experts whose weights an artifact keeps as the checkpoint stores them.

Formats are modules: MXFP4 (kept_mxfp4.py), NVFP4 (kept_nvfp4.py), FP8 (kept_fp8.py), int4 (kept_int4.py).

The parameters that hold such a weight in full stay in the model, where its shapes are read, or give their place to the
stored values if these have their name; scales are buffers beside them. LynxExperts is given what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from lynx_trt.export import kept_fp8, kept_int4, kept_mxfp4, kept_nvfp4, moe

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import PreTrainedModel

    from lynx_trt.export.parts import Part
    from lynx_trt.export.quantized.methods import Quantization
    from lynx_trt.export.sources import Source
    from lynx_trt.export.stored import StoredTensor
    from lynx_trt.export.weights import CheckpointWeights

# Precisions that LynxExperts computes in with quantized weights.
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class _Format(Protocol):
    """One in which experts can be kept: a module."""

    CALLED: str  # by people
    ENDINGS: tuple[str, str]  # of the names of values and scales, behind a parameter's

    def is_stored_so(self, stored: StoredTensor) -> bool:
        """Whether it is in this format."""

    def obstacle_of_layer(self, layer: moe.MoeLayer) -> str | None:
        """Why a layer of that form can't have such weights, a clause; None if it can."""

    def obstacle(self, name: str, source: Source, dtype: torch.dtype) -> str | None:
        """Why that parameter can't be kept for an artifact of that dtype, a clause; None if it can."""

    def weights(self, sources: Mapping[str, Source]) -> str:
        """What the form's `weights` are, of all parameters together, if nothing keeps them from being kept."""

    def parts(self, name: str, source: Source, model: PreTrainedModel, weights: str) -> Mapping[str, Part]:
        """What LynxExperts takes in the place of that parameter, with such `weights`."""


_FORMATS: tuple[_Format, ...] = (kept_mxfp4, kept_nvfp4, kept_fp8, kept_int4)


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
        model: with parameters that are fake; of layers that are kept it gets what is stored.
        layers: its MoE layers; the form of those that are kept becomes that of their stored weights.
        weights: from which those layers' weights are then to be had as they are stored.
        quantization: how the checkpoint is quantized.
        precision: fp32, fp16 or bf16.
        fake: makes what the model gets.

    Returns:
        `quantization` with how many weights are kept; with why none is, if some are in a form that can be.

    Raises:
        CheckpointError: a scale is no number, or weights have another shape than the model's.
    """
    sources = {
        f"{layer.name}.{name}": weights.source(f"{layer.name}.{name}")
        for layer in layers
        for name in moe.projections(_module(model, layer))
    }
    every = [tensor for source in sources.values() for tensor in source.tensors()]
    form = next((each for each in _FORMATS if any(map(each.is_stored_so, every))), None)
    if form is None:
        return quantization
    if obstacle := _obstacle(form, layers, sources, precision):
        return replace(quantization, obstacle=obstacle)
    found = form.weights(sources)
    for layer in layers:
        for name in (f"{layer.name}.{name}" for name in moe.projections(_module(model, layer))):
            _keep(form.parts(name, sources[name], model, found), model, layer, name, weights, fake)
        layer.form = replace(layer.form, transposed=False, weights=found)
        layer.endings = form.ENDINGS
    return replace(quantization, kept=len(every))


def _module(model: PreTrainedModel, layer: moe.MoeLayer) -> nn.Module:
    module: nn.Module = model.get_submodule(layer.name)
    return module


def _keep(
    parts: Mapping[str, Part],
    model: PreTrainedModel,
    layer: moe.MoeLayer,
    name: str,
    weights: CheckpointWeights,
    fake: FakeTensorMode,
) -> None:
    """Put `parts` in the place of parameter `name`, in the layer's module and in what is read."""
    module = _module(model, layer)
    kept, full = sum(part.nbytes for part in parts.values()), model.get_parameter(name).nbytes
    for key, part in parts.items():
        with fake:
            stored = torch.empty(part.shape, dtype=part.dtype)
        if key == name:
            module.register_parameter(key.rpartition(".")[2], nn.Parameter(stored, requires_grad=False))
        else:
            module.register_buffer(key.rpartition(".")[2], stored)
    weights.keep(name, parts)
    layer.expert_bytes += (kept - full) // layer.experts


def _obstacle(
    form: _Format, layers: Sequence[moe.MoeLayer], sources: Mapping[str, Source], precision: str
) -> str | None:
    """Why the weights can't be kept, a clause; None if they can."""
    what = form.CALLED
    if precision not in PRECISIONS:
        return (
            f"LynxExperts has weights in {what} in {' and '.join(PRECISIONS)} alone, and the precision is {precision}"
        )
    for source in sources.values():
        if other := next((tensor.key for tensor in source.tensors() if not form.is_stored_so(tensor)), None):
            return f"{other} is not stored in {what}, and all layers' experts are kept or none's"
    found = (form.obstacle_of_layer(layer) for layer in layers)
    if why := next(filter(None, found), None):
        return why
    found = (form.obstacle(name, source, PRECISIONS[precision]) for name, source in sources.items())
    return next(filter(None, found), None)
