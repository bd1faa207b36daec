"""Building engines with the real TensorRT for RTX on a CPU, and every way in which that can go wrong."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import psutil
import pytest
from fake_kernels import fake_kernels
from onnx import helper
from trt_graphs import CACHE, DTYPES, HEAD_SIZE, HEADS, H, handed_over, make_graph

from lynx_trt.errors import TensorRTError, UsageError
from lynx_trt.experts import FORMATS, ExpertsForm
from lynx_trt.export.ops import EXPERTS, SELECT
from lynx_trt.plugins import aot
from lynx_trt.plugins.specs import ExpertsSpec, SelectSpec
from lynx_trt.tensorrt import loader, worker
from lynx_trt.tensorrt.build import KernelsReport, build_engine
from lynx_trt.tensorrt.prepare import FUSED_ROWS, _fold_heads, _nodes, hand_over, input_dims, prepare, read
from lynx_trt.tensorrt.profiles import Profile, Range, decode_and_prefill

try:
    for wheel in loader.RTX_WHEELS:
        importlib.metadata.version(wheel)
except importlib.metadata.PackageNotFoundError as missing:
    pytest.skip(f"{missing.name} is not installed: {loader.INSTALL_CPU}", allow_module_level=True)


# Experts in each of the formats, with sizes that tell H from I.
QUANTIZED = {
    ExpertsForm(weights="mxfp4"): {"hidden": 64, "intermediate": 96},
    ExpertsForm(weights="fp8"): {"hidden": 128, "intermediate": 256},
    ExpertsForm(weights="int4_g32_zeros"): {"hidden": 64, "intermediate": 96},
    ExpertsForm(weights="nvfp4"): {"hidden": 48, "intermediate": 80},
}


def build_children() -> list[psutil.Process]:
    """The build's processes: tests of other files may have left pools of their own."""
    return [child for child in psutil.Process().children() if "lynx_trt.tensorrt.worker" in child.cmdline()]


def profiles_of(path: Path) -> tuple[Profile, Profile]:
    return decode_and_prefill(
        input_dims(read(path)),
        decode_batch=Range(1, 8, 64),
        prefill_batch=Range(1, 2, 4),
        prefill_length=Range(1, 16, CACHE),
    )


def build(path: Path, **options):
    return build_engine(path, path.with_suffix(".plan"), profiles_of(path), flavor="rtx", **options)


def edit(path: Path, change) -> Path:
    model = onnx.load(path, load_external_data=False)
    change(model)
    onnx.save(model, path)
    return path


def node_of(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op)


def set_attribute(op: str, name: str, value):
    def change(model):
        node = node_of(model, op)
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend(kept if value is None else [*kept, helper.make_attribute(name, value)])

    return change


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "partial" in path.name or path.suffix == ".plan"]


# ---- engines


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_build(tmp_path, dtype, bias):
    path = make_graph(tmp_path / "model.onnx", dtype, layers=2, bias=bias)
    seen = []
    report = build(path, on_progress=seen.append)
    plan = path.with_suffix(".plan").read_bytes()
    assert report.plan_bytes == len(plan)
    assert report.plugin_layers == {SELECT: 2, EXPERTS: 2}
    assert (report.flavor, report.external) == ("rtx", ())
    assert [profile.name for profile in report.profiles] == ["decode", "prefill"]
    assert report.messages == ()
    assert 0 < report.peak_bytes < 1e9
    precision = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype]
    io = {tensor.name: (tensor.mode, tensor.dtype, tensor.shape) for tensor in report.io}
    assert io["input_ids"] == ("input", "int64", (-1, -1))
    assert io["past_key_values.0.key"] == ("input", precision, (-1, HEADS, CACHE, HEAD_SIZE))
    assert io["budgets"] == ("input", "int32", (2,))
    assert io["floors"] == ("input", "float32", (2,))
    assert io["hidden"] == ("output", precision, (-1, H))
    assert io["active.1"] == ("output", "int32", ())
    # The attributes are in the plan, whole: a value that dies too early would be garbage there.
    assert len(re.findall(rb"vote\0.{8}weight", plan, re.DOTALL)) == 4  # of each layer for each profile
    assert len(re.findall(rb"activation\0.{8}silu", plan, re.DOTALL)) == 4
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0, 1)
    assert {"Parsing", "Building engine", "Writing the plan"} <= {progress.phase for progress in seen}
    assert leftovers(tmp_path) == ["model.plan"]


def test_kernels_are_in_the_engine_once(tmp_path, monkeypatch):
    """What TensorRT says of the layers is what is compiled; one node carries the result, all know its id."""
    asked = []

    def compile_for(ops, sms, *, progress):
        asked.extend(ops)
        progress(1.0)
        return fake_kernels([op.spec for op in ops], sms, 256)

    monkeypatch.setattr(aot, "compile_for", compile_for)
    path = make_graph(tmp_path / "model.onnx", "bf16", layers=3, bias=True)
    seen = []
    report = build(path, sms=(80, 89), on_progress=seen.append)
    assert [op.ranges for op in asked] == [((1, 64), (1, 4 * CACHE))] * 2  # three equal layers: two ops
    assert [type(op.spec) for op in asked] == [SelectSpec, ExpertsSpec]
    assert (asked[1].spec.dtype, asked[1].spec.bias, asked[1].spec.inner) == ("bfloat16", True, 32)
    assert (asked[0].spec.dispatch_taken, asked[1].spec.dispatch_given) == (True, True)
    blob = fake_kernels([op.spec for op in asked], (80, 89), 256).to_bytes()
    assert (report.kernels.sms, report.kernels.bytes) == ((80, 89), len(blob))
    plan = path.with_suffix(".plan").read_bytes()
    assert 0 < plan.count(blob) <= 4  # of one node for each of two profiles; TensorRT for RTX keeps attributes as well
    assert plan.count(hashlib.sha256(blob).hexdigest().encode()) >= 12  # of six nodes for each profile
    assert report.messages == ()
    assert "Compiling GPU kernels" in {progress.phase for progress in seen}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data", "model.plan"]
    assert build(path).kernels == KernelsReport()


