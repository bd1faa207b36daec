"""LynxExperts' kernels against their PyTorch twins, intermediates first: our error against float64 is at most twice
that of PyTorch in the same precision.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from kernel_process import on_device
from numpy.typing import NDArray
from torch import Tensor

from lynx_trt import fp8, mxfp4
from lynx_trt.experts import ACTIVATIONS, ExpertsForm
from lynx_trt.experts import experts as experts_ref
from lynx_trt.plugins import execute, experts_fp4, experts_fp8, experts_int4
from lynx_trt.plugins.launch import ExpertsLaunch, MatmulLaunch
from lynx_trt.plugins.plans import experts_plan
from lynx_trt.plugins.specs import ExpertsSpec
from lynx_trt.plugins.tune import random_quantized
from lynx_trt.plugins.twins import combine_twin, dequantize_twin, dispatch_twin, down_twin, experts_twin, gate_up_twin

SWIGLU = ExpertsForm()
GPT_OSS = ExpertsForm(transposed=True, interleaved=True, alpha=1.702, limit=1.5, up_offset=1.0)

# Tiles that tiny layers have several of. Decode: one tile of 16 pairs an expert up to 16 tokens, several beyond.
_TILE = MatmulLaunch(16, 16, 32, warps=4, stages=2)
DECODE = ExpertsLaunch(False, _TILE, _TILE, "")
SWAPPED = ExpertsLaunch(False, replace(_TILE, swap=True), replace(_TILE, swap=True), "")
# Three programs share a sum over I, in pieces that don't come out even.
SPLIT = ExpertsLaunch(False, _TILE, replace(_TILE, split=3), "")
PREFILL = ExpertsLaunch(True, replace(_TILE, per_multiprocessor=1), replace(_TILE, per_multiprocessor=1), "")
_COPIED = replace(_TILE, descriptors=True, per_multiprocessor=1)
DESCRIPTORS = ExpertsLaunch(True, _COPIED, _COPIED, "")
# Loads ahead of the next item, and the pairs of down by a descriptor of rows that belong to other experts too.
AHEAD = ExpertsLaunch(True, replace(_COPIED, flatten=True), replace(_COPIED, flatten=True, copied=True), "")
LAUNCHES = {
    "decode": DECODE,
    "swapped": SWAPPED,
    "split": SPLIT,
    "prefill": PREFILL,
    "descriptors": DESCRIPTORS,
    "ahead": AHEAD,
}

# Of PyTorch's error in that precision, that of rounding the result alone.
EPSILON = {torch.float32: 2e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Layer:
    """A layer and a batch for it, all random."""

    spec: ExpertsSpec
    hidden: Tensor
    index: Tensor
    weight: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        names = ("hidden", "index", "weight", "gate_up", "down", "gate_up_bias", "down_bias")
        return {name: getattr(self, name) for name in (*names, "gate_up_scale", "down_scale")}

    def double(self) -> Layer:
        """The same in float64."""
        floats = {name: each.double() for name, each in self.tensors.items() if each is not None and _is_float(each)}
        return replace(self, **floats)

    def twin(self) -> Tensor:
        return experts_twin(self.spec.form, **self.tensors)  # type: ignore[arg-type]


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point


def _layer(
    tokens: int,
    experts: int = 5,
    width: int = 2,
    hidden: int = 48,
    inner: int = 40,
    *,
    form: ExpertsForm = SWIGLU,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
) -> Layer:
    """By default H is a multiple of no tile and I of one of its two, and an expert (the last) is empty."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    rows = 2 * inner if form.gated else inner
    gate_up = normal(experts, rows, hidden, scale=1.5 * hidden**-0.5)
    down = normal(experts, hidden, inner, scale=inner**-0.5)
    if form.transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    reachable = max(experts - 1, width)
    index = torch.stack([torch.randperm(reachable, generator=generator)[:width] for _ in range(tokens)])
    weight = torch.rand((tokens, width), generator=generator)
    biases = (normal(experts, rows), normal(experts, hidden)) if bias else (None, None)
    spec = ExpertsSpec(experts, width, hidden, inner, str(dtype).removeprefix("torch."), form, bias)
    layer = Layer(spec, normal(tokens, hidden), index, weight, gate_up, down, *biases)
    return _quantized(layer) if form.quantized else layer


