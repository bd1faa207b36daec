"""Which rule a router follows, found by asking the model's own MoE block.

To send a token to another expert, LynxSelect has to know how *any* expert would have been ranked (`choice`)
and weighted (`combine`). No model says so in a form that can be read, so the block is run on random numbers,
and the rules that published models use are tried until one reproduces its experts and its weights. Where
none does, tokens can only lose experts (`drop`), with the weights that the model gave.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

PROBE = "lynx_probe"
PROBE_TOKENS = 64
# Below every score that a router can give, yet finite: a non-finite row would count as broken and be masked.
NEVER = torch.finfo(torch.float32).min


SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "sigmoid": torch.sigmoid,
    "identity": lambda logits: logits,
}


@dataclass(frozen=True)
class Rule:
    """How a router ranks and weighs experts. Paths are relative to the MoE block.

    scores = softmax | sigmoid | identity of the logits; choice = scores + bias (the logits themselves + bias if
    `by_logits`), outside of the `groups_used` best of `groups` groups never; combine = scores, over their sum among the
    chosen if `renormalize`, times `scale`; a chosen expert's weight is then multiplied by its number in `expert_scale`
    (Gemma 4), behind the selection.
    """

    scores: str
    bias: str | None = None
    groups: int = 1
    groups_used: int = 1
    group_score: str = "none"  # none | best | best_two
    renormalize: bool = True
    scale: float = 1.0
    expert_scale: str | None = None
    by_logits: bool = False

    def __str__(self) -> str:
        """The rule in a few words."""
        parts = [self.scores]
        parts += ["ranked by logits"] if self.by_logits else []
        parts += ["+ correction bias"] if self.bias else []
        parts += [f"{self.groups_used} of {self.groups} groups"] if self.groups > 1 else []
        parts += ["renormalised"] if self.renormalize else []
        parts += [f"x {self.scale:g}"] if self.scale != 1.0 else []
        parts += ["x a number an expert"] if self.expert_scale else []
        return ", ".join(parts)

    def choice_and_combine(self, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [T,E] f32, bias [E] f32 -> choice [T,E] f32, combine [T,E] f32."""
        combine = SCORES[self.scores](logits)
        ranked = logits if self.by_logits else combine
        choice = ranked if bias is None else ranked + bias
        if self.group_score == "none":
            return choice, combine
        experts = logits.shape[-1]
        grouped = choice.view(-1, self.groups, experts // self.groups)
        best = grouped.topk(2 if self.group_score == "best_two" else 1, dim=-1).values.sum(-1)
        used = torch.zeros_like(best).scatter(1, best.topk(self.groups_used, dim=-1).indices, 1.0)
        allowed = used.unsqueeze(-1).expand(-1, -1, experts // self.groups).reshape(-1, experts) > 0
        return torch.where(allowed, choice, NEVER), combine

    def weights(self, combine: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Combine [..,E], index [..,K] -> [..,K]: what those experts weigh, before `expert_scale`."""
        weight = combine.gather(-1, index)
        if self.renormalize:
            weight = weight / weight.sum(-1, keepdim=True)
        return weight * self.scale


@dataclass(frozen=True)
class _Seen:
    """What one run of the block showed; no logits if no router was known."""

    logits: torch.Tensor | None
    index: torch.Tensor
    weight: torch.Tensor
    biases: dict[str, torch.Tensor]
    attributes: list[float]


@dataclass(frozen=True)
class Routing:
    """How a block routes: its rule (None: none of ours), and K, a token's experts (None: it can't be run alone)."""

    rule: Rule | None
    experts_per_token: int | None


def find_routing(
    block: nn.Module, experts_name: str, router_class: type[nn.Module] | None, logits_at: int = 0
) -> Routing:
    """The rule that `block` follows, and its K.

    Args:
        block: the module that holds the router and the experts; its parameters may be on the meta device.
        experts_name: name of the experts within the block.
        router_class: class of the router, an instance of which is within the block; None if it is not known.
        logits_at: place of the logits in the router's output.
    """
    seen = None
    with suppress(Exception), torch.no_grad():  # whatever a model's own code may raise
        seen = _run(block, experts_name, router_class, logits_at)
    if seen is None:
        return Routing(None, None)
    k = int(seen.index.shape[-1])
    if seen.logits is None:
        return Routing(None, k)
    logits = seen.logits
    fits = (_fit(candidate, seen, logits) for candidate in _candidates(block, seen, logits))
    return Routing(next((rule for rule in fits if rule), None), k)


def _run(block: nn.Module, experts_name: str, router_class: type[nn.Module] | None, logits_at: int) -> _Seen:
    probe = _with_random_weights(block, experts_name)
    routers = [module for module in probe.modules() if router_class and isinstance(module, router_class)]
    captured: dict[str, torch.Tensor] = {}

    def on_router(_: nn.Module, __: Any, output: Any) -> None:
        captured["logits"] = output[logits_at]

    def on_experts(_: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        captured["index"], captured["weight"] = index, weight
        return torch.zeros_like(hidden)

    if len(routers) == 1:
        routers[0].register_forward_hook(on_router)
    ALL_EXPERTS_FUNCTIONS.register(PROBE, on_experts)
    experts: Any = probe.get_submodule(experts_name)
    experts.config._experts_implementation = PROBE
    size = int(experts.gate_up_proj.shape[1 if experts.is_transposed else 2]) if experts.has_gate else 0
    size = size or int(experts.up_proj.shape[1 if experts.is_transposed else 2])
    hidden = torch.randn(1, PROBE_TOKENS, size, generator=torch.Generator().manual_seed(0))
    try:
        probe(hidden)
    except Exception:  # whatever a model's own code may raise
        if len(routers) != 1:
            raise
        captured["index"], captured["weight"] = _routed(routers[0](hidden[0]))
    logits = captured["logits"].float().reshape(PROBE_TOKENS, -1) if "logits" in captured else None
    count = logits.shape[-1] if logits is not None else 0
    state = {**dict(probe.named_parameters()), **dict(probe.named_buffers())}
    biases = {n: t.reshape(-1) for n, t in state.items() if t.numel() == count and not n.startswith(experts_name)}
    attributes = [v for m in probe.modules() for v in vars(m).values() if isinstance(v, float)]
    return _Seen(logits, captured["index"], captured["weight"].float(), biases, attributes)


def _routed(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and weight [T,K] in a router's output: for a block that is a whole decoder layer, and can't run alone."""
    index = next(each for each in output if not each.is_floating_point())
    return index, next(each for each in output if each.is_floating_point() and each.shape == index.shape)


def _with_random_weights(block: nn.Module, experts_name: str) -> Any:
    """A copy of the block with real random float32 weights, but for the experts', which the probe doesn't run."""
    generator = torch.Generator().manual_seed(1)
    memo: dict[int, Any] = {}
    for name, tensor in itertools.chain(block.named_parameters(), block.named_buffers()):
        if name.startswith(f"{experts_name}."):
            memo[id(tensor)] = tensor
            continue
        if not tensor.is_floating_point():
            continue
        real = torch.randn(tensor.shape, generator=generator) / max(1.0, tensor.shape[-1] ** 0.5 / 2)
        memo[id(tensor)] = nn.Parameter(real, requires_grad=False) if isinstance(tensor, nn.Parameter) else real
    return copy.deepcopy(block, memo)


def _candidates(block: nn.Module, seen: _Seen, logits: torch.Tensor) -> Iterator[Rule]:
    """Rules to try, the plain ones first, so that a model without bias or groups is never called grouped."""
    experts = logits.shape[-1]
    groupings: list[tuple[int, int, str]] = [(1, 1, "none")]
    for groups, used in _group_sizes(block):
        if 1 < groups < experts and experts % groups == 0 and used < groups:
            groupings += [(groups, used, "best_two"), (groups, used, "best")]
    for grouping, bias, renormalize, scores in itertools.product(
        groupings, (None, *seen.biases), (True, False), tuple(SCORES)
    ):
        yield Rule(scores, bias, *grouping, renormalize=renormalize)
    for scale, renormalize, scores in itertools.product(seen.biases, (True, False), tuple(SCORES)):
        yield Rule(scores, renormalize=renormalize, expert_scale=scale)
    for bias, renormalize, scores in itertools.product(seen.biases, (True, False), ("sigmoid", "softmax")):
        yield Rule(scores, bias, renormalize=renormalize, by_logits=True)


def _group_sizes(block: nn.Module) -> set[tuple[int, int]]:
    """Every (groups, groups used) that the block or one of its modules names."""
    found = set()
    for module in block.modules():
        for source in (module, getattr(module, "config", None)):
            groups = next((g for n in ("num_group", "n_group", "num_groups") if (g := getattr(source, n, None))), None)
            used = getattr(source, "topk_group", None)
            if isinstance(groups, int) and isinstance(used, int):
                found.add((groups, used))
    return found


def _fit(rule: Rule, seen: _Seen, logits: torch.Tensor) -> Rule | None:
    """`rule` with its scale, if it gives what the block gave."""
    choice, combine = rule.choice_and_combine(logits, seen.biases[rule.bias] if rule.bias else None)
    ranked = choice.topk(seen.index.shape[-1], dim=-1).indices
    if not torch.equal(ranked.sort(-1).values, seen.index.sort(-1).values):
        return None
    weight = rule.weights(combine, seen.index)
    if rule.expert_scale:
        weight = weight * seen.biases[rule.expert_scale][seen.index]
    scale = float((seen.weight.sum() / weight.sum()).item())
    # The model's own number, if it has one, and not its float32 reconstruction.
    scale = next((value for value in (1.0, *seen.attributes) if abs(value - scale) < 1e-5 * abs(scale)), scale)
    if not torch.allclose(weight * scale, seen.weight, rtol=1e-4, atol=1e-6):
        return None
    return replace(rule, scale=scale)