@pytest.fixture
def asked(monkeypatch):
    """The specs of what a build asks the compiler for, which gives kernels that are none."""
    specs = []

    def compile_for(ops, sms, *, progress):
        specs.extend(op.spec for op in ops)
        return fake_kernels(specs, sms, 256)

    monkeypatch.setattr(aot, "compile_for", compile_for)
    return specs


@pytest.mark.parametrize("where", ["engine", "external"])
@pytest.mark.parametrize("form", QUANTIZED, ids=lambda form: form.weights)
def test_kernels_of_quantized_weights(tmp_path, asked, where, form):
    """What is compiled is for the sizes of the numbers, not for those of the bytes."""
    sizes = QUANTIZED[form]
    path = make_graph(tmp_path / "model.onnx", "bf16", layers=2, bias=True, form=form, **sizes)
    report = build(path, sms=(89,), expert_weights=where)
    assert report.messages == ()
    experts = next(spec for spec in asked if isinstance(spec, ExpertsSpec))
    assert experts == ExpertsSpec(8, 2, *sizes.values(), "bfloat16", form, bias=True, dispatch_given=True)
    plan = path.with_suffix(".plan").read_bytes()
    assert 0 < plan.count(fake_kernels(asked, (89,), 256).to_bytes()) <= 4
    assert handed_over(plan) == [1] * 8


# What is compiled for the others runs on the emulated GPU (test_compiled_kernels.py).
@pytest.mark.parametrize(
    "form",
    [form if form.weights == "fp8" else pytest.param(form, marks=pytest.mark.slow) for form in QUANTIZED],
    ids=lambda form: form.weights,
)
def test_compiled_kernels_of_quantized_weights(tmp_path, monkeypatch, form):
    """The real ones: each kernel that reads weights reads their scales."""
    pytest.importorskip("triton")
    made = []

    def compile_for(*given, **options):
        made.append(real(*given, **options))
        return made[-1]

    real = aot.compile_for
    monkeypatch.setattr(aot, "compile_for", compile_for)
    path = make_graph(tmp_path / "model.onnx", "bf16", bias=True, form=form, **QUANTIZED[form])
    report = build(path, sms=(89, 120), expert_weights="external")
    assert report.messages == ()
    (kernels,) = made
    (by_sm,) = (by_sm for key, by_sm in kernels.ops.items() if key.startswith("experts;"))
    assert by_sm.keys() == {89, 120}
    for plans in by_sm.values():
        steps = [step.arguments for plan in plans for step in plan.steps]
        assert sum("gate_up_scale" in names for names in steps) == sum("gate_up" in names for names in steps) > 0
        assert sum("down_scale" in names for names in steps) == sum("down" in names for names in steps) > 0
    assert kernels.to_bytes() in path.with_suffix(".plan").read_bytes()


def test_a_gpu_that_the_engine_would_not_run_on(tmp_path):
    """Whoever asks, not the command alone: TensorRT for RTX builds such an engine without a word."""
    path = make_graph(tmp_path / "model.onnx", "fp16")
    with pytest.raises(TensorRTError, match=r"could not run: .* 120 and later, not on SM 90, 100; .*full TensorRT"):
        build(path, sms=(80, 90, 100))
    assert [each.name for each in tmp_path.iterdir() if "plan" in each.name] == []


def test_external_weights(tmp_path):
    path = make_graph(tmp_path / "model.onnx", "fp16", layers=2, bias=True)
    inside, outside = build(path), build(path, expert_weights="external")
    names = [f"{name}.{layer}" for layer in range(2) for name in ("gate_up", "down", "gate_up_bias")]
    # The bias of `down` has 8 * 32 * 2 = 512 bytes and lies in the ONNX file itself: it stays in the engine.
    assert [weight.name for weight in outside.external] == names
    assert outside.plugin_layers == inside.plugin_layers
    tensors = {tensor.name: tensor for tensor in read(path).graph.initializer}
    io = {tensor.name: tensor for tensor in outside.io}
    data = (tmp_path / "model.onnx.data").read_bytes()
    onnx.load_external_data_for_model(whole := onnx.load(path, load_external_data=False), str(tmp_path))
    values = {tensor.name: tensor.raw_data for tensor in whole.graph.initializer}
    for weight in outside.external:
        assert io[weight.name].shape == weight.shape == tuple(tensors[weight.name].dims)
        assert io[weight.name].dtype == weight.dtype == "float16"
        assert weight.file == "model.onnx.data"
        assert data[weight.offset : weight.offset + weight.length] == values[weight.name]


