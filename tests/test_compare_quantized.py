"""Layers of quantized weights in ONNX Runtime: every form gives what the same layers give whose weights are float."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_models
from onnx import TensorProto, helper, numpy_helper
from test_compare_lowering import Array, steps

from lynx_trt.artifact import Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.comparison.runners import open_runner, specs
from lynx_trt.experts import FORMATS, ExpertsForm
from lynx_trt.export.functions import add_functions
from lynx_trt.export.ops import experts_attributes
from lynx_trt.inspect import rows
from lynx_trt.machine import _LOADING, memory_bytes, weights_problem
from lynx_trt.runtime.lowering import Form, lower
from lynx_trt.runtime.ort import OrtBackend

FILE = "experts.bin"
Twins = Callable[..., tuple[Artifact, Artifact]]


@pytest.fixture(scope="session")
def twins(workspace: Path, build_quietly: Callable[..., Artifact]) -> Twins:
    """Of a random model, two artifacts whose experts have the same random weights: quantized, and in its precision."""
    made: dict[tuple[str, str, str], tuple[Artifact, Artifact]] = {}

    def make(name: str, precision: str = "fp32", kind: str = "mxfp4") -> tuple[Artifact, Artifact]:
        key = name, precision, kind
        if key not in made:
            folder = workspace / "quantized" / "-".join(key)
            wide = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}  # blocks of 128
            model = tiny_models.random_model(name, **(wide if FORMATS[kind].block == 128 else {}))
            built = build_quietly(
                tiny_models.save(model, folder / "model"), folder / "built", preset="lynx", precision=precision
            )
            made[key] = _rewritten(built, folder / kind, kind), _rewritten(built, folder / "float")
        return made[key]

    return make


def _rewritten(built: Artifact, folder: Path, kind: str | None = None) -> Artifact:
    """A copy with weights of the test's own, in a file of their own: the same quantized, by default in full."""
    of = kind or folder.parent.name.rpartition("-")[2]
    shutil.copytree(built.folder, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    random, data = np.random.default_rng(1), bytearray()

    def stored(name: str, array: Array) -> str:
        tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        for entry in (("location", FILE), ("offset", len(data)), ("length", array.nbytes)):
            tensor.external_data.add(key=entry[0], value=str(entry[1]))
        model.graph.initializer.append(tensor)
        data.extend(array.tobytes())
        return name

    layers = []
    nodes = [node for node in model.graph.node if node.op_type == "LynxExperts"]
    for number, (node, record) in enumerate(zip(nodes, built.manifest.model.moe_layers, strict=True)):
        # JSON has made numbers of what is true or false.
        fields = {key: bool(value) if isinstance(value, int) else value for key, value in record.form.items()}
        form = ExpertsForm(**fields)  # type: ignore[arg-type]
        kept = initializers[node.input[3]]
        experts, width = kept.dims[0], built.manifest.model.hidden
        rows = record.intermediate * (2 if form.gated else 1)
        dtype = helper.tensor_dtype_to_np_dtype(kept.data_type)
        names: list[str] = []
        scales: list[str] = []
        for what, shape in (("gate_up", (experts, rows, width)), ("down", (experts, width, record.intermediate))):
            values, scale = _random(of, shape, random, dtype)
            full = FORMATS[of].dequantize(values, scale)
            names.append(stored(f"{what}_{number}", values if kind else full.astype(dtype)))
            if kind:
                scales.append(stored(f"{what}_scale_{number}", scale))
        biases = list(node.input[5:])
        del node.input[3:]
        node.input.extend([*names, *scales, *biases])
        form = replace(form, transposed=False, weights=kind or "float")
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(key, value) for key, value in experts_attributes(form).items())
        layers.append(record.model_copy(update={"form": {**record.form, "transposed": 0, "weights": form.weights}}))
    (folder / FILE).write_bytes(data)
    add_functions(model)
    onnx.save(model, folder / "model.onnx")
    record = built.manifest.model.model_copy(update={"moe_layers": layers})
    return Artifact(folder, built.manifest.model_copy(update={"model": record}))


