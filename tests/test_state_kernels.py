"""LynxCausalConv and LynxLinearAttention: kernels against twins in float64, and the twins against transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from kernel_process import on_device
from torch import Tensor

from lynx_trt.errors import UsageError
from lynx_trt.plugins import execute
from lynx_trt.plugins.aot import compile_for
from lynx_trt.plugins.launch import SMS
from lynx_trt.plugins.plans import linear_attention_plan
from lynx_trt.plugins.shapes import STATES, ops_of
from lynx_trt.plugins.specs import CausalConvSpec, LinearAttentionSpec, Op
from lynx_trt.plugins.twins import causal_conv_twin, linear_attention_twin

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RUN = {CausalConvSpec: execute.causal_conv, LinearAttentionSpec: execute.linear_attention}
TWIN = {CausalConvSpec: causal_conv_twin, LinearAttentionSpec: linear_attention_twin}


@dataclass
class Layer:
    """A spec and the op's inputs by name; `past_state` and `lengths` are among them."""

    spec: Any
    tensors: dict[str, Tensor]

    def run(self, **options: Any) -> tuple[Tensor, Tensor]:
        # A process that shares the tensors would write into them.
        tensors = {name: each.clone() for name, each in self.tensors.items()}
        return on_device(RUN[type(self.spec)], self.spec, **tensors, **options)

    def twin(self, *, double: bool = False) -> tuple[Tensor, Tensor]:
        floats = {name: each.double() for name, each in self.tensors.items() if double and each.is_floating_point()}
        return TWIN[type(self.spec)](self.spec, **{**self.tensors, **floats})


def check(layer: Layer, **options: Any) -> None:
    """The errors are at most twice those of the twin in the same precision."""
    for got, want, usual in zip(layer.run(**options), layer.twin(double=True), layer.twin(), strict=True):
        assert (got.dtype, got.shape) == (usual.dtype, usual.shape)
        assert torch.isfinite(got).all()
        ours, usuals = (got.double() - want).abs(), (usual.double() - want).abs()
        epsilon = 2 * torch.finfo(got.dtype).eps
        assert float(ours.norm()) <= 2 * float(usuals.norm()) + epsilon * float(want.norm())
        assert float(ours.max()) <= 2 * float(usuals.max()) + epsilon * float(want.abs().max())