def test_external_weights_are_not_in_the_plan(tmp_path):
    path = make_graph(tmp_path / "model.onnx", "fp16", hidden=128, intermediate=512)  # 3 MB of expert weights
    inside, outside = build(path), build(path, expert_weights="external")
    weights = sum(weight.length for weight in outside.external)
    assert weights == 3 * 8 * 512 * 128 * 2
    assert inside.plan_bytes - outside.plan_bytes > 0.9 * weights


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("form", QUANTIZED, ids=lambda form: form.weights)
def test_quantized_weights(tmp_path, dtype, bias, form):
    """A byte of them is one of the engine, inside and outside; TensorRT turns none into numbers."""
    path = make_graph(tmp_path / "model.onnx", dtype, layers=2, bias=bias, hidden=128, intermediate=512, form=form)
    inside, outside = build(path), build(path, expert_weights="external")
    assert inside.plugin_layers == outside.plugin_layers == {SELECT: 2, EXPERTS: 2}
    assert inside.messages == outside.messages == ()
    plan = path.with_suffix(".plan").read_bytes()
    assert len(re.findall(rb"weights\0.{8}" + form.weights.encode(), plan, re.DOTALL)) == 4  # two layers, two profiles
    assert handed_over(plan) == [1] * 8
    quantized = [f"{name}{part}.{n}" for n in range(2) for part in ("", "_scale") for name in ("gate_up", "down")]
    stored = FORMATS[form.weights]
    scale = DTYPES[dtype][1].name if stored.scale_type == "float" else stored.scale_type
    io = {tensor.name: tensor for tensor in outside.io}
    weights = {weight.name: weight for weight in outside.external}
    biases = {f"{name}.{n}" for n in range(2) for name in ("gate_up_bias", "down_bias")}
    assert set(weights) == {*quantized, *(biases if bias else ())}
    data = (tmp_path / "model.onnx.data").read_bytes()
    onnx.load_external_data_for_model(whole := onnx.load(path, load_external_data=False), str(tmp_path))
    values = {tensor.name: tensor.raw_data for tensor in whole.graph.initializer}
    for weight in weights.values():
        assert (io[weight.name].dtype, io[weight.name].shape) == (weight.dtype, weight.shape)
        own = scale if "_scale." in weight.name else "int8"
        assert weight.dtype == (own if weight.name in quantized else DTYPES[dtype][1].name)
        assert data[weight.offset : weight.offset + weight.length] == values[weight.name]
    size = sum(weights[name].length for name in quantized)
    numbers = 2 * 8 * 3 * 512 * 128
    each = {"mxfp4": 1 / 2 + 1 / 32, "fp8": 1 + 4 / 128, "nvfp4": 1 / 2 + 2 / 16, "int4_g32_zeros": 1 / 2 + 4 / 32}
    assert size == numbers * each[form.weights]
    assert each[form.weights] == stored.bytes_a_value
    assert 0.9 * size < inside.plan_bytes - outside.plan_bytes < 1.1 * size
    build(path)
    inside_plan = path.with_suffix(".plan").read_bytes()
    assert all(values[name] in inside_plan and values[name] not in plan for name in quantized)


def test_function_bodies_do_not_replace_the_plugins(tmp_path):
    """With bodies and no plugin TensorRT would build the reference implementation, silently and slowly."""
    from lynx_trt.export.functions import add_functions

    path = make_graph(tmp_path / "model.onnx", "fp32", layers=2)
    edit(path, set_attribute(SELECT, "power", 3.0))  # two variants of the op: overloads in the node

    def add(model):
        add_functions(model)
        assert len(model.functions) == 3

    report = build(edit(path, add))
    assert report.plugin_layers == {SELECT: 2, EXPERTS: 2}
    assert b"vote\0" in path.with_suffix(".plan").read_bytes()


def test_the_file_is_left_alone(tmp_path):
    path = make_graph(tmp_path / "model.onnx", "fp32")
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()}
    build(path, expert_weights="external")
    path.with_suffix(".plan").unlink()
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()} == before


# ---- the metadata that LynxSelect hands to LynxExperts


def insert_after(op: str, made: onnx.NodeProto, position: int):
    """Put a node behind the first one of an op, and its output in the place of an input of the first LynxExperts."""

    def change(model):
        place = next(n for n, node in enumerate(model.graph.node) if node.op_type == op)
        model.graph.node.insert(place + 1, made)
        node_of(model, EXPERTS).input[position] = made.output[0]

    return change


def through_identity(model):
    """`index` goes through another node: what comes out of it may be another tensor."""
    insert_after(SELECT, helper.make_node("Identity", ["index.0"], ["index0"]), 1)(model)


def through_reshape(model):
    model.graph.initializer.append(helper.make_tensor("two", onnx.TensorProto.INT64, [2], [-1, 2]))
    insert_after(SELECT, helper.make_node("Reshape", ["index.0", "two"], ["index0"]), 1)(model)


def second_user(model):
    """Another node reads `index` too."""
    insert_after(SELECT, helper.make_node("Cast", ["index.0"], ["seen"], to=onnx.TensorProto.INT32), 1)(model)
    node_of(model, EXPERTS).input[1] = "index.0"
    model.graph.output.append(helper.make_tensor_value_info("seen", onnx.TensorProto.INT32, None))


def index_is_an_output(model):
    model.graph.output.append(helper.make_tensor_value_info("index.0", onnx.TensorProto.INT64, None))


def two_experts(model):
    """Both layers use the first one's choice."""
    [node for node in model.graph.node if node.op_type == EXPERTS][1].input[1] = "index.0"


def experts_of_the_router(model):
    """The index is the router's, and LynxSelect's goes nowhere."""
    node_of(model, EXPERTS).input[1] = "topk_index.0"


def more_experts_in_the_router(model):
    """The router ranks 16 experts of which the layer has 8: the metadata's layout is of another E."""
    router = next(t for t in model.graph.initializer if t.name == "router.0")
    router.dims[1] *= 2
    del router.external_data[:]
    router.data_location = onnx.TensorProto.DEFAULT
    router.raw_data = bytes(router.dims[0] * router.dims[1] * 2)


def in_a_subgraph(model):
    """The second layer's LynxExperts is in both branches of an If, and its LynxSelect outside."""
    place, node = [(n, node) for n, node in enumerate(model.graph.node) if node.op_type == EXPERTS][1]
    branches = []
    for branch in ("then", "else"):
        inner = onnx.NodeProto()
        inner.CopyFrom(node)
        inner.name, inner.output[0] = f"{node.name}.{branch}", branch
        value = helper.make_tensor_value_info(branch, onnx.TensorProto.FLOAT16, None)
        branches.append(helper.make_graph([inner], branch, [], [value]))
    condition = helper.make_node("Cast", ["budget.1"], ["condition"], to=onnx.TensorProto.BOOL)
    made = helper.make_node("If", ["condition"], list(node.output), then_branch=branches[0], else_branch=branches[1])
    del model.graph.node[place]
    model.graph.node.insert(place, made)
    model.graph.node.insert(place, condition)


