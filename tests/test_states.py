"""Layers that keep a state in place of keys and values: the two ops in ONNX Runtime, the export, and the runtimes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_models
import torch
from host_gpu import HostGpu
from onnx import TensorProto, helper
from test_trt_backend import backend_of, with_engine

from lynx_trt.artifact import TOKENIZER, Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.errors import LynxError, UnsupportedModelError
from lynx_trt.export import functions, ops
from lynx_trt.inspect import cache_bytes
from lynx_trt.runtime.open import limits_of
from lynx_trt.runtime.ort import OrtBackend
from lynx_trt.runtime.sampling import Sampling
from lynx_trt.runtime.scheduler import Policy, Scheduler
from lynx_trt.runtime.sequence import Generated, Request
from lynx_trt.runtime.text import Tokenizer
from lynx_trt.tensorrt.prepare import input_dims

Array = np.ndarray[Any, np.dtype[Any]]
B, S = 3, 5
LENGTHS = np.array([5, 0, 2])  # a full row, an idle one, one with padding
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def session(op: str, inputs: dict[str, Array], attributes: dict[str, Any]) -> Any:
    """One node in ONNX Runtime, by its function body."""

    def value(name: str, array: Array | None = None) -> onnx.ValueInfoProto:
        element = helper.np_dtype_to_tensor_dtype(array.dtype) if array is not None else TensorProto.UNDEFINED
        return helper.make_tensor_value_info(name, element, None)

    node = helper.make_node(op, list(inputs), ["output", "present_state"], domain=ops.DOMAIN, **attributes)
    state = inputs["past_state"]
    first = next(iter(inputs.values()))
    outputs = [value("output", first), value("present_state", state)]
    graph = helper.make_graph([node], "node", [value(*item) for item in inputs.items()], outputs)
    imports = [helper.make_opsetid("", ops.OPSET), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=11)
    functions.add_functions(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def in_place(run: Any, inputs: dict[str, Array], output: Array) -> tuple[Array, Array]:
    """The outputs, the state of the past and the present being the same memory."""
    binding = run.io_binding()
    state = inputs["past_state"].copy()
    arrays = {**inputs, "past_state": state}
    for name, array in arrays.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    for name, array in {"output": output, "present_state": state}.items():
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    run.run_with_iobinding(binding)
    return output, state


def recurrence(inputs: dict[str, Array], heads: int, rule: str, scale: float, epsilon: float) -> tuple[Array, Array]:
    """LynxLinearAttention as `ops` has it, in float64."""
    state = inputs["past_state"].astype(np.float64)
    _, states, keys, values = state.shape
    output = np.zeros((B * S, states, values))
    for place, length in enumerate(LENGTHS):
        for token in range(place * S, place * S + length):
            for head in range(states):
                q, k = (
                    inputs[n][token].reshape(heads, keys)[head * heads // states].astype(np.float64)
                    for n in ("query", "key")
                )
                if epsilon:
                    q, k = (x / np.sqrt((x * x).sum() + epsilon) for x in (q, k))
                decay = np.exp(inputs["decay"][token].reshape(states, -1)[head].astype(np.float64))
                kept = state[place, head] * decay[:, None]
                new = inputs["value"][token].reshape(states, values)[head].astype(np.float64)
                if rule == "gated_delta":
                    new = new - kept.T @ k
                state[place, head] = kept + np.outer(k, inputs["beta"][token, head] * new)
                output[token, head] = scale * state[place, head].T @ q
    return output.reshape(B * S, -1), state


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("rule", ops.UPDATE_RULES)
@pytest.mark.parametrize(("heads", "by_key", "epsilon"), [(2, False, 1e-6), (4, True, 1e-6), (1, False, 0.0)])
def test_linear_attention(rule: str, heads: int, by_key: bool, epsilon: float, dtype: str) -> None:
    """Shared queries and keys, a decay a key, padding and idle rows; the state in place."""
    states, keys, values = 4, 16, 6
    random = np.random.default_rng(heads)
    inputs = {
        "query": random.standard_normal((B * S, heads * keys)).astype(dtype),
        "key": (0.3 * random.standard_normal((B * S, heads * keys))).astype(dtype),
        "value": random.standard_normal((B * S, states * values)).astype(dtype),
        "decay": -np.abs(random.standard_normal((B * S, states * (keys if by_key else 1)))).astype(np.float32),
        "beta": random.random((B * S, states), np.float32),
        "past_state": random.standard_normal((B, states, keys, values)).astype(np.float32),
        "lengths": LENGTHS,
    }
    attributes = ops.linear_attention_attributes(
        key_heads=heads, value_heads=states, update_rule=rule, scale=0.25, epsilon=epsilon
    )
    run = session(ops.LINEAR_ATTENTION, inputs, attributes)
    output, state = recurrence(inputs, heads, rule, 0.25, epsilon)
    found = run.run(None, inputs)
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 1e-3, "rtol": 1e-3}
    np.testing.assert_allclose(found[0], output, **near)
    np.testing.assert_allclose(found[1], state, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(found[1][1], inputs["past_state"][1])  # an idle row's
    for one, other in zip(in_place(run, inputs, np.empty_like(inputs["value"])), found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("width", "bias", "activation"), [(4, True, "silu"), (3, False, "none"), (2, True, "none")])
def test_causal_conv(width: int, bias: bool, activation: str, dtype: str) -> None:
    """What lies before the step counts, and the state is the last real rows; the state in place."""
    random = np.random.default_rng(width)
    channels = 6
    inputs = {
        "values": random.standard_normal((B * S, channels)).astype(dtype),
        "weight": random.standard_normal((channels, width)).astype(dtype),
        "past_state": random.standard_normal((B, width - 1, channels)).astype(dtype),
        "lengths": LENGTHS,
        **({"bias": random.standard_normal(channels).astype(dtype)} if bias else {}),
    }
    rows = np.concatenate([inputs["past_state"], inputs["values"].reshape(B, S, channels)], axis=1)
    wide = rows.astype(np.float64)
    output = sum(wide[:, tap : tap + S] * inputs["weight"][:, tap] for tap in range(width)) + inputs.get("bias", 0)
    if activation == "silu":
        output = output / (1 + np.exp(-output))
    state = np.stack([rows[row, length : length + width - 1] for row, length in enumerate(LENGTHS)])
    run = session(ops.CAUSAL_CONV, inputs, ops.causal_conv_attributes(activation))
    found = run.run(None, inputs)
    near = 1e-5 if dtype == "float32" else 3e-3
    np.testing.assert_allclose(found[0], output.reshape(B * S, channels), atol=near, rtol=near)
    np.testing.assert_array_equal(found[1], state)
    for one, other in zip(in_place(run, inputs, np.empty_like(inputs["values"])), found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("op", "change"),
    [(ops.CAUSAL_CONV, {"activation": "relu"}), (ops.LINEAR_ATTENTION, {"update_rule": "delta"})],
)
def test_attributes_that_are_not_known(op: str, change: dict[str, Any]) -> None:
    right = {
        ops.CAUSAL_CONV: ops.causal_conv_attributes("none"),
        ops.LINEAR_ATTENTION: ops.linear_attention_attributes(
            key_heads=1, value_heads=1, update_rule="gated", scale=1.0, epsilon=0.0
        ),
    }
    make: dict[str, Callable[[Any], Any]] = {
        ops.CAUSAL_CONV: lambda attributes: functions.causal_conv_function(attributes, bias=False),
        ops.LINEAR_ATTENTION: functions.linear_attention_function,
    }
    with pytest.raises(LynxError, match=f"{op} has {next(iter(change))} = '{next(iter(change.values()))}'"):
        make[op]({**right[op], **change})


# --- The export.


@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h"])
def test_one_node_reads_a_state(name: str, artifact: Any) -> None:
    """So a backend may bind past and present to one memory. Nothing is a loop over tokens, and sizes have names."""
    built = artifact(name, preset="lynx")
    graph = onnx.load(built.path("model.onnx"), load_external_data=False).graph
    for state in built.manifest.model.states:
        assert sum(f"past_{state.name}" in node.input for node in graph.node) == 1
    assert not {node.op_type for node in graph.node} & {"Loop", "Scan"}
    varying = {
        size for dims in input_dims(onnx.ModelProto(graph=graph)).values() for size in dims if isinstance(size, str)
    }
    assert varying == {"batch", "sequence"}
    kinds = [node.op_type for node in graph.node if node.domain == ops.DOMAIN]
    layers = len({state.name.split(".")[1] for state in built.manifest.model.states})
    assert kinds.count(ops.CAUSAL_CONV) == kinds.count(ops.LINEAR_ATTENTION) == layers


def test_what_a_sequence_takes(artifact: Any) -> None:
    """One layer of attention, 2 heads of 16 by 64 rows, twice; and a state of 3 x 192 and 4 x 16 x 32; float32."""
    manifest = artifact("qwen3_next", preset="lynx").manifest
    assert cache_bytes(manifest) == 4 * (2 * 2 * 16 * 64 + 3 * 192 + 4 * 16 * 32)


@pytest.mark.parametrize("function", ["torch_chunk_gated_delta_rule", "causal_conv1d_fn"])
def test_a_function_that_computes_something_else(
    function: str,
    checkpoint: Callable[[str], Path],
    build_quietly: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It has the name of one that is known, and another result: the model is refused."""
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    original = getattr(module, function)

    def other(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        return (result[0] * 1.001, result[1]) if isinstance(result, tuple) else result * 1.001

    monkeypatch.setattr(module, function, other)
    with pytest.raises(UnsupportedModelError, match="that is not known here"):
        build_quietly(checkpoint("qwen3_next"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- The runtimes.


def run_all(artifact: Artifact, backend: Any, prompts: list[str], new: int, **policy: Any) -> list[list[int]]:
    """Tokens of each prompt, greedily, with all experts; more of them than the backend has slots."""
    tokenizer, limits = Tokenizer(artifact.path(TOKENIZER)), limits_of(artifact.manifest)
    scheduler = Scheduler(backend, limits, restriction=Restriction(limits.experts), policy=Policy(**policy))
    sequences = [
        Generated(tokenizer.encode(prompt), Request(new + 3 * number, Sampling(), number), tokenizer.stream())
        for number, prompt in enumerate(prompts)
    ]
    for sequence in sequences:
        scheduler.submit(sequence)
    while scheduler.step():
        pass
    assert [sequence.error for sequence in sequences] == [None] * len(sequences)
    return [list(sequence.tokens) for sequence in sequences]


PROMPTS = ["def add(a, b):\n", "i", "class Point:\n    def", "x = [", "while True:", "ab"]


def eager(name: str, prompt: list[int], new: int) -> list[int]:
    """Greedy tokens of transformers' model, the whole sequence at every step."""
    model = tiny_models.random_model(name, eos_token_id=None)
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def hybrid(
    byte_checkpoint: Callable[[str], Path], build_quietly: Callable[..., Artifact], tmp_path_factory: Any
) -> Callable[[str], Artifact]:
    made: dict[str, Artifact] = {}

    def make(name: str) -> Artifact:
        if name not in made:
            made[name] = build_quietly(byte_checkpoint(name), tmp_path_factory.mktemp(name) / "artifact")
        return made[name]

    return make


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2_moe"])
def test_sequences_come_and_go(name: str, hybrid: Callable[[str], Artifact]) -> None:
    """Prompts in chunks with padding beside others that decode, slots that are used again and moved: eager's text."""
    built = hybrid(name)
    encode = Tokenizer(built.path(TOKENIZER)).encode
    found = run_all(built, OrtBackend(built, 3, threads=1), PROMPTS, 4, chunk=4, prefill_tokens=8)
    assert found == [eager(name, encode(prompt), 4 + 3 * number) for number, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("graphs", [True, False])
def test_engine_gives_the_same(graphs: bool, hybrid: Callable[[str], Artifact], tmp_path: Path) -> None:
    """On a GPU of host memory: states bound in place, moved whole, zeros where a sequence begins."""
    engined = with_engine(hybrid("qwen3_next"), tmp_path / "artifact")
    gpu = HostGpu()
    backend = backend_of(engined, 3, gpu, graphs=graphs)
    expected = run_all(engined, OrtBackend(engined, 3, threads=1), PROMPTS, 8, chunk=8)
    assert run_all(engined, backend, PROMPTS, 8, chunk=8) == expected
    assert (gpu.launches > 0) == graphs


@pytest.mark.parametrize("kind", ["onnxruntime", "tensorrt"])
def test_slots(kind: str, hybrid: Callable[[str], Artifact], tmp_path: Path) -> None:
    """A copied slot goes on as its source does; a cleared one, whatever was in it, begins as a new one."""
    built = hybrid("qwen3_next")
    backend: Any = OrtBackend(built, 3, threads=1)
    if kind == "tensorrt":
        built = with_engine(built, tmp_path / "artifact")
        backend = backend_of(built, 3)
    everything, one = Restriction((8, 8)), np.ones(1, np.int64)
    prompt, past, length = np.array([[65, 66, 67, 68]]), np.zeros(1, np.int64), np.array([4])

    def following(slot: int) -> Array:
        return backend.step(np.array([[70]]), length, one, everything, first=slot).logits.copy()

    first = backend.step(prompt, past, length, everything, first=2).logits.copy()
    backend.copy_slot(2, 0, 4)
    np.testing.assert_array_equal(following(0), following(2))
    # Used before, and not cleared: the past of 0 says that a sequence begins.
    np.testing.assert_allclose(backend.step(prompt, past, length, everything, first=0).logits, first, atol=1e-5)
    backend.clear_slot(0)
    assert np.isfinite(following(0)).all()


@pytest.mark.parametrize("kind", ["onnxruntime", "tensorrt"])
def test_a_conversation_goes_on(kind: str, hybrid: Callable[[str], Artifact], tmp_path: Path) -> None:
    """The last prompt, kept in a free slot with its states, is not computed again: eager's text all the same."""
    built = hybrid("qwen3_next")
    backend: Any = OrtBackend(built, 3, threads=1)
    if kind == "tensorrt":
        built = with_engine(built, tmp_path / "artifact")
        backend = backend_of(built, 3)
    tokenizer, limits = Tokenizer(built.path(TOKENIZER)), limits_of(built.manifest)
    scheduler = Scheduler(backend, limits, restriction=Restriction(limits.experts), policy=Policy(chunk=8, reuse=4))
    prompt = tokenizer.encode("def add(a, b):")
    for turn in range(3):
        sequence = Generated(list(prompt), Request(5, Sampling(), 0), tokenizer.stream())
        scheduler.submit(sequence)
        while scheduler.step():
            pass
        assert sequence.error is None
        assert list(sequence.tokens) == eager("qwen3_next", prompt, 5)
        assert (sequence.reused > 0) == (turn > 0)
        prompt = [*prompt, *sequence.tokens, *tokenizer.encode("\n")]
