"""The kernels as an engine carries them, on an emulated GPU (`emulator`): what the compiler made, not the source.

The tests of the kernels' sources run there too, with LYNX_EMULATED_SM=90 in the environment: `make emulate`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import test_draw_kernel
import test_experts_kernels
import test_hand_over_kernels
import test_select_kernel
import test_state_kernels
import torch
from emulator import EmulatedGpu, FaultError
from kernel_process import emulated
from numpy.typing import NDArray

from lynx_trt.experts import WEIGHTS, ExpertsForm
from lynx_trt.plugins import execute
from lynx_trt.plugins.launch import CLUSTER_SM, SMS, ExpertsLaunch, MatmulLaunch, experts_launch
from lynx_trt.plugins.plans import experts_plan
from lynx_trt.plugins.shapes import SHAPES, STATES, Shape
from lynx_trt.runtime.draws import BEYOND
from lynx_trt.runtime.sampling import Sampling, draw
from lynx_trt.selection import PRESETS

Array = NDArray[Any]

# Multiplies by mma.sync, by wgmma, by tcgen05; the others are like the first.
KINDS = (80, 90, 100)
EVERY_SM = [pytest.param(sm, marks=[] if sm in KINDS else pytest.mark.slow) for sm in SMS]
# int4's other two forms have the same instructions.
HERE_TOO = [(weights, 90) for weights in WEIGHTS if weights not in ("int4_g32_zeros", "int4_g128")]
HERE_TOO += [("float", sm) for sm in KINDS]
EVERY_WEIGHTS = [
    pytest.param(weights, sm, marks=[] if (weights, sm) in HERE_TOO else pytest.mark.slow)
    for sm in SMS
    for weights in WEIGHTS
]


@pytest.fixture(autouse=True)
def on_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The helpers of the other tests run here what they interpret there, on the SM that the test sets."""
    for module in (test_draw_kernel, test_experts_kernels, test_select_kernel, test_state_kernels):
        monkeypatch.setattr(module, "on_device", lambda function, *a, **o: emulated(HERE[0], function, *a, **o))


HERE = [90]


