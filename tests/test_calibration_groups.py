"""The grouped selection is the NumPy reference, group by group: indices and kept sets exactly, weights to a bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx_trt.calibration.groups import _votes, select_groups
from lynx_trt.selection import PRESETS, Selection, select

VARIANTS = {
    **PRESETS,
    "drop": Selection(vote="weight", guarantee=1, sensitivity=0.0, remap=False),
    "everything": Selection(vote="affinity", guarantee=2, sensitivity=0.3, remap=True, alpha=1.7, beta=2),
    "all-guaranteed": Selection(vote="count", guarantee=9, sensitivity=0.0, remap=True),
}


def routing(seed: int, groups: int, batch: int, experts: int, width: int, coarse: bool) -> dict[str, torch.Tensor]:
    """A router's outputs; coarse ones are full of ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(groups, batch, experts, generator=generator) * 2
    if coarse:
        logits = logits.round()
    combine = torch.softmax(logits, -1)
    choice = combine + (torch.randn(experts, generator=generator) * 0.1 if seed % 2 else 0.0)
    index = choice.topk(width, -1).indices
    weight = combine.gather(-1, index)
    weight = weight / weight.sum(-1, keepdim=True)
    return {"choice": choice, "combine": combine, "topk_index": index, "topk_weight": weight}


def assert_equal(selection: Selection, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None, **rule: Any) -> None:
    got = select_groups(selection, **inputs, token_mask=mask, **rule)
    for group in range(len(inputs["choice"])):
        arrays = {name: value[group].numpy() for name, value in inputs.items()}
        own_mask = None if mask is None else mask[group].numpy()
        want = select(selection, **arrays, token_mask=own_mask, **rule)
        np.testing.assert_array_equal(got.index[group].numpy(), want.index)
        np.testing.assert_array_equal(got.kept[group].nonzero().flatten().numpy(), want.kept)
        np.testing.assert_array_max_ulp(got.weight[group].numpy(), want.weight, maxulp=1)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "ties"])
def test_equals_the_reference(name: str, coarse: bool) -> None:
    inputs = routing(3, groups=12, batch=9, experts=16, width=4, coarse=coarse)
    for budget in (0, 1, 5, 9, 15, 16, 99):
        for floor in (0.0, 1e-46, 0.02, 1 / 9, 1.0):  # 1e-46 is 0 as a float32
            assert_equal(VARIANTS[name], inputs, None, budget=budget, floor=floor)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(VARIANTS)),
    seed=st.integers(0, 1000),
    batch=st.integers(1, 8),
    sizes=st.sampled_from([(1, 1), (4, 1), (6, 6), (8, 3), (33, 5)]),  # K=1, K=E, odd E
    budget=st.integers(0, 12),
    floor=st.sampled_from([0.0, 1e-46, 1e-45, 1e-6, 0.003, 0.05, 0.125, 0.25, 1.0, 1e38]),
    coarse=st.booleans(),
    renormalize=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
)
def test_equals_the_reference_everywhere(
    name: str,
    seed: int,
    batch: int,
    sizes: tuple[int, int],
    budget: int,
    floor: float,
    coarse: bool,
    renormalize: bool,
    scale: float,
) -> None:
    inputs = routing(seed, 3, batch, *sizes, coarse)
    mask = torch.rand(3, batch, generator=torch.Generator().manual_seed(seed)) > 0.2
    assert_equal(VARIANTS[name], inputs, mask, budget=budget, floor=floor, renormalize=renormalize, scale=scale)


@pytest.mark.parametrize("name", ["lynx", "lynx-latency", "lynx-affinity", "xshare", "everything"])
@pytest.mark.parametrize("masked", [0, 3], ids=["all count", "some masked"])
def test_votes_on_the_floor_are_not_above_it(name: str, masked: int) -> None:
    """Floors at and right beside some group's own votes: what ties is out, and one float32 lower it is in."""
    inputs = routing(11, groups=6, batch=8, experts=16, width=4, coarse=False)
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[:, :masked] = False
    voting = np.float32(8 - masked)
    selection = VARIANTS[name]
    combine = inputs["combine"].where(mask[..., None], 0.0)
    weight = inputs["topk_weight"].where(mask[..., None], 0.0)
    votes = _votes(selection, combine, inputs["topk_index"], weight, mask).float().numpy()
    changed = 0
    for group in range(6):
        vote = np.sort(votes[group])[-5]
        exact = np.float32(vote / voting)
        for floor in (exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(1))):
            assert_equal(selection, inputs, mask, budget=15, floor=float(floor))
        # Worth a test only where the product really is the vote.
        changed += exact * voting == vote
    assert changed


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_loads_nothing(broken: float) -> None:
    inputs = routing(5, groups=2, batch=4, experts=8, width=2, coarse=False)
    inputs["combine"][1, 2, 3] = broken
    got = select_groups(PRESETS["lynx"], **inputs, budget=4)
    assert (got.index[1, 2] == -1).all()
    assert (got.weight[1, 2] == 0).all()
    assert_equal(PRESETS["lynx"], inputs, None, budget=4)


def test_unchanged_tokens_keep_their_routing_bit_for_bit() -> None:
    inputs = routing(7, groups=20, batch=6, experts=16, width=4, coarse=False)
    got = select_groups(PRESETS["lynx"], **inputs, budget=10)
    same = got.kept.gather(1, inputs["topk_index"].flatten(1)).view(20, 6, 4).all(-1)
    assert 0 < same.sum() < same.numel()  # or the test says nothing
    assert torch.equal(got.index[same], inputs["topk_index"][same])
    assert torch.equal(got.weight[same], inputs["topk_weight"][same])


def test_a_floor_keeps_what_enough_tokens_want() -> None:
    """Worked by hand: shares 0.8 and 0.2 of three tokens, so votes 1.28, 0.68, 0.04 and 0.04 (power 2)."""
    choice = torch.tensor([[[0.8, 0.2, 0.0, 0.0], [0.8, 0.0, 0.2, 0.0], [0.0, 0.8, 0.0, 0.2]]])
    index = torch.tensor([[[0, 1], [0, 2], [1, 3]]])
    inputs = {
        "choice": choice,
        "combine": choice,
        "topk_index": index,
        "topk_weight": choice.gather(2, index),
    }
    voted = Selection(vote="weight", guarantee=0, sensitivity=0.0, remap=True, power=2.0)
    for floor, budget, kept in (
        (0.0, 3, [0, 1, 2]),  # as many as there are votes for, up to the cap
        (0.01, 3, [0, 1, 2]),  # 0.03 over three tokens
        (0.02, 3, [0, 1]),
        (0.3, 3, [0]),
        (0.02, 1, [0]),  # the budget holds as well
        (9.0, 3, []),
        (0.02, 4, [0, 1]),  # a budget of E is no limit: the floor alone decides
        (0.0, 4, [0, 1, 2, 3]),
    ):
        got = select_groups(voted, **inputs, budget=budget, floor=floor)
        assert got.kept[0].nonzero().flatten().tolist() == kept
    own = Selection(vote="weight", guarantee=1, sensitivity=0.0, remap=True, power=2.0)
    assert select_groups(own, **inputs, budget=3, floor=9.0).kept[0].nonzero().flatten().tolist() == [0, 1]
