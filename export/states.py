"""Layers that keep a state of fixed size in place of keys and values, through transformers' own extension points.

In transformers such a layer asks the cache for its states, and calls functions of its module by their names: a causal
convolution, and the recurrence over the tokens in its chunked form. While a model is traced, ours stand in their places
and become LynxCausalConv and LynxLinearAttention, with padding and rows of unequal length. A name proves nothing, so
each function is asked first whether ours gives what it gives, on random numbers, as in `native.py`.

The same functions compute, token after token, where no step is traced: what they are asked against.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from lynx_trt.errors import UnsupportedModelError
from lynx_trt.export import attention, ops

# Types of layers, as configs name them, that keep such states.
KINDS = ("linear_attention", "conv")
# FLA's, which its functions have as a constant.
EPSILON = 1e-6

_layer: ContextVar[StateLayer | None] = ContextVar("lynx_export_state_layer", default=None)

States = tuple[torch.Tensor, torch.Tensor]


class StateLayer(LinearAttentionCacheLayerMixin):  # type: ignore[misc]
    """A layer's states: convolution [B,W-1,C] of the model's dtype, recurrent [B,N,D,M] f32; None: what it has none of.

    Those that are not given come into being, as zeros, when the layer first asks: so a forward finds their shapes.
    """

    def __init__(self, conv: torch.Tensor | None = None, recurrent: torch.Tensor | None = None) -> None:
        """Wrap the graph's inputs."""
        super().__init__()
        self.conv, self.recurrent = conv, recurrent
        # What the layer did without our functions would be lost.
        self.waits_for_conv, self.recurred = False, False

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing to do: the states are inputs."""

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        """The new values alone: our convolution, which comes next, has the state."""
        self._refuse_others(state_idx)
        self.waits_for_conv = True
        return conv_states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        """Our recurrence has kept it already."""
        self._refuse_others(state_idx)
        if not self.recurred:
            raise UnsupportedModelError("a layer keeps a state by a recurrence that is not known here")
        return recurrent_states

    def caches(self) -> dict[str, torch.Tensor]:
        """What it keeps, by name.

        Raises:
            UnsupportedModelError: it has used a convolution that is not known here.
        """
        if self.waits_for_conv:
            raise UnsupportedModelError("a layer keeps a state by a convolution that is not known here")
        both = {"conv": self.conv, "recurrent": self.recurrent}
        return {name: tensor for name, tensor in both.items() if tensor is not None}

    @staticmethod
    def _refuse_others(state_idx: int) -> None:
        if state_idx:
            raise UnsupportedModelError("a layer keeps more than one state of a kind, which is not supported")


class StepCache(Cache):  # type: ignore[misc]
    """A model's caches in one step. A layer that asks for its states gets none: our functions have them.

    With a state in hand it would choose its form for one token or for many, and a graph has one form for both.
    """

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Remember who asks."""
        _layer.set(self._of(layer_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Remember who asks."""
        _layer.set(self._of(layer_idx))

    def _of(self, layer_idx: int) -> StateLayer:
        layer = self.layers[layer_idx]
        if not isinstance(layer, StateLayer):
            raise UnsupportedModelError(f"layer {layer_idx} keeps a state and is not of type {' or '.join(KINDS)}")
        return layer


@contextmanager
def known_functions(model: nn.Module) -> Iterator[set[str]]:
    """Replace the recurrences and convolutions of the model's modules for a while; yields the names of those replaced.

    One that computes something else than ours stays, and its layer is refused when it asks for its state.
    """
    undo: list[tuple[Any, str, Any]] = []
    token = _layer.set(None)
    try:
        for module_name in sorted({type(module).__module__ for module in model.modules()}):
            module = sys.modules[module_name]
            for name, (ours, is_same) in _KNOWN.items():
                original = vars(module).get(name)
                # Unwrapped: transformers calls a package of GPU kernels instead where one is installed.
                if original is not None and is_same(inspect.unwrap(original)):
                    undo.append((module, name, original))
                    setattr(module, name, ours)
        yield {name for _, name, _ in undo}
    finally:
        _layer.reset(token)
        for target, name, original in undo:
            setattr(target, name, original)


def causal_conv(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **__: Any,
) -> torch.Tensor:
    """`causal_conv1d_fn`: [B,C,S] by weight [C,W] -> [B,C,S], from the layer's state on."""
    layer = _layer.get()
    batch, channels, _ = hidden_states.shape
    values = hidden_states.transpose(1, 2)
    state = None if layer is None else layer.conv
    if state is None:
        state = values.new_zeros(batch, weight.shape[-1] - 1, channels)
    output, state = _conv(values, weight, bias, state, activation or "none")
    if layer is not None:
        layer.conv, layer.waits_for_conv = state, False
    return output.transpose(1, 2)


def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *_: Any,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **__: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule: [B,S,G,D] twice, [B,S,N,M], g [B,S,N] or a key each [B,S,N,D], beta [B,S,N]."""
    scale = query.shape[-1] ** -0.5
    epsilon = EPSILON if use_qk_l2norm_in_kernel else 0.0
    output, state = _recur(query, key, value, g, beta, "gated_delta", scale, epsilon)
    return output, state if output_final_state else None


def mamba_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,  # noqa: N803  (transformers calls it with these names)
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    chunk_size: int = 0,
    D: torch.Tensor | None = None,  # noqa: N803
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    z: torch.Tensor | None = None,
    **_: Any,
) -> Any:
    """Mamba-2's scan: [B,S,N,M], dt [B,S,N], A [N], B and C [B,S,G,D]; C is the query, B the key, dt the beta."""
    if z is not None:
        raise UnsupportedModelError("a Mamba-2 layer gates inside its scan, which is not supported")
    step = dt.float()
    if dt_bias is not None:
        step = step + dt_bias.float()
    if dt_softplus:
        step = F.softplus(step)
    if dt_limit[0] > 0.0 or dt_limit[1] < float("inf"):
        step = step.clamp(dt_limit[0], dt_limit[1])
    output, state = _recur(C, B, hidden_states, step * A.float(), step, "gated", 1.0, 0.0)
    output = output.float()
    if D is not None:
        output = output + D.float()[:, None] * hidden_states.float()
    return (output, state) if return_final_states else output


def _conv(
    values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor, activation: str
) -> States:
    """[B,S,C], and the next state."""
    step = attention.current_step()
    if step is None:
        rows = torch.cat([state, values], dim=1)
        channels, width = weight.shape
        output = F.conv1d(rows.transpose(1, 2), weight[:, None], bias, groups=channels).transpose(1, 2)
        return (F.silu(output) if activation in ("silu", "swish") else output), rows[:, rows.shape[1] - width + 1 :]
    if activation not in (*ops.CONV_ACTIVATIONS, "swish"):
        raise UnsupportedModelError(f"a convolution has the activation {activation!r}, which is not supported")
    batch, length, channels = values.shape
    inputs = [values.reshape(batch * length, channels), weight, state, step.lengths, *([] if bias is None else [bias])]
    output, state = torch.onnx.ops.symbolic_multi_out(
        f"{ops.DOMAIN}::{ops.CAUSAL_CONV}",
        inputs,
        {**ops.causal_conv_attributes("silu" if activation == "swish" else activation)},
        dtypes=(values.dtype, state.dtype),
        shapes=((batch * length, channels), state.shape),
        version=ops.VERSION,
    )
    return output.reshape(batch, length, channels), state


def _recur(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    rule: str,
    scale: float,
    epsilon: float,
) -> States:
    """[B,S,N,M], and the layer's next state [B,N,D,M]."""
    layer = _layer.get()
    batch, length, heads, size = value.shape
    state = None if layer is None else layer.recurrent
    if state is None:
        state = value.new_zeros(batch, heads, key.shape[-1], size, dtype=torch.float32)
    step = attention.current_step()
    if step is None:
        output, state = recurrence(query, key, value, decay, beta, state, rule, scale, epsilon)
    else:
        key_heads = key.shape[2]
        tensors = (query, key, value, decay.float(), beta.float())
        flat = [tensor.reshape(batch * length, -1) for tensor in tensors]
        output, state = torch.onnx.ops.symbolic_multi_out(
            f"{ops.DOMAIN}::{ops.LINEAR_ATTENTION}",
            [*flat, state, step.lengths],
            {
                **ops.linear_attention_attributes(
                    key_heads=key_heads, value_heads=heads, update_rule=rule, scale=scale, epsilon=epsilon
                )
            },
            dtypes=(value.dtype, torch.float32),
            shapes=((batch * length, heads * size), state.shape),
            version=ops.VERSION,
        )
        output = output.reshape(batch, length, heads, size)
    if layer is not None:
        layer.recurrent, layer.recurred = state, True
    return output, state


def recurrence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    rule: str,
    scale: float,
    epsilon: float,
) -> States:
    """LynxLinearAttention as `ops` defines it, over real tokens alone; shapes as in `delta_rule`, in float32."""
    heads = value.shape[2]
    query, key = (
        _unit(tensor.float(), epsilon).repeat_interleave(heads // tensor.shape[2], 2) for tensor in (query, key)
    )
    factor = decay.float().exp()
    factor = factor[..., None] if factor.dim() == 3 else factor  # of all keys, or of each
    outputs = []
    for token in range(value.shape[1]):
        k = key[:, token, :, :, None]
        state = state * factor[:, token, :, :, None]
        new = value[:, token, :, None].float()
        if rule == "gated_delta":
            new = new - (state * k).sum(2, keepdim=True)
        state = state + k * (beta[:, token, :, None, None].float() * new)
        outputs.append((state * query[:, token, :, :, None]).sum(2) * scale)
    return torch.stack(outputs, dim=1).to(value.dtype), state


def _unit(tensor: torch.Tensor, epsilon: float) -> torch.Tensor:
    return tensor * torch.rsqrt((tensor * tensor).sum(-1, keepdim=True) + epsilon) if epsilon else tensor


# --- What is asked of a function before ours takes its place.


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _close(one: Any, other: Any) -> bool:
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-4, rtol=1e-4) for a, b in pairs)


