"""The selection inside an exported model, against Hugging Face eager with the NumPy selection put in by hand.

`choice` and `combine` are computed here from each architecture's published formula, not by the code under test, so a
wrong rule, a wrong scale or a forgotten bias shows as wrong logits of the restricted model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from test_architectures import Batch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lynx_trt.artifact import Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.runtime.ort import OrtBackend
from lynx_trt.selection import PRESETS, Selection, select

PROMPT = 9
STEPS = 6
ROWS = 3

Scores = tuple[torch.Tensor, torch.Tensor]


def softmax(logits: torch.Tensor, _: Any) -> Scores:
    p = torch.softmax(logits, -1)
    return p, p


def deepseek(logits: torch.Tensor, router: Any) -> Scores:
    """DeepSeek-V3, section 2.1.2: sigmoid scores; a bias for the ranking alone; the 2 best of 4 groups of 2 experts."""
    scores = torch.sigmoid(logits)
    ranked = scores + router.e_score_correction_bias
    groups = ranked.view(-1, 4, 2).sum(-1)
    used = torch.zeros_like(groups).scatter(1, groups.topk(2).indices, 1.0)
    return ranked.masked_fill(used.repeat_interleave(2, dim=-1) == 0, torch.finfo(torch.float32).min), scores


def glm(logits: torch.Tensor, router: Any) -> Scores:
    scores = torch.sigmoid(logits)
    return scores + router.e_score_correction_bias, scores


def kolibri(logits: torch.Tensor, router: Any) -> Scores:
    return logits + router.e_score_correction_bias, torch.sigmoid(logits)


def given(probabilities: torch.Tensor, _: Any) -> Scores:
    """Gemma 4: what its router tells are probabilities already."""
    return probabilities, probabilities


def nothing(logits: torch.Tensor, _: Any) -> Scores:
    raise AssertionError("PhiMoE's rule is not known")


# Architecture: how it scores, whether it renormalises, its scale, the routers' class.
RULES: dict[str, tuple[Callable[[torch.Tensor, Any], Scores], bool, float, str]] = {
    "mixtral": (softmax, True, 1.0, "MixtralTopKRouter"),
    "qwen2_moe": (softmax, False, 1.0, "Qwen2MoeTopKRouter"),
    "glm4_moe": (glm, True, 1.0, "Glm4MoeTopkRouter"),
    "deepseek_v3": (deepseek, True, 2.5, "DeepseekV3TopkRouter"),
    "gpt_oss": (softmax, True, 1.0, "GptOssTopKRouter"),
    "kolibri1": (kolibri, False, 1.0, "Kolibri1TopKRouter"),
    "gemma4": (given, True, 1.0, "Gemma4TextRouter"),
    "phimoe": (nothing, False, 1.0, "PhimoeTopKRouter"),
}


class ByHand:
    """An eager model whose experts get what NumPy selects; one step of B rows at a time, a row a sequence."""

    def __init__(self, name: str, selection: Selection, budget: int, floor: float = 0.0) -> None:
        self.model = tiny_models.random_model(name)
        self.scores, self.renormalize, self.scale, router_class = RULES[name]
        self.selection, self.budget, self.floor = selection, budget, floor
        self.restricted = False
        self.router: Any = None
        self.logits: torch.Tensor | None = None
        self.active: list[int] = []
        for module in self.model.modules():
            if type(module).__name__ == router_class:
                module.register_forward_hook(self.on_router)
        ALL_EXPERTS_FUNCTIONS.register("by_hand", self.experts)
        self.model.set_experts_implementation("by_hand")

    def on_router(self, router: Any, _: Any, output: Any) -> None:
        self.router, self.logits = router, output[0].float().reshape(-1, output[0].shape[-1])

    def experts(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.restricted:
            index, weight = self.choose(index, weight)
        default = type(module).forward.__wrapped__
        # The eager loop wants a full set of experts: an empty slot becomes expert 0 with weight 0.
        result: torch.Tensor = default(module, hidden, index.clamp(min=0), weight.to(hidden.dtype))
        return result

    def choose(self, index: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.logits is not None
        if self.scores is nothing:
            choice = combine = torch.zeros_like(self.logits).scatter(1, index, weight.float())
        else:
            choice, combine = self.scores(self.logits, self.router)
        # Gemma 4's weights are multiplied last, by a number of each expert: the selection has them before.
        numbers = getattr(self.router, "per_expert_scale", torch.ones(choice.shape[1])).detach().float()
        weight = weight.float() / numbers[index]
        chosen = select(
            self.selection,
            choice.numpy(),
            combine.numpy(),
            index.numpy(),
            weight.numpy(),
            budget=self.budget,
            floor=self.floor,
            renormalize=self.renormalize,
            scale=self.scale,
        )
        self.active.append(len(chosen.kept))
        index = torch.from_numpy(chosen.index)
        return index, torch.from_numpy(chosen.weight) * numbers[index.clamp(min=0)]

    @torch.no_grad()
    def run(self, batch: Batch) -> np.ndarray[Any, Any]:
        """[steps, B, V]: prefill with all experts, then decode steps of the whole batch under the budget."""
        rows = torch.tensor([row[: PROMPT + STEPS] for row in batch.rows])
        output = self.model(input_ids=rows[:, :PROMPT], use_cache=True)
        self.restricted = True
        logits = []
        for step in range(STEPS):
            tokens = rows[:, PROMPT + step : PROMPT + step + 1]
            output = self.model(input_ids=tokens, past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[:, -1].numpy())
        return np.stack(logits)


def same_length_batch() -> Batch:
    generator = np.random.default_rng(11)
    return Batch([generator.integers(3, 256, size=PROMPT + STEPS).tolist() for _ in range(ROWS)])


def exported(
    artifact: Artifact, batch: Batch, budget: int, floor: float = 0.0
) -> tuple[np.ndarray[Any, Any], list[int]]:
    backend = OrtBackend(artifact, slots=ROWS)
    layers = len(artifact.manifest.model.moe_layers)
    rows = np.array([row[: PROMPT + STEPS] for row in batch.rows])
    past, ones = np.zeros(ROWS, dtype=np.int64), np.ones(ROWS, dtype=np.int64)
    dial = Restriction((budget,) * layers, (floor,) * layers)
    backend.step(rows[:, :PROMPT], past, ones * PROMPT, dial)
    results = [
        backend.step(rows[:, PROMPT + s : PROMPT + s + 1], ones * (PROMPT + s), ones, dial) for s in range(STEPS)
    ]
    return np.stack([r.logits for r in results]), [int(a) for r in results for a in r.active]


@pytest.mark.parametrize(
    ("name", "preset"),
    [*((name, "lynx") for name in RULES), ("deepseek_v3", "lynx-latency"), ("mixtral", "xshare")],
)
def test_restricted_model_equals_eager_by_hand(name: str, preset: str, artifact: Callable[..., Artifact]) -> None:
    """A budget of 3 for 3 tokens of 2 experts: some tokens lose experts in nearly every layer and step."""
    selection = PRESETS[preset]
    if name == "phimoe":
        selection = replace(selection, remap=False)
    by_hand = ByHand(name, selection, budget=3)
    batch = same_length_batch()
    expected = by_hand.run(batch)
    logits, active = exported(artifact(name, preset=preset), batch, budget=3)
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
    assert active == by_hand.active
    assert min(active) < 5, "the budget restricted nothing, so this test shows nothing"


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_floors_equal_eager_by_hand(name: str, artifact: Callable[..., Artifact]) -> None:
    """A floor between the votes that experts get: what is left differs from step to step."""
    by_hand = ByHand(name, PRESETS["lynx"], budget=8, floor=0.1)
    batch = same_length_batch()
    expected = by_hand.run(batch)
    logits, active = exported(artifact(name, preset="lynx"), batch, budget=8, floor=0.1)
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
    assert active == by_hand.active
    without = exported(artifact(name, preset="lynx"), batch, budget=8)[1]
    assert sum(active) < sum(without), "the floor restricted nothing, so this test shows nothing"
    assert len(set(active)) > 1


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_off_is_the_models_own_routing_exactly(name: str, artifact: Callable[..., Artifact]) -> None:
    """Bit for bit: `--preset off`, and any other preset at a budget of E."""
    batch = same_length_batch()
    off, _ = exported(artifact(name, preset="off"), batch, budget=8)
    for preset in ("lynx", "lynx-latency" if name == "deepseek_v3" else "xshare"):
        full, _ = exported(artifact(name, preset=preset), batch, budget=8)
        np.testing.assert_array_equal(off, full)
