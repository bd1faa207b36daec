"""The selection over many decode steps at once: the torch twin of `lynx_trt.selection.select`.

A decode step is a group of B tokens. `select` takes one group; a calibration has hundreds of thousands, so this
takes G of them in one call, on whichever device the tensors are. It is held to `select` exactly, and follows its
steps and its rules of rounding; comments there say why, those here only what is different.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lynx_trt.selection import TINY, Selection, _float32


class GroupsSelected(NamedTuple):
    """What the tokens use: `index` int64 [G,B,K] (-1: empty), `weight` float32 [G,B,K], `kept` bool [G,E]: in use."""

    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index
    weight: torch.Tensor
    kept: torch.Tensor


def select_groups(
    selection: Selection,
    choice: torch.Tensor,
    combine: torch.Tensor,
    topk_index: torch.Tensor,
    topk_weight: torch.Tensor,
    *,
    budget: int,
    floor: float = 0.0,
    token_mask: torch.Tensor | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
) -> GroupsSelected:
    """`lynx_trt.selection.select` for each of G groups; the arguments are its, with a leading dimension.

    Args:
        selection: the parameters.
        choice: float32 [G,B,E], what the model ranks experts by.
        combine: float32 [G,B,E], the weight an expert would get before renormalisation.
        topk_index: int64 [G,B,K], the model's own routing; not checked.
        topk_weight: float32 [G,B,K], its weights.
        budget: experts to keep in each group.
        floor: votes that an expert needs for each voting token, beside its place among the first `budget`.
        token_mask: bool [G,B], False for padding.
        renormalize: the model divides the weights of the chosen experts by their sum.
        scale: the model multiplies the weights by this.
    """
    counts = choice.isfinite().all(-1) & combine.isfinite().all(-1) & topk_weight.isfinite().all(-1)
    if token_mask is not None:
        counts &= token_mask
    if not bool(counts.all()):
        column = counts[..., None]
        choice, combine, topk_weight = (value.where(column, 0.0) for value in (choice, combine, topk_weight))
        topk_index = topk_index.where(column, 0)
    kept = _kept_sets(selection, choice, combine, topk_index, topk_weight, counts, budget, floor)
    unchanged = counts & _lookup(kept, topk_index).all(-1)
    index = topk_index.where(unchanged[..., None], -1)
    weight = topk_weight.where(unchanged[..., None], 0.0)
    group, row = (counts & ~unchanged).nonzero(as_tuple=True)
    if len(group):
        allowed = kept[group]
        own = topk_index[group, row]
        if not selection.remap:
            allowed = allowed & torch.zeros_like(allowed).scatter_(1, own, True)
        routed = _reroute(choice[group, row], combine[group, row], allowed, own.shape[1], renormalize, scale)
        index[group, row], weight[group, row] = routed
    # One column more than E, where empty slots go.
    used = kept.new_zeros(kept.shape[0], kept.shape[1] + 1)
    used.scatter_(1, index.flatten(1).where(index.flatten(1) >= 0, kept.shape[1]), True)
    return GroupsSelected(index, weight, used[:, :-1])


def _lookup(kept: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Whether each expert of `index` [G,B,K] is in its group's `kept` [G,E]."""
    return kept.gather(1, index.flatten(1)).view(index.shape)


