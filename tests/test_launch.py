"""Launch choices and plans: pure functions, so all of it is tested without a GPU or a compiler."""

from __future__ import annotations

import argparse
import itertools
import random
import runpy
from collections.abc import Callable, Iterable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_kernels import FakeDriver

from lynx_trt.errors import UsageError
from lynx_trt.experts import ExpertsForm
from lynx_trt.export.ops import experts_attributes, select_attributes
from lynx_trt.plugins import aot, launch_table, tune
from lynx_trt.plugins.blob import Cubin
from lynx_trt.plugins.candidates import PARTS, candidates, estimate, families, fits, rows_a_value, select_candidates
from lynx_trt.plugins.launch import (
    FLOAT32_TOKENS,
    MOST_PROGRAMS,
    SHARED_MEMORY,
    SMS,
    experts_estimate,
    experts_launch,
    row_of,
    select_estimate,
    select_launch,
    shared_bytes,
    tokens_bucket,
)
from lynx_trt.plugins.launch_source import render_table
from lynx_trt.plugins.plan import (
    ALIGNMENT,
    MODULES,
    SCRATCH_BYTES,
    Grid,
    Kernel,
    Plan,
    Region,
    find_plan,
)
from lynx_trt.plugins.plans import experts_plan, plans, select_plan, workspace_bytes
from lynx_trt.plugins.shapes import SHAPES, Shape, experts_spec, select_spec
from lynx_trt.plugins.specs import BYTES, ExpertsSpec, SelectSpec
from lynx_trt.selection import PRESETS
from lynx_trt.tensorrt import loader

MODELS = list(SHAPES)

