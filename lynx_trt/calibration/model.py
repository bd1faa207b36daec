"""A Hugging Face model that runs under the selection, many decode steps in one teacher-forced forward.

With causal attention, position t of a forward over whole sequences sees exactly what a decode step at t sees: the
keys and values of the positions before it, each computed under its own step's selection. What a step shares is only
the selection, over the B tokens at the same position; so the experts are intercepted (transformers' experts
interface, as for the export), their routing is restricted in groups of one position, and everything else is the
model's own code.

All state of a run is in a ContextVar, so that several threads can run one model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_outputs import MoeModelOutputWithPast

from lynx_trt.budgets import Restriction
from lynx_trt.calibration.groups import select_groups
from lynx_trt.export.moe import MoeLayer, _router_recorder, _tensor, find_layers, scaled
from lynx_trt.export.routing import Rule
from lynx_trt.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "lynx_measure"


@dataclass(frozen=True)
class Setting:
    """What is tried: the parameters of the selection, and what each of N MoE layers may load."""

    selection: Selection
    restriction: Restriction

    def restricts(self, layer: int, experts: int) -> bool:
        """Whether a MoE layer of `experts` experts can come out differently."""
        return self.restriction.budgets[layer] < experts or self.restriction.floors[layer] > 0

    def to_dict(self) -> dict[str, Any]:
        """`selection`, `budgets` and `floors`, for JSON."""
        return {"selection": asdict(self.selection), **self.restriction.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Setting:
        """From a dictionary that holds what `to_dict` gives, and maybe more."""
        restriction = Restriction(tuple(values["budgets"]), tuple(values["floors"]))
        return cls(Selection(**values["selection"]), restriction)


@dataclass(frozen=True)
class Shape:
    """How a run's sequences are decode steps: `batch` sequences advance together, after `prompt` tokens of prefill."""

    batch: int
    prompt: int


@dataclass
class Outcome:
    """What a forward over c * B sequences of L tokens gave; D is L - prompt, the decode steps of each batch."""

    hidden: torch.Tensor  # [c*B, D, H], what goes into the output embedding
    index: dict[int, torch.Tensor]  # MoE layer -> experts in use, int16 [c*B, D, K]; -1: an empty slot
    inputs: list[Any] = field(default_factory=list)  # outputs of each decoder layer, if they were asked for


@dataclass
class _Run:
    """State of the forward in progress."""

    shape: Shape
    sequences: int
    setting: Setting | None
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    index: dict[int, torch.Tensor] = field(default_factory=dict)
    keep_inputs: bool = False
    inputs: list[Any] = field(default_factory=list)
    skipped: int = 0  # decoder layers whose work is known
    known: Any = None  # the output of the last of them


_run: ContextVar[_Run | None] = ContextVar("lynx_calibration_run", default=None)
_head_input: ContextVar[torch.Tensor | None] = ContextVar("lynx_calibration_head_input", default=None)


