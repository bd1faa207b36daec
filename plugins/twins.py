"""Each kernel once more in plain PyTorch: what tests and benchmarks compare with.

Given tensors of a precision, a twin computes in that precision, as eager PyTorch would: with float64 inputs it is the
reference, with bfloat16 ones the error that is usual. Intermediates have the layout of the kernels' workspaces, with
rows that a kernel does not write left at 0. Not made to be fast, though they run on any device.

T tokens, E experts, K experts a token uses, H hidden size, I inner size; R is 2 I, for ungated experts I.
B sequences of S = T / B tokens, C channels, W weights a channel, N states of D keys by M values.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lynx_trt import fp8, int4, mxfp4
from lynx_trt.experts import FORMATS, ExpertsForm
from lynx_trt.plugins.specs import CausalConvSpec, LinearAttentionSpec, SelectSpec
from lynx_trt.selection import TINY

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Selected(NamedTuple):
    """The outputs of LynxSelect, and the kept set, bool [E]."""

    index: Tensor  # type: ignore[assignment]  # [T,K] int64; hides tuple.index
    weight: Tensor  # [T,K] float32
    active: Tensor  # [] int32
    kept: Tensor


def select_twin(
    spec: SelectSpec,
    choice: Tensor,
    combine: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    budget: int,
    floor: float,
    token_mask: Tensor,
) -> Selected:
    """LynxSelect; the arguments are the op's inputs: [T,E], [T,E], [T,K], [T,K], a number, another, [T] bool."""
    finite = [torch.isfinite(values).all(dim=1) for values in (choice, combine, topk_weight)]
    counts = token_mask & finite[0] & finite[1] & finite[2]
    column = counts[:, None]
    choice, combine, topk_weight = (torch.where(column, values, 0.0) for values in (choice, combine, topk_weight))
    topk_index = torch.where(column, topk_index, 0)
    own = torch.zeros_like(choice, dtype=torch.bool).scatter_(1, topk_index, True) & column
    kept = _kept_set(spec, choice, combine, topk_index, topk_weight, counts, own, budget, floor)
    lost = (own & ~kept).any(dim=1, keepdim=True)
    allowed = column & kept & (own | torch.tensor(spec.remap, device=own.device))
    index, weight = _best(spec, choice, combine, allowed)
    index = torch.where(lost, index, torch.where(column, topk_index, -1))
    weight = torch.where(lost, weight, topk_weight)
    active = torch.tensor(len(torch.unique(index[index >= 0])), dtype=torch.int32, device=index.device)
    return Selected(index, weight, active, kept)


def _kept_set(
    spec: SelectSpec,
    choice: Tensor,
    combine: Tensor,
    index: Tensor,
    weight: Tensor,
    counts: Tensor,
    own: Tensor,
    budget: int,
    floor: float,
) -> Tensor:
    """Steps 1 to 5 of the selection, bool [E]."""
    experts = choice.shape[1]
    if budget >= experts and floor <= 0:
        return torch.ones(experts, dtype=torch.bool, device=choice.device)
    votes = _votes(spec, combine, index, weight, counts).float()
    forced = (own & _forced(spec, choice, index, weight)).any(dim=0)
    enough = votes > torch.tensor(floor, dtype=torch.float32, device=votes.device) * counts.sum().float()
    first, sums = forced.tolist(), votes.tolist()
    ranked = sorted(range(experts), key=lambda expert: (not first[expert], -sums[expert], expert))
    best = torch.tensor(ranked[: max(budget, 0)], dtype=torch.int64, device=votes.device)
    return forced | (torch.zeros_like(forced).index_fill_(0, best, True) & enough)


