"""MoE blocks as LynxSelect + LynxExperts, through transformers' experts interface.

transformers 5 sends every model's experts through one function that can be replaced by name. Ours emits the
two ops: the selection, fed with what the router showed, and the experts, in the form that a probe found.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lynx_trt.errors import ExportError, UnsupportedModelError
from lynx_trt.experts import ExpertsForm
from lynx_trt.export import ops
from lynx_trt.export.config import EXPERTS, EXPERTS_PER_TOKEN
from lynx_trt.export.routing import Rule, find_routing
from lynx_trt.selection import Selection

NAME = "lynx"


@dataclass
class MoeLayer:
    """One MoE block of the model, in order of the layers: what the export has to know of it."""

    position: int
    name: str  # of the experts module, e.g. model.layers.0.mlp.experts
    form: ExpertsForm
    rule: Rule | None
    block: nn.Module
    experts: int
    experts_per_token: int
    intermediate: int
    expert_parameters: int  # of one expert, biases included
    expert_bytes: int  # of those in the graph
    endings: tuple[str, ...] = ("",)  # of the names of what holds the weights: values, and scales of quantized ones
    logits: torch.Tensor | None = None  # the router's, of the step being traced


@dataclass
class MoeStep:
    """Tensors of the step being traced that the ops need, and what they gave."""

    selection: Selection
    budgets: torch.Tensor  # [layers] i32; already E where the step is a prefill
    floors: torch.Tensor  # [layers] f32; already 0 where the step is a prefill
    token_mask: torch.Tensor  # [T] bool
    active: dict[int, torch.Tensor]  # layer position -> [] i32


_step: ContextVar[MoeStep] = ContextVar("lynx_export_moe_step")


@contextmanager
def tracing(step: MoeStep) -> Iterator[None]:
    """Make `step` the one that the experts see."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def find_layers(model: PreTrainedModel) -> list[MoeLayer]:
    """Every MoE block of the language model of `model`, with hooks on the routers that keep their logits.

    Raises:
        UnsupportedModelError: no MoE block, or one that the ops can't express; the message names the module.
    """
    recorder = _router_recorder(model)
    layers: list[MoeLayer] = []
    language = set(model.get_decoder().modules())  # what sees and hears may have experts as well
    for name, module in model.named_modules():
        if not _is_experts(module) or module not in language:
            continue
        block_name, _, experts_name = name.rpartition(".")
        block = model.get_submodule(block_name)
        routing = find_routing(block, experts_name, *(recorder or (None,)))
        weight = _input_weight(name, module)
        own = list(module.parameters())
        layer = MoeLayer(
            position=len(layers),
            name=name,
            form=_form(name, module),
            rule=routing.rule,
            block=block,
            experts=int(weight.shape[0]),
            experts_per_token=routing.experts_per_token or _experts_per_token(name, model),
            intermediate=int(weight.shape[2 if module.is_transposed else 1]) // (2 if module.has_gate else 1),
            expert_parameters=sum(p.numel() for p in own) // int(weight.shape[0]),
            expert_bytes=sum(p.nbytes for p in own) // int(weight.shape[0]),
        )
        module._lynx = layer
        if recorder and routing.rule:
            _keep_logits(block, layer, *recorder)
        layers.append(layer)
    if not layers:
        _refuse_without_experts(model)
    return layers


def _experts_per_token(name: str, model: PreTrainedModel) -> int:
    """K as the config has it, for a block that can't be run on its own."""
    config = model.config.get_text_config()
    for attribute in EXPERTS_PER_TOKEN:
        value = getattr(config, attribute, None)
        if isinstance(value, int) and value > 0:
            return value
    raise UnsupportedModelError(f"{name}: neither the block nor the config tells how many experts a token uses")


def _is_experts(module: nn.Module) -> bool:
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(type(module), "_apply_gate")