def _random(
    kind: str, shape: tuple[int, int, int], random: np.random.Generator, precision: np.dtype[Any]
) -> tuple[Array, Array]:
    *rows, width = shape
    stored = FORMATS[kind]
    values = random.integers(-128, 128, (*rows, width // stored.per_byte)).astype(np.int8)
    scales = (*rows, width // stored.block)
    if kind == "mxfp4":
        return values, random.integers(121, 124, scales).astype(np.int8)
    if kind == "fp8":
        values[(values == -1) | (values == 127)] = 0  # NaN
        return values, random.uniform(1e-4, 1e-3, scales).astype(np.float32)
    factors = random.integers(2, 8, scales) / 512  # three bits, so that weights are numbers of both 16-bit types
    points = [random.integers(0, 17, scales)] if stored.zeros else []
    return values, np.concatenate([factors, *points], axis=-1).astype(precision)


def _equal(found: list[tuple[Array, Array]], expected: list[tuple[Array, Array]], what: object) -> None:
    for (got, got_active), (logits, active) in zip(found, expected, strict=True):
        assert got_active.tolist() == active.tolist(), what
        assert np.abs(got - logits).max() <= 64 * np.finfo(np.float32).eps * np.abs(logits).max(), what


NAMES = ("qwen3_moe", "gpt_oss", "deepseek_v3")
# Of int4 one with zero points and one without, of either block.
KINDS = ("mxfp4", "fp8", "int4_g32_zeros", "int4_g128")


# masked, single and unrestricted | with biases, interleaved | a router that is no softmax, so auto is fused
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in NAMES[:2] for kind in ("mxfp4", "fp8")),
        *(pytest.param(NAMES[2], kind, marks=pytest.mark.slow) for kind in ("mxfp4", "fp8")),
        ("qwen3_moe", "int4_g128"),
        ("gpt_oss", "int4_g32_zeros"),
        ("qwen3_moe", "nvfp4"),
    ],
)
def test_every_form_gives_what_float_weights_give(name: str, kind: str, twins: Twins) -> None:
    packed, plain = twins(name, kind=kind)
    reference = steps(plain, None)
    forms: tuple[Form | None, ...] = (None, "body", "grouped", "fused", "auto")
    for form in forms:
        _equal(steps(packed, form), reference, form)
    if name != "deepseek_v3":
        for other in ("masked", "unrestricted", "baseline"):
            for (got, _), (expected, _) in zip(steps(packed, other), steps(plain, other), strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_step_of_one_token(twins: Twins) -> None:
    packed, plain = (OrtBackend(each, 1, threads=1, form="auto") for each in twins("qwen3_moe"))
    assert packed._graphs.single is not None
    for restriction in (Restriction((1, 2)), Restriction((8, 8))):
        got, expected = (
            each.step(np.array([[7]]), np.zeros(1, np.int64), np.ones(1, np.int64), restriction)
            for each in (packed, plain)
        )
        np.testing.assert_allclose(got.logits, expected.logits, rtol=1e-5, atol=1e-5 * np.abs(expected.logits).max())


@pytest.mark.parametrize(("kind", "precision"), [("mxfp4", "fp16"), ("int4_g32_zeros", "fp16"), ("int4_g128", "bf16")])
@pytest.mark.parametrize("form", ["grouped", "fused"])
def test_the_rest_in_half_precision(form: Form, kind: str, precision: str, twins: Twins) -> None:
    """As the exporter makes them; both are computed in float32, and these weights are numbers of either type."""
    packed, plain = twins("gpt_oss", precision, kind)
    _equal(steps(packed, form), steps(plain, form), form)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["grouped", "auto", "baseline"])
def test_weights_become_float_at_load_alone(form: Form, kind: str, twins: Twins, tmp_path: Path) -> None:
    # Scales of int4 are of the graph's own precision, and become float32 first.
    packed, _ = twins("qwen3_moe", "fp16" if kind.startswith("int4") else "fp32", kind)
    backend = OrtBackend(packed, 1, threads=1, form=form, profile=tmp_path / "step")
    lengths = np.ones(1, np.int64)
    backend.step(np.array([[7]]), np.zeros(1, np.int64), lengths, Restriction((8, 8)))
    backend.step(np.array([[7]]), lengths, lengths, Restriction((1, 1)))
    ran = set()
    for file in backend.end_profile():
        events = json.loads(Path(file).read_text(encoding="utf-8"))
        ran |= {event["args"]["op_name"] for event in events if event.get("cat") == "Node"}
    assert "Softmax" in ran or "MoE" in ran
    assert "DequantizeLinear" not in ran