def conv_layer(
    lengths: list[int],
    tokens: int,
    channels: int = 40,
    width: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    activation: str = "silu",
) -> Layer:
    """`tokens` tokens a sequence."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    size = len(lengths)
    tensors = {"values": normal(size * tokens, channels), "weight": normal(channels, width)}
    tensors |= {"past_state": normal(size, width - 1, channels), "lengths": torch.tensor(lengths)}
    tensors |= {"bias": normal(channels)} if bias else {}
    return Layer(CausalConvSpec(channels, width, str(dtype).removeprefix("torch."), bias, activation), tensors)


def attention_layer(
    lengths: list[int],
    tokens: int,
    sizes: tuple[int, int, int, int] = (2, 4, 16, 16),
    *,
    dtype: torch.dtype = torch.float32,
    rule: str = "gated_delta",
    epsilon: float = 1e-6,
    per_key: bool = False,
) -> Layer:
    """`sizes` are G, N, D and M. Without normalization keys are small, as a delta rule needs them."""
    generator = torch.Generator().manual_seed(0)
    key_heads, heads, keys, values = sizes

    def normal(width: int, scale: float = 1.0) -> Tensor:
        return torch.randn((len(lengths) * tokens, width), generator=generator) * scale

    decays = heads * keys if per_key else heads
    scale = 1.0 if epsilon else keys**-0.5
    tensors = {
        "query": normal(key_heads * keys).to(dtype),
        "key": normal(key_heads * keys, scale).to(dtype),
        "value": normal(heads * values).to(dtype),
        "decay": -normal(decays).abs(),
        "beta": normal(heads).sigmoid(),
        "past_state": torch.randn((len(lengths), heads, keys, values), generator=generator),
        "lengths": torch.tensor(lengths),
    }
    kind = str(dtype).removeprefix("torch.")
    return Layer(LinearAttentionSpec(keys, values, kind, decays, key_heads, heads, rule, keys**-0.5, epsilon), tensors)


# ---- the convolution


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [False, True])
def test_conv_decode(dtype: torch.dtype, in_place: bool) -> None:
    """A token each of four sequences, one of which has none; more channels than one program has."""
    layer = conv_layer([1, 0, 1, 1], 1, 150, dtype=dtype)
    check(layer, in_place=in_place)


@pytest.mark.parametrize(
    "layer",
    [
        conv_layer([5, 0, 1, 2], 5),  # none, fewer real tokens than the state has rows, all
        conv_layer(
            [11, 3], 11, 70, 3, bias=False, activation="none"
        ),  # tokens and channels in several tiles, short ones
        conv_layer([40, 37], 40, 24, dtype=torch.bfloat16),
        conv_layer([9], 12, 8, 2, bias=False),  # a state of one row
        conv_layer([70, 1, 5, 0], 70, 72, dtype=torch.float16),  # more than a few: the other tiles
    ],
    ids=["ragged", "tiles", "bfloat16", "narrow", "prefill"],
)
def test_conv_prefill(layer: Layer) -> None:
    check(layer)
    check(layer, in_place=True)


def test_conv_steps_are_one_convolution() -> None:
    """Token after token through the state gives the bits of all at once."""
    whole = conv_layer([6, 6], 6)
    outputs, state = whole.run()
    values, past = whole.tensors["values"].reshape(2, 6, -1), whole.tensors["past_state"]
    for token in range(6):
        tensors = {**whole.tensors, "values": values[:, token].contiguous(), "past_state": past}
        output, past = Layer(whole.spec, {**tensors, "lengths": torch.ones(2, dtype=torch.int64)}).run()
        torch.testing.assert_close(output, outputs.reshape(2, 6, -1)[:, token])
    assert torch.equal(past, state)


# ---- linear attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "epsilon"), [("gated_delta", 1e-6), ("gated", 0.0)])
def test_attention_decode(dtype: torch.dtype, rule: str, epsilon: float) -> None:
    """One of three sequences has no token: its state stays as it is, to the bit."""
    layer = attention_layer([1, 0, 1], 1, dtype=dtype, rule=rule, epsilon=epsilon)
    check(layer)
    output, state = layer.run(in_place=True)
    assert torch.equal(state[1], layer.tensors["past_state"][1])
    assert not output[1].any()


@pytest.mark.parametrize(
    "layer",
    [
        attention_layer([5, 0, 2], 5),  # ragged, padded, none
        attention_layer([4, 3], 4, (1, 3, 12, 70)),  # no powers of two: D, M in two tiles; keys for all three heads
        attention_layer([4, 1], 4, (3, 3, 16, 8), per_key=True),  # a decay of each key, a narrow state
        attention_layer([4, 1], 4, (1, 2, 20, 24), per_key=True, rule="gated", epsilon=0.0, dtype=torch.bfloat16),
        attention_layer([4], 4, epsilon=0.0, dtype=torch.float16),
        attention_layer([3, 2], 3, (2, 4, 24, 16), rule="gated", epsilon=1e-5),
        attention_layer([2], 2, (1, 1, 300, 10)),  # a row of more than one warp
    ],
    ids=["ragged", "odd-sizes", "per-key", "per-key-gated", "no-epsilon", "gated-epsilon", "many-keys"],
)
def test_attention_prefill(layer: Layer) -> None:
    check(layer)
    check(layer, in_place=True)


@pytest.mark.parametrize(
    "layer",
    [
        attention_layer([40, 0, 16, 17], 40, dtype=torch.bfloat16),  # a chunk that is not full, one alone, none
        attention_layer([20, 3], 20, (1, 3, 12, 70), dtype=torch.float16),  # no powers of two, five tiles of M
        attention_layer([33, 20], 33, rule="gated", epsilon=0.0, dtype=torch.float16),
        attention_layer([17, 5], 17, (2, 4, 24, 16), rule="gated", epsilon=1e-5, dtype=torch.bfloat16),
        attention_layer([18], 18, (2, 2, 24, 16), epsilon=0.0, dtype=torch.bfloat16),
        attention_layer([1, 0, 1], 1, dtype=torch.float16),  # decode, which the other form is for
        attention_layer([37, 0, 16, 17], 37, (2, 4, 24, 40), per_key=True, dtype=torch.bfloat16),
        attention_layer([17, 5], 17, (1, 3, 12, 8), per_key=True, epsilon=0.0, dtype=torch.float16),
        attention_layer([18], 18, (1, 2, 16, 16), per_key=True, rule="gated", epsilon=0.0, dtype=torch.bfloat16),
    ],
    ids=[
        *("ragged", "odd-sizes", "gated", "gated-epsilon", "no-epsilon", "decode"),
        *("per-key", "per-key-no-epsilon", "per-key-gated"),
    ],
)
def test_attention_in_chunks(layer: Layer) -> None:
    assert len(linear_attention_plan(layer.spec, 64, chunks=True).steps) == 2
    check(layer, chunks=True)
    check(layer, chunks=True, in_place=True)


def test_a_prefill_goes_in_chunks() -> None:
    layer = attention_layer([150, 70], 150, (1, 2, 16, 16), dtype=torch.bfloat16)
    assert len(linear_attention_plan(layer.spec, 8).steps) == 2
    assert len(linear_attention_plan(layer.spec, 4).steps) == 1
    check(layer)


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"keys": 256}])
def test_what_goes_token_after_token(changes: dict[str, Any]) -> None:
    spec = replace(attention_layer([1], 1, dtype=torch.bfloat16).spec, **changes)
    assert len(linear_attention_plan(spec, 512).steps) == 1


@pytest.mark.parametrize("per_key", [False, True])
def test_alike_keys_and_strong_updates(per_key: bool) -> None:
    """Where the inverse has its largest entries: all keys the same, beta 1, no decay."""
    layer = attention_layer([48], 48, (1, 1, 16, 16), per_key=per_key, dtype=torch.bfloat16)
    layer.tensors["key"][:] = layer.tensors["key"][0]
    layer.tensors["beta"][:] = 1
    layer.tensors["decay"][:] = 0
    check(layer, chunks=True)


@pytest.mark.parametrize(("rule", "per_key"), [("gated", False), ("gated_delta", False), ("gated_delta", True)])
def test_a_state_that_is_forgotten(rule: str, per_key: bool) -> None:
    """A decay of nearly all, and then of nearly nothing: differences of sums would have lost the latter's digits."""
    layer = attention_layer([20], 20, (1, 2, 16, 16), rule=rule, per_key=per_key, dtype=torch.float16)
    layer.tensors["decay"][:] = -1e-3
    layer.tensors["decay"][3] = -1e4
    check(layer, chunks=True)


