"""The commands on ONNX files: what they print, what they refuse and in which words; data files that pass through."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from foreign_graphs import Spec, make_model, save_model
from foreign_run import TOLERANCE, difference
from foreign_store import load
from onnx import TensorProto, helper, numpy_helper

from lynx_trt.artifact import Artifact, read
from lynx_trt.errors import CheckpointError, UnsupportedModelError
from lynx_trt.export.foreign import read_foreign
from lynx_trt.export.foreign_finite import refuse_not_finite
from lynx_trt.export.onnx_file import open_onnx
from lynx_trt.selection import PRESETS

ROOT = Path(__file__).parents[1]


def _command(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"lynx_trt.{module}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def _one_unknown(folder: Path) -> Path:
    """A model of two blocks, of which the second has an activation that the ops don't know."""
    model = make_model(Spec(form="dense_unrolled", activation="silu", layers=2))
    last = max(at for at, node in enumerate(model.graph.node) if node.op_type == "TopK")
    for node in list(model.graph.node)[last:]:
        if node.op_type == "Sigmoid":
            node.op_type = "Tanh"
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


# ---- the commands --------------------------------------------------------------------------------------------------


def test_build_writes_an_artifact(tmp_path: Path) -> None:
    path = save_model(Spec(form="moe"), tmp_path / "model")
    done = _command("build", str(path), "-o", str(tmp_path / "artifact"), "--tensorrt", "none", "--budget", "3")
    assert done.returncode == 0, done.stderr
    assert "Rewrote 2 MoE blocks of ONNX of tests" in done.stdout
    manifest = read(tmp_path / "artifact").manifest
    assert manifest.selection.budgets == [3, 3]
    assert manifest.foreign is not None
    assert manifest.foreign.patterns == {"com.microsoft.MoE": 2}
    assert manifest.foreign.added == ["budgets", "floors"]


def test_inspect_says_what_is_in_a_file(tmp_path: Path) -> None:
    path = save_model(Spec(form="gathered", experts=6, count=2, hidden=16, inner=8), tmp_path)
    done = _command("inspect", str(path))
    assert done.returncode == 0, done.stderr
    assert "2 recognised, 0 not" in done.stdout
    text = " ".join(done.stdout.split())
    assert "gathered experts; E 6, K 2, H 16, I 8; softmax, renormalised" in text
    assert list(tmp_path.iterdir()) == [path], "nothing is written"


def test_inspect_names_what_it_does_not_recognise(tmp_path: Path) -> None:
    path = _one_unknown(tmp_path / "model")
    done = _command("inspect", str(path), "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert len(found["blocks"]) == 1
    assert [item["node"] for item in found["not_recognised"]] == [_second_router(path)]
    assert "activation" in found["not_recognised"][0]["reason"]


def _second_router(path: Path) -> str:
    routers = [node.name for node in onnx.load(path).graph.node if node.op_type == "TopK"]
    return f"'{routers[-1]}' (TopK)"


def test_a_block_that_is_not_recognised_is_refused(tmp_path: Path) -> None:
    path = _one_unknown(tmp_path / "model")
    done = _command("build", str(path), "-o", str(tmp_path / "artifact"), "--tensorrt", "none")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert _second_router(path) in errors[0]
    assert "--allow-partial" in errors[0]
    assert not (tmp_path / "artifact").exists()


def test_allow_partial_builds_and_counts(tmp_path: Path) -> None:
    path = _one_unknown(tmp_path / "model")
    arguments = ["-o", str(tmp_path / "artifact"), "--tensorrt", "none", "--allow-partial"]
    done = _command("build", str(path), *arguments)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 MoE blocks stay as they are" in done.stdout + done.stderr
    manifest = read(tmp_path / "artifact").manifest
    assert len(manifest.model.moe_layers) == 1
    assert manifest.foreign is not None
    assert len(manifest.foreign.kept) == 1
    rewritten = onnx.load(tmp_path / "artifact" / "model.onnx")
    assert difference(onnx.load(path), rewritten, [6]) < TOLERANCE


def test_a_model_without_blocks(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "model.onnx")
    done = _command("inspect", str(tmp_path / "model.onnx"))
    assert done.returncode == 1
    assert "holds no MoE block" in done.stderr


# ---- damaged files -------------------------------------------------------------------------------------------------


def _refused(path: Path) -> str:
    with pytest.raises((CheckpointError, UnsupportedModelError)) as refusal:
        read_foreign(path, PRESETS["lynx"])
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"\x00", b"not a model at all", b"\x08\x0a" * 40], ids=repr)
def test_no_onnx_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    assert "is not an ONNX file, or is damaged" in _refused(tmp_path / "model.onnx")