def handed(path: Path, shapes=None) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The copy for TensorRT, and the LynxSelect nodes of it that hand over; E is 8 unless `shapes` says otherwise."""
    model = prepare(path).model
    inputs = {SELECT: [[-1, 8]] * 7, EXPERTS: [[8, H, 32]] * 7}
    every = {node.name: inputs[node.op_type] for node in _nodes(model.graph) if node.domain == "lynx"}
    return model, hand_over(model, {**every, **(shapes or {})})


def test_hand_over(tmp_path):
    """Each pair: an output more, an input more behind the biases, and the fields that say so."""
    for bias in (False, True):
        model, names = handed(make_graph(tmp_path / "model.onnx", layers=2, bias=bias))
        pairs = [[node for node in model.graph.node if node.op_type == op] for op in (SELECT, EXPERTS)]
        assert names == tuple(node.name for node in pairs[0])
        for select, experts in zip(*pairs, strict=True):
            assert len(select.output) == 4
            assert (len(experts.input), experts.input[-1]) == (8 if bias else 6, select.output[3])
            for node in (select, experts):
                assert [a.i for a in node.attribute if a.name == "dispatch"] == [1]
        assert hand_over(model, {}) == ()  # a second time: nothing is left to do


@pytest.mark.parametrize(
    "change",
    [through_identity, through_reshape, second_user, index_is_an_output, two_experts, experts_of_the_router],
)
def test_no_hand_over(tmp_path, change):
    """Where the index is not LynxSelect's own, or not for one LynxExperts alone: the other layer is not touched."""
    before = prepare(edit(make_graph(tmp_path / "model.onnx", layers=2), change)).model
    model, names = handed(tmp_path / "model.onnx")
    assert names == (() if change is two_experts else ("LynxSelect.index.1",))
    for old, new in zip(before.graph.node, model.graph.node, strict=True):
        assert old == new or new.name in ("LynxSelect.index.1", "LynxExperts.experts.1")
        assert all(a.i == (old != new) for a in new.attribute if a.name == "dispatch")


@pytest.mark.parametrize("experts", [16, -1])
def test_no_hand_over_of_another_number_of_experts(tmp_path, experts):
    path = make_graph(tmp_path / "model.onnx", layers=2)
    assert handed(path, {"LynxSelect.index.0": [[-1, experts]] * 7})[1] == ("LynxSelect.index.1",)


def test_no_hand_over_into_a_subgraph(tmp_path):
    path = edit(make_graph(tmp_path / "model.onnx", layers=2), in_a_subgraph)
    model, names = handed(path)
    assert names == ("LynxSelect.index.0",)
    assert sum(node.op_type == EXPERTS for node in _nodes(model.graph)) == 3


@pytest.mark.parametrize(
    ("change", "pairs"),
    [
        (None, 2),
        (through_identity, 1),
        (through_reshape, 1),
        (second_user, 1),
        (two_experts, 0),
        (more_experts_in_the_router, 1),
    ],
)
def test_engines_with_and_without_the_hand_over(tmp_path, asked, change, pairs):
    """TensorRT builds all of them, its own shapes decide, and the kernels are those of the layers that there are."""
    path = make_graph(tmp_path / "model.onnx", "fp16", layers=2, bias=True)
    report = build(edit(path, change) if change else path, sms=(89,))
    assert report.messages == ()
    assert report.plugin_layers == {SELECT: 2, EXPERTS: 2}
    taken = {spec.dispatch_taken for spec in asked if isinstance(spec, SelectSpec)}
    given = {spec.dispatch_given for spec in asked if isinstance(spec, ExpertsSpec)}
    assert taken == given == {0: {False}, 1: {False, True}, 2: {True}}[pairs]
    counts = Counter(handed_over(path.with_suffix(".plan").read_bytes()))
    # Of both layers of each pair, for each of two profiles.
    assert (counts[1], counts[0]) == (4 * pairs, 4 * (2 - pairs))
    assert not [tensor.name for tensor in report.io if "dispatch" in tensor.name]


def test_hand_over_of_many_tokens(tmp_path):
    """A step of 65,536 tokens: the tensor between the two has 131,090 entries, on one axis."""
    path = make_graph(tmp_path / "model.onnx", layers=1)
    options = {"decode_batch": Range(1, 8, 16384), "prefill_batch": Range(1, 64, 1024)}
    profiles = decode_and_prefill(input_dims(read(path)), **options, prefill_length=Range(1, 16, CACHE))
    report = build_engine(path, path.with_suffix(".plan"), profiles, flavor="rtx")
    assert report.messages == ()
    assert handed_over(path.with_suffix(".plan").read_bytes()) == [1] * 4


def test_hand_over_with_external_weights(tmp_path):
    """Weights that are inputs of the engine come before the metadata, which no one binds."""
    path = make_graph(tmp_path / "model.onnx", "bf16", layers=2, bias=True)
    report = build(path, expert_weights="external")
    names = [tensor.name for tensor in report.io]
    assert {item.name for item in report.external} <= set(names)
    assert not [name for name in names if "dispatch" in name]
    assert handed_over(path.with_suffix(".plan").read_bytes()) == [1] * 8  # four layers, two profiles


@pytest.mark.slow  # a gigabyte of disk
def test_memory(tmp_path):
    """500 MB of expert weights: measured 3.0 times the weights + 0.2 GB (a third of it pages of the data file)."""
    path = make_graph(tmp_path / "model.onnx", "bf16", layers=10, hidden=512, intermediate=2048)
    weights = (tmp_path / "model.onnx.data").stat().st_size
    assert weights > 5e8
    assert build(path).peak_bytes < 3 * weights + 0.5e9
    outside = build(path, expert_weights="external")
    assert outside.peak_bytes < 0.5e9
    assert outside.plan_bytes < 0.05 * weights