# What a node's tensors are called in plans.
TENSORS = {
    *(
        "choice",
        "combine",
        "topk_index",
        "topk_weight",
        "budget",
        "floor",
        "token_mask",
        "index",
        "weight",
        "active",
        "dispatch",
    ),
    *("hidden", "gate_up", "down", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias", "output"),
}


@pytest.mark.parametrize(
    ("tokens", "experts", "width", "bucket"),
    [(1, 8, 2, 1), (4, 8, 2, 1), (5, 8, 2, 2), (32, 8, 2, 8), (16, 128, 8, 1), (17, 128, 8, 2), (16384, 8, 2, 4096)],
)
def test_buckets(tokens: int, experts: int, width: int, bucket: int) -> None:
    assert tokens_bucket(tokens, experts, width) == bucket


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("dtype", BYTES)
def test_tiles_fit_shared_memory(dtype: str, sm: int) -> None:
    for model in MODELS:
        shape = SHAPES[model]
        for tokens in (1 << power for power in range(16)):
            layer = shape.experts, shape.experts_per_token, shape.hidden, shape.inner
            launch = experts_launch(tokens, *layer, dtype, sm)
            assert shared_bytes(launch.gate_up, dtype, sm, rows_a_value=2) <= SHARED_MEMORY[sm]
            assert shared_bytes(launch.down, dtype, sm, rows_a_value=1) <= SHARED_MEMORY[sm]
            assert launch.reason


def test_launches_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        experts_launch(1, 8, 2, 64, 64, "float16", 90).prefill = True  # type: ignore[misc]


def test_a_measured_launch_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = experts_estimate(4, 64, 64, "float16", 90)
    measured = replace(estimate, gate_up=replace(estimate.gate_up, warps=8), microseconds=12.5)
    layer = 8, 2, 64, 64
    monkeypatch.setitem(launch_table.EXPERTS, (90, *layer, "float"), {1: estimate, 16: measured})
    assert experts_launch(16, *layer, "float16", 90) == measured
    assert experts_launch(16, *layer, "bfloat16", 90) == measured
    assert experts_launch(64, *layer, "float16", 90) == measured  # more than was measured
    assert experts_launch(8, *layer, "float16", 90).microseconds is None
    assert experts_launch(16, *layer, "float32", 90).microseconds is None
    assert experts_launch(16, *layer, "float16", 80).microseconds is None
    assert experts_launch(16, *layer, "float16", 90, form=ExpertsForm(weights="mxfp4")).microseconds is None
    quick = replace(select_launch(16, 128, 8, 90), warps=2, microseconds=5.0)
    monkeypatch.setitem(launch_table.SELECT, (90, 128, 8, 16), quick)
    assert select_launch(16, 128, 8, 90) == quick


def test_tokens_per_expert_decide() -> None:
    """Decode kernels while weights are read, prefill kernels when they are multiplied; the copy engine from SM 90."""
    for model in MODELS:
        shape = SHAPES[model]
        sizes = shape.hidden, shape.inner, "bfloat16", 90
        chosen = [experts_estimate(1 << p, *sizes, form=shape.form) for p in range(12)]
        assert [each.prefill for each in chosen] == [False] * 6 + [True] * 6
        # Which bring bytes where they are to be multiplied, and so none that are to become numbers first.
        assert all(each.gate_up.descriptors != shape.form.quantized for each in chosen if each.prefill)
    assert not experts_estimate(64, 4096, 4096, "bfloat16", 80).gate_up.descriptors
    # Rows that are no multiple of 16 bytes are nothing for the copy engine.
    assert not experts_estimate(64, 4096, 1001, "bfloat16", 90).down.descriptors


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("model", MODELS)
def test_plans_cover_all_numbers_of_tokens(model: str, sm: int) -> None:
    for spec in (experts_spec(model, "bfloat16", dispatch_given=False), select_spec(model)):
        options = plans(spec, sm, 5000)
        assert [plan.max_tokens for plan in options] == sorted({plan.max_tokens for plan in options})
        assert options[-1].max_tokens >= 5000
        assert find_plan(options, 1) is options[0]
        for plan in options:
            known = TENSORS | {"T", "null", *plan.offsets(plan.max_tokens)}
            assert {argument for step in plan.steps for argument in step.arguments} <= known
            assert all(step.kernel.function in MODULES for step in plan.steps)
            assert all(step.grid.programs(plan.max_tokens, 132) > 0 for step in plan.steps)


@pytest.mark.parametrize("handed", [True, False])
def test_only_experts_behind_their_selection_begin_early(handed: bool) -> None:
    """What is before the first launch of an op is otherwise TensorRT's, and waits for whom it likes."""
    select = select_spec("qwen3-30b-a3b", dispatch_taken=handed)
    experts = experts_spec("qwen3-30b-a3b", "bfloat16", dispatch_given=handed)
    for sm, spec in itertools.product((80, 90), (select, experts)):
        early = [[step.programmatic for step in plan.steps] for plan in plans(spec, sm, 4096)]
        # Of the experts' launches some are measured to be slower so.
        assert any(first for first, *_ in early) == (sm == 90 and handed and spec is experts)
        assert any(any(others) for _, *others in early) == (sm == 90)
        assert sm == 80 or spec is experts or all(all(others) for _, *others in early)


def test_a_batch_beyond_the_plans() -> None:
    with pytest.raises(ValueError, match="5000 tokens: the kernels are made for up to 64"):
        find_plan(plans(select_spec("mixtral-8x7b"), 90, 64), 5000)


@pytest.mark.parametrize("model", MODELS)
def test_decode_launches_a_program_for_every_tile(model: str) -> None:
    """However the pairs fall on the experts, there are no more tiles than programs."""
    shape = SHAPES[model]
    rng = random.Random(0)
    for plan in plans(experts_spec(model, "bfloat16"), 90, 512):
        constants = [dict(step.kernel.constants) for step in plan.steps[:2]]
        if "ONE_TILE" not in constants[0]:
            continue
        for _ in range(20):
            tokens = rng.randint(1, plan.max_tokens)
            few = rng.randint(shape.experts_per_token, shape.experts)  # the fewer, the fuller
            counts = [0] * few
            for _ in range(tokens):
                for expert in rng.sample(range(few), shape.experts_per_token):
                    counts[expert] += 1
            for step, (values, rows, block) in zip(
                plan.steps,
                zip(constants, (shape.inner, shape.hidden), ("BLOCK_I", "BLOCK_H"), strict=True),
                strict=False,
            ):
                height = 10**9 if values["ONE_TILE"] else int(values["BLOCK_T"])
                tiles = sum(-(-count // height) for count in counts if count) * -(-rows // int(values[block]))
                assert tiles <= step.grid.programs(tokens, 132)
                assert not values["ONE_TILE"] or tokens <= int(values["BLOCK_T"])


def test_grids() -> None:
    assert Grid(fixed=1).programs(7, 132) == 1
    assert Grid(times=1, over=16).programs(33, 132) == 3
    assert Grid(per=3, cap=8, slots=2, times=2, over=16).programs(9, 132) == 3 * (8 + 2)
    assert Grid(per=3, sequences=1).programs(40, 132, 5) == 3 * 5
    assert Grid(per=1000, times=1, per_multiprocessor=2).programs(9, 132) == 264
    assert Grid(per=10**6, times=1, per_multiprocessor=9).programs(9, 200) == MOST_PROGRAMS


def test_workspace_regions_are_aligned_and_do_not_overlap() -> None:
    plan = Plan(64, (), (Region("a", fixed=3), Region("b", per=100), Region("c", per=8, tokens=16)))
    assert plan.offsets(17) == {"a": 0, "b": 256, "c": 256 + 1792}
    assert plan.workspace_bytes(17) == 256 + 1792 + 256
    assert all(offset % ALIGNMENT == 0 for offset in plan.offsets(17).values())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens", [1, 16, 100, 512, 513, 16384])
def test_workspace_is_bounded_by_the_tokens(model: str, tokens: int) -> None:
    """The formula that the docstring gives: never E x T x H."""
    shape = SHAPES[model]
    pairs, experts = tokens * shape.experts_per_token, shape.experts
    tables = 20 * (4 * pairs + 5 * experts) + 8 * ALIGNMENT
    assert workspace_bytes(select_spec(model), tokens) <= tables
    partial = 4 if tokens <= FLOAT32_TOKENS else 2
    # A prefill may come with as few tokens as a decode batch has at most.
    rows = pairs * (2 * shape.inner + partial * shape.hidden)
    least = FLOAT32_TOKENS * shape.experts_per_token * (2 * shape.inner + 4 * shape.hidden)
    scratch = SCRATCH_BYTES * MOST_PROGRAMS
    bound = max(rows, least) if tokens > FLOAT32_TOKENS else rows
    assert workspace_bytes(experts_spec(model, "bfloat16", dispatch_given=False), tokens) <= bound + tables + scratch


def test_specs_come_from_the_attributes_of_nodes() -> None:
    selection = PRESETS["lynx"]
    attributes = select_attributes(selection, experts_per_token=8, renormalize=True, scale=2.5)
    spec = SelectSpec.from_attributes(attributes, experts=128, experts_per_token=8)
    assert (spec.vote, spec.guarantee, spec.remap, spec.power, spec.scale) == ("weight", 1, True, 2.0, 2.5)
    form = ExpertsForm("gelu", gated=False, transposed=True, limit=7.0)
    sizes = {"experts": 8, "experts_per_token": 2, "hidden": 64, "inner": 32}
    experts = ExpertsSpec.from_attributes(experts_attributes(form), **sizes, dtype="float16")  # type: ignore[arg-type]
    assert experts.form == form
    assert experts == ExpertsSpec(8, 2, 64, 32, "float16", form)


def test_keys_tell_specs_apart() -> None:
    """Floats by the bits of a float32: 0.1 as a Python float and as a plugin's field are the same."""
    spec = select_spec("mixtral-8x7b")
    assert replace(spec, sensitivity=0.1).key == replace(spec, sensitivity=0.10000000149011612).key
    assert "sensitivity=3dcccccd" in replace(spec, sensitivity=0.1).key
    keys = {replace(spec, **change).key for change in ({}, {"scale": 2.0}, {"remap": False}, {"dispatch_taken": False})}  # type: ignore[arg-type]
    assert len(keys) == 4
    assert " " not in experts_spec("gpt-oss-120b", "bfloat16").key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 2000}, "2000 experts a layer: the kernels take 1 to 1024"),
        ({"experts_per_token": 9}, "9 of 8 experts a token"),
        ({"vote": "loud"}, "vote is 'loud'"),
    ],
)
def test_specs_that_no_kernel_is_made_for(change: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(select_spec("mixtral-8x7b"), **change)  # type: ignore[arg-type]


def test_equal_layers_share_plans() -> None:
    """A plan is a function of the spec: equal specs of different layers give equal kernels."""
    spec = experts_spec("qwen3-30b-a3b", "bfloat16")
    again = experts_spec("qwen3-30b-a3b", "bfloat16")
    assert experts_plan(spec, 90, 16) == experts_plan(again, 90, 16)
    assert hash(experts_plan(spec, 90, 16).steps[0].kernel) == hash(experts_plan(again, 90, 16).steps[0].kernel)


# ------------------------------------------------------------------------------------------------ the tuner


def test_the_tuner_tries_what_can_run() -> None:
    """The estimate first, nothing twice, nothing that finds no room; both kinds of kernels where either may win."""
    for name, tokens in itertools.product(SHAPES, (1, 16, 64, 256, 4096)):
        spec = experts_spec(name, "bfloat16")
        for prefill, part in itertools.product(families(spec, tokens), PARTS):
            tried = candidates(spec, 90, tokens, part, prefill=prefill)
            assert len(tried) == len(set(tried)) > 10
            assert tried[0] == getattr(estimate(spec, 90, tokens, prefill=prefill), part)
            for each in tried[1:]:
                assert fits(each, spec, 90, rows_a_value=rows_a_value(spec, part))
                assert bool(each.per_multiprocessor) == prefill
                assert not each.copied or (each.descriptors and part == "down")
                assert not each.flatten or each.descriptors
            splits = {each.split for each in tried}
            assert splits == ({1, 2, 4} if part == "down" and not prefill and tokens <= 64 else {1}), (name, tokens)
    mixtral = experts_spec("mixtral-8x7b", "bfloat16")
    assert [families(mixtral, tokens) for tokens in (16, 64, 4096)] == [(False,), (False, True), (True,)]


def test_what_does_not_fit_is_not_tried() -> None:
    spec = experts_spec("mixtral-8x7b", "bfloat16")
    matmul = experts_estimate(64, 4096, 14336, "bfloat16", 90).gate_up
    assert fits(matmul, spec, 90, rows_a_value=2)
    assert not fits(replace(matmul, block_n=256), spec, 90, rows_a_value=2)
    assert not fits(replace(matmul, stages=6), spec, 90, rows_a_value=2)
    assert not fits(replace(matmul, block_n=8), spec, 90, rows_a_value=2)
    large = experts_estimate(128, 4096, 14336, "bfloat16", 90).gate_up
    assert fits(large, spec, 90, rows_a_value=2)
    assert not fits(replace(large, warps=4), spec, 90, rows_a_value=2)  # 256 sums a thread


def test_the_tuner_tries_selections_that_can_run() -> None:
    """One program only of small batches; clusters where there are any; blocks whose tables stay small; the estimate."""
    for name, tokens in itertools.product(SHAPES, (1, 16, 128, 512, 4096)):
        shape = SHAPES[name]
        tried = select_candidates(tokens, shape.experts, shape.experts_per_token, 90)
        assert tried[0] == select_estimate(tokens, shape.experts, shape.experts_per_token)
        assert len(set(tried)) == len(tried)
        assert 1 < len(tried) < 32
        older = select_candidates(tokens, shape.experts, shape.experts_per_token, 89)
        assert older == [launch for launch in tried if launch.programs <= 1]
        for launch in tried:
            assert launch.block_t * shape.experts <= (8192 if launch.programs > 1 else 4096)
            assert launch.programs == 0 or launch.programs * launch.tokens >= tokens
            assert launch.programs <= 1 or launch.block_t in (4, 8, 16, 32, launch.tokens)
            assert launch.programs or 4 * launch.tokens * shape.experts_per_token >= shape.experts
            assert select_plan(select_spec(name), 90, tokens, launch).steps


@pytest.mark.parametrize("experts", [8, 64, 100, 128, 256, 512])
@pytest.mark.parametrize("tokens", [64, 128, 256, 512])
def test_every_decode_batch_can_be_selected_in_one_launch(tokens: int, experts: int) -> None:
    """From SM 90 on; what the fewest warps hold least of, which spills nowhere, is among it."""
    tried = [each for each in select_candidates(tokens, experts, 8, 90) if each.programs]
    row = row_of(experts)
    assert any(each.block_t * row <= 256 * each.warps and each.warps <= 8 for each in tried)


def test_the_table_is_python(tmp_path: Path) -> None:
    experts = {
        (90, 8, 2, 4096, 14336, "float"): {
            tokens: replace(
                experts_estimate(bucket, 4096, 14336, "bfloat16", 90), reason='12% of "it"', microseconds=1.25
            )
            for tokens, bucket in ((1, 1), (256, 64))
        },
        (90, 8, 2, 64, 64, "float"): {1: experts_estimate(1, 64, 64, "bfloat16", 90)},
    }
    select = {(90, 8, 2, 16): replace(select_launch(16, 8, 2, 90), microseconds=5.5)}
    path = tmp_path / "table.py"
    path.write_text(render_table("a GPU", experts, select))
    table = runpy.run_path(str(path))
    assert table["EXPERTS"] == experts
    assert table["SELECT"] == select
    assert max(map(len, path.read_text().splitlines())) <= 120


def test_kernels_that_do_not_compile_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that is no kernel does not end the search, nor one at which the compiler's process dies."""
    pytest.importorskip("triton")
    monkeypatch.setenv(loader.CACHE_VARIABLE, str(tmp_path))
    good = experts_plan(experts_spec("mixtral-8x7b", "bfloat16"), 90, 1).steps[2].kernel
    bad = replace(good, constants=good.constants[:-1])
    found = aot.compile_each([bad, good, replace(bad, warps=8)], 90, jobs=1)
    assert list(found) == [good]
    assert found[good].function == "combine_kernel"
    worker = aot._Worker(tmp_path / "worker")
    worker._process.kill()
    worker._process.wait()
    worker.revive()
    assert worker.compile(good, 90).entry == found[good].entry
    worker.stop()


def test_what_spills_or_has_no_room_is_not_tried() -> None:
    plan = experts_plan(experts_spec("mixtral-8x7b", "bfloat16"), 90, 1)
    cubins = {step.kernel: Cubin(90, step.kernel.function, "entry", 128, 1000, 0, 9, 0, b"") for step in plan.steps}
    compiled = tune.usable(plan, cubins, 90)
    assert compiled is not None
    assert [step.kernel.function for step in compiled.steps] == [step.kernel.function for step in plan.steps]
    first = plan.steps[0].kernel
    for change in ({"spills": 4}, {"shared": SHARED_MEMORY[90] + 1}):
        assert tune.usable(plan, {**cubins, first: replace(cubins[first], **change)}, 90) is None  # type: ignore[arg-type]
    assert tune.usable(plan, {**cubins, first: None}, 90) is None


@pytest.mark.parametrize("agree", [True, False])
def test_the_tuner_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agree: bool) -> None:
    """All but a GPU: one on which more stages, split sums and prefetching are faster, a compiler that never fails."""
    driver, compiled = FakeDriver(), []

    def compile_each(kernels: Iterable[Kernel], sm: int, **_: object) -> dict[Kernel, Cubin]:
        kernels = set(kernels)
        compiled.append(len(kernels))

        def cubin(kernel: Kernel) -> Cubin:
            return Cubin(sm, kernel.function, "", 128, 1000, 0, 9, 0, f"0 {len(kernel.parameters) + 2}\0".encode())

        return {kernel: cubin(kernel) for kernel in kernels}

    def time_graph(function: Callable[[], object], **_: object) -> float:
        function()
        return 800.0

    monkeypatch.setattr(launch_table, "EXPERTS", {})
    monkeypatch.setattr(launch_table, "SELECT", {})
    monkeypatch.setitem(SHAPES, "tiny", Shape(8, 2, 64, 1024))
    monkeypatch.setattr(tune, "DEVICE", "cpu")
    monkeypatch.setattr(tune, "machine", lambda: tune.Machine(90, "a GPU", 1e12))
    monkeypatch.setattr(tune, "time_graph", time_graph)
    monkeypatch.setattr(tune, "compile_each", compile_each)
    if agree:  # nothing is computed here: without this no two outputs agree
        monkeypatch.setattr(tune, "_agree", lambda *_: True)
    monkeypatch.setattr("lynx_trt.plugins.cuda_driver.cuda_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: argparse.Namespace(cuda_stream=0))
    bench_time = tune.Bench.time

    def time(self: tune.Bench, plan: Plan[Kernel], *others: Any, **how: Any) -> float:
        gain = 0.0
        for step in plan.steps:
            constants = dict(step.kernel.constants)
            gain += step.kernel.stages + constants.get("SPLIT", 0) + constants.get("PREFETCH", 0) / 256  # type: ignore[operator]
        return bench_time(self, plan, *others, **how) - 4 * gain

    monkeypatch.setattr(tune.Bench, "time", time)
    path = tmp_path / "table.py"
    tune.main(shape=["tiny"], tokens="1,2,1024", output=path)
    table = runpy.run_path(str(path))
    assert set(table["SELECT"]) == {(90, 8, 2, tokens) for tokens in (1, 2, 1024)}
    assert set(table["EXPERTS"]) == {(90, 8, 2, 64, 1024, "float")}
    launches = table["EXPERTS"][90, 8, 2, 64, 1024, "float"]
    assert {tokens: launch.prefill for tokens, launch in launches.items()} == {1: False, 2: False, 1024: True}
    assert all(launch.microseconds for launch in launches.values())
    if agree:
        assert launches[1].gate_up.stages == 6
        assert launches[1].down.split > 1
        assert launches[1].down.prefetch == 256
        assert launches[1024].down.prefetch == 0
        assert launches[1024].down.stages == 5
    else:  # what is faster and says something else is not taken
        assert launches[1].down == experts_estimate(1, 64, 1024, "bfloat16", 90).down
    # All candidates of a batch were compiled at once; those of two tokens were there.
    assert len(compiled) == 4
    assert max(compiled) > 50


def test_candidates_are_compiled_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[Kernel] = []

    def compile_each(kernels: Iterable[Kernel], sm: int, **_: object) -> dict[Kernel, None]:
        compiled.extend(kernels)
        assert sm == 90
        return dict.fromkeys(compiled)

    monkeypatch.setitem(SHAPES, "tiny", Shape(8, 2, 64, 128))
    monkeypatch.setattr(tune, "compile_each", compile_each)
    tune.main(shape=["tiny"], tokens="1,1024", compile_for=90)
    functions = {kernel.function for kernel in compiled}
    assert {"gate_up_decode_kernel", "down_decode_kernel", "gate_up_prefill_kernel", "down_prefill_kernel"} < functions
    assert len(compiled) == len(set(compiled))
    assert f"{len(compiled)} of {len(compiled)} kernels compile" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"--compile-for is 75: launches are tuned for 80"):
        tune.main(compile_for=75)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_tuner_says_what_it_lacks() -> None:
    with pytest.raises(
        UsageError, match=r"measures on a GPU, and PyTorch finds none here: run it on a machine with one"
    ):
        tune.machine()


def test_the_tuner_measures_restricted_batches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second batch of decode on half of the experts that the others have; a prefill is never restricted."""
    monkeypatch.setattr(tune, "DEVICE", "cpu")
    spec = replace(experts_spec("qwen3-30b-a3b", "bfloat16"), hidden=8, inner=8)
    active = [len(batch["index"].unique()) for batch in tune.experts_inputs(spec, 16)]
    assert min(active[0::2]) > 70
    assert max(active[1::2]) < 45
    assert all(len(row.unique()) == 8 for batch in tune.experts_inputs(spec, 16) for row in batch["index"])
    assert [len(batch["index"].unique()) for batch in tune.experts_inputs(spec, 1)] == [8] * 4
    assert [len(batch["index"].unique()) for batch in tune.experts_inputs(spec, 1024)] == [128]