def test_damaged_files_get_one_line_or_are_read(tmp_path: Path) -> None:
    """Cut off anywhere, and with bytes flipped anywhere: an error of ours, or a model; never a traceback."""
    whole = make_model(Spec(form="moe", layers=1)).SerializeToString()
    generator = np.random.default_rng(0)
    path = tmp_path / "model.onnx"
    lines = set()
    for number in range(80):
        data = bytearray(whole)
        if number % 2:
            data = data[: int(generator.integers(1, len(data)))]
        else:
            for at in generator.integers(0, len(data), 3):
                data[at] = int(generator.integers(0, 256))
        path.write_bytes(bytes(data))
        try:
            read_foreign(path, PRESETS["lynx"])
        except (CheckpointError, UnsupportedModelError) as refusal:
            lines.add(str(refusal).count("\n"))
    assert lines == {0}


def test_a_missing_file(tmp_path: Path) -> None:
    assert "No such file" in _refused(tmp_path / "model.onnx")


def test_missing_external_data(tmp_path: Path) -> None:
    path = save_model(Spec(), tmp_path, external=True)
    (tmp_path / "model.onnx.data").unlink()
    message = _refused(path)
    assert "model.onnx.data" in message
    assert "keep the data files beside the ONNX file" in message


def test_external_data_that_ends_early(tmp_path: Path) -> None:
    path = save_model(Spec(), tmp_path, external=True)
    data = (tmp_path / "model.onnx.data").read_bytes()
    (tmp_path / "model.onnx.data").write_bytes(data[: len(data) // 2])
    assert "are not complete" in _refused(path)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../b"])
def test_external_data_elsewhere(location: str, tmp_path: Path) -> None:
    path = save_model(Spec(), tmp_path / "model", external=True)
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
    tensor.external_data[0].value = location
    path.write_bytes(model.SerializeToString())
    assert "outside of the folder of the file" in _refused(path)


def test_a_cycle(tmp_path: Path) -> None:
    model = make_model(Spec())
    first = model.graph.node[3]
    first.input[0] = model.graph.node[-1].output[0]
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    message = _refused(tmp_path / "model.onnx")
    assert "cycle" in message
    assert "node" in message


def test_a_value_that_nothing_makes(tmp_path: Path) -> None:
    model = make_model(Spec())
    model.graph.node[5].input[0] = "nowhere"
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert "'nowhere', which nothing makes" in _refused(tmp_path / "model.onnx")


def test_an_opset_too_old(tmp_path: Path) -> None:
    model = make_model(Spec(opset=17))
    model.opset_import[0].version = 11
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert "13 is the oldest" in _refused(tmp_path / "model.onnx")


def test_nodes_out_of_order_are_read(tmp_path: Path) -> None:
    model = make_model(Spec())
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert len(list(open_onnx(tmp_path / "model.onnx").graph)) == len(nodes)


# ---- weights that are no numbers -----------------------------------------------------------------------------------


def _broken(path: Path, name: str, value: float, at: int, external: bool) -> str:
    """One value of the tensor `name` (a part of its name) replaced in the file; the name."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if name in t.name)
    values = numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[at] = value
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    (path.parent / "model.onnx.data").unlink(missing_ok=True)
    options = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 64}
    onnx.save(model, path, **(options if external else {}))
    return str(tensor.name)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize(
    ("form", "dtype", "name", "value", "what"),
    [
        ("loop_scatter", "fp32", "down", np.nan, "nan"),  # laid out anew
        ("moe", "fp16", "fc1", np.inf, "inf"),  # as it is
        ("dense_batched", "bf16", "embed", -np.inf, "-inf"),  # no expert's
        ("qmoe4", "fp32", "scale", np.inf, "inf"),  # a scale
    ],
)
def test_weights_that_are_no_numbers(
    form: str, dtype: str, name: str, value: float, what: str, external: bool, tmp_path: Path
) -> None:
    """Refused before anything is written, with the tensor, the value, its place and the file that it lies in."""
    path = save_model(Spec(form=form, dtype=dtype, hidden=32, inner=16), tmp_path / "model")
    tensor = _broken(path, name, value, 5, external)
    done = _command("build", str(path), "-o", str(tmp_path / "out"), "--tensorrt", "none")
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    inside = f" in {path.parent / 'model.onnx.data'}" if external else ""
    assert line.startswith(f"error: {path}: tensor {tensor!r}{inside} holds {what} at [")
    assert "], so its weights are broken; export it again" in line
    assert not [item for item in tmp_path.iterdir() if item.name != "model"]


def _tensors(*arrays: Any) -> list[Any]:
    return [ir.tensor(array, name="w") for array in arrays]


def test_what_is_no_weight_or_masks() -> None:
    """Constants of one number, integers, causal masks, biases and sinks; empty tensors."""
    mask = np.triu(np.full((600, 600), -np.inf, np.float32), 1)  # more than a piece
    refuse_not_finite(
        _tensors(
            np.float32(np.nan), np.array([np.inf], np.float16), np.arange(9), mask, mask.astype(ml_dtypes.bfloat16),
            np.array([0, -np.inf, 3], np.float16), np.zeros((0, 3), np.float32),
        ),
        Path("model.onnx"),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_every_value_that_is_no_number(dtype: Any, value: float) -> None:
    """In a matrix, in its last piece; the largest finite numbers are numbers."""
    largest = float(ml_dtypes.finfo(dtype).max)
    array = np.array([[largest, -largest, 0.0]] * 100_000, dtype)
    done: list[tuple[int, int]] = []
    refuse_not_finite(_tensors(array), Path("m.onnx"), on_progress=lambda *both: done.append(both))
    assert done == [(array.nbytes, array.nbytes)]
    array[99_999, 1] = value
    with pytest.raises(CheckpointError, match=r"^m\.onnx: tensor 'w' holds -?(nan|inf) at \[99999, 1\]"):
        refuse_not_finite(_tensors(array), Path("m.onnx"))


def test_a_mask_with_another_infinity() -> None:
    mask = np.triu(np.full((8, 8), -np.inf, np.float32), 1)
    mask[7, 0] = np.inf
    with pytest.raises(CheckpointError, match=r"holds inf at \[7, 0\]"):
        refuse_not_finite(_tensors(mask), Path("m.onnx"))


# ---- data files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["moe", "loop_scatter", "qmoe4", "grouped"])
def test_external_data_comes_along(form: str, tmp_path: Path, build_quietly: Callable[..., Artifact]) -> None:
    spec = Spec(form=form, hidden=32, inner=16)
    path = save_model(spec, tmp_path / "model", external=True)
    before = path.read_bytes(), (tmp_path / "model" / "model.onnx.data").read_bytes()
    artifact = build_quietly(path, tmp_path / "artifact")
    assert difference(make_model(spec), onnx.load(artifact.folder / "model.onnx"), [6, 6]) < TOLERANCE
    assert before == (path.read_bytes(), (tmp_path / "model" / "model.onnx.data").read_bytes())
    assert (artifact.folder / "model.onnx").stat().st_size < 100_000


def test_quantized_weights_keep_their_packed_form(tmp_path: Path, build_quietly: Callable[..., Artifact]) -> None:
    path = save_model(Spec(form="qmoe4", hidden=32, inner=16, layers=1), tmp_path / "model", external=True)
    artifact = build_quietly(path, tmp_path / "artifact")
    assert artifact.manifest.foreign is not None
    (packed,) = artifact.manifest.foreign.packed.values()
    place: dict[str, Any] = packed["fc1"]["weights"]
    data = (artifact.folder / place["file"]).read_bytes()[place["offset"] :][: place["length"]]
    stored = next(t for t in onnx.load(path).graph.initializer if t.name == place["name"])
    assert data == numpy_helper.to_array(stored).tobytes()


def test_subgraph_blocks_are_refused(tmp_path: Path) -> None:
    """A block inside an If is named, not passed over."""
    model = make_model(Spec(form="moe", layers=1))
    at = next(at for at, node in enumerate(model.graph.node) if node.op_type == "MoE")
    node = onnx.NodeProto()
    node.CopyFrom(model.graph.node[at])
    out = node.output[0]
    node.output[0] = "inside"
    same = helper.make_node("Identity", [node.input[0]], ["same"])
    branches = [
        helper.make_graph([inner], "b", [], [helper.make_empty_tensor_value_info(inner.output[0])])
        for inner in (node, same)
    ]
    made = helper.make_node("If", ["yes"], [out], then_branch=branches[0], else_branch=branches[1])
    model.graph.node[at].CopyFrom(made)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert "inside a subgraph" in _refused_by_name(tmp_path / "model.onnx")


def _refused_by_name(path: Path) -> str:
    foreign = read_foreign(path, PRESETS["lynx"])
    assert not foreign.blocks
    return " ".join(f"{item.node} {item.reason}" for item in foreign.refused)


def test_unknown_moe_ops_are_named(tmp_path: Path) -> None:
    model = load("genai-0.18-gpt-oss")
    for node in model.graph.node:
        if node.op_type == "MoE":
            node.op_type = "SparseMoeLayer"
    onnx.save(model, tmp_path / "model.onnx")
    assert "SparseMoeLayer" in _refused_by_name(tmp_path / "model.onnx")


@pytest.mark.slow
def test_gigabytes_of_external_data(tmp_path: Path) -> None:
    """2 GB, of which all has to be laid out anew, in less than 1 GB of memory (`benchmarks/` has the time)."""
    script = ROOT / "benchmarks" / "foreign_external_data.py"
    command = [sys.executable, str(script), "--form", "loop_scatter", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (row,) = json.loads(done.stdout)["rows"]
    assert row["data_bytes"] > 1.9e9
    assert row["peak_bytes"] < 1e9
