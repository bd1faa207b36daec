"""The masked form of a MoE layer against the NumPy references: each token's experts exactly, outputs to rounding.

The layer's router is its input, so that every kind of row can be fed.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from lynx_trt.errors import ArtifactError
from lynx_trt.experts import ExpertsForm, experts
from lynx_trt.export.ops import EXPERTS, OPSET, SELECT, experts_attributes, select_attributes
from lynx_trt.runtime.lowering import lower
from lynx_trt.runtime.routing import count_active
from lynx_trt.selection import PRESETS, Selection, select

Array = np.ndarray[Any, np.dtype[Any]]
E, K, H, I = 16, 4, 16, 8  # noqa: E741  # the field's letters
FORM = ExpertsForm()

SELECTIONS = {
    **{name: selection for name, selection in PRESETS.items() if name != "off"},
    # what no preset has: dropping, for votes to one's own and to all; powers; two kinds of what is kept anyway at once
    "count-drop": Selection("count", guarantee=2, sensitivity=0.5, remap=False),
    "weight-drop": Selection("weight", guarantee=0, sensitivity=0.0, remap=False, power=0.5),
    "weight-steep": Selection("weight", guarantee=3, sensitivity=0.0, remap=True, power=5.0),
    "weight-plain": Selection("weight", guarantee=0, sensitivity=0.3, remap=True),
    "affinity-bins": Selection("affinity", guarantee=0, sensitivity=0.0, remap=True, alpha=3.0, beta=7),
    "affinity-drop": Selection("affinity", guarantee=1, sensitivity=0.25, remap=False, beta=0),
    "score-drop": Selection("score", guarantee=0, sensitivity=0.0, remap=False),
    "score-sensitive": Selection("score", guarantee=2, sensitivity=0.5, remap=True),
}


def store(folder: Path, selection: Selection, *, renormalize: bool = True, scale: float = 1.0) -> Any:
    """An artifact of one layer whose router's logits are an input; the second of two budgets and floors is its own."""
    generator = np.random.default_rng(7)
    weights = {
        "gate_up": generator.normal(0, 0.3, (E, 2 * I, H)).astype(np.float32),
        "down": generator.normal(0, 0.3, (E, H, I)).astype(np.float32),
    }
    graph = onnx.parser.parse_graph(
        f"""
        layer (float[T,{H}] hidden, float[T,{E}] logits, int32[2] budgets, float[2] floors, bool[T] mask)
            => (float[T,{H}] output, int32[N] active_experts)
        <int64 one = {{1}}, int64[1] first = {{0}}, int64[1] k = {{{K}}}, int64[1] last = {{-1}}>
        {{
            choice = Softmax (logits)
            chosen, index = TopK (choice, k)
            total = ReduceSum (chosen, last)
            weight = Div (chosen, total)
            budget = Gather (budgets, one)
            floor = Gather (floors, one)
            own, own_weight, active = lynx.LynxSelect (choice, choice, index, weight, budget, floor, mask)
            output = lynx.LynxExperts (hidden, own, own_weight, gate_up, down)
            one_active = Unsqueeze (active, first)
            active_experts = Concat <axis = 0> (one_active)
        }}
        """
    )
    attributes = {
        SELECT: select_attributes(selection, experts_per_token=K, renormalize=renormalize, scale=scale),
        EXPERTS: experts_attributes(FORM),
    }
    for node in graph.node:
        values = attributes.get(node.op_type, {})
        node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in values.items())
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("lynx", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    record = SimpleNamespace(name="layer", experts=E, experts_per_token=K)
    manifest = SimpleNamespace(model=SimpleNamespace(moe_layers=[record]))
    return SimpleNamespace(folder=folder, path=lambda name: folder / name, manifest=manifest, weights=weights)


def open_session(artifact: Any, **options: Any) -> Any:
    lowered = lower(artifact, **options)
    assert lowered.forms == (options.get("form", "masked"),)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(lowered.model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def routed(logits: Array, *, renormalize: bool, scale: float) -> tuple[Array, Array, Array]:
    """What the model's own router gives: choice [T,E], index [T,K], weight [T,K]."""
    with np.errstate(invalid="ignore"):
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    choice = exponentials / exponentials.sum(axis=1, keepdims=True)
    index = np.argsort(-choice, axis=1, kind="stable")[:, :K]
    weight = np.take_along_axis(choice, index, axis=1)
    weight = weight / weight.sum(axis=1, keepdims=True) if renormalize else weight
    return choice, index, (weight * np.float32(scale)).astype(np.float32)


def check(
    artifact: Any,
    session: Any,
    selection: Selection,
    case: dict[str, Any],
    *,
    renormalize: bool = True,
    scale: float = 1.0,
) -> None:
    """One step: hidden [T,H], logits [T,E], mask [T], budget, floor."""
    hidden, logits, mask = case["hidden"], case["logits"], case["mask"]
    choice, index, weight = routed(logits, renormalize=renormalize, scale=scale)
    expected = select(
        selection,
        choice,
        choice,
        index,
        weight,
        budget=case["budget"],
        floor=case["floor"],
        token_mask=mask,
        renormalize=renormalize,
        scale=scale,
    )
    feeds = {
        "hidden": hidden,
        "logits": logits,
        "budgets": np.array([0, case["budget"]], np.int32),
        "floors": np.array([9, case["floor"]], np.float32),
        "mask": mask,
    }
    output, chosen_by = session.run(None, feeds)
    assert chosen_by.shape == logits.shape
    # An expert of weight 0 (its logit is -inf) fills a slot of the reference, and here is none.
    used = np.where(expected.weight > 0, expected.index, -1)
    for row, own in zip(chosen_by, used, strict=True):
        best = np.argsort(-np.where(np.isfinite(row), row, -np.inf), kind="stable")[:K]
        assert {int(e) for e in best if np.isfinite(row[e])} == {int(e) for e in own if e >= 0}
    assert count_active([chosen_by], 1, K).tolist() == [len(np.unique(used[used >= 0]))]
    whole = experts(FORM, hidden, expected.index, expected.weight, **artifact.weights)
    assert np.abs(output - whole).max() <= 1e-5 * max(1, float(np.abs(whole).max()))


def cases(rows: int, seed: int) -> Any:
    """Every budget and floor that differs in what it does, with masked rows and rows of values that are no numbers."""
    generator = np.random.default_rng(seed)
    # none, fewer than K, what is guaranteed at most, nearly all, all, more | none, some, nearly all, above every vote,
    # beyond float32 once it is multiplied
    for budget, floor in itertools.product((0, 2, 4, 12, E, 99), (0.0, 0.01, 0.12, 1.5, 3e38)):
        hidden = generator.normal(size=(rows, H)).astype(np.float32)
        logits = generator.normal(0, 2, (rows, E)).astype(np.float32)
        mask = generator.random(rows) > (0.2 if floor else 0)
        if budget in (4, E) and rows > 1:
            # One NaN makes a row worthless, as does +inf; -inf is an expert that the row never chooses.
            logits[generator.integers(rows), generator.integers(E)] = np.nan
            logits[generator.integers(rows), generator.integers(E)] = np.inf
            logits[generator.integers(rows), :3] = -np.inf
        if budget == 12 and rows > 1:
            logits[0] = -np.inf  # all of a row: its softmax is NaN
        yield {"hidden": hidden, "logits": logits, "mask": mask, "budget": budget, "floor": floor}


@pytest.mark.parametrize("name", SELECTIONS)
def test_each_token_has_the_experts_of_the_reference(name: str, tmp_path: Path) -> None:
    artifact = store(tmp_path, SELECTIONS[name])
    session = open_session(artifact)
    # one token, whose experts are its own; few, of which some drop to fewer than K; many
    for seed, rows in enumerate((1, 2, 5, 40)):
        for case in cases(rows, seed):
            check(artifact, session, SELECTIONS[name], case)


# a token's own weights decide: guaranteed or not, to another power, dropping or not (which is the same for one)
@pytest.mark.parametrize("name", ["lynx", "weight-drop", "weight-steep"])
def test_a_single_token_has_the_experts_of_the_reference(name: str, tmp_path: Path) -> None:
    artifact = store(tmp_path, SELECTIONS[name])
    session = open_session(artifact, form="single")
    for case in (case for seed in range(8) for case in cases(1, seed)):
        check(artifact, session, SELECTIONS[name], case)
    for value in (np.nan, np.inf, -np.inf):
        logits = np.linspace(0, 3, E, dtype=np.float32)[None].copy()
        logits[0, 3:] = value  # a row that doesn't count; but for -inf, three experts that are left
        case = {"hidden": np.ones((1, H), np.float32), "logits": logits, "mask": np.ones(1, bool)}
        check(artifact, session, SELECTIONS[name], {**case, "budget": 3, "floor": 0.0})


# votes that are alike whatever the weights, so that the lower index decides; votes for experts that are not its own;
# a token that may keep all of its own
@pytest.mark.parametrize("name", ["lynx-latency", "lynx-affinity", "xshare", "weight-plain"])
def test_where_more_than_its_weights_decides_a_single_token_is_a_batch(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="which experts a single token keeps"):
        lower(store(tmp_path, SELECTIONS[name]), form="single")


# softmax not renormalised (OLMoE, Qwen2-MoE); scaled; both
@pytest.mark.parametrize(("renormalize", "scale"), [(False, 1.0), (True, 2.5), (False, 16.0)])
def test_other_rules_for_the_weights(renormalize: bool, scale: float, tmp_path: Path) -> None:
    artifact = store(tmp_path, PRESETS["lynx"], renormalize=renormalize, scale=scale)
    session = open_session(artifact)
    for case in (*cases(1, 11), *cases(9, 12)):
        check(artifact, session, PRESETS["lynx"], case, renormalize=renormalize, scale=scale)


def test_experts_that_tie_for_votes_are_kept_by_the_lower_index(tmp_path: Path) -> None:
    """Rows that are one row shifted: all experts have the same votes, summed in other orders."""
    for name in ("lynx", "lynx-latency", "xshare"):
        artifact = store(tmp_path, SELECTIONS[name])
        session = open_session(artifact)
        row = np.random.default_rng(5).normal(0, 2, E).astype(np.float32)
        logits = np.stack([np.roll(row, shift) for shift in range(E)])
        hidden = np.ones((E, H), np.float32)
        for budget in (1, 5, 11):
            case = {"hidden": hidden, "logits": logits, "mask": np.ones(E, bool), "budget": budget, "floor": 0.0}
            check(artifact, session, SELECTIONS[name], case)


def test_a_vote_that_is_the_floor_is_not_enough(tmp_path: Path) -> None:
    """Rows that are all alike: an expert's votes are the number of voting tokens, whatever their shares add up to."""
    artifact = store(tmp_path, PRESETS["lynx-latency"])
    session = open_session(artifact)
    generator = np.random.default_rng(2)
    for rows in (1, 3, 6, 7, 12, 96):
        for _ in range(8):
            logits = np.repeat(generator.normal(0, 2, (1, E)).astype(np.float32), rows, axis=0)
            case = {"hidden": np.ones((rows, H), np.float32), "logits": logits, "mask": np.ones(rows, bool)}
            check(artifact, session, PRESETS["lynx-latency"], {**case, "budget": E, "floor": 1.0})


def test_votes_beyond_float64_stay_with_the_selections_own_nodes(tmp_path: Path) -> None:
    steep = Selection("weight", guarantee=1, sensitivity=0.0, remap=True, power=20.0)
    artifact = store(tmp_path, steep)
    assert lower(artifact).forms == ("fused",)
    with pytest.raises(ArtifactError, match="votes to the power 20 leave float64"):
        lower(artifact, form="masked")
