"""LynxSelect's kernels and their PyTorch twin against the NumPy reference: indices and kept experts exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_process import CLUSTERS, on_device
from numpy.typing import NDArray
from test_selection import Batch, batches, budgets, floors, selections

from lynx_trt.experts import ExpertsForm
from lynx_trt.plugins import execute, plans
from lynx_trt.plugins.launch import SelectLaunch, select_estimate
from lynx_trt.plugins.specs import ExpertsSpec, SelectSpec
from lynx_trt.plugins.twins import dispatch_twin, select_twin
from lynx_trt.selection import PRESETS, Selection

Array = NDArray[Any]

# The ways through the kernels: one program that holds the batch; blocks of 2 tokens; a cluster of 4 programs that hold
# their tokens (of at most 16), and one of 2 programs with tiles of 2 tokens.
HELD = SelectLaunch(1, 16, 4, 16, "")
BLOCKS = SelectLaunch(0, 2, 4, 2, "")
CLUSTER = SelectLaunch(4, 4, 4, 4, "")
TILES = SelectLaunch(2, 2, 4, 8, "")
WAYS = {"held": HELD, "blocks": BLOCKS} | ({"cluster": CLUSTER, "tiles": TILES} if CLUSTERS else {})


def _spec(
    selection: Selection, experts: int, width: int, *, renormalize: bool = True, scale: float = 1.0
) -> SelectSpec:
    return SelectSpec(
        experts,
        width,
        selection.vote,
        selection.guaranteed(width),
        selection.sensitivity,
        selection.remap,
        selection.power,
        selection.alpha,
        selection.beta,
        renormalize,
        scale,
        dispatch_taken=True,
    )


def _tensors(batch: Batch, budget: int, floor: float = 0.0) -> list[torch.Tensor]:
    floats = [torch.tensor(np.asarray(a, np.float32)) for a in (batch.choice, batch.combine, batch.topk_weight)]
    mask = np.ones(batch.sizes[0], np.bool_) if batch.token_mask is None else batch.token_mask
    index = torch.tensor(np.asarray(batch.topk_index, np.int64))
    limits = [torch.tensor(budget, dtype=torch.int32), torch.tensor(floor, dtype=torch.float32)]
    return [*floats[:2], index, floats[2], *limits, torch.tensor(mask)]


def _check(
    batch: Batch, selection: Selection, budget: int, launch: SelectLaunch, floor: float = 0.0, **rule: Any
) -> None:
    """The kernels give what the reference gives."""
    _, experts, width = batch.sizes
    spec = _spec(selection, experts, width, **rule)
    got = on_device(execute.select, spec, *_tensors(batch, budget, floor), launch=launch)
    want = batch.select(selection, budget, floor=floor, **rule)
    np.testing.assert_array_equal(got.index.numpy(), want.index)
    # The sum of weights may differ in a float64's last bits.
    np.testing.assert_allclose(got.weight.numpy(), want.weight, rtol=2e-7)
    assert int(got.active) == len(want.kept)
    _check_dispatch(got.dispatch, torch.from_numpy(want.index), experts)


def _check_dispatch(got: torch.Tensor, index: torch.Tensor, experts: int) -> None:
    """The metadata is the twin's, but for what is not written."""
    want = dispatch_twin(index, experts)
    active = int(want[0])
    pairs = int(want[1 + active])
    written = torch.zeros(len(want), dtype=torch.bool)
    for first, last in (
        (0, 2 + active),
        (2 + experts, 2 + experts + active),
        (2 + 2 * experts, 2 + 2 * experts + pairs),
    ):
        written[first:last] = True
    assert torch.equal(got[written], want[written])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(batches(min_tokens=1), selections, budgets, floors, st.sampled_from(list(WAYS)), st.booleans())