def _same_conv(original: Callable[..., Any]) -> bool:
    """With and without a bias and an activation."""
    x, weight, bias = _random(2, 6, 5), _random(6, 4, seed=1), _random(6, seed=2)
    with torch.no_grad(), suppress(Exception):
        return all(
            _close(original(x, weight, b, activation=activation), causal_conv(x, weight, b, activation))
            for b in (None, bias)
            for activation in (None, "silu")
        )
    return False


def _same_delta_rule(original: Callable[..., Any]) -> bool:
    """More tokens than a chunk has; with a decay for all keys of a head, or else one for each."""
    key_heads = {3: 2, 4: 4}  # queries and keys are shared where a head has one decay
    for dimensions, heads in key_heads.items():
        # Keys of more than length 1 would let the state grow from token to token.
        q, k, v = _random(1, 70, heads, 8), 0.3 * _random(1, 70, heads, 8, seed=1), _random(1, 70, 4, 6, seed=2)
        decay = -F.softplus(_random(1, 70, 4, *([8] if dimensions == 4 else []), seed=3))
        options: dict[str, Any] = {
            "beta": _random(1, 70, 4, seed=4).sigmoid(),
            "initial_state": None,
            "output_final_state": True,
        }
        with torch.no_grad(), suppress(Exception):
            if all(
                _close(
                    original(q, k, v, g=decay, use_qk_l2norm_in_kernel=unit, **options),
                    delta_rule(q, k, v, g=decay, use_qk_l2norm_in_kernel=unit, **options),
                )
                for unit in (True, False)
            ):
                return True
    return False