def _refuse_without_experts(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    count = next((c for n in EXPERTS if (c := getattr(config, n, None))), None)
    kind = f"{type(model).__name__} (model_type {model.config.model_type!r})"
    if count:
        raise UnsupportedModelError(
            f"{kind} has {count} experts, but its MoE blocks don't go through transformers' experts interface, "
            "so they can't be rewritten"
        )
    raise UnsupportedModelError(f"{kind} is a dense model: it has no experts to select from")


def _router_recorder(model: PreTrainedModel) -> tuple[type[nn.Module], int] | None:
    """Class of the router and the place of the logits in its output, as the model itself declares them."""
    for module in model.get_decoder().modules():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        if recorded is not None and not isinstance(recorded, (list, tuple)):
            return recorded.target_class, recorded.index
    return None


def _keep_logits(block: nn.Module, layer: MoeLayer, router_class: type[nn.Module], at: int) -> None:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        layer.logits = output[at]

    for module in block.modules():
        if isinstance(module, router_class):
            module.register_forward_hook(keep)


def _tensor(block: nn.Module, path: str) -> torch.Tensor:
    owner, _, name = path.rpartition(".")
    tensor = getattr(block.get_submodule(owner), name)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def projections(module: nn.Module) -> tuple[str, str]:
    """Names of an experts module's two weights; the biases' end in `_bias`."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def _input_weight(name: str, module: nn.Module) -> torch.Tensor:
    weight = getattr(module, projections(module)[0], None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 3 or not hasattr(module, "down_proj"):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) doesn't hold its experts' weights in the known form"
        )
    return weight


def _form(name: str, module: Any) -> ExpertsForm:
    """The experts' form; the activation is whichever of the known ones gives what the module's own gate gives.

    Raises:
        UnsupportedModelError: a norm after each expert, or an activation that none of ours reproduces.
    """
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) normalises each expert's output, which the op can't"
        )
    hidden = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) * 5
    for form in _candidates(module):
        with suppress(Exception), torch.no_grad():
            own = module._apply_gate(hidden) if form.gated else module.act_fn(hidden)
            if torch.allclose(apply_form(form, hidden), own, atol=1e-5):
                return form
    raise UnsupportedModelError(f"{name} ({type(module).__name__}) has an activation that the op doesn't know")


def _candidates(module: Any) -> Iterator[ExpertsForm]:
    def numbers(default: float, *names: str) -> set[float]:
        found = (getattr(module, name, None) for name in names)
        return {default, *(float(value) for value in found if isinstance(value, (int, float)))}

    gated, transposed = bool(module.has_gate), bool(module.is_transposed)
    if not gated:
        for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
            yield ExpertsForm(activation, gated=False, transposed=transposed)
        return
    for activation, interleaved, offset, alpha, limit in itertools.product(
        ("silu", "gelu", "gelu_tanh", "relu", "relu2"),
        (False, True),
        (0.0, 1.0),
        sorted(numbers(1.0, "alpha", "swiglu_alpha")),
        sorted(numbers(0.0, "limit", "swiglu_limit")),
    ):
        yield ExpertsForm(activation, True, transposed, interleaved, alpha, limit, offset)


def apply_form(form: ExpertsForm, hidden: torch.Tensor) -> torch.Tensor:
    """What an expert does between its two matrices: [.., 2I] (gated) or [.., I] -> [.., I]."""
    if not form.gated:
        return _activation(form, hidden)
    gate, up = (hidden[..., ::2], hidden[..., 1::2]) if form.interleaved else hidden.chunk(2, dim=-1)
    if form.limit:
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    return _activation(form, gate) * (up + form.up_offset)


def _activation(form: ExpertsForm, x: torch.Tensor) -> torch.Tensor:
    match form.activation:
        case "silu":
            return x * torch.sigmoid(form.alpha * x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
    raise AssertionError(form.activation)


def experts(module: Any, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Hidden [T,H], index [T,K], weight [T,K] -> [T,H]: the two ops, in the place of the model's own experts."""
    layer: MoeLayer = module._lynx
    step = _step.get()
    if index.shape[-1] != layer.experts_per_token:
        raise ExportError(f"{layer.name} routes to {index.shape[-1]} experts a token, not {layer.experts_per_token}")
    index, weight = _select(layer, step, hidden, index.to(torch.int64), weight.float())
    names = projections(module)
    endings = (*layer.endings, "_bias") if module.has_bias else layer.endings
    inputs = [hidden, index, weight, *(getattr(module, name + ending) for ending in endings for name in names)]
    return torch.onnx.ops.symbolic(
        f"{ops.DOMAIN}::{ops.EXPERTS}",
        inputs,
        {**ops.experts_attributes(layer.form)},
        dtype=hidden.dtype,
        shape=hidden.shape,
        version=ops.VERSION,
    )


def _select(
    layer: MoeLayer, step: MoeStep, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rule = layer.rule
    if rule is not None and layer.logits is not None:
        logits = layer.logits.float().reshape(-1, layer.experts)
        # Fetched now and not kept: while it traces, torch.export puts its own tensors in the modules' places.
        bias = None if rule.bias is None else _tensor(layer.block, rule.bias).float().reshape(-1)
        choice, combine = rule.choice_and_combine(logits, bias)
        if rule.expert_scale:
            weight = rule.weights(combine, index)
    else:  # Only the chosen experts' weights are known: they rank and weigh, and the selection only drops.
        rule = Rule("identity", renormalize=False)
        choice = combine = torch.zeros(hidden.shape[0], layer.experts).scatter(1, index, weight)
    attributes = ops.select_attributes(
        step.selection, experts_per_token=index.shape[-1], renormalize=rule.renormalize, scale=rule.scale
    )
    index, weight, active = torch.onnx.ops.symbolic_multi_out(
        f"{ops.DOMAIN}::{ops.SELECT}",
        (choice, combine, index, weight, step.budgets[layer.position], step.floors[layer.position], step.token_mask),
        {**attributes},
        dtypes=(torch.int64, torch.float32, torch.int32),
        shapes=(index.shape, weight.shape, ()),
        version=ops.VERSION,
    )
    step.active[layer.position] = active
    return index, scaled(layer, rule, index, weight)


def scaled(layer: MoeLayer, rule: Rule, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weights [..,K] of a selection times their experts' numbers, if the rule has some; index [..,K], -1: none."""
    if not rule.expert_scale:
        return weight
    numbers = _tensor(layer.block, rule.expert_scale).float().reshape(-1)
    return weight * numbers.index_select(0, index.clamp(min=0).reshape(-1)).reshape(index.shape)


def register() -> None:
    """Make `set_experts_implementation("lynx")` mean `experts` above."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