@pytest.mark.parametrize(("chunks", "per_key"), [(False, False), (True, False), (True, True)])
def test_padding_is_not_read(chunks: bool, per_key: bool) -> None:
    """NaN behind the real tokens stays there, and lengths beyond S are S."""
    layer = attention_layer([2, 3], 3, per_key=per_key, dtype=torch.float16)
    for name in ("query", "key", "value", "decay", "beta"):
        layer.tensors[name][2] = torch.nan
    output, state = layer.run(chunks=chunks)
    assert torch.isfinite(state).all()
    assert torch.isfinite(output).all()
    assert not output[2].any()
    longer = Layer(layer.spec, {**layer.tensors, "lengths": torch.tensor([2, 9])})
    assert all(torch.equal(a, b) for a, b in zip(longer.run(chunks=chunks), (output, state), strict=True))


# ---- the twins are what transformers computes


def test_the_twin_of_the_gated_delta_rule() -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    layer = attention_layer([5, 5], 5, (2, 4, 16, 12))
    assert layer.spec.epsilon == pytest.approx(1e-6)
    shapes = {"query": (2, 5, 2, 16), "key": (2, 5, 2, 16), "value": (2, 5, 4, 12)}
    q, k, v = (layer.tensors[name].reshape(shape) for name, shape in shapes.items())
    g, b = (layer.tensors[name].reshape(2, 5, 4) for name in ("decay", "beta"))
    want = modeling.torch_recurrent_gated_delta_rule(
        q, k, v, g, b, layer.tensors["past_state"], True, use_qk_l2norm_in_kernel=True
    )
    output, state = layer.twin()
    torch.testing.assert_close(output.reshape(want[0].shape), want[0])
    torch.testing.assert_close(state, want[1])


