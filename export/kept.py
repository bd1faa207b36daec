"""Experts whose weights an artifact keeps as the checkpoint stores them: in MXFP4 (kept_mxfp4.py) or FP8 (kept_fp8.py).

The parameters that hold such a weight in full stay in the model, where its shapes are read, or give their place to the
stored values if these have their name; scales are buffers beside them. LynxExperts is given what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from lynx_trt.export import kept_fp8, kept_mxfp4, moe

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


@dataclass(frozen=True)
class _Format:
    """One in which experts can be kept; the functions are those that kept_mxfp4.py and kept_fp8.py describe."""

    weights: str  # of the form
    endings: tuple[str, str]  # of the names of values and scales, behind a parameter's
    is_stored_so: Callable[[StoredTensor], bool]
    obstacle_of_layer: Callable[[moe.MoeLayer], str | None]
    obstacle: Callable[[str, Source, torch.dtype], str | None]
    parts: Callable[[str, Source, PreTrainedModel], Mapping[str, Part]]


_FORMATS = tuple(
    _Format(weights, module.ENDINGS, module.is_stored_so, module.obstacle_of_layer, module.obstacle, module.parts)
    for weights, module in (("mxfp4", kept_mxfp4), ("fp8", kept_fp8))
)


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
    for layer in layers:
        for name in moe.projections(_module(model, layer)):
            _keep(form, model, layer, f"{layer.name}.{name}", weights, fake)
        layer.form = replace(layer.form, transposed=False, weights=form.weights)
        layer.endings = form.endings
    return replace(quantization, kept=len(every))


def _module(model: PreTrainedModel, layer: moe.MoeLayer) -> nn.Module:
    module: nn.Module = model.get_submodule(layer.name)
    return module


def _keep(
    form: _Format,
    model: PreTrainedModel,
    layer: moe.MoeLayer,
    name: str,
    weights: CheckpointWeights,
    fake: FakeTensorMode,
) -> None:
    """Put what is stored of parameter `name` in its place, in the layer's module and in what is read."""
    module = _module(model, layer)
    parts = form.parts(name, weights.source(name), model)
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
    what = form.weights.upper()
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