# ---- the copy for TensorRT


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        ("fp32", (1, 4, 1, 64), 1),
        ("fp16", ("batch", 4, "sequence", 256), 0),
        ("fp16", ("batch", 4, "sequence", 576), 1),  # DeepSeek's latents
        ("fp16", ("batch", 4, "sequence", "size"), 1),
        ("fp16", None, 1),
    ],
)
def test_decomposable_attention(tmp_path, dtype, shape, expected):
    """What TensorRT has no fused kernel for, and what nothing is known of."""
    path = make_graph(tmp_path / "model.onnx", dtype)

    def annotate(model):
        elem = model.graph.output[0].type.tensor_type.elem_type
        model.graph.value_info.append(helper.make_tensor_value_info("q", elem, shape))

    model = prepare(edit(path, annotate)).model
    attributes = [
        attribute for attribute in node_of(model, "Attention").attribute if attribute.name == "TRT_decomposable"
    ]
    assert [attribute.i for attribute in attributes] == [1] * expected


@pytest.mark.parametrize(("rows", "expected"), [(FUSED_ROWS, 0), (FUSED_ROWS + 8, 1)])
def test_long_caches_are_decomposable(tmp_path, rows, expected):
    """Of more rows than TensorRT's fused kernels take."""
    path = make_graph(tmp_path / "model.onnx", "fp16")

    def annotate(model):
        elem = model.graph.output[0].type.tensor_type.elem_type
        key = node_of(model, "Attention").input[1]
        query = helper.make_tensor_value_info("q", elem, ("batch", 4, "sequence", 64))
        model.graph.value_info.append(query)
        cache = next(value for value in model.graph.output if value.name == key)
        cache.type.tensor_type.shape.dim[2].dim_value = rows

    model = prepare(edit(path, annotate)).model
    found = [each for each in node_of(model, "Attention").attribute if each.name == "TRT_decomposable"]
    assert [attribute.i for attribute in found] == [1] * expected


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe"])
def test_folded_heads_are_the_same_attention(name, artifact, tmp_path):
    """Where all heads read one cache they are folded, and ONNX Runtime computes the same; elsewhere nothing is."""
    import onnxruntime

    built = artifact(name, preset="lynx")
    manifest = built.manifest.model
    results = []
    for fold in (False, True):
        model = onnx.load(built.path("model.onnx"))
        if fold:
            assert _fold_heads(model.graph) == (manifest.layers if name == "deepseek_v3" else 0)
            queries = {node.input[0] for node in model.graph.node if node.op_type == "Attention"}
            assert len(queries) == manifest.layers
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        random = np.random.default_rng(0)
        layers = len(manifest.moe_layers)
        inputs = {
            "input_ids": random.integers(3, 256, (2, 5)),
            "past_lengths": np.array([3, 20]),
            "lengths": np.array([5, 4]),
            "budgets": np.full(layers, 8, np.int32),
            "floors": np.zeros(layers, np.float32),
        }
        for cache in manifest.caches:
            shape = (2, cache.heads, manifest.cache_rows, cache.size)
            inputs[f"past_{cache.name}"] = random.standard_normal(shape, np.float32)
        results.append(session.run(["logits"], inputs)[0])
    plain, folded = results
    assert np.abs(folded - plain).max() <= 64 * np.finfo(np.float32).eps * np.abs(plain).max()


def test_unnamed_nodes_and_omitted_outputs(tmp_path):
    """Foreign tools drop names, plugin attributes and unused outputs; TensorRT's parser insists on all three."""

    def change(model):
        for node in model.graph.node:
            node.name = ""
        node = node_of(model, SELECT)
        del node.output[2:]
        kept = [attribute for attribute in node.attribute if not attribute.name.startswith("plugin_")]
        del node.attribute[:]
        node.attribute.extend(kept)
        outputs = [value for value in model.graph.output if not value.name.startswith("active")]
        del model.graph.output[:]
        model.graph.output.extend(outputs)

    report = build(edit(make_graph(tmp_path / "model.onnx"), change))
    assert report.plugin_layers == {SELECT: 1, EXPERTS: 1}


# ---- graphs that are wrong: one clear message each


def rename_op(domain: str, name: str):
    def change(model):
        node = node_of(model, "Add")
        node.op_type, node.domain = name, domain

    return change


def rewire(op: str, position: int, tensor: str | None):
    def change(model):
        node = node_of(model, op)
        if tensor is None:
            del node.input[position:]
        else:
            node.input[position] = tensor

    return change


def retype(tensor: str, kind: int):
    """Another type of the same bits."""

    def change(model):
        next(t for t in model.graph.initializer if t.name == tensor).data_type = kind

    return change


def reshape(tensor: str, *shape: int):
    def change(model):
        next(t for t in model.graph.initializer if t.name == tensor).dims[:] = shape

    return change