def _quantized(layer: Layer) -> Layer:
    """With random weights of about the same size as those it has."""
    generator, kind, dtype = torch.Generator().manual_seed(1), layer.spec.form.weights, layer.hidden.dtype
    found: dict[str, Tensor] = {}
    for name in ("gate_up", "down"):
        found |= random_quantized(kind, name, tuple(getattr(layer, name).shape), generator, dtype)
    return replace(layer, **found)


def _run(layer: Layer, launch: ExpertsLaunch | None = DECODE) -> Tensor:
    return on_device(execute.experts, layer.spec, **layer.tensors, launch=launch)


def _check(got: Tensor, want: Tensor, usual: Tensor) -> None:
    """The error is at most twice that of `usual`, by norm and at the worst place."""
    assert torch.isfinite(got).all()
    epsilon = EPSILON[usual.dtype]
    ours, usuals = (got.double() - want).abs(), (usual.double() - want).abs()
    assert float(ours.norm()) <= 2 * float(usuals.norm()) + epsilon * float(want.norm())
    worst = divmod(int(ours.argmax()), want.shape[-1])
    bound = 2 * float(usuals.max()) + epsilon * float(want.abs().max())
    assert float(ours.max()) <= bound, f"at {worst}: {got[worst]}, {want[worst]} by float64"


def _check_layer(layer: Layer, launch: ExpertsLaunch | None = DECODE) -> None:
    _check(_run(layer, launch), layer.double().twin(), layer.twin())


def _plan_regions(spec: ExpertsSpec, tensors: dict[str, Tensor], launch: ExpertsLaunch) -> dict[str, Tensor]:
    tokens = len(tensors["hidden"])
    return execute.run(experts_plan(spec, execute.sm_of(tensors["hidden"]), tokens, launch), tensors, tokens)


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("form", [SWIGLU, GPT_OSS], ids=["swiglu", "gpt_oss"])
def test_intermediates(form: ExpertsForm, launch: str) -> None:
    """Each kernel's own output, in the layout of its workspace."""
    layer = _layer(20, form=form, dtype=torch.bfloat16, bias=True)
    layer.index[3] = -1  # a token with no expert
    tensors = {name: each for name, each in layer.tensors.items() if each is not None}
    tensors["output"] = torch.empty_like(layer.hidden)
    regions = on_device(_plan_regions, layer.spec, tensors, LAUNCHES[launch])
    dispatch = dispatch_twin(layer.index, 5)
    used = int(dispatch[1 + int(dispatch[0])])
    assert torch.equal(regions["dispatch"].view(torch.int32)[12 : 12 + used], dispatch[12 : 12 + used])

    def inner(of: Layer) -> Tensor:
        return gate_up_twin(form, of.hidden, of.gate_up, dispatch, experts_per_token=2, bias=of.gate_up_bias)

    def partial(of: Layer) -> Tensor:
        return down_twin(form, inner(of), of.down, dispatch, bias=of.down_bias)

    got = regions["inner"].view(torch.bfloat16).reshape(40, 40)
    _check(got[:used], inner(layer.double())[:used], inner(layer)[:used])
    where = regions["where"].view(torch.int32)[dispatch[12 : 12 + used]]
    assert torch.equal(where, torch.arange(used, dtype=torch.int32))
    got = regions["partial"].view(torch.float32).reshape(40, -1, 48).sum(dim=1)
    _check(got[:used], partial(layer.double())[:used], partial(layer)[:used])
    got[used:] = 0
    _check(combine_twin(got, dispatch, layer.weight, experts=5), layer.double().twin(), layer.twin())


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize(
    "layer",
    [
        pytest.param({"tokens": 1}, id="one_token"),
        pytest.param({"tokens": 3, "experts": 1, "width": 1}, id="one_expert"),
        pytest.param({"tokens": 4, "experts": 3, "width": 3}, id="every_expert_for_every_token"),
        pytest.param({"tokens": 16, "hidden": 64, "inner": 32}, id="sizes_are_multiples_of_the_tiles"),
        pytest.param({"tokens": 17, "hidden": 40, "inner": 24}, id="a_pair_more_than_a_tile"),
        pytest.param({"tokens": 50, "experts": 2, "width": 1}, id="all_tokens_on_one_expert"),
    ],
)
def test_batches(layer: dict[str, Any], launch: str) -> None:
    _check_layer(_layer(**layer), LAUNCHES[launch])