def _forced(spec: SelectSpec, choice: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Each token's own experts that are kept whatever the budget (and some that are not its own), bool [T,E]."""
    outside = torch.ones_like(choice, dtype=torch.bool).scatter_(1, index, False)
    order = torch.where(outside, -torch.inf, choice).sort(dim=1, descending=True, stable=True).indices
    best = torch.zeros_like(outside).scatter_(1, order[:, : spec.guarantee], True)
    width = index.shape[1]
    if spec.sensitivity == 0 or width == 1:
        return best
    confidence = (width * _shares(weight).amax(dim=1) - 1) / (width - 1)
    return best | (confidence.float() < spec.sensitivity)[:, None]


def _votes(spec: SelectSpec, combine: Tensor, index: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The votes for each expert, float64 [E]."""
    if spec.vote == "score":
        return _shares(combine).sum(dim=0)
    if spec.vote == "count":
        own = torch.ones_like(weight, dtype=torch.float64)
    elif spec.vote == "weight":
        own = _shares(weight) ** spec.power
    else:
        value = combine.gather(1, index).double().clamp(min=0)
        best = value.amax(dim=1, keepdim=True)
        ratio = torch.where(best > 0, value / torch.where(best > 0, best, 1.0), 1.0)
        steps = (spec.alpha * ratio.log()).float().floor().double().clamp(min=-spec.beta, max=0)
        own = torch.tensor(max(int(counts.sum()), 1), dtype=torch.float64, device=steps.device) ** steps
    own = torch.where(counts[:, None], own, 0.0)
    votes = torch.zeros(combine.shape[1], dtype=torch.float64, device=own.device)
    return votes.index_add_(0, index.reshape(-1), own.reshape(-1))


def _shares(values: Tensor) -> Tensor:
    positive = values.double().clamp(min=0)
    return positive / positive.sum(dim=1, keepdim=True).clamp(min=TINY)


def _best(spec: SelectSpec, choice: Tensor, combine: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's K best allowed experts and their weights."""
    order = torch.where(allowed, choice, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    index = order[:, : spec.experts_per_token]
    empty = ~allowed.gather(1, index)
    weight = torch.where(empty, 0.0, combine.gather(1, index).double())
    factor = torch.full_like(weight[:, :1], spec.scale)
    if spec.renormalize:
        total = weight.sum(dim=1, keepdim=True)
        factor = torch.where(total != 0, factor / torch.where(total != 0, total, 1.0), 0.0)
    return torch.where(empty, -1, index), (weight * factor).float()


def dispatch_twin(index: Tensor, experts: int) -> Tensor:
    """The metadata of `index` [T,K]: int32 [2 E + 2 + T K], laid out as in `dispatch_kernel.py`."""
    flat = index.reshape(-1)
    used = (flat >= 0) & (flat < experts)
    pairs = torch.where(used, flat, experts).sort(stable=True).indices[: int(used.sum())]
    numbers, counts = torch.unique(flat[pairs], return_counts=True)
    dispatch = torch.zeros(2 * experts + 2 + flat.numel(), dtype=torch.int32, device=index.device)
    dispatch[0] = len(numbers)
    dispatch[2 : 2 + len(numbers)] = counts.cumsum(0)
    dispatch[2 + experts : 2 + experts + len(numbers)] = numbers
    dispatch[2 + 2 * experts : 2 + 2 * experts + len(pairs)] = pairs
    return dispatch


def _groups(dispatch: Tensor, experts: int) -> list[tuple[int, slice, Tensor]]:
    """For each active expert: its index, its range in the order of pairs, and its pairs."""
    values = dispatch.tolist()
    offsets, numbers = values[1 : 2 + experts], values[2 + experts : 2 + 2 * experts]
    pairs = dispatch[2 + 2 * experts :].long()
    ranges = [slice(offsets[number], offsets[number + 1]) for number in range(values[0])]
    return [(numbers[number], each, pairs[each]) for number, each in enumerate(ranges)]


def dequantize_twin(weights: str, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Values and scales of quantized weights to [...,D], made in float32 and rounded once."""
    if weights == "mxfp4":
        numbers, factors = _look_up(mxfp4.PAIRS, values), _look_up(mxfp4.SCALES, scales)
    elif weights == "nvfp4":
        numbers, factors = _look_up(mxfp4.PAIRS, values), scales.float()
    elif weights == "fp8":
        numbers, factors = _look_up(fp8.VALUES, values), scales
    else:
        factors = scales.float()
        zeros = factors.new_tensor(int4.ZERO)
        if FORMATS[weights].zeros:
            factors, zeros = factors.chunk(2, dim=-1)
        numbers = _look_up(int4.PAIRS, values).reshape(*factors.shape, -1) - zeros[..., None]
    matrix = numbers.reshape(*factors.shape, FORMATS[weights].block) * factors[..., None]
    return matrix.reshape(*values.shape[:-1], -1).to(dtype)


def _look_up(table: NDArray[np.float32], data: Tensor) -> Tensor:
    return torch.from_numpy(table).to(data.device)[data.view(torch.uint8).long()]


def gate_up_twin(
    form: ExpertsForm,
    hidden: Tensor,
    gate_up: Tensor,
    dispatch: Tensor,
    *,
    experts_per_token: int,
    bias: Tensor | None = None,
) -> Tensor:
    """The inner values of all pairs, [T K, I], a row a pair in the order of `dispatch`; hidden is [T,H]."""
    experts, rows = gate_up.shape[0], gate_up.shape[2 if form.transposed else 1]
    inner = hidden.new_zeros(len(hidden) * experts_per_token, rows // 2 if form.gated else rows)
    for expert, each, pairs in _groups(dispatch, experts):
        inner[each] = activate_twin(form, _linear(form, hidden[pairs // experts_per_token], gate_up, bias, expert))
    return inner


def down_twin(
    form: ExpertsForm, inner: Tensor, down: Tensor, dispatch: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """Each pair's output, [T K, H], in the order of the dispatch; 0 past the last pair."""
    partial = inner.new_zeros(len(inner), down.shape[2 if form.transposed else 1])
    for expert, each, _ in _groups(dispatch, down.shape[0]):
        partial[each] = _linear(form, inner[each], down, bias, expert)
    return partial


def combine_twin(partial: Tensor, dispatch: Tensor, weight: Tensor, *, experts: int) -> Tensor:
    """The weighted sum of each token's slots, [T,H]; `weight` is [T,K]."""
    outputs = torch.zeros_like(partial)  # by slot
    for _, each, pairs in _groups(dispatch, experts):
        outputs[pairs] = partial[each] * weight.reshape(-1)[pairs, None].to(partial.dtype)
    return outputs.reshape(*weight.shape, -1).sum(dim=1)


def experts_twin(
    form: ExpertsForm,
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """LynxExperts: the arguments are the op's inputs, [T,H] of the precision of `hidden`."""
    if gate_up_scale is not None and down_scale is not None:
        gate_up = dequantize_twin(form.weights, gate_up, gate_up_scale, hidden.dtype)
        down = dequantize_twin(form.weights, down, down_scale, hidden.dtype)
    dispatch = dispatch_twin(index, down.shape[0])
    inner = gate_up_twin(form, hidden, gate_up, dispatch, experts_per_token=index.shape[1], bias=gate_up_bias)
    partial = down_twin(form, inner, down, dispatch, bias=down_bias)
    return combine_twin(partial, dispatch, weight, experts=down.shape[0])


def _linear(form: ExpertsForm, x: Tensor, weights: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    matrix = weights[expert] if form.transposed else weights[expert].T
    y = x @ matrix
    return y if bias is None else y + bias[expert]


def activate_twin(form: ExpertsForm, gate_up: Tensor) -> Tensor:
    """From gate and up to inner values, [., R] to [., I]."""
    limit = form.limit or math.inf
    if not form.gated:
        return _activation(form, gate_up.clamp(-limit, limit))
    if form.interleaved:
        gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
    else:
        gate, up = gate_up.chunk(2, dim=1)
    return _activation(form, gate.clamp(max=limit)) * (up.clamp(-limit, limit) + form.up_offset)


def _activation(form: ExpertsForm, z: Tensor) -> Tensor:
    if form.activation == "silu":
        return F.silu(z) if form.alpha == 1 else z * torch.sigmoid(form.alpha * z)
    if form.activation.startswith("gelu"):
        return F.gelu(z, approximate="tanh" if form.activation == "gelu_tanh" else "none")
    return F.relu(z) if form.activation == "relu" else F.relu(z) ** 2


def causal_conv_twin(
    spec: CausalConvSpec,
    values: Tensor,
    weight: Tensor,
    past_state: Tensor,
    lengths: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """LynxCausalConv; the arguments are the op's inputs: [T,C], [C,W], [B,W-1,C], [B] and [C]."""
    rows = torch.cat([past_state, values.reshape(len(lengths), -1, spec.channels)], dim=1)
    output = F.conv1d(rows.mT, weight[:, None], bias, groups=spec.channels).mT.reshape(values.shape)
    state = torch.stack([row[length : length + spec.width - 1] for row, length in zip(rows, lengths, strict=True)])
    return F.silu(output) if spec.activation == "silu" else output, state


def linear_attention_twin(
    spec: LinearAttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    past_state: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """LynxLinearAttention; the arguments are the op's inputs. Computed in the precision of the state."""
    heads, size = spec.value_heads, spec.keys

    def by_head(tensor: Tensor, count: int) -> Tensor:
        """[T,..] to [B,S,N,..], what several states share once for each."""
        apart = tensor.to(past_state.dtype).reshape(len(lengths), -1, count, tensor.shape[1] // count)
        return apart.repeat_interleave(heads // count, dim=2)

    def normalized(tensor: Tensor) -> Tensor:
        norm = (tensor.square().sum(dim=-1, keepdim=True) + spec.epsilon).sqrt()
        return tensor / norm if spec.epsilon else tensor

    q, k = (normalized(by_head(each, spec.key_heads)) for each in (query, key))
    v, g, b = (by_head(each, heads) for each in (value, decay, beta))
    state, outputs = past_state, []
    for token in range(q.shape[1]):
        real = (token < lengths)[:, None, None, None]
        k_now, v_now = k[:, token, :, :, None], v[:, token, :, None, :]
        after = state * g[:, token].exp().expand(-1, -1, size)[..., None]
        if spec.update_rule == "gated_delta":
            v_now = v_now - k_now.mT @ after
        after = after + k_now * (b[:, token, :, :, None] * v_now)
        state = torch.where(real, after, state)
        outputs.append(torch.where(real, q[:, token, :, None, :] @ after * spec.scale, 0.0))
    return torch.stack(outputs, dim=1).reshape(value.shape).to(value.dtype), state