def move_data(key: int, value: str):
    def change(model):
        next(t for t in model.graph.initializer if t.name == "gate_up.0").external_data[key].value = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_op("com.example", "Foo"), r"can't read .*model.onnx:\n  node Add.\w+ \(Foo\): TensorRT has no such op"),
        (rename_op("lynx", "LynxRoute"), r"is lynx.LynxRoute, which this version does not know"),
        (set_attribute(EXPERTS, "plugin_version", "2"), r"plugin_version '2'; this version has '1'"),
        (set_attribute(EXPERTS, "activation", "mish"), r"\n  node LynxExperts.experts.0: .*'mish'; allowed: silu"),
        (set_attribute(SELECT, "vote", None), r"\n  node LynxSelect.index.0: LynxSelect needs the attribute vote"),
        (rewire(EXPERTS, 1, "weight.0"), r"index is float32; allowed: int64"),
        (rewire(EXPERTS, 3, None), r"has 3 inputs; it takes 5 or 7"),
        (rewire(SELECT, 4, "budgets"), r"budget has 1 dimensions"),
        (rewire(SELECT, 5, "floors"), r"floor has 1 dimensions"),
        (rewire(SELECT, 5, "budget.0"), r"floor is int32; allowed: float32"),
        (rewire(SELECT, 6, None), r"LynxSelect has 6 inputs; it takes 7"),
        (rewire("Reshape", 0, "nothing"), r"node Reshape.\w+ \(Reshape\): .*input was not registered"),
        (move_data(0, "gone.data"), r"gone.data: No such file or directory \(tensor gate_up.0\)"),
        (move_data(1, "begin"), r"gate_up.0 does not say where its data lies"),
        (move_data(1, "999999999"), r"has \d+ bytes, and tensor gate_up.0 ends at byte \d+. The file was cut off"),
    ],
)
def test_wrong_graph(tmp_path, change, message):
    path = edit(make_graph(tmp_path / "model.onnx"), change)
    with pytest.raises(TensorRTError, match=re.compile(message, re.DOTALL)):
        build(path)
    assert leftovers(tmp_path) == []


# Of each format: what is changed in a graph of it, and the message.
WRONG_WEIGHTS = {
    "mxfp4": [
        (retype("gate_up.0", onnx.TensorProto.UINT8), r"gate_up is (int32|DataType.UINT8); allowed: int8"),
        (set_attribute(EXPERTS, "weights", "fp3"), r"weights is 'fp3'; allowed: float, mxfp4, fp8"),
        (set_attribute(EXPERTS, "weights", "float"), r"LynxExperts has 7 inputs|gate_up is int8; allowed: float16"),
        (set_attribute(EXPERTS, "weights", "fp8"), r"gate_up_scale is int8; allowed: float32"),
        (set_attribute(EXPERTS, "transposed", 1), r"transposed is 1, and weights in mxfp4 have to lie along"),
        (rewire(EXPERTS, 6, None), r"has 6 inputs; it takes 7 or 9"),
        (rewire(EXPERTS, 6, "gate_up_scale.0"), r"down_scale has H = 192, and hidden has 64"),
        (reshape("gate_up.0", 8, 96, 64), r"gate_up_scale has R = 192, and gate_up has 96"),
        (reshape("down.0", 8, 96, 32), r"down has H = 96, and hidden has 64"),
        (reshape("down_scale.0", 4, 128, 3), r"down_scale has E = 4, and gate_up has 8"),
        (reshape("gate_up_scale.0", 8, 64, 6), r"gate_up_scale has R = 64, and gate_up has 192"),
        (set_attribute(EXPERTS, "gated", 0), r"gate_up has R = 192, and R has to be 2 Q, which is 96"),
    ],
    "fp8": [
        (retype("gate_up.0", onnx.TensorProto.FLOAT8E4M3FN), r"gate_up is DataType.FP8; allowed: int8"),
        (retype("down_scale.0", onnx.TensorProto.INT32), r"down_scale is int32; allowed: float32"),
        (set_attribute(EXPERTS, "weights", "float"), r"LynxExperts has 7 inputs|gate_up is int8; allowed: float16"),
        (set_attribute(EXPERTS, "weights", "mxfp4"), r"gate_up_scale is float32; allowed: int8"),
        (set_attribute(EXPERTS, "transposed", 1), r"transposed is 1, and weights in fp8 have to lie along"),
        (rewire(EXPERTS, 6, None), r"has 6 inputs; it takes 7 or 9"),
        (rewire(EXPERTS, 6, "gate_up_scale.0"), r"down_scale has H = 512, and hidden has 128"),
        (reshape("gate_up.0", 8, 256, 256), r"gate_up has H = 256, and hidden has 128"),
        (reshape("down.0", 8, 256, 128), r"down has H = 256, and hidden has 128"),
        (reshape("down_scale.0", 4, 256, 2), r"down_scale has E = 4, and gate_up has 8"),
        (reshape("down_scale.0", 16, 128, 1), r"down_scale has E = 16, and gate_up has 8"),
        (reshape("gate_up_scale.0", 8, 256, 2), r"gate_up_scale has R = 256, and gate_up has 512"),
        (set_attribute(EXPERTS, "gated", 0), r"gate_up has R = 512, and R has to be I, which is 256"),
    ],
    "int4_g32_zeros": [
        (retype("down_scale.0", onnx.TensorProto.BFLOAT16), r"down_scale is bfloat16; allowed: float16"),
        (set_attribute(EXPERTS, "weights", "int4_g32"), r"gate_up_scale has G = 4, and 32 G has to be H, which is 64"),
        (set_attribute(EXPERTS, "weights", "mxfp4"), r"gate_up_scale is float16; allowed: int8"),
    ],
    "nvfp4": [
        (set_attribute(EXPERTS, "weights", "int4_g32"), r"gate_up_scale has G = 3, and 32 G has to be H, which is 48"),
    ],
}


@pytest.mark.parametrize("where", ["engine", "external"])
@pytest.mark.parametrize(
    ("form", "change", "message"),
    [(form, *wrong) for form in QUANTIZED for wrong in WRONG_WEIGHTS[form.weights]],
    ids=lambda value: value.weights if isinstance(value, ExpertsForm) else None,
)
def test_wrong_quantized_weights(tmp_path, form, change, message, where):
    path = make_graph(tmp_path / "model.onnx", form=form, **QUANTIZED[form])
    with pytest.raises(TensorRTError, match=r"\n  node LynxExperts.experts.0: .*" + message):
        build(edit(path, change), expert_weights=where)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "holds no graph"),
        (b"\xff" * 64, "is not an ONNX file"),
        (b"<html>", "not an ONNX"),
    ],
)
def test_wrong_file(tmp_path, content, message):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TensorRTError, match=f"model.onnx.*{message}"):
        build_engine(path, tmp_path / "model.plan", [])


