"""Foreign models rewritten and run beside their originals in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from foreign_fuzz import widened

from lynx_trt.export.foreign import Foreign, read_foreign, require_all
from lynx_trt.export.foreign_files import write_foreign
from lynx_trt.selection import PRESETS

# Of the largest logit. What the two graphs add up, they add up in another order.
TOLERANCE = 1e-5
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


def rewrite(model: onnx.ModelProto, folder: Path, preset: str = "lynx") -> tuple[Foreign, onnx.ModelProto]:
    """The pass over a model in a file, and the model that it writes."""
    (folder / "original").mkdir(parents=True, exist_ok=True)
    (folder / "rewritten").mkdir(exist_ok=True)
    path = folder / "original" / "model.onnx"
    onnx.save(model, path)
    foreign = read_foreign(path, PRESETS[preset])
    require_all(foreign, allow_partial=False)
    write_foreign(foreign, folder / "rewritten")
    rewritten = onnx.load(folder / "rewritten" / "model.onnx")
    _check_order(rewritten.graph)
    return foreign, rewritten


def _check_order(graph: onnx.GraphProto) -> None:
    """Every value is made before it is read, which ONNX Runtime forgives and other readers don't."""
    known = {"", *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)}
    for node in graph.node:
        missing = set(node.input) - known
        assert not missing, f"{node.op_type} {node.name} reads {missing} too early"
        known |= set(node.output)
    assert {value.name for value in graph.output} <= known


def session(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def feeds(inputs: Any, *, batch: int = 3, length: int = 5, past: int = 0, vocabulary: int = 32) -> dict[str, Any]:
    """Random inputs for a step of `length` tokens after `past` of them; the first row begins with padding."""
    generator = np.random.default_rng(length)
    made = {}
    for value in inputs:
        if value.name in ("budgets", "token_mask"):
            continue
        if value.name == "floors":
            made[value.name] = np.zeros(value.shape, np.float32)
            continue
        shape = [_size(value.name, axis, size, batch, length, past) for axis, size in enumerate(value.shape)]
        dtype = _TYPES[value.type]
        if value.name == "input_ids":
            made[value.name] = generator.integers(0, vocabulary, shape).astype(dtype)
        elif value.name == "attention_mask":
            made[value.name] = np.ones(shape, dtype)
        elif value.name == "position_ids":
            made[value.name] = np.broadcast_to(np.arange(past, past + length), shape).astype(dtype)
        else:
            made[value.name] = (generator.standard_normal(shape) * 0.5).astype(dtype)
    return made


def _size(name: str, axis: int, size: Any, batch: int, length: int, past: int) -> int:
    if isinstance(size, int):
        return size
    if name.startswith("past"):
        rows = 8 if size == "past_sliding_length" else past
        return {0: batch, 1: 2, 2: rows, 3: 16}[axis]
    if axis == 0:
        return batch
    return past + length if name == "attention_mask" else length


def run(model: onnx.ModelProto, given: dict[str, Any], budgets: list[int] | None = None) -> Any:
    """The logits; of a rewritten model, under these budgets and no floors."""
    opened = session(model)
    names = {value.name for value in opened.get_inputs()}
    given = dict(given)
    if "budgets" in names:
        given["budgets"], given["floors"] = np.array(budgets, np.int32), np.zeros(len(budgets or ()), np.float32)
    if "token_mask" in names:
        given["token_mask"] = np.ones(given["input_ids"].shape, bool)
    first = next(value.name for value in opened.get_outputs())
    return opened.run([first], given)[0].astype(np.float64)


def error(one: Any, other: Any) -> float:
    """The largest difference, over the largest value."""
    assert one.shape == other.shape
    return float(np.abs(one - other).max() / np.abs(one).max())


def difference(original: onnx.ModelProto, rewritten: onnx.ModelProto, experts: list[int], **step: int) -> float:
    """How far the two are apart with the selection off, both in float32, so that rounding plays no part."""
    original, rewritten = widened(original), widened(rewritten)
    given = feeds(session(original).get_inputs(), **step)
    return error(run(original, given), run(rewritten, given, experts))