def test_the_twin_of_kimi_delta_attention() -> None:
    modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    layer = attention_layer([5, 5], 5, (3, 3, 16, 12), per_key=True)
    q, k, v, g = (layer.tensors[name].reshape(2, 5, 3, -1) for name in ("query", "key", "value", "decay"))
    beta = layer.tensors["beta"].reshape(2, 5, 3)
    want = modeling.recurrent_kimi_delta_attention(
        q, k, v, g, beta, layer.tensors["past_state"], True, use_qk_l2norm_in_kernel=True
    )
    output, state = layer.twin()
    torch.testing.assert_close(output.reshape(want[0].shape), want[0])
    torch.testing.assert_close(state, want[1])


# ---- what kernels are made for


CONV = CausalConvSpec(64, 4, "float16", True, "silu")
ATTENTION = LinearAttentionSpec(128, 64, "float16", 8, 2, 8, "gated", 1.0, 0.0)


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        (CONV, {"channels": 0}, "have 0 channels"),
        (CONV, {"width": 1}, "are 1 wide: the kernels take 2 to 16"),
        (CONV, {"activation": "gelu"}, "activation is 'gelu': it has to be one of none, silu"),
        (CONV, {"dtype": "int8"}, "dtype is 'int8'"),
        (ATTENTION, {"keys": 2048}, "of 2048 keys by 64 values: the kernels take 1 to 1024 keys"),
        (ATTENTION, {"key_heads": 3}, "3 and 8: the latter has to be a multiple"),
        (ATTENTION, {"key_heads": 0}, "0 and 8: the latter has to be a multiple"),
        (ATTENTION, {"decays": 64}, "a token has 64 decays: it has to be 8, one for each head, or 1024, one for each"),
        (ATTENTION, {"update_rule": "delta"}, "update_rule is 'delta': it has to be one of gated, gated_delta"),
        (ATTENTION, {"epsilon": -1.0}, r"epsilon is -1\.0"),
        (ATTENTION, {"dtype": "float64"}, "dtype is 'float64'"),
    ],
)
def test_what_no_kernel_is_made_for(spec: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(spec, **changes)


def _spills(name: str, sms: list[int], dtype: str = "bfloat16") -> list[Any]:
    kernels = compile_for(ops_of(name, dtype), sms, jobs=2)
    functions = {"causal_conv_kernel", "linear_attention_kernel"}
    if name != "granite-4.0-h-256":
        chunks = "linear_attention_key_chunks_kernel" if STATES[name].per_key else "linear_attention_chunks_kernel"
        functions |= {chunks, "linear_attention_prefill_kernel"}
    assert {cubin.function for cubin in kernels.cubins} == functions
    allowed = {"linear_attention_prefill_kernel": 80} if name in STATES and STATES[name].per_key else {}
    return [(it.function, it.sm, it.spills) for it in kernels.cubins if it.spills > allowed.get(it.function, 0)]


def test_nothing_spills() -> None:
    assert _spills("nemotron-h", [89]) == []


@pytest.mark.slow
def test_short_convolutions_spill_on_no_sm() -> None:
    """Alone in their layer, as in LFM2, and the widest."""
    specs = [CausalConvSpec(2048, 3, "bfloat16", False, "none"), CausalConvSpec(12288, 4, "float32", True, "silu")]
    kernels = compile_for([Op(spec, ((1, 128), (512, 16384))) for spec in specs], SMS, jobs=2)
    assert [cubin for cubin in kernels.cubins if cubin.spills] == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", STATES)
def test_nothing_spills_on_any_sm(name: str, dtype: str) -> None:
    """The layers of all models that we name: two minutes."""
    assert _spills(name, list(SMS), dtype) == []
