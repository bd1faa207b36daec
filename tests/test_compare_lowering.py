"""The lowered graph gives what the function bodies give, in every form, and leaves the artifact alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from lynx_trt.artifact import Artifact, check_files
from lynx_trt.budgets import Restriction
from lynx_trt.errors import ArtifactError
from lynx_trt.runtime.attention import lower_attention
from lynx_trt.runtime.graph import GraphEdit
from lynx_trt.runtime.lowering import Form, lower
from lynx_trt.runtime.ort import OrtBackend
from lynx_trt.runtime.routing import Unrestricted
from lynx_trt.tensorrt.prepare import _fold_heads

Array = np.ndarray[Any, np.dtype[Any]]

# softmax, renormalised | biases, clamped, interleaved, transposed, sinks | sigmoid with groups, a shared expert, a
# dense first layer | a router that no rule describes, so experts are dropped and slots are empty
NAMES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "phimoe")
FLOAT, HEADS, ROWS = TensorProto.FLOAT, 4, 16


def steps(artifact: Artifact, form: Form | None) -> list[tuple[Array, Array]]:
    """Logits and active experts of a ragged prefill, a restricted step with an idle row, and a free one."""
    backend = OrtBackend(artifact, 4, threads=1, form=form)
    layers = artifact.manifest.model.moe_layers
    generator = np.random.default_rng(3)
    everything = Restriction(tuple(layer.experts for layer in layers))
    floors = (0.05,) * len(layers)
    past, lengths = np.zeros(4, np.int64), np.array([7, 1, 5, 7])
    results = [backend.step(generator.integers(3, 256, (4, 7)), past, lengths, everything)]
    past = lengths
    for restriction, lengths in (
        (Restriction((3,) * len(layers)), np.array([1, 1, 0, 1])),
        (Restriction((2,) * len(layers)), np.ones(4, np.int64)),
        (Restriction((7,) * len(layers), floors), np.ones(4, np.int64)),
        (everything, np.ones(4, np.int64)),
    ):
        results.append(backend.step(generator.integers(3, 256, (4, 1)), past, lengths, restriction))
        past = past + lengths
    # A row without tokens has no last token, so its logits mean nothing.
    return [
        (result.logits[[0, 1, 3]] if number == 1 else result.logits, result.active)
        for number, result in enumerate(results)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_function_bodies(name: str, artifact: Callable[..., Artifact]) -> None:
    built = artifact(name, preset="lynx")
    reference = steps(built, None)
    forms: tuple[Form, ...] = ("grouped", "fused", "auto")  # auto: masked, but for the last two
    for form in forms:
        for (expected, active), (got, got_active) in zip(reference, steps(built, form), strict=True):
            assert got_active.tolist() == active.tolist()
            # Sums in another order: some roundings of float32 at the scale of the logits, over the layers.
            bound = 64 * np.finfo(np.float32).eps * np.abs(expected).max()
            assert np.abs(got - expected).max() <= bound, form


def test_latent_attention_reads_the_rows_that_there_are(artifact: Callable[..., Artifact]) -> None:
    """Of cache and mask, both cut in one place for all layers."""
    lowered = lower(artifact("deepseek_v3", preset="lynx")).model.graph
    producers = {name: node for node in lowered.node for name in node.output}
    attentions = [node for node in lowered.node if node.op_type == "Attention"]
    assert len(attentions) == 3
    ends = set()
    for node in attentions:
        assert node.input[1] == node.input[2]
        key, mask = producers[node.input[1]], producers[producers[node.input[3]].input[0]]
        assert [cut.op_type for cut in (key, mask, producers[key.input[0]])] == ["Slice", "Slice", "TensorScatter"]
        ends |= {key.input[2], mask.input[2]}
    assert len(ends) == 1
    assert len({node.input[3] for node in attentions}) == 1


@pytest.mark.parametrize("length", [1, 4])
def test_latent_attentions_with_masks_of_their_own(length: int) -> None:
    """Two layers, one of which sees a window: each keeps its mask, and only a decode step is one product of all heads.

    No model that is read has both, so the graph is made here. TensorRT's copy shares masks as well.
    """
    graphs = {
        "plain": _two_latent_attentions(),
        "lowered": _two_latent_attentions(),
        "folded": _two_latent_attentions(),
    }
    edit = GraphEdit(graphs["lowered"], Path())
    lower_attention(edit, graphs["lowered"].graph)
    edit.finish()
    assert _fold_heads(graphs["folded"].graph) == 2
    queries = [node.input[0] for node in graphs["lowered"].graph.node if node.op_type == "Attention"]
    graphs["lowered"].graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in queries)
    random = np.random.default_rng(0)
    past = np.array([0, 5, 9])
    inputs = {"past_lengths": past, "lengths": np.full(3, length)}
    for name, shape in (("cache", (3, 1, ROWS, 8)), ("new", (3, 1, length, 8)), ("query", (3, HEADS, length, 8))):
        inputs[name] = random.standard_normal(shape, np.float32)
    keys, positions = np.arange(ROWS), (past[:, None] + np.arange(length))[:, None, :, None]
    inputs["all"] = keys <= positions
    inputs["window"] = inputs["all"] & (keys > positions - 3)
    got = {}
    for name, model in graphs.items():
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        wanted = {node.name for node in session.get_inputs()}
        got[name] = session.run(None, {key: value for key, value in inputs.items() if key in wanted})
    assert [each.shape for each in got["lowered"][2:]] == 2 * [
        (3, 1, HEADS, 8) if length == 1 else (3, HEADS, length, 8)
    ]
    assert np.abs(got["plain"][0] - got["plain"][1]).max() > 0.1
    for name in ("lowered", "folded"):
        for ours, expected in zip(got[name][:2], got["plain"], strict=True):
            assert np.abs(ours - expected).max() <= 64 * np.finfo(np.float32).eps * np.abs(expected).max()


def _two_latent_attentions() -> onnx.ModelProto:
    """Of one query to one cache, through two masks."""
    batched: dict[str, tuple[int, list[Any]]] = {
        "past_lengths": (TensorProto.INT64, []),
        "lengths": (TensorProto.INT64, []),
        "cache": (FLOAT, [1, ROWS, 8]),
        "new": (FLOAT, [1, "sequence", 8]),
        "query": (FLOAT, [HEADS, "sequence", 8]),
        **{mask: (TensorProto.BOOL, [1, "sequence", ROWS]) for mask in ("all", "window")},
    }
    inputs = [helper.make_tensor_value_info(name, kind, ["batch", *shape]) for name, (kind, shape) in batched.items()]
    shape = ["batch", HEADS, "sequence", 8]
    outputs = [helper.make_tensor_value_info(name, FLOAT, shape) for name in ("through_all", "through_window")]
    nodes = [helper.make_node("TensorScatter", ["cache", "new", "past_lengths"], ["rows"], axis=2)]
    for mask, output in zip(("all", "window"), outputs, strict=True):
        nodes.append(helper.make_node("Attention", ["query", "rows", "rows", mask], [output.name], scale=0.5))
    graph = helper.make_graph(nodes, "latent", inputs, outputs)
    graph.value_info.append(helper.make_tensor_value_info("rows", FLOAT, ["batch", 1, ROWS, 8]))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def test_the_baseline_is_the_model_without_selection(artifact: Callable[..., Artifact]) -> None:
    built = artifact("qwen3_moe", preset="lynx")
    plain, fused = steps(built, None), steps(built, "baseline")
    # Behind the restricted steps the caches differ, so only the prefill compares.
    assert np.abs(plain[0][0] - fused[0][0]).max() <= 1e-5 * np.abs(plain[0][0]).max()
    assert all((active == -1).all() for _, active in fused)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])  # the second keeps an Attention with sinks of its own
@pytest.mark.parametrize("heads", [0, 1 << 30])  # of no size, of any size: streamed, with all scores
def test_both_ways_to_attend_are_equal(
    name: str, heads: int, artifact: Callable[..., Artifact], monkeypatch: Any
) -> None:
    built = artifact(name, preset="lynx")
    reference = steps(built, None)
    monkeypatch.setattr("lynx_trt.runtime.attention.SMALL_HEAD", heads)
    sinks = [node.input[11] for node in lower(built).model.graph.node if node.op_type == "GroupQueryAttention"]
    assert all(bool(sink) == bool(heads) for sink in sinks)
    assert len(sinks) == (0 if name == "gpt_oss" else built.manifest.model.layers)
    for (expected, _), (got, _) in zip(reference, steps(built, "auto"), strict=True):
        assert np.abs(got - expected).max() <= 64 * np.finfo(np.float32).eps * np.abs(expected).max()


def test_a_restricted_step_of_one_token_has_a_graph_of_its_own(artifact: Callable[..., Artifact]) -> None:
    """And gives what the function bodies give; a free step, an idle one and those of two tokens have others."""
    built = artifact("qwen3_moe", preset="lynx")
    reference, backend = (OrtBackend(built, 2, threads=1, form=form) for form in (None, "auto"))
    graphs = backend._graphs
    ran: list[Any] = []
    run = backend._run

    def noted(session: Any, bindings: Any) -> None:
        ran.append(session)
        run(session, bindings)

    backend._run = noted  # type: ignore[method-assign]
    ids = np.random.default_rng(8).integers(3, 256, (2, 4))
    nothing, prompt, one = np.zeros(2, np.int64), np.full(2, 4), np.ones(2, np.int64)
    for either in (reference, backend):
        either.step(ids, nothing, prompt, Restriction((8, 8)))
    assert graphs.single is not None
    for slot, restriction, expected in (
        (0, Restriction((1, 2)), graphs.single),
        (1, Restriction((8, 8), (0.3, 0.1)), graphs.single),
        (0, Restriction((1, 1), (0.5, 0.5)), graphs.single),
        (1, Restriction((2, 2)), graphs.free),  # K is 2: a token has no more
        (None, Restriction((2, 2)), graphs.whole),
    ):
        rows = slice(0, 2) if slot is None else slice(slot, slot + 1)
        steps = [
            each.step(ids[rows, :1], prompt[rows], one[rows], restriction, first=rows.start)
            for each in (reference, backend)
        ]
        assert ran[-1] is expected.session
        assert steps[1].active.tolist() == steps[0].active.tolist()
        bound = 64 * np.finfo(np.float32).eps * np.abs(steps[0].logits).max()
        assert np.abs(steps[1].logits - steps[0].logits).max() <= bound
    idle = backend.step(ids[:1, :1], prompt[:1], np.zeros(1, np.int64), Restriction((1, 1)))
    assert idle.active.tolist() == [0, 0]


def test_one_token_has_one_thread(artifact: Callable[..., Artifact]) -> None:
    backend = OrtBackend(artifact("qwen3_moe", preset="lynx"), 2, threads=2, form="auto")

    def threads(free: bool, tokens: int) -> int:
        return int(backend._graph(free, 1, tokens).session.get_session_options().intra_op_num_threads)

    assert [threads(free, tokens) for free in (True, False) for tokens in (1, 2)] == [1, 2, 1, 2]


# a batch in one piece, in pieces of equal size, and of unequal size; behind free slots
@pytest.mark.parametrize(("batch", "pieces", "first"), [(7, 1, 0), (8, 2, 0), (9, 2, 0), (12, 3, 1)])
@pytest.mark.parametrize("form", ["auto", "baseline"])
def test_pieces_of_a_batch_are_the_whole(
    form: Form, batch: int, pieces: int, first: int, artifact: Callable[..., Artifact], monkeypatch: Any
) -> None:
    built = artifact("qwen3_moe", preset="lynx")
    experts = tuple(layer.experts for layer in built.manifest.model.moe_layers)
    generator = np.random.default_rng(5)
    whole, cut = (OrtBackend(built, first + batch, threads=1, pieces=count, form=form) for count in (1, 4))
    ran: list[int] = []
    run = cut._run

    def counted(session: Any, bindings: Any) -> None:
        ran.append(len(bindings))
        run(session, bindings)

    monkeypatch.setattr(cut, "_run", counted)
    past, one = np.zeros(batch, np.int64), np.ones(batch, np.int64)
    ids = generator.integers(3, 256, (batch, 5))
    idle = one.copy()
    idle[2] = 0
    for number, (tokens, lengths, budget) in enumerate(
        [(ids, one * 5, 8), (ids[:, :1], one, 8), (ids[:, 1:2], one, 2), (ids[:, 2:3], idle, 8), (ids[:, 3:4], one, 8)]
    ):
        restriction = Restriction((budget,) * len(experts))
        expected, got = (each.step(tokens, past, lengths, restriction, first=first) for each in (whole, cut))
        assert got.active.tolist() == expected.active.tolist()
        rows = lengths > 0
        difference = np.abs(got.logits[rows] - expected.logits[rows]).max()
        assert difference <= 64 * np.finfo(np.float32).eps * np.abs(expected.logits).max(), number
        past = past + lengths
    # The selection votes over the batch, and an idle row has to load nothing; a prompt runs in one piece.
    assert ran == ([1, pieces, 1, 1, pieces] if form == "auto" else [1, pieces, pieces, pieces, pieces])


@pytest.mark.parametrize("failing", [0, 1])  # on the caller's thread, beside it
def test_a_piece_that_fails_fails_the_step(failing: int, artifact: Callable[..., Artifact]) -> None:
    """Once the others have ended: they write where the next step will."""
    backend = OrtBackend(artifact("qwen3_moe", preset="lynx"), 8, threads=1, pieces=2, form="auto")
    ended: list[int] = []

    class Session:
        def run_with_iobinding(self, piece: int) -> None:
            if piece == failing:
                raise RuntimeError("no memory")
            time.sleep(0.05)
            ended.append(piece)

    with pytest.raises(RuntimeError, match="no memory"):
        backend._run(Session(), [0, 1])
    assert ended == [1 - failing]


@pytest.mark.parametrize("form", ["baseline", "unrestricted", "masked"])
def test_a_rule_that_is_no_softmax_has_no_baseline(form: Form, artifact: Callable[..., Artifact]) -> None:
    with pytest.raises(ArtifactError, match="softmax and top-k only"):
        lower(artifact("deepseek_v3", preset="lynx"), form=form)


def test_a_row_of_values_that_are_no_numbers_stays_its_own(artifact: Callable[..., Artifact]) -> None:
    """One sequence's cache is poisoned; the other rows' logits are those of a batch without it."""
    built = artifact("qwen3_moe", preset="lynx")
    for form in ("grouped", "fused", "masked"):
        rows = []
        for poison in (0.0, np.nan):
            backend = OrtBackend(built, 2, threads=1, form=form)  # type: ignore[arg-type]
            for cache in backend._caches.values():
                cache[1, :, :3] = poison
            everything = Restriction(tuple(layer.experts for layer in built.manifest.model.moe_layers))
            step = backend.step(np.array([[5], [9]]), np.array([0, 3]), np.ones(2, np.int64), everything)
            rows.append(step.logits[0])
        assert np.isfinite(rows[1]).all()
        assert np.abs(rows[0] - rows[1]).max() <= 1e-5 * np.abs(rows[0]).max()


def test_small_and_large_experts_choose_their_form(artifact: Callable[..., Artifact], monkeypatch: Any) -> None:
    built = artifact("qwen3_moe", preset="lynx")
    assert set(lower(built).forms) == {"masked"}
    # no softmax; no rule at all, so that the chosen experts' weights are all that is known
    for name in ("deepseek_v3", "phimoe"):
        assert set(lower(artifact(name, preset="lynx")).forms) == {"fused"}
    monkeypatch.setattr("lynx_trt.runtime.moe_layer.SMALL_EXPERT", 0)
    assert set(lower(built).forms) == {"grouped"}


def test_what_restricts_nothing(artifact: Callable[..., Artifact]) -> None:
    built = artifact("qwen3_moe", preset="lynx")  # K = 2 of E = 8
    one = np.ones(2, np.int64)

    def free(
        budget: int, lengths: Array = one, width: int = 1, artifact: Artifact = built, floors: tuple[float, ...] = ()
    ) -> bool:
        return Unrestricted(artifact).holds(lengths, width, Restriction((budget, budget), floors))

    assert free(4)  # two tokens have four experts at most
    assert not free(3)
    assert not free(7, floors=(0.0, 0.01))  # an expert of two tokens can lack the votes
    assert not free(8, floors=(0.0, 0.01))
    assert not free(8, np.array([1, 0]))  # an idle row has to load nothing
    assert free(1, one * 5, 5)  # a prefill is never restricted
    score = built.manifest.selection.model_copy(update={"parameters": {"vote": "score"}})
    scored = replace(built, manifest=built.manifest.model_copy(update={"selection": score}))
    assert not free(4, artifact=scored)
    assert free(8, artifact=scored)


def test_the_artifact_stays_as_it_was_built(artifact: Callable[..., Artifact]) -> None:
    built = artifact("qwen3_moe", preset="lynx")
    before = sorted(path.name for path in built.folder.iterdir())
    OrtBackend(built, 1, threads=1, form="auto")
    assert check_files(built) == []
    assert sorted(path.name for path in built.folder.iterdir()) == before


def test_a_graph_that_is_none(tmp_path: Any, artifact: Callable[..., Artifact]) -> None:
    built = artifact("qwen3_moe", preset="lynx")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match="can't be read as ONNX"):
        lower(Artifact(tmp_path, built.manifest))


def test_half_precision_is_computed_in_float32(artifact: Callable[..., Artifact]) -> None:
    """Both from the same fp16 weights: the lowered one is the function bodies' but for fp16's own rounding."""
    built = artifact("qwen3_moe", precision="fp16", preset="lynx")
    expected, _ = steps(built, None)[0]
    got, _ = steps(built, "auto")[0]
    scale = np.abs(expected).max()
    assert np.median(np.abs(got - expected)) <= 8 * np.finfo(np.float16).eps * scale


@pytest.mark.parametrize("form", ["baseline", "masked", "fused"])
def test_weights_that_are_multiplied_have_no_fused_form(form: Form, artifact: Callable[..., Artifact]) -> None:
    """Gemma 4: com.microsoft.MoE would leave each expert's number out."""
    with pytest.raises(ArtifactError, match="multiplies each expert's weight by a number of its own"):
        lower(artifact("gemma4"), form=form)
    assert set(lower(artifact("gemma4"), form="auto").forms) == {"grouped"}