def test_external_weights_that_are_not_constants(tmp_path):
    def compute(model):
        node = node_of(model, EXPERTS)
        model.graph.node.insert(0, helper.make_node("Identity", [node.input[4]], ["computed"]))
        node.input[4] = "computed"

    with pytest.raises(TensorRTError, match=r"down of LynxExperts.experts.0 is 'computed', which is not a constant"):
        build(edit(make_graph(tmp_path / "model.onnx"), compute), expert_weights="external")


def test_external_weights_that_are_inside_the_file(tmp_path):
    path = make_graph(tmp_path / "model.onnx")
    onnx.save(onnx.load(path), path)
    with pytest.raises(TensorRTError, match="all its expert weights inside the ONNX file"):
        build(path, expert_weights="external")
    assert build(path).plugin_layers == {SELECT: 1, EXPERTS: 1}  # in the engine they are fine


# ---- options and places that are wrong


def test_wrong_options(tmp_path):
    path = make_graph(tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="'disk': choose engine or external"):
        build(path, expert_weights="disk")
    with pytest.raises(UsageError, match="'lean': choose auto, full or rtx"):
        build_engine(path, tmp_path / "plan", profiles_of(path), flavor="lean")
    with pytest.raises(UsageError, match="0 bytes; it must be at least 1"):
        build(path, workspace_bytes=0)
    bad = Profile("bad", {**profiles_of(path)[0].shapes, "lengths": ((3,), (1,), (2,))})
    with pytest.raises(UsageError, match=r"min \[3\], opt \[1\], max \[2\]"):
        build_engine(path, tmp_path / "plan", [bad])


def test_workspace_limit(tmp_path):
    path = make_graph(tmp_path / "model.onnx")
    with pytest.raises(TensorRTError, match=r"could not build the engine: .*Raise or drop the workspace limit"):
        build(path, workspace_bytes=1)
    assert leftovers(tmp_path) == []
    assert build(path, workspace_bytes=1 << 30).plan_bytes


def test_full_tensorrt_without_a_gpu(tmp_path):
    if loader.describe()["auto"] == "full":
        pytest.skip("this machine has full TensorRT and a GPU")
    path = make_graph(tmp_path / "model.onnx")
    with pytest.raises(TensorRTError, match="full TensorRT does not work here"):
        build_engine(path, tmp_path / "plan", profiles_of(path), flavor="full")


def test_no_place_for_the_plan(tmp_path):
    path = make_graph(tmp_path / "model.onnx")
    for place, message in [(tmp_path, "it is a folder"), (tmp_path / "no" / "plan", "no does not exist")]:
        with pytest.raises(TensorRTError, match=message):
            build_engine(path, place, profiles_of(path))


def test_disk_full(tmp_path):
    """A limit on the file size stands for a full disk: the write fails in the same place."""
    path = make_graph(tmp_path / "model.onnx")
    old = path.with_suffix(".plan")
    old.write_text("the plan of yesterday")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(TensorRTError, match="can't write the engine: File too large; make room, or choose another"):
            build(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert leftovers(tmp_path) == ["model.plan"]
    assert old.read_text() == "the plan of yesterday"


def test_callback_that_raises(tmp_path):
    def stop(progress):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(make_graph(tmp_path / "model.onnx"), on_progress=stop)
    assert leftovers(tmp_path) == []
    assert not build_children()


# ---- the child process


@pytest.mark.parametrize(
    ("number", "advice"), [(signal.SIGKILL, "ran out of memory"), (signal.SIGABRT, "a crash inside TensorRT")]
)
def test_child_dies_in_the_middle(tmp_path, number, advice):
    def kill(progress):
        if progress.phase == "Loading TensorRT":
            (child,) = build_children()
            child.send_signal(number)

    path = make_graph(tmp_path / "model.onnx")
    with pytest.raises(TensorRTError, match=f"ended by {number.name} in the phase '.*{advice}"):
        build(path, on_progress=kill)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("says", "error", "message"),
    [
        ("libfoo: out of luck", TensorRTError, "exit code 3 in the phase 'Starting'.*last words: libfoo: out of luck"),
        ("Traceback (most recent call last):", RuntimeError, "Traceback"),  # a defect of ours keeps its traceback
    ],
)
def test_child_ends_without_an_answer(tmp_path, monkeypatch, says, error, message):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 3\n")
    python.chmod(0o755)
    path = make_graph(tmp_path / "model.onnx")
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(error, match=message):
        build(path)
    assert leftovers(tmp_path) == []


BUILD_SCRIPT = """
import os, signal, sys
import psutil
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_tensorrt_build import build
def act(progress):
    if progress.phase == "Loading TensorRT":
        print(psutil.Process().children()[0].pid, flush=True)
        {act}
try:
    build(Path({path!r}), on_progress=act)
except KeyboardInterrupt:
    print("interrupted", psutil.Process().children())
"""


def run_script(path: Path, act: str) -> tuple[subprocess.CompletedProcess[str], int]:
    """Build in a process (group) of its own that does `act` in the middle; the result and the worker's pid."""
    code = BUILD_SCRIPT.format(tests=str(Path(__file__).parent), path=str(path), act=act)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True, timeout=60
    )
    return done, int(done.stdout.split()[0])