def _same_scan(original: Callable[..., Any]) -> bool:
    """More tokens than a chunk has, limits of dt, and the state, which transformers has turned."""
    x, dt, a = _random(2, 21, 4, 6), _random(2, 21, 4, seed=1), -_random(4, seed=2).exp()
    b, c = _random(2, 21, 2, 8, seed=3), _random(2, 21, 2, 8, seed=4)
    options: dict[str, Any] = {
        "D": _random(4, seed=5),
        "dt_bias": _random(4, seed=6),
        "dt_softplus": True,
        "return_final_states": True,
    }
    with torch.no_grad(), suppress(Exception):
        for limit in ((0.0, float("inf")), (0.1, 0.7)):
            theirs, state = original(x, dt, a, b, c, chunk_size=8, dt_limit=limit, **options)
            ours, turned = mamba_scan(x, dt, a, b, c, chunk_size=8, dt_limit=limit, **options)
            if not _close((theirs, state), (ours, turned.mT)):
                return False
        return True
    return False


_KNOWN: dict[str, tuple[Callable[..., Any], Callable[[Callable[..., Any]], bool]]] = {
    "causal_conv1d_fn": (causal_conv, _same_conv),
    "torch_chunk_gated_delta_rule": (delta_rule, _same_delta_rule),
    "chunk_kimi_delta_attention": (delta_rule, _same_delta_rule),
    "mamba2_chunk_scan": (mamba_scan, _same_scan),
}