def experts_layer(weights: str, tokens: int, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> Any:
    """One with a token that has no expert, and the last expert unused."""
    form = sizes.pop("form", ExpertsForm(weights=weights))
    layer = test_experts_kernels._layer(
        tokens, **{"experts": 5, "width": 2, "hidden": 256, "inner": 384} | sizes, form=form, dtype=dtype
    )
    layer.index[0] = -1
    return layer


def check_experts(layer: Any, launch: ExpertsLaunch | None = None) -> None:
    got = test_experts_kernels._run(layer, launch)
    quantized = layer.spec.form.quantized
    double = replace(layer, hidden=layer.hidden.double()) if quantized else layer.double()
    test_experts_kernels._check(got, double.twin(), layer.twin())


@pytest.mark.parametrize(("weights", "sm"), EVERY_WEIGHTS)
def test_experts(weights: str, sm: int) -> None:
    """The launches that ship, of a decode batch and of a prefill; weights in each form, and each instruction set."""
    HERE[0] = sm
    for tokens in (12, 150):
        check_experts(experts_layer(weights, tokens))


@pytest.mark.parametrize("sm", EVERY_SM)
def test_experts_in_float16_and_float32(sm: int) -> None:
    HERE[0] = sm
    gpt_oss = replace(SHAPES["gpt-oss-120b"].form, limit=1.5)
    check_experts(experts_layer("float", 20, torch.float16, hidden=48, inner=40, form=gpt_oss, bias=True))
    check_experts(experts_layer("float", 20, torch.float32, hidden=48, inner=40))


@pytest.mark.parametrize("sm", [90, *(pytest.param(sm, marks=pytest.mark.slow) for sm in (100, 120))])
def test_experts_by_descriptors(sm: int) -> None:
    """Copies of tensors: boxes that end outside of a matrix, and rows of other experts."""
    HERE[0] = sm
    tile = MatmulLaunch(64, 64, 64, warps=4, stages=3, descriptors=True, per_multiprocessor=1)
    for flatten, copied in ((False, False), (True, True)):
        down = replace(tile, flatten=flatten, copied=copied)
        launch = ExpertsLaunch(True, replace(tile, flatten=flatten), down, "")
        check_experts(experts_layer("float", 90, hidden=136, inner=200), launch)


# Sizes: lines past the end of rows, rows that are no multiple of a tile, and a matrix of one line a row.
AHEAD = [
    ("float", {"hidden": 200, "inner": 264}, 256, 1),
    ("float", {"hidden": 136, "inner": 72, "form": ExpertsForm(transposed=True)}, 64, 2),
    ("fp8", {}, 256, 1),
    ("int4_g32_zeros", {}, 256, 2),
]


@pytest.mark.parametrize("sm", [90, *(pytest.param(sm, marks=pytest.mark.slow) for sm in (100, 120))])
@pytest.mark.parametrize(("weights", "sizes", "prefetch", "split"), AHEAD)
def test_weights_that_are_asked_for_ahead(
    weights: str, sizes: dict[str, Any], prefetch: int, split: int, sm: int
) -> None:
    """They are those that down reads of active experts, each row's first; the result is the same, bit for bit."""
    layer = experts_layer(weights, 12, **sizes)
    tile = MatmulLaunch(16, 64, 64, warps=4, stages=3, split=split)
    results, asked = [], []
    for ahead in (0, prefetch):
        gpu = EmulatedGpu(sm, counts=True)
        results.append(step_on(gpu, layer, ExpertsLaunch(False, tile, replace(tile, prefetch=ahead), "")))
        counters = dict(gpu.launched)["down_decode_kernel"]
        assert counters is not None
        sectors, every = (
            counters.read(gpu.where["down"], layer.tensors["down"].nbytes, ahead=early) for early in (True, False)
        )
        assert (every > 0)[sectors > 0].all()
        asked.append((int((sectors > 0).sum()), int((every > 0).sum())))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert asked[0][0] == 0
    spec = layer.spec
    share = min(prefetch * split, spec.inner) / spec.inner
    assert asked[1][0] >= 0.9 * share * asked[1][1]


# It multiplies no matrices, so that the SMs differ little.
@pytest.mark.parametrize("sm", [pytest.param(sm, marks=[] if sm == 90 else pytest.mark.slow) for sm in SMS])
def test_selection(sm: int) -> None:
    HERE[0] = sm
    ways = [test_select_kernel.HELD, test_select_kernel.BLOCKS]
    ways += [test_select_kernel.CLUSTER] if sm >= CLUSTER_SM else []
    batch = test_select_kernel._router(14, 40, 4)
    for launch in ways:
        for preset, budget, floor in (("lynx", 10, 0.0), ("lynx-affinity", 9, 0.01)):
            test_select_kernel._check(batch, PRESETS[preset], budget, launch, floor)


# Kernels that another SM's tests have.
SAME = {(80, "nemotron-h"), (80, "granite-4.0-h"), (80, "kimi-linear"), (100, "granite-4.0-h"), (100, "kimi-linear")}


@pytest.mark.parametrize("sm", EVERY_SM)
@pytest.mark.parametrize("name", [name for name in STATES if "256" not in name])
def test_layers_that_keep_a_state(name: str, sm: int) -> None:
    """Real sizes of a state, two of the heads: a decode step, a prefill in chunks where there is one."""
    if (sm, name) in SAME:
        pytest.skip("as on the other SMs")
    HERE[0] = sm
    it = STATES[name]
    heads = (1, 2) if it.key_heads < it.value_heads else (2, 2)
    how: dict[str, Any] = {"rule": it.update_rule, "epsilon": it.epsilon, "per_key": it.per_key}
    for lengths, tokens in (([1, 0, 1], 1), ([52], 52)):
        sizes = (*heads, it.keys, it.values)
        test_state_kernels.check(
            test_state_kernels.attention_layer(lengths, tokens, sizes, dtype=torch.bfloat16, **how)
        )
        test_state_kernels.check(
            test_state_kernels.conv_layer(lengths, tokens, 192, it.width, dtype=torch.bfloat16, bias=it.bias)
        )


@pytest.mark.parametrize("sm", EVERY_SM)
def test_draws(sm: int) -> None:
    HERE[0] = sm
    logits = np.random.default_rng(0).standard_normal((8, 3000)).astype(np.float32) * 3
    ways = Sampling(), Sampling(0.7), Sampling(1.0, top_p=0.9), Sampling(1.0, top_k=5)
    draws = test_draw_kernel.draws_for(8, *ways)
    got, wanted = test_draw_kernel.kernels(logits, draws, None), draw(logits, draws).tolist()
    assert [row for row in range(8) if got[row] != wanted[row] and got[row] != BEYOND] == []
    assert got.count(BEYOND) <= 2  # a top-p that isn't within what is known, for the host to draw


@pytest.mark.parametrize("sm", [90, *(pytest.param(sm, marks=pytest.mark.slow) for sm in (100, 120))])
@pytest.mark.parametrize("way", ["held", "blocks", "cluster"])
def test_launches_that_begin_early(way: str, sm: int) -> None:
    """Both ops in a row, each launch as far on its way as a GPU might have it while the one before it has done nothing.

    With the metadata handed over, and with each op making its own in the workspace that the other has too.
    """
    launches, blocks_here = test_hand_over_kernels.SELECTS[way]
    for tokens, handed in ((33, True), (33, False), (1, True)):
        routing, weights = test_hand_over_kernels.inputs(tokens, budget=4)
        gpu = EmulatedGpu(sm)
        with (
            mock.patch.object(execute, "run", gpu.run),
            mock.patch.object(execute, "sm_of", return_value=sm),
            gpu.in_a_row(),
        ):
            chosen = launches, test_hand_over_kernels.LAUNCHES["decode"]
            made = test_hand_over_kernels.layer(routing, weights, chosen, blocks_here, handed)
        test_hand_over_kernels.check(made, routing, weights)


def step_on(gpu: EmulatedGpu, layer: Any, launch: ExpertsLaunch | None = None) -> torch.Tensor:
    """One run of a layer."""
    spec = layer.spec
    tensors = {name: each for name, each in layer.tensors.items() if each is not None}
    tensors["output"] = torch.empty_like(layer.hidden)
    gpu.run(experts_plan(spec, gpu.sm, 1 << (len(layer.hidden) - 1).bit_length(), launch), tensors, len(layer.hidden))
    return tensors["output"]


REAL = [
    *(("qwen3-30b-a3b", tokens) for tokens in (1, 16)),
    *((name, 16) for name in SHAPES if name.startswith(("gpt-oss", "deepseek", "qwen3-30b-a3b-"))),
]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("", 1), ("", 16), *(pytest.param(*each, marks=pytest.mark.slow) for each in REAL)],
)
def test_a_decode_step_reads_each_active_expert_once(name: str, tokens: int) -> None:
    """All of an active expert's matrices, each sector by one instruction of one warp; nothing of any other expert's.

    At the real H and I with few experts and the launches that ship for all, and at small ones.
    """
    shape = SHAPES[name] if name else Shape(8, 2, 256, 384)
    count, width = shape.experts_per_token + 4, shape.experts_per_token
    layer = experts_layer(
        "float", tokens, experts=count, width=width, hidden=shape.hidden, inner=shape.inner, form=shape.form,
        bias=shape.bias,
    )  # fmt: skip
    layer.index[0] = torch.randperm(count - 1)[:width]
    gpu = EmulatedGpu(90, size=1 << 30, multiprocessors=132, counts=True)
    sizes = (shape.experts, shape.experts_per_token, shape.hidden, shape.inner)
    step_on(gpu, layer, experts_launch(tokens, *sizes, "bfloat16", 90, form=shape.form))
    active = set(layer.index.reshape(-1).tolist())
    assert len(active) < count

    def reads(name: str) -> Array:
        every = [counters for _, counters in gpu.launched if counters is not None]
        found = sum(counters.read(gpu.where[name], layer.tensors[name].nbytes) for counters in every)
        return np.asarray(found).reshape(count, -1)

    assert {"gate_up_decode_kernel", "down_decode_kernel"} < {function for function, _ in gpu.launched}
    for matrix in ("gate_up", "down"):
        for expert in range(count):
            assert (reads(matrix)[expert] == (expert in active)).all(), (matrix, expert)
            if shape.form.quantized:
                assert ((reads(f"{matrix}_scale")[expert] > 0) == (expert in active)).all(), (matrix, expert)


def test_shared_memory_is_used_without_conflicts() -> None:
    """The tiles that ship: an instruction takes hardly more wavefronts than what it moves needs."""
    gpu = EmulatedGpu(90, counts=True)
    for tokens in (12, 150):
        step_on(gpu, experts_layer("float", tokens))
        for function, counters in gpu.launched:
            assert counters is not None
            used = counters.wavefronts.values()
            assert sum(use.taken for use in used) <= 1.1 * sum(use.least for use in used) + 64, (function, used)


def test_a_launch_that_lies_about_its_memory_is_seen() -> None:
    """Weights that are shorter than the plan thinks: the emulator sees the read that a GPU might let pass."""
    layer = experts_layer("float", 12)
    layer.index[1, 0] = 4
    short = replace(layer, down=layer.down[:4].contiguous())
    with pytest.raises(FaultError, match=r"down_decode_kernel.*in no allocation"):
        step_on(EmulatedGpu(90), short)