def wait_until_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("target", ["os.killpg(0, signal.SIGINT)", "os.kill(os.getpid(), signal.SIGINT)"])
def test_interrupt(tmp_path, target):
    """Ctrl-C, which the whole group gets, and a SIGINT to the parent alone."""
    done, worker_pid = run_script(make_graph(tmp_path / "model.onnx"), target)
    assert done.stdout.splitlines()[1:] == ["interrupted []"]
    assert done.stderr == ""
    assert wait_until_gone(worker_pid)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_parent_dies(tmp_path, number):
    """Nobody is left to end the worker: it ends itself, and removes what it has written."""
    done, worker_pid = run_script(make_graph(tmp_path / "model.onnx"), f"os.kill(os.getpid(), signal.{number})")
    assert done.returncode == -getattr(signal, number)
    assert wait_until_gone(worker_pid)
    assert leftovers(tmp_path) == []


def test_interrupt_of_the_child_alone_changes_nothing(tmp_path):
    def interrupt(progress):
        if progress.phase == "Loading TensorRT":
            build_children()[0].send_signal(signal.SIGINT)

    assert build(make_graph(tmp_path / "model.onnx"), on_progress=interrupt).plan_bytes


# ---- what TensorRT says


def channel_lines(tmp_path, use) -> list[dict]:
    file = tmp_path / "lines"
    channel = worker._Channel(os.open(file, os.O_CREAT | os.O_WRONLY))
    use(channel)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_messages_are_one_line_and_come_once(tmp_path):
    def use(channel):
        for text in ("two\n  lines", "two lines", "Make sure input x has Int64 binding.", "another"):
            channel.message("warning", text)

    assert [line["text"] for line in channel_lines(tmp_path, use)] == ["two lines", "another"]


def test_progress_never_falls(tmp_path):
    def use(channel):
        for phase, fraction in (("a", 0.5), ("b", 0.2), (None, 0.7)):
            channel.progress(phase, fraction)

    lines = [(line["phase"], line["fraction"]) for line in channel_lines(tmp_path, use)]
    assert lines == [("a", 0.5), ("b", 0.5), ("b", 0.7)]


def test_the_flag_is_the_one_that_the_library_knows(tmp_path):
    """It says itself what the engine asks for: the flag goes together with no weight streaming."""
    trt = loader.load("rtx").module
    path = make_graph(tmp_path / "model.onnx", layers=0)

    def use(channel):
        builder = worker._Builder(trt, channel)
        builder.parse(path.read_bytes(), path)
        builder.configure([asdict(profile) for profile in profiles_of(path)], None)
        builder.leave_memory_to_user()
        builder.config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        with pytest.raises(TensorRTError, match=r"kREQUIRE_USER_ALLOCATION is not compatible with .*kWEIGHT_STREAMING"):
            builder.build(tmp_path / "plan")

    channel_lines(tmp_path, use)


def test_engines_with_and_without_the_flag(tmp_path):
    path = make_graph(tmp_path / "model.onnx")
    ours = build(path)
    theirs = build(path, user_memory=False)
    assert ours.messages == theirs.messages == ()
    # Nothing but a few bytes: the capture needs no other kernels.
    assert 0 < abs(theirs.plan_bytes - ours.plan_bytes) < 4096


# ---- what only full TensorRT does, or a TensorRT that errs: with stand-ins


class StandIn:
    """A TensorRT of a few lines, for what the real one on a CPU can't be made to do."""

    IStreamWriter = object

    class LayerType:
        PLUGIN_V3 = 1

    def __init__(self, layers=(), parts=(b"one", b"two")):
        self.parts = parts
        self.layers = [type("Layer", (), {"name": name, "type": kind}) for name, kind in layers]
        self.num_layers = len(self.layers)

    def get_layer(self, number):
        return self.layers[number]

    def build_serialized_network_to_stream(self, network, config, writer):
        return all(writer.write(part) == len(part) for part in self.parts)

    def builder(self, channel=None):
        builder = object.__new__(worker._Builder)
        builder.trt = builder.builder = builder.network = builder.config = self
        builder.errors, builder.channel = ["out of luck"], channel
        return builder


def test_plan_is_streamed(tmp_path):
    def use(channel):
        assert StandIn().builder(channel).build(tmp_path / "plan") == 6

    assert channel_lines(tmp_path, use)[-1]["phase"] == "Writing the plan"
    assert (tmp_path / "plan").read_bytes() == b"onetwo"


def test_streaming_to_a_full_disk(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    (tmp_path / "plan").symlink_to("/dev/full")

    def use(channel):
        builder = StandIn(parts=[b"x" * 1_000_000]).builder(channel)
        with pytest.raises(TensorRTError, match=r"No space left on device.*GB are free.*; make room"):
            builder.build(tmp_path / "plan")

    channel_lines(tmp_path, use)
    assert not (tmp_path / "plan").exists()


def test_a_stream_that_fails(tmp_path):
    builder = StandIn().builder()
    builder.builder = type("Builder", (), {"build_serialized_network_to_stream": lambda *_: False})()
    with pytest.raises(TensorRTError, match="could not build the engine: out of luck"):
        builder._stream((tmp_path / "plan").open("wb"))


@pytest.mark.parametrize(("flags", "expected"), [({"REQUIRE_USER_ALLOCATION": 5}, [5]), ({}, [])])
def test_a_library_without_the_flag(flags, expected):
    """TensorRT for RTX has it from 1.2 on."""
    builder, asked = StandIn().builder(), []
    builder.trt.BuilderFlag = SimpleNamespace(**flags)
    builder.config = SimpleNamespace(set_flag=asked.append)
    builder.leave_memory_to_user()
    assert asked == expected


def test_nodes_that_are_no_plugin_layers():
    """A TensorRT that takes the function body, or drops a node, must not go unnoticed."""
    builder = StandIn(layers=[("a", 1), ("b", 2)]).builder()
    assert builder.count_plugins({"a": SELECT}) == {SELECT: 1, EXPERTS: 0}
    with pytest.raises(TensorRTError, match=r"2 of 3 lynx nodes did not become plugin layers: b \(LynxExperts\), c"):
        builder.count_plugins({"a": SELECT, "b": EXPERTS, "c": EXPERTS})