class Probed:
    """A model whose forward can be restricted, resumed in the middle, and stopped before the output embedding."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Hook into `model`, for good.

        Raises:
            UnsupportedModelError: it has no MoE block, or one that the selection can't be applied to.
        """
        self.model = model.eval()
        self.model.config.output_router_logits = False
        self.layers: list[MoeLayer] = find_layers(model)
        self.experts = tuple(layer.experts for layer in self.layers)
        recorder = _router_recorder(model)
        for layer in self.layers:
            if recorder and layer.rule is not None:
                _record_logits(layer, *recorder)
        ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
        model.set_experts_implementation(NAME)
        decoder: Any = model.get_decoder()  # within what has images or sound beside it
        self._decoder_forward: Callable[..., Any] = decoder.forward
        decoder.forward = self._decoder_or_given
        self.decoder_layers = _decoder_layers(model, self.layers)
        self.position = [_decoder_position(layer) for layer in self.layers]  # MoE layer -> decoder layer
        for number, block in enumerate(self.decoder_layers):
            block.forward = _skippable(block.forward, number)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    def first_restricted(self, setting: Setting) -> int:
        """The decoder layer up to which `setting` changes nothing."""
        positions = (
            self.position[layer] for layer, experts in enumerate(self.experts) if setting.restricts(layer, experts)
        )
        return min(positions, default=len(self.decoder_layers)) if self.decoder_layers else 0

    @torch.inference_mode()
    def run(
        self,
        ids: torch.Tensor,
        shape: Shape,
        setting: Setting | None,
        *,
        keep_inputs: bool = False,
        skipped: int = 0,
        known: Any = None,
    ) -> Outcome:
        """One teacher-forced forward of `ids` [c*B,L] under `setting` (None: unrestricted).

        Args:
            ids: token ids; rows i*B to (i+1)*B - 1 decode together.
            shape: B, and the tokens of prefill.
            setting: what the decode steps are restricted to.
            keep_inputs: also return every decoder layer's output, for a later run to start from.
            skipped: decoder layers to leave out, since this setting changes nothing in them.
            known: the output of the last of those, from the unrestricted run.
        """
        assert ids.shape[0] % shape.batch == 0
        run = _Run(shape, ids.shape[0], setting, keep_inputs=keep_inputs, skipped=skipped, known=known)
        token = _run.set(run)
        try:
            output = self.model.base_model(input_ids=ids, use_cache=False)
        finally:
            _run.reset(token)
        return Outcome(output.last_hidden_state[:, shape.prompt :], run.index, run.inputs)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits, float32 [R,V], for `hidden` [R,H]; with whatever it does after the output embedding."""
        with _as_head_input(hidden[None]):
            output = self.model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=hidden.device), use_cache=False)
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def _decoder_or_given(self, *arguments: Any, **options: Any) -> Any:
        given = _head_input.get()
        if given is not None:
            return _Given(last_hidden_state=given)
        return self._decoder_forward(*arguments, **options)


@dataclass
class _Given(MoeModelOutputWithPast):  # type: ignore[misc]
    """A decoder's output that is nothing but hidden states; what else a model hands on of it (Gemma 4) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@contextmanager
def _as_head_input(hidden: torch.Tensor) -> Iterator[None]:
    token = _head_input.set(hidden)
    try:
        yield
    finally:
        _head_input.reset(token)


def _record_logits(layer: MoeLayer, router_class: type[nn.Module], at: int) -> None:
    def record(_: nn.Module, __: Any, output: Any) -> None:
        run = _run.get()
        if run is not None and run.setting is not None:
            run.logits[layer.position] = output[at]

    for module in layer.block.modules():
        if isinstance(module, router_class):
            module.register_forward_hook(record)


def _decoder_position(layer: MoeLayer) -> int:
    """The number in `model.layers.3.mlp.experts`."""
    return next(int(part) for part in layer.name.split(".") if part.isdigit())


def _decoder_layers(model: PreTrainedModel, layers: list[MoeLayer]) -> list[nn.Module]:
    """The list that the MoE blocks' decoder layers are in; empty if there is no single one."""
    owners = set()
    for layer in layers:
        parts = layer.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            return []
        owners.add(".".join(parts[:number]))
    owner = model.get_submodule(owners.pop()) if len(owners) == 1 else None
    return list(owner) if isinstance(owner, nn.ModuleList) else []


