"""The kernels that ship, at the sizes of real models on a GPU: compiled ahead of time, launched by the CUDA driver."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_common import Options
from gpu_compile import CLUSTERS, cluster_plan
from gpu_layer import (
    MODELS,
    ROUTERS,
    Kernels,
    Layer,
    errors,
    floored,
    make_batch,
    make_layer,
    ops_for,
    ours,
    restrict,
    selection_tensors,
    specs_of,
    supported_sm,
)
from torch import Tensor

from lynx_trt.plugins import execute
from lynx_trt.plugins.launch import CLUSTER_SM
from lynx_trt.plugins.shapes import SHAPES
from lynx_trt.plugins.specs import DrawSpec, SelectSpec
from lynx_trt.plugins.twins import dispatch_twin
from lynx_trt.runtime.draws import BEYOND
from lynx_trt.runtime.sampling import Sampling, draw, draws_of
from lynx_trt.selection import PRESETS
from lynx_trt.selection import select as select_ref

DRY = "LYNX_GPU_DRY" in os.environ
# One token; a decode batch in one tile an expert; one in several; the first prefill; the largest tiles.
TOKENS = (1, 20) if DRY else (1, 16, 128, 1024, 4096)
DEVICE = torch.device("cpu" if DRY else "cuda")


def every(models: tuple[str, ...]) -> Any:
    """A model's tests are one process', which holds its weights."""
    return pytest.mark.parametrize("model", [pytest.param(m, marks=pytest.mark.xdist_group(m)) for m in models])


# In a dry run all sizes are the same.
FORMS = tuple({SHAPES[model].form: model for model in MODELS}.values())
EVERY_MODEL, EVERY_ROUTER = every(FORMS if DRY else MODELS), every(ROUTERS[:1] if DRY else ROUTERS)


def options(dtype: str, *, jit: bool = False) -> Options:
    return Options(Path(), 0.0, DRY, MODELS, dtype, jit, None)


def sm_here() -> int:
    return CLUSTER_SM if DRY else supported_sm()


@functools.lru_cache(maxsize=1)
def layer_of(name: str, dtype: str) -> Layer:
    return make_layer(name, options(dtype))


@functools.lru_cache
def kernels_for(name: str, dtype: str, tokens: int, jit: bool = False) -> Kernels:
    ops = ops_for([specs_of(name, dtype, dry=DRY)], [tokens])
    kernels = Kernels(ops, options(dtype, jit=jit))
    assert jit or kernels.how == ("interpreted" if DRY else "cubins"), kernels.how
    return kernels


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [*((tokens, "bfloat16") for tokens in TOKENS), *((tokens, "float16") for tokens in TOKENS[1::2])],
)
@EVERY_MODEL
def test_error_is_at_most_twice_that_of_pytorch(model: str, dtype: str, tokens: int) -> None:
    """The criterion that ships, by norm; all forms of the layer at once."""
    layer = layer_of(model, dtype)
    batch = make_batch(layer, tokens, 0, DEVICE)
    if tokens <= 128:
        batch = restrict(layer, batch, max(batch.active // 2, 1))
    kernels = kernels_for(model, dtype, tokens)
    outputs = {
        name: ours(kernels, layer, [batch], **form)()[0].clone()
        for name, form in {
            "experts": {"whole": False},
            "layer": {"whole": True},
            "apart": {"whole": True, "handed": False},
        }.items()
    }
    found = errors(layer, batch, outputs)
    for name in outputs:
        # A token of a few values tells little of an error's size.
        assert found[name]["error"] <= 2 * found["pytorch"]["error"] + 0.01 * DRY, (name, found)
        assert torch.isfinite(outputs[name]).all()


@pytest.mark.parametrize("tokens", TOKENS[1::2])
@EVERY_MODEL
def test_the_same_bits_twice_and_however_they_are_launched(model: str, tokens: int) -> None:
    """Deterministic, and the compiler ahead of time makes what the compiler at run time makes."""
    layer = layer_of(model, "bfloat16")
    batch = make_batch(layer, tokens, 0, DEVICE)
    run = ours(kernels_for(model, "bfloat16", tokens), layer, [batch], whole=True)
    first = run()[0].clone()
    for _ in range(1 if DRY else 5):
        assert torch.equal(run()[0], first)
    other = ours(kernels_for(model, "bfloat16", tokens, True), layer, [batch], whole=True)()[0]
    assert torch.equal(other, first)


@pytest.mark.skipif(DRY, reason="graphs are CUDA's")
@pytest.mark.xdist_group("qwen3-30b-a3b")
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_graph_takes_new_inputs(tokens: int) -> None:
    """Captured once, replayed on another batch that was written over the first: nothing is decided on the host."""
    layer = layer_of("qwen3-30b-a3b", "bfloat16")
    kernels = kernels_for("qwen3-30b-a3b", "bfloat16", tokens)
    held, other = (make_batch(layer, tokens, seed, DEVICE) for seed in (0, 3))
    other = replace(other, budget=torch.full_like(other.budget, 7), floor=torch.full_like(other.floor, 0.002))
    want = ours(kernels, layer, [other], whole=True)()[0].clone()
    run = ours(kernels, layer, [held], whole=True)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (output,) = run()
    for name in ("hidden", "choice", "topk_index", "topk_weight", "budget", "floor", "token_mask"):
        getattr(held, name).copy_(getattr(other, name))
    graph.replay()
    assert torch.equal(output, want)


def check_selection(model: str, tokens: int, by: str, run: Callable[[SelectSpec, dict[str, Tensor]], None]) -> None:
    """What `run` makes of a batch is the reference's, index by index, with a masked and a broken row."""
    experts, select = specs_of(model, "bfloat16", dry=DRY)
    layer = Layer(model, experts, select, {})
    batch = make_batch(layer, tokens, 0, DEVICE)
    if tokens > 2:
        batch.token_mask[-1] = False
        batch.choice[-2, 3] = float("nan")
    if by == "floor":
        batch = floored(layer, batch, batch.active / 2)
    else:
        batch = restrict(layer, batch, max(experts.experts // 4, 2))
    spec = replace(select, dispatch_taken=True)
    tensors = selection_tensors(batch, spec)
    run(spec, tensors)
    given = (batch.choice, batch.choice, batch.topk_index, batch.topk_weight)
    want = select_ref(
        replace(PRESETS["lynx"], guarantee=0),
        *(each.cpu().numpy() for each in given),
        budget=int(batch.budget),
        floor=float(batch.floor),
        token_mask=batch.token_mask.cpu().numpy(),
    )
    np.testing.assert_array_equal(tensors["index"].cpu().numpy(), want.index)
    np.testing.assert_allclose(tensors["weight"].cpu().numpy(), want.weight, rtol=2e-7)
    assert int(tensors["active"]) == len(want.kept)
    expected = dispatch_twin(torch.from_numpy(want.index), experts.experts)
    active = int(expected[0])
    pairs = int(expected[1 + active])
    got = tensors["dispatch"].cpu()
    begin = 2 + 2 * experts.experts
    for first, last in ((0, 2 + active), (2 + experts.experts, 2 + experts.experts + active), (begin, begin + pairs)):
        assert torch.equal(got[first:last], expected[first:last])


@pytest.mark.parametrize("by", ["budget", "floor"])
@pytest.mark.parametrize("tokens", [1, 2, 33] if DRY else [1, 2, 16, 33, 128, 512])
@EVERY_ROUTER
def test_selection_is_the_reference(model: str, tokens: int, by: str) -> None:
    """With the launches that ship."""

    def run(spec: SelectSpec, tensors: dict[str, Tensor]) -> None:
        kernels_for(model, "bfloat16", tokens).prepare(spec, tensors, tokens)()

    check_selection(model, tokens, by, run)


@pytest.mark.parametrize(
    ("tokens", "programs", "tile", "block"),
    CLUSTERS[:2] if DRY else CLUSTERS,
)
@pytest.mark.parametrize("by", ["budget", "floor"])
@EVERY_ROUTER
def test_selection_in_a_cluster_is_the_reference(
    model: str, by: str, tokens: int, programs: int, tile: int, block: int
) -> None:
    """Whatever ships; again and again, since what one program reads too early is there by chance sometimes."""
    if (sm := sm_here()) < CLUSTER_SM:
        pytest.skip(f"there are no clusters on SM {sm}")

    def run(spec: SelectSpec, tensors: dict[str, Tensor]) -> None:
        again, _ = execute.prepare(cluster_plan(spec, sm, programs, tile, block), tensors, tokens)
        for _ in range(1 if DRY else 50):
            for name in ("index", "weight", "active", "dispatch"):
                tensors[name].fill_(77)
            again()

    check_selection(model, tokens, by, run)


@EVERY_MODEL
def test_inactive_experts_are_not_read(model: str) -> None:
    """NaN in every expert that the selection left out; of integers all bits, which is NaN where they have one."""
    layer = layer_of(model, "bfloat16")
    batch = restrict(layer, make_batch(layer, 16, 0, DEVICE), 4)
    kernels = kernels_for(model, "bfloat16", 16)
    want = ours(kernels, layer, [batch], whole=True)()[0].clone()
    unused = torch.ones(layer.experts.experts, dtype=torch.bool, device=DEVICE)
    unused[batch.index[batch.index >= 0]] = False
    poisoned = replace(layer, weights={name: each.clone() for name, each in layer.weights.items()})
    for each in poisoned.weights.values():
        each[unused] = float("nan") if each.dtype.is_floating_point else -1
    assert torch.equal(ours(kernels, poisoned, [batch], whole=True)()[0], want)


@pytest.mark.skipif(DRY, reason="the interpreter takes most of a minute, and tests/test_draw_kernel.py are the same")
@pytest.mark.parametrize("vocabulary", [32_000, 151_936])
def test_draws_of_large_vocabularies(vocabulary: int) -> None:
    """Greedy rows exactly; others where the cumulative weights, in float64, have reached the draw, but for rounding."""
    rng = np.random.default_rng(vocabulary)
    logits = (rng.standard_normal((24, vocabulary)) * rng.choice([1, 4], (24, 1))).astype(np.float32)
    ways = [Sampling(), Sampling(0.7), Sampling(1.0, 0.9, top_k=40), Sampling(0.6, 0.9)]
    draws = draws_of(24, [(row, ways[row % 4], np.random.default_rng(row)) for row in range(24)])
    inputs = (logits, draws.scale, draws.top_p, draws.top_k, draws.uniform)
    tensors = [torch.from_numpy(each).to(DEVICE) for each in inputs]
    got = execute.draw(DrawSpec(vocabulary, True), *tensors).cpu().numpy()
    again = execute.draw(DrawSpec(vocabulary, True), *tensors).cpu().numpy()
    np.testing.assert_array_equal(got, again)
    expected = draw(logits, draws)
    np.testing.assert_array_equal(got[0::4], expected[0::4])
    assert (got[2::4] == expected[2::4]).all()  # of 40 tokens an edge is hardly ever hit
    for row in range(1, 24, 4):
        weights = np.exp((logits[row] - logits[row].max()).astype(np.float64) / draws.temperature[row])
        ends = np.cumsum(weights) / weights.sum()
        assert ends[got[row]] >= draws.uniform[row] - 1e-5
        assert ends[got[row]] - weights[got[row]] / weights.sum() <= draws.uniform[row] + 1e-5
    nucleus = got[3::4]
    assert ((nucleus == expected[3::4]) | (nucleus == BEYOND)).all()