@pytest.mark.parametrize("launch", ["decode", "prefill", "descriptors"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts(interleaved: bool, transposed: bool, launch: str) -> None:
    form = replace(GPT_OSS, transposed=transposed, interleaved=interleaved)
    _check_layer(_layer(5, form=form, bias=True), LAUNCHES[launch])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, gated: bool) -> None:
    """With a limit that bites."""
    form = ExpertsForm(activation, gated=gated, limit=0.7, alpha=1.3)
    layer = _layer(5, form=form)
    _check_layer(layer)
    # The twin is held to the reference here, where it has all forms to itself.
    tensors = {name: None if each is None else each.numpy() for name, each in layer.double().tensors.items()}
    np.testing.assert_allclose(layer.double().twin().numpy(), experts_ref(form, **tensors), rtol=1e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize("launch", ["decode", "descriptors"])
def test_ungated_experts_with_biases(launch: str) -> None:
    _check_layer(_layer(5, form=ExpertsForm("relu2", gated=False, transposed=True), bias=True), LAUNCHES[launch])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 40])
def test_estimated_launches(tokens: int, dtype: torch.dtype) -> None:
    """The launch that ships, of decode and (20 tokens an expert: 32; 512 would be too slow here) its largest tiles."""
    _check_layer(_layer(tokens, experts=4, dtype=dtype, form=GPT_OSS, bias=True), None)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_inactive_experts_are_not_read_and_empty_slots_add_nothing(launch: str) -> None:
    """NaN in whatever must not be read: the weights of unused experts, the weight of an empty slot."""
    layer = _layer(6, bias=True)
    layer.index[:, 1] = -1
    layer.index[2] = -1
    layer.index[4, 0] = 5  # past the last expert: nobody's
    layer.index[5] = torch.tensor([-1, 3])
    want = layer.double().twin()
    unused = [expert for expert in range(5) if expert not in layer.index]
    assert unused
    for each in (layer.gate_up, layer.down, layer.gate_up_bias, layer.down_bias):
        assert each is not None
        each[unused] = float("nan")
    layer.weight[layer.index < 0] = float("nan")
    got = _run(layer, LAUNCHES[launch])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert not got[[2, 4]].any()


def test_an_expert_named_twice_counts_twice() -> None:
    """Routers don't, but then a token can have more pairs of an expert than the tile has room for."""
    layer = _layer(16)
    layer.index[:] = 2
    _check_layer(layer, DECODE)