def _skippable(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        run = _run.get()
        if run is None:
            return forward(*arguments, **options)
        output = run.known if number < run.skipped else forward(*arguments, **options)
        if run.keep_inputs:
            run.inputs.append(output)
        return output

    return call


def _experts(module: Any, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Hidden [T,H], index [T,K], weight [T,K] -> [T,H]; the decode positions' routing restricted as the run says."""
    run = _run.get()
    if run is not None:
        layer: MoeLayer = module._lynx
        index, weight = index.to(torch.int64), weight.float()
        if run.setting is not None and run.setting.restricts(layer.position, layer.experts):
            index, weight = _restrict(layer, run, run.setting, index, weight)
        decoded = index.view(run.sequences, -1, index.shape[-1])[:, run.shape.prompt :]
        run.index[layer.position] = decoded.to(torch.int16)
    return run_experts(module, hidden, index, weight)


def _restrict(
    layer: MoeLayer, run: _Run, setting: Setting, index: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The routing [T,K] with the selection applied to every group of one batch and one decode position."""
    batch, prompt = run.shape.batch, run.shape.prompt

    def to_groups(rows: torch.Tensor) -> torch.Tensor:
        """[T,x] -> [c*D,B,x]."""
        steps = rows.view(run.sequences // batch, batch, -1, rows.shape[-1])[:, :, prompt:]
        return steps.transpose(1, 2).reshape(-1, batch, rows.shape[-1])

    def from_groups(groups: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[c*D,B,x] into a copy of [T,x]."""
        rows = rows.clone()
        steps = rows.view(run.sequences // batch, batch, -1, rows.shape[-1])[:, :, prompt:]
        steps.copy_(groups.view(steps.shape[0], steps.shape[2], batch, -1).transpose(1, 2))
        return rows

    own_index, own_weight = to_groups(index), to_groups(weight)
    rule, selection = layer.rule, setting.selection
    if rule is not None:
        logits = to_groups(run.logits.pop(layer.position).reshape(len(index), -1)).float()
        bias = None if rule.bias is None else _tensor(layer.block, rule.bias).float().reshape(-1)
        choice, combine = rule.choice_and_combine(logits.flatten(0, 1), bias)
        choice, combine = choice.view(logits.shape), combine.view(logits.shape)
        if rule.expert_scale:
            own_weight = rule.weights(combine, own_index)
    else:  # As in the export: only the chosen experts' weights are known, and a token can only lose experts.
        rule, selection = Rule("identity", renormalize=False), replace(selection, remap=False)
        shape = (*own_index.shape[:2], layer.experts)
        choice = combine = torch.zeros(shape, device=index.device).scatter(2, own_index, own_weight)
    selected = select_groups(
        selection,
        choice,
        combine,
        own_index,
        own_weight,
        budget=setting.restriction.budgets[layer.position],
        floor=setting.restriction.floors[layer.position],
        renormalize=rule.renormalize,
        scale=rule.scale,
    )
    chosen = scaled(layer, rule, selected.index, selected.weight)
    return from_groups(selected.index, index), from_groups(chosen, weight)


def run_experts(module: Any, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The experts of a transformers module: hidden [T,H], index int64 [T,K] (-1: none), weight float32 [T,K] -> [T,H].

    On the CPU one expert at a time, its tokens gathered: small enough to stay in the cache, and faster there than
    transformers' own forms. On a GPU transformers' grouped form.
    """
    if hidden.device.type != "cpu":
        weight = weight.masked_fill(index < 0, 0.0)
        grouped: Callable[..., torch.Tensor] = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
        return grouped(module, hidden, index.clamp(min=0), weight)
    width = index.shape[1]
    flat = index.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat + 1).cumsum(0).tolist()
    slots = hidden.new_zeros(flat.shape[0], hidden.shape[1])
    for expert, (start, end) in enumerate(itertools.pairwise(ends)):
        if end > start:
            places = order[start:end]
            slots[places] = _expert(module, expert, hidden[places // width])
    return torch.einsum("tk,tkh->th", weight.to(hidden.dtype), slots.view(-1, width, hidden.shape[1]))


def _expert(module: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _linear(module, first, expert, rows)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return _linear(module, "down_proj", expert, inner)


def _linear(module: Any, name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
    matrix = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return F.linear(rows, matrix.T if module.is_transposed else matrix, bias)
