"""A layer's two ops in a row, LynxSelect's metadata handed to LynxExperts: the same bits as when each makes its own."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from kernel_process import CLUSTERS, on_device
from torch import Tensor

from lynx_trt.experts import ExpertsForm
from lynx_trt.plugins import execute, plans
from lynx_trt.plugins.launch import ExpertsLaunch, MatmulLaunch, SelectLaunch, power_of_two
from lynx_trt.plugins.specs import ExpertsSpec, SelectSpec
from lynx_trt.plugins.twins import dispatch_twin, experts_twin, select_twin

E, K, H, I = 6, 2, 48, 40  # noqa: E741
SELECT = SelectSpec(E, K, "weight", 0, 0.0, True)
EXPERTS = ExpertsSpec(E, K, H, I, "float32", ExpertsForm(), bias=True)

# One program; blocks whose tables every program adds up, held at once and in two tiles each; and blocks of which that
# would be too many (with the number that is too many lowered to 1).
SELECTS = {
    "held": (SelectLaunch(1, 16, 4, 16, ""), 64),
    "blocks": (SelectLaunch(0, 4, 4, 4, ""), 64),
    "tiled-blocks": (SelectLaunch(0, 2, 4, 4, ""), 64),
    **({"cluster": (SelectLaunch(8, 8, 4, 8, ""), 64)} if CLUSTERS else {}),
    "many-blocks": (SelectLaunch(0, 4, 4, 4, ""), 1),
}
_TILE = MatmulLaunch(16, 16, 32, warps=4, stages=2)
_ALL_PROGRAMS = replace(_TILE, per_multiprocessor=1)
LAUNCHES = {"decode": ExpertsLaunch(False, _TILE, _TILE, ""), "prefill": ExpertsLaunch(True, *[_ALL_PROGRAMS] * 2, "")}

# What nobody wrote: as a place or a number of pairs it would be far outside of everything.
UNWRITTEN = 0x55555555


def layer(
    routing: dict[str, Tensor],
    weights: dict[str, Tensor],
    launches: tuple[SelectLaunch, ExpertsLaunch],
    blocks_here: int,
    handed: bool,
) -> dict[str, Tensor]:
    """Both ops' plans, as an engine launches them one after the other; all tensors that they wrote."""
    tokens = len(routing["choice"])
    made = {
        "index": torch.empty_like(routing["topk_index"]),
        "weight": torch.empty_like(routing["topk_weight"]),
        "active": torch.zeros_like(routing["budget"]),
        "output": torch.empty_like(weights["hidden"]),
    }
    if handed:
        size = 2 * E + 2 + routing["topk_index"].numel()
        made["dispatch"] = torch.full((size,), UNWRITTEN, dtype=torch.int32, device=routing["choice"].device)
    select = replace(SELECT, dispatch_taken=handed)
    experts = replace(EXPERTS, dispatch_given=handed)
    most, sm = power_of_two(tokens), execute.sm_of(routing["choice"])
    with mock.patch.object(plans, "BLOCKS_HERE", blocks_here):
        execute.run(plans.select_plan(select, sm, most, launches[0]), {**routing, **made}, tokens)
        execute.run(plans.experts_plan(experts, sm, most, launches[1]), {**weights, **made}, tokens)
    return made


def inputs(tokens: int, budget: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch whose last two rows are padding, and in which no token chooses expert 3."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    logits = normal(tokens, E)
    logits[:, 3] = -30.0
    choice = logits.softmax(dim=1)
    weight, index = choice.topk(K, dim=1)
    mask = torch.ones(tokens, dtype=torch.bool)
    mask[max(tokens - 2, 1) :] = False
    routing = {"choice": choice, "combine": choice, "topk_index": index, "topk_weight": weight}
    routing |= {"budget": torch.tensor(budget, dtype=torch.int32), "floor": torch.tensor(0.0), "token_mask": mask}
    weights = {"hidden": normal(tokens, H), "gate_up": normal(E, 2 * I, H, scale=0.15)}
    weights |= {"down": normal(E, H, I, scale=0.15), "gate_up_bias": normal(E, 2 * I), "down_bias": normal(E, H)}
    weights["gate_up"][3] = float("nan")  # nothing of an expert that nobody uses is read
    return routing, weights


def check(made: dict[str, Tensor], routing: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """The choice is the twin's, and the output close to what the twin makes of it."""
    limits = {"budget": int(routing["budget"]), "floor": float(routing["floor"])}
    want = select_twin(SELECT, **{**routing, **limits})  # type: ignore[arg-type]
    assert torch.equal(made["index"], want.index)
    usable = {name: each.nan_to_num() for name, each in weights.items()}
    close = experts_twin(EXPERTS.form, index=want.index, weight=want.weight, **usable)
    torch.testing.assert_close(made["output"], close, rtol=1e-4, atol=1e-5)


# One token, in a tile an expert; more pairs of an expert than a tile has, and a last block of one token.
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("way", SELECTS)
def test_handed_or_not_is_the_same(way: str, launch: str, tokens: int) -> None:
    select_launch, blocks_here = SELECTS[way]
    routing, weights = inputs(tokens, budget=4)
    launches = select_launch, LAUNCHES[launch]
    handed, apart = (
        on_device(layer, routing, weights, launches, blocks_here, handed=handed) for handed in (True, False)
    )
    for name in apart:
        assert torch.equal(handed[name], apart[name]), name
    check(handed, routing, weights)
    assert 3 not in handed["index"]
    assert bool((handed["index"][~routing["token_mask"]] == -1).all())


@pytest.mark.parametrize("way", SELECTS)
def test_no_expert_at_all(way: str) -> None:
    """A batch of padding alone: metadata of no expert, and an output of zeros."""
    routing, weights = inputs(9, budget=4)
    routing["token_mask"][:] = False
    select_launch, blocks_here = SELECTS[way]
    made = on_device(layer, routing, weights, (select_launch, LAUNCHES["decode"]), blocks_here, handed=True)
    assert int(made["active"]) == int(made["dispatch"][0]) == 0
    assert not made["output"].any()


def test_the_estimated_launches() -> None:
    """Those that ship, of a batch that takes LynxSelect several launches: 6 experts and 520 tokens."""
    tokens = 520
    chosen = plans.select_launch(power_of_two(tokens), E, K, 90)
    assert chosen.programs == 0
    routing, weights = inputs(tokens, budget=3)
    made = on_device(layer, routing, weights, (chosen, LAUNCHES["prefill"]), 64, handed=True)
    check(made, routing, weights)
    expected = dispatch_twin(made["index"], E)
    active = int(expected[0])
    assert active == 3
    pairs = int(expected[1 + active])
    written = [*range(2 + active), *range(2 + E, 2 + E + active), *range(2 + 2 * E, 2 + 2 * E + pairs)]
    assert torch.equal(made["dispatch"][written], expected[written])