@pytest.mark.parametrize("form", [ExpertsForm("relu", gated=False, limit=1.0), ExpertsForm(limit=1.0)])
def test_nan_in_one_row_stays_there(form: ExpertsForm) -> None:
    """Clamps and relu must not turn NaN into a number, nor may it reach another token."""
    layer = _layer(6, form=form)
    clean = _run(layer)
    layer.hidden[2, 5] = float("nan")
    got = _run(layer)
    assert got[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("launch", ["decode", "prefill"])
def test_the_same_bits_in_any_company(launch: str) -> None:
    """A token's result does not depend on the rest of the batch, nor on the run."""
    layer = _layer(16, dtype=torch.bfloat16)
    every = _run(layer, LAUNCHES[launch])
    assert torch.equal(every, _run(layer, LAUNCHES[launch]))
    some = replace(layer, hidden=layer.hidden[4:9], index=layer.index[4:9], weight=layer.weight[4:9])
    assert torch.equal(every[4:9], _run(some, LAUNCHES[launch]))


def test_given_metadata() -> None:
    """A node that has LynxSelect's metadata as an input makes none."""
    layer = _layer(7)
    spec = replace(layer.spec, dispatch_given=True)
    got = on_device(execute.experts, spec, **layer.tensors, dispatch=dispatch_twin(layer.index, 5), launch=DECODE)
    assert torch.equal(got, _run(layer))


# ------------------------------------------------------------------------------------------------ quantized weights

MXFP4, FP8 = ExpertsForm(weights="mxfp4"), ExpertsForm(weights="fp8")
GPT_OSS_ROWS = replace(GPT_OSS, transposed=False)
# H and I, which are multiples of no deeper tile: three and five blocks of 32; two, three and one of 128. Of int4 the
# other two combinations of blocks and zero points are run once, and so is NVFP4, which is MXFP4 but for its scales.
SIZES = {"mxfp4": (96, 160), "fp8": (256, 128), "int4_g32_zeros": (160, 96), "int4_g128": (384, 128)}
ALL_SIZES = SIZES | {"int4_g32": SIZES["int4_g32_zeros"], "int4_g128_zeros": SIZES["int4_g128"], "nvfp4": (80, 112)}
_DEEP = replace(_TILE, block_d=128)
QUANTIZED_LAUNCHES = {
    **{name: LAUNCHES[name] for name in ("decode", "swapped", "split", "prefill")},
    "prefill_swapped": ExpertsLaunch(True, *(replace(each, swap=True) for each in (PREFILL.gate_up, PREFILL.down)), ""),
    # Of MXFP4 deeper than a block, and than what is left at the end of a row.
    "deep": ExpertsLaunch(False, _DEEP, _DEEP, ""),
}


def _quantized_layer(tokens: int, weights: str, form: ExpertsForm = SWIGLU, **how: Any) -> Layer:
    hidden, inner = ALL_SIZES[weights]
    return _layer(tokens, hidden=hidden, inner=inner, form=replace(form, weights=weights), **how)


@pytest.mark.parametrize("weights", SIZES)
@pytest.mark.parametrize("launch", QUANTIZED_LAUNCHES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantized_weights(dtype: torch.dtype, launch: str, weights: str) -> None:
    layer = _quantized_layer(20, weights, GPT_OSS_ROWS, bias=True, dtype=dtype)
    _check_layer(layer, QUANTIZED_LAUNCHES[launch])


@pytest.mark.parametrize("weights", sorted(ALL_SIZES.keys() - SIZES.keys()))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_blocks_and_scales(dtype: torch.dtype, weights: str) -> None:
    for launch in ("deep", "prefill_swapped"):
        _check_layer(_quantized_layer(20, weights, dtype=dtype), QUANTIZED_LAUNCHES[launch])


@pytest.mark.parametrize("weights", SIZES)
@pytest.mark.parametrize("launch", ["decode", "prefill"])
@pytest.mark.parametrize(
    "layer",
    [
        pytest.param({"tokens": 1}, id="one_token"),
        pytest.param({"tokens": 17, "form": ExpertsForm("relu2", gated=False)}, id="ungated"),
        pytest.param({"tokens": 5, "form": ExpertsForm(interleaved=True), "experts": 2}, id="interleaved"),
    ],
)
def test_forms_of_quantized_weights(layer: dict[str, Any], launch: str, weights: str) -> None:
    _check_layer(_quantized_layer(weights=weights, dtype=torch.bfloat16, **layer), QUANTIZED_LAUNCHES[launch])


@pytest.mark.parametrize("weights", SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantized_weights_by_the_launches_that_ship(dtype: torch.dtype, weights: str) -> None:
    for tokens in (3, 40):  # 20 an expert: tiles of 32
        _check_layer(_quantized_layer(tokens, weights, GPT_OSS_ROWS, experts=4, bias=True, dtype=dtype), None)


@pytest.mark.parametrize("weights", ALL_SIZES)
def test_the_twin_of_quantized_weights_is_the_reference(weights: str) -> None:
    layer = _quantized_layer(5, weights, GPT_OSS_ROWS, bias=True, dtype=torch.bfloat16)
    double = layer.double()
    # Scales are what they are, and NumPy has no bfloat16.
    scales = {name: getattr(layer, name) for name in ("gate_up_scale", "down_scale")}
    double = replace(double, **{name: each.float() if _is_float(each) else each for name, each in scales.items()})
    tensors = {name: None if each is None else each.numpy() for name, each in double.tensors.items()}
    want = experts_ref(layer.spec.form, **tensors)  # type: ignore[arg-type]
    np.testing.assert_allclose(double.twin().numpy(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weights", SIZES)
@pytest.mark.parametrize("launch", ["decode", "prefill"])
def test_quantized_weights_of_inactive_experts_are_not_read(launch: str, weights: str) -> None:
    layer = _quantized_layer(6, weights, dtype=torch.bfloat16)
    unused = [expert for expert in range(5) if expert not in layer.index]
    assert unused
    want, usual = layer.double().twin(), layer.twin()
    for each in (layer.gate_up_scale, layer.down_scale):
        assert each is not None
        each[unused] = -1 if each.dtype == torch.int8 else torch.nan  # of MXFP4 a byte of 255 is NaN
    _check(_run(layer, QUANTIZED_LAUNCHES[launch]), want, usual)


def _execute(assembly: str, given: str, word: int) -> list[int]:
    """What the instructions make of an int32 that is given: $0 and those that follow it."""
    registers = {given: word, "0": 0}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in re.findall(r"^\s*([a-z][\w.]+ [^;{}]+);$", assembly, re.MULTILINE):
        name, operands = line.split(" ", 1)
        target, *others = [each.strip() for each in operands.split(",")]
        values = [value(each) for each in others]
        match name:
            case "and.b32":
                result = values[0] & values[1]
            case "shl.b32":
                result = values[0] << values[1]
            case "shr.u32":
                result = values[0] >> values[1]
            case "mul.lo.u32":
                result = values[0] * values[1]
            case "lop3.b32":
                assert values[3] == 0xEA  # (a & b) | c, as each bit of it says
                assert all(0xEA >> n & 1 == (n >> 2 & n >> 1 & 1 | n & 1) for n in range(8))
                result = values[0] & values[1] | values[2]
            case "prmt.b32":
                both = values[0] | values[1] << 32
                result = sum((both >> 8 * (values[2] >> 4 * n & 7) & 255) << 8 * n for n in range(4))
            case _:
                raise AssertionError(line)
        registers[target] = result & 0xFFFFFFFF
    return [registers[f"${number}"] for number in range(int(given[1:]))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("module", "given", "table"), [(experts_fp4, "$4", mxfp4.PAIRS), (experts_fp8, "$2", fp8.VALUES[:, None])]
)
def test_instructions(module: ModuleType, given: str, table: NDArray[np.float32], dtype: torch.dtype) -> None:
    """The interpreter has another way than these instructions: each byte, among others that must not matter."""
    kind = str(dtype).removeprefix("torch.").upper()
    bias = getattr(module, f"BIAS_{kind}").value
    # What is NaN in FP8 is a number in these: build refuses it.
    known = [byte for byte in range(256) if np.isfinite(table[byte]).all()]
    assert len(known) == (256 if given == "$4" else 254)
    for byte in known:
        others = [known[(byte * 7 + 13 * place) % len(known)] for place in range(4)]
        for place in range(4):
            four = [byte if n == place else other for n, other in enumerate(others)]
            words = _execute(
                getattr(module, f"_TO_{kind}").value, given, sum(each << 8 * n for n, each in enumerate(four))
            )
            bits = torch.tensor([half for word in words for half in (word & 0xFFFF, word >> 16)], dtype=torch.int32)
            found = bits.to(torch.int16).view(dtype).double() * 2.0**bias
            want = table[np.array(four)].T.reshape(-1)
            assert found.tolist() == want.tolist()
            assert torch.equal(found.signbit(), torch.from_numpy(np.signbit(want)))


@pytest.mark.parametrize(("dtype", "zero"), [(torch.float16, 16), (torch.bfloat16, 0)])
def test_instructions_of_int4(dtype: torch.dtype, zero: int) -> None:
    """Each byte; a value, less a zero point, is exact behind the large number that it is added to."""
    kind = str(dtype).removeprefix("torch.").upper()
    large = getattr(experts_int4, f"LARGE_{kind}").value
    for byte in range(256):
        four = [(byte * factor + 13 * place) % 256 for place, factor in enumerate((1, 3, 5, 7))]
        word = sum(each << 8 * n for n, each in enumerate(four))
        words = _execute(getattr(experts_int4, f"_TO_{kind}").value, "$4", word)
        bits = torch.tensor([half for word in words for half in (word & 0xFFFF, word >> 16)], dtype=torch.int32)
        found = bits.to(torch.int16).view(dtype) - torch.tensor(large + zero, dtype=dtype)
        assert found.tolist() == [(each & 15) - zero for each in four] + [(each >> 4) - zero for each in four]


@pytest.mark.parametrize("weights", ALL_SIZES)
def test_the_twin_stays_on_the_device_of_its_tensors(weights: str) -> None:
    """On a GPU a tensor of the host beside it is an error, as it is on the device that has no memory."""
    layer = _quantized_layer(2, weights, dtype=torch.bfloat16)
    assert layer.gate_up_scale is not None
    matrix = dequantize_twin(weights, layer.gate_up.to("meta"), layer.gate_up_scale.to("meta"), torch.bfloat16)
    assert matrix.device.type == "meta"
    assert matrix.shape == (5, 2 * ALL_SIZES[weights][1], ALL_SIZES[weights][0])