def test_odd_batches(
    batch: Batch, selection: Selection, budget: int, floor: float, way: str, renormalize: bool
) -> None:
    """T=1, K=1, K=E, E=1, ties, zeros, masks, NaN, Inf, sums at the ends of float32."""
    _check(batch, selection, budget, WAYS[way], floor, renormalize=renormalize, scale=1.5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(batches(min_tokens=1), selections, budgets, floors)
def test_twin(batch: Batch, selection: Selection, budget: int, floor: float) -> None:
    _, experts, width = batch.sizes
    choice, combine, index, weight, _, _, mask = _tensors(batch, budget)
    index = torch.where(mask[:, None], index, 0)  # indexing with what padding may hold is no part of a plain twin
    got = select_twin(_spec(selection, experts, width), choice, combine, index, weight, budget, floor, mask)
    want = batch.select(selection, budget, floor=floor)
    np.testing.assert_array_equal(got.index.numpy(), want.index)
    np.testing.assert_allclose(got.weight.numpy(), want.weight, rtol=2e-7)
    np.testing.assert_array_equal(got.kept.numpy(), batch.kept_set(selection, budget, floor))
    assert int(got.active) == len(want.kept)


def _router(tokens: int, experts: int, width: int, seed: int = 0) -> Batch:
    """A batch as a softmax router gives it, the last token padding, the one before it broken."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, experts)) * 2 + rng.normal(size=experts)
    scores = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    index = np.argsort(-scores, axis=1, kind="stable")[:, :width]
    weight = np.take_along_axis(scores, index, axis=1)
    weight /= weight.sum(axis=1, keepdims=True)
    mask = np.ones(tokens, np.bool_)
    if tokens > 2:
        mask[-1] = False
        scores[-2, experts // 2] = np.nan
    return Batch(scores, scores, index, weight, mask)


@pytest.mark.parametrize(
    ("tokens", "experts", "width"),
    [
        (1, 128, 8),  # one token: nothing to vote against
        (16, 128, 8),  # the decode batch of Qwen3-30B-A3B: one program holds it
        (20, 128, 8),  # blocks, the last not full
        (37, 64, 6),  # DeepSeek-V2-Lite; blocks, the last not full
        (5, 40, 4),  # E is no power of two
        (16, 8, 2),  # Mixtral: a row shorter than a warp
        (40, 8, 2),  # its tokens in one program, too many for the bits of an int32
        (100, 8, 2),  # and of an int64
        (9, 512, 10),  # the longest row
    ],
)
@pytest.mark.parametrize("preset", ["lynx", "lynx-accuracy", "lynx-affinity", "oea", "xshare"])
def test_routers(preset: str, tokens: int, experts: int, width: int) -> None:
    """The estimated launch on batches of real models' sizes: a budget takes experts away, and a floor some more."""
    batch, selection, budget = _router(tokens, experts, width), PRESETS[preset], max(experts // 4, 2)
    for floor in (0.0, *_edge(batch, selection, budget)):
        _check(batch, selection, budget, select_estimate(tokens, experts, width), floor)


def _edge(batch: Batch, selection: Selection, budget: int) -> tuple[float, float]:
    """Two neighbours in float32, the higher of which leaves at most half of the experts that the budget keeps.

    It is as near to an expert's vote as a floor can be. (Where more than half is guaranteed, the higher one is 2.)
    """

    def floor(bits: int) -> float:
        return float(np.array(bits, np.int32).view(np.float32))

    most = int(batch.kept_set(selection, budget).sum()) // 2
    low, high = 0, int(np.float32(2.0).view(np.int32))
    while high - low > 1:
        middle = (low + high) // 2
        few = int(batch.kept_set(selection, budget, floor(middle)).sum()) <= most
        low, high = (low, middle) if few else (middle, high)
    return floor(low), floor(high)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("budget", [0, 1, 31, 32, 1000])
def test_budgets(way: str, budget: int) -> None:
    """No budget at all, one short of all experts, all, more than all (prefill: the routing is kept bit for bit)."""
    batch = _router(11, 32, 4)
    _check(batch, PRESETS["lynx-latency"], budget, WAYS[way])
    _check(batch, replace(PRESETS["lynx"], remap=False), budget, WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_everything_tied(way: str) -> None:
    """All scores equal, and 0.0 beside -0.0: only indices decide."""
    scores = np.zeros((6, 8), np.float32)
    scores[:, ::2] = -0.0
    index = np.array([[0, 1], [2, 3], [4, 5], [6, 7], [1, 0], [7, 6]])
    batch = Batch(scores, np.full((6, 8), 0.125, np.float32), index, np.full((6, 2), 0.5, np.float32))
    _check(batch, PRESETS["lynx-latency"], 3, WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_a_token_at_the_threshold_is_not_sensitive(way: str) -> None:
    """Confidences of 0.25, just that, and of 0.125: with tau 0.25 the second token alone keeps its experts."""
    scores = np.array([[0.625, 0.375, 0.0, 0.0], [0.0, 0.0, 0.5625, 0.4375]], np.float32)
    batch = Batch(scores, scores, np.array([[0, 1], [2, 3]]), np.array([[0.625, 0.375], [0.5625, 0.4375]], np.float32))
    assert list(batch.kept_set(PRESETS["lynx-accuracy"], 0)) == [False, False, True, True]
    _check(batch, PRESETS["lynx-accuracy"], 0, WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_votes_are_compared_as_float32(way: str) -> None:
    """Ten tenths (in float64 a bit less than 1) and one whole are a tie: the lower index wins."""
    weight = np.array([[1.0, 9.0]] * 10 + [[1.0, 0.0]], np.float32)
    index = np.array([[1, 2]] * 10 + [[3, 0]])
    scores = np.zeros((11, 4), np.float32)
    _check(Batch(scores, scores, index, weight), replace(PRESETS["lynx-latency"], vote="weight"), 2, WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_no_token_counts(way: str) -> None:
    """All padding or broken: no expert is in use, and every slot is empty."""
    batch = _router(4, 8, 2)
    assert batch.token_mask is not None
    batch.token_mask[:2] = False
    batch.topk_weight[2:] = np.inf
    _check(batch, PRESETS["lynx"], 2, WAYS[way])


@pytest.mark.skipif(not CLUSTERS, reason="no clusters here")
# Bits of an int64; programs with one token, and with none; E is no power; tiles of which some are empty, and one alone.
@pytest.mark.parametrize(
    ("tokens", "programs", "tile", "block"),
    [(130, 4, 64, 64), (17, 8, 4, 4), (5, 2, 4, 4), (130, 4, 32, 64), (17, 2, 4, 16), (3, 4, 2, 8), (20, 2, 1, 16)],
)
@pytest.mark.parametrize("preset", ["lynx", "lynx-affinity"])
def test_clusters(preset: str, tokens: int, programs: int, tile: int, block: int) -> None:
    batch, launch = _router(tokens, 40, 6), SelectLaunch(programs, tile, 4, block, "")
    for budget in (12, 40):
        _check(batch, PRESETS[preset], budget, launch)
    _check(batch, PRESETS[preset], 40, launch, floor=0.002)


@pytest.mark.slow
@pytest.mark.skipif(not CLUSTERS, reason="no clusters here")
def test_the_largest_decode_batch_in_one_launch() -> None:
    """512 tokens, 512 experts, 16 a token: 16 tiles a program."""
    _check(_router(512, 512, 16), PRESETS["lynx"], 200, SelectLaunch(8, 4, 8, 64, ""))


@pytest.mark.parametrize("preset", ["lynx", "lynx-affinity"])
def test_many_blocks(preset: str) -> None:
    """Blocks that are too many for each program to add up: the kept set and the scan are launches of their own."""
    batch = _router(19, 16, 3)  # ten blocks: tables of more rows than are added at a time
    selection = replace(PRESETS[preset], guarantee=0)
    low, high = _edge(batch, selection, 5)
    assert batch.kept_set(selection, 5, low).sum() > batch.kept_set(selection, 5, high).sum()
    for floor in (0.0, low, high):
        given = (_spec(selection, 16, 3), *_tensors(batch, 5, floor))
        got = on_device(with_many_blocks, execute.select, *given, launch=BLOCKS)
        want = batch.select(selection, 5, floor=floor)
        np.testing.assert_array_equal(got.index.numpy(), want.index)
        assert int(got.active) == len(want.kept)
        _check_dispatch(got.dispatch, torch.from_numpy(want.index), 16)


def with_many_blocks(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call it as if two blocks were too many; truly too many would take the interpreter half a minute."""
    with mock.patch.object(plans, "BLOCKS_HERE", 1):
        return function(*arguments, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("vote", ["count", "weight", "affinity", "score"])
def test_floors_between_on_and_above_votes(vote: str, way: str) -> None:
    """Six rows, of which a NaN and padding leave four to vote, each with 1 for one expert under every kind of vote."""
    index = np.array([[0], [0], [1], [2], [3], [3]])
    votes = np.array([0.5, 0.25, 0.25, 0.0], np.float32)  # over the number of voting rows
    scores = np.zeros((6, 4), np.float32)
    scores[np.arange(6), index[:, 0]] = 1.0
    mask = np.array([True] * 5 + [False])
    scores[4, 0] = np.nan
    batch = Batch(scores, scores, index, np.ones((6, 1), np.float32), mask)
    selection = replace(PRESETS["lynx-latency"], vote=vote)
    for floor, kept in [
        (0.0, 3),
        (0.2, 3),  # a fifth of four is below a vote; of five or six it would not be
        (np.nextafter(np.float32(0.25), np.float32(0)), 3),
        (0.25, 1),  # a tie is not above
        (np.nextafter(np.float32(0.25), np.float32(1)), 1),
        (np.nextafter(np.float32(0.5), np.float32(0)), 1),
        (0.5, 0),
        (3e38, 0),  # times 4 is infinite
    ]:
        assert int(batch.kept_set(selection, 3, float(floor)).sum()) == kept == int((votes > floor).sum()), floor
        _check(batch, selection, 3, WAYS[way], float(floor))
    # Without a limit the floor alone decides, and what is guaranteed needs no votes.
    for budget in (4, 1000):
        assert batch.kept_set(selection, budget, 0.25).sum() == 1
        _check(batch, selection, budget, WAYS[way], 0.25)
    _check(batch, replace(selection, guarantee=1), 3, WAYS[way], 0.25)


@pytest.mark.parametrize("way", WAYS)
def test_a_floor_is_multiplied_and_compared_as_float32(way: str) -> None:
    """Three tenths are 0.3 in float32, above the float64 product of 0.1 and 3, and not above the float32 one."""
    weight = np.array([[1.0, 9.0]] * 3, np.float32)
    scores = np.zeros((3, 4), np.float32)
    batch = Batch(scores, scores, np.array([[0, 1]] * 3), weight)
    selection = replace(PRESETS["lynx-latency"], vote="weight")
    floor = float(np.float32(0.1))
    assert list(batch.kept_set(selection, 2, floor)) == [False, True, False, False]
    _check(batch, selection, 2, WAYS[way], floor)
    below = float(np.nextafter(np.float32(floor), np.float32(0)))
    assert list(batch.kept_set(selection, 2, below)) == [True, True, False, False]
    _check(batch, selection, 2, WAYS[way], below)


@pytest.mark.parametrize("way", WAYS)
def test_affinity_counts_the_voters_of_all_blocks(way: str) -> None:
    """7 second choices of 1/n each lose against one first choice of 1 if n is 9, and would win if it were 5."""
    scores = np.zeros((9, 4), np.float32)
    scores[:, 0], scores[:7, 1], scores[8, 2] = 1.0, 0.6, 2.0
    index = np.array([[0, 1]] * 7 + [[0, 3]] + [[2, 0]])
    batch = Batch(scores, scores, index, np.take_along_axis(scores, index, axis=1))
    selection = replace(PRESETS["lynx-affinity"], guarantee=0)
    assert list(batch.kept_set(selection, 2)) == [True, False, True, False]
    _check(batch, selection, 2, WAYS[way])


@pytest.mark.parametrize(
    ("tokens", "width", "experts"),
    [
        (3, 2, 4),  # one program
        (90, 6, 9),  # blocks
        (40, 16, 16),  # K = E
    ],
)
def test_dispatch_of_any_index(tokens: int, width: int, experts: int) -> None:
    """The experts' own dispatch: empty slots, experts that nobody uses, and one that a token names twice."""
    index = torch.from_numpy(np.random.default_rng(0).integers(-1, experts - 1, (tokens, width)))
    _check_dispatch(on_device(run_dispatch, index, experts), index, experts)
    _check_dispatch(on_device(with_many_blocks, run_dispatch, index, experts), index, experts)


def run_dispatch(index: torch.Tensor, experts: int) -> torch.Tensor:
    """The metadata that a LynxExperts which is not given it makes from `index`."""
    spec = ExpertsSpec(experts, index.shape[1], 8, 8, "float32", ExpertsForm())
    whole = plans.experts_plan(spec, execute.sm_of(index), len(index))
    steps = tuple(step for step in whole.steps if step.kernel.function.startswith("dispatch"))
    regions = execute.run(plans.Plan(whole.max_tokens, steps, whole.regions), {"index": index}, len(index))
    return regions["dispatch"].view(torch.int32)[: 2 * experts + 2 + index.numel()]