@pytest.mark.parametrize(
    ("kind", "types", "table"),
    [
        ("mxfp4", {TensorProto.INT8, TensorProto.INT16}, 4 << 16),
        ("int4_g32_zeros", {TensorProto.UINT4, TensorProto.FLOAT16}, 0),
    ],
)
def test_bytes_stay_in_their_file(kind: str, types: set[int], table: int, twins: Twins) -> None:
    """Of a lowered graph, in which only tables and constants of the selection lie inside."""
    packed, _ = twins("gpt_oss", "fp16", kind)
    for form, parts in (("grouped", 8), ("fused", 1)):
        graph = lower(packed, form=form).model.graph  # type: ignore[arg-type]
        there = [t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL]
        ours = [t for t in there if {e.key: e.value for e in t.external_data}["location"] == FILE]
        assert len(ours) == 2 * 2 * 2 * parts  # layers, matrices, values and scales
        assert {t.data_type for t in ours} == types
        inside = [t for t in graph.initializer if t.data_location != TensorProto.EXTERNAL]
        assert sum(numpy_helper.to_array(t).nbytes for t in inside if t.data_type == TensorProto.INT8) == table


def test_comparing_them(twins: Twins) -> None:
    """With com.microsoft.MoE and the graph as it is."""
    packed, plain = twins("qwen3_moe")
    ids = np.random.default_rng(0).integers(3, 256, (2, 6))
    found = {}
    for artifact in (packed, plain):
        for spec in specs(artifact, baselines=("ort-moe", "ort-plain"), budgets=("off",), checkpoint=None):
            if spec.absent:
                continue
            opened = open_runner(artifact, spec, 2, 1)
            assert opened.runner is not None, opened.absent
            found[artifact.folder.name, spec.name] = opened.runner.prefill(ids)
    assert len(found) == 6
    expected = found["float", "ort-plain"]
    for name, got in found.items():
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(), err_msg=str(name))


def test_memory_to_load_them_is_counted(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some 6 bytes for each of theirs, beside float32."""
    packed, plain = (each.manifest.model for each in twins("qwen3_moe"))
    larger = packed.model_copy(
        update={
            "parameters": 10**9,
            "moe_layers": [layer.model_copy(update={"expert_bytes": 10**7}) for layer in packed.moe_layers],
        }
    )
    assert _LOADING.keys() == FORMATS.keys()
    assert weights_problem(packed) is None
    assert memory_bytes() > 0
    monkeypatch.setattr("lynx_trt.machine.memory_bytes", lambda: 4 * 10**9)
    assert weights_problem(plain.model_copy(update={"parameters": 10**9})) is None
    # 2 layers of 8 experts
    assert "its weights take 5.0 GB while they become float32" in str(weights_problem(larger))


@pytest.mark.parametrize("kind", ["mxfp4", "fp8", "int4_g32_zeros"])
def test_their_graph_as_an_onnx_file(
    kind: str, twins: Twins, tmp_path: Path, build_quietly: Callable[..., Artifact]
) -> None:
    """What `build` says of it is what it says of the graph with float weights, but for bytes."""
    artifacts = [
        build_quietly(each.folder / "model.onnx", tmp_path / each.folder.name)
        for each in twins("gpt_oss", "fp16", kind)
    ]
    packed, plain = (artifact.manifest.model for artifact in artifacts)
    named = {"mxfp4": "MXFP4", "fp8": "FP8", "int4_g32_zeros": "int4 (blocks of 32, zero points)"}[kind]
    in_words, in_full = (dict(rows(artifact.manifest))["experts"] for artifact in artifacts)
    assert in_words.endswith(f"each, in {named}")
    assert in_full.endswith("each")
    for field in ("precision", "layers", "hidden", "vocabulary", "parameters"):
        assert getattr(packed, field) == getattr(plain, field), field
    for one, other in zip(packed.moe_layers, plain.moe_layers, strict=True):
        assert one.quantized == kind
        assert (one.experts, one.intermediate, one.rule) == (other.experts, other.intermediate, other.rule)
        values = 3 * packed.hidden * one.intermediate
        biases = 2 * (2 * one.intermediate + packed.hidden)
        assert one.expert_bytes == values * FORMATS[kind].bytes_a_value + biases


def test_an_onnx_file_from_before_there_were_quantized_weights(
    twins: Twins, tmp_path: Path, build_quietly: Callable[..., Artifact]
) -> None:
    """Its nodes don't say that their weights are float."""
    _, plain = twins("qwen3_moe")
    folder = shutil.copytree(plain.folder, tmp_path / "old")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "LynxExperts":
            del node.attribute[[attribute.name for attribute in node.attribute].index("weights")]
    onnx.save(model, folder / "model.onnx")
    built = build_quietly(folder / "model.onnx", tmp_path / "built")
    assert [layer.form["weights"] for layer in built.manifest.model.moe_layers] == ["float", "float"]
    model = onnx.load(built.folder / "model.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "LynxExperts"]
    assert all(any(attribute.name == "weights" for attribute in node.attribute) for node in nodes)