def _kept_sets(
    selection: Selection,
    choice: torch.Tensor,
    combine: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    counts: torch.Tensor,
    budget: int,
    floor: float,
) -> torch.Tensor:
    """Steps 1 to 5 of the selection, bool [G,E]."""
    groups, _, experts = choice.shape
    floor = _float32(floor)
    if budget >= experts and floor == 0:
        return torch.ones(groups, experts, dtype=torch.bool, device=choice.device)
    own_forced = _guaranteed(selection, choice, index) | _sensitive(selection, weight)[..., None]
    own_forced &= counts[..., None]
    forced = torch.zeros(groups, experts, dtype=torch.uint8, device=choice.device)
    forced.scatter_reduce_(1, index.flatten(1), own_forced.to(torch.uint8).flatten(1), "amax")
    votes = _votes(selection, combine, index, weight, counts).float()
    enough = votes > counts.sum(1, keepdim=True).float() * floor
    # The forced come first, those without enough votes last; the sort is stable, so a tie goes to the lower expert.
    rank = votes.where(enough, -torch.inf).where(forced == 0, torch.inf)
    order = rank.sort(dim=1, descending=True, stable=True).indices[:, :budget]
    first = torch.zeros_like(forced, dtype=torch.bool).scatter_(1, order, True)
    return (forced > 0) | (first & enough)


def _guaranteed(selection: Selection, choice: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Which of a token's own experts are among its k0 best by `choice`, ties to the lower expert; [G,B,K]."""
    width = index.shape[-1]
    count = selection.guaranteed(width)
    if count in (0, width):
        return torch.full_like(index, count == width, dtype=torch.bool)
    by_expert = index.argsort(dim=-1)
    own = choice.gather(-1, index).gather(-1, by_expert)
    order = own.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(index, dtype=torch.bool).scatter_(-1, by_expert.gather(-1, order), True)


def _sensitive(selection: Selection, weight: torch.Tensor) -> torch.Tensor:
    """The tokens that no expert stands out for, [G,B]."""
    width = weight.shape[-1]
    if selection.sensitivity == 0 or width == 1:
        return torch.zeros_like(weight[..., 0], dtype=torch.bool)
    confidence = (width * _shares(weight).amax(-1) - 1) / (width - 1)
    return confidence.float() < _float32(selection.sensitivity)


def _votes(
    selection: Selection, combine: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """The votes for each expert over its group, float64 [G,E]."""
    if selection.vote == "score":
        return _shares(combine).sum(1)
    if selection.vote == "count":
        own = torch.ones_like(weight, dtype=torch.float64)
    elif selection.vote == "weight":
        own = _shares(weight) ** _float32(selection.power)
    else:
        own = _affinities(selection, combine.gather(-1, index), counts)
    votes = torch.zeros(combine.shape[0], combine.shape[2], dtype=torch.float64, device=combine.device)
    return votes.scatter_add_(1, index.flatten(1), own.where(counts[..., None], 0.0).flatten(1))


def _shares(values: torch.Tensor) -> torch.Tensor:
    """Each value over the sum of its row, float64; a negative one counts as 0, and a row of zeros gives zeros."""
    positive = values.double().clamp(min=0.0)
    return positive / positive.sum(-1, keepdim=True).clamp(min=TINY)


def _affinities(selection: Selection, own: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The vote n ** bin for each of a token's own experts, float64 [G,B,K]; `own` is their `combine`."""
    own = own.double().clamp(min=0.0)
    best = own.amax(-1, keepdim=True)
    ratio = (own / best).where(best > 0, 1.0)
    bins = (_float32(selection.alpha) * ratio.log()).float().floor().double()
    voting = counts.sum(1).clamp(min=1).double()[:, None, None]
    return voting ** bins.clamp(-float(selection.beta), 0.0)


def _reroute(
    choice: torch.Tensor, combine: torch.Tensor, allowed: torch.Tensor, width: int, renormalize: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's `width` best allowed experts [R,K] and their weights under the model's own rule (step 6)."""
    ranked = choice.where(allowed, -torch.inf)
    index = ranked.sort(dim=1, descending=True, stable=True).indices[:, :width]
    empty = ~allowed.gather(1, index)
    weight = combine.gather(1, index).double().masked_fill(empty, 0.0)
    if renormalize:
        total = weight.sum(1, keepdim=True)
        weight = weight * (_float32(scale) / total).where(total != 0, 0.0)
    else:
        weight = weight * _float32(scale)
    return index.masked_fill(empty, -1), weight.float()
