"""Sliding windows: caches of as many rows as a window and a step need, written in a ring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from test_states import run_all
from test_trt_backend import backend_of, with_engine

from lynx_trt.artifact import Artifact, CacheRecord
from lynx_trt.budgets import Restriction
from lynx_trt.errors import GenerationError
from lynx_trt.inspect import cache_bytes
from lynx_trt.runtime.lowering import Form
from lynx_trt.runtime.ort import OrtBackend

Array = np.ndarray[Any, np.dtype[Any]]
# The window of the models here is 8, a step has 8 tokens, so a ring has 16: it goes round several times.
CHUNK, LENGTHS, STEPS = 8, (37, 5, 50), 30
PROMPTS = [
    "def add(a, b):\n    return a + b\n",
    "i",
    "def add(a, b):\n    return a - b\n\n\nclass Point:\n    def",
    "def add(a, b):\n    return",
    "x = [1, 2, 3]\nfor i in x:\n    print(i)\n",
    "def add(a, b):\n    return a * b",
]


@pytest.fixture(scope="module")
def text(
    byte_checkpoint: Callable[[str], Path], build_quietly: Callable[..., Artifact], tmp_path_factory: Any
) -> Artifact:
    """gpt-oss: every second layer has a window, and all have attention sinks."""
    folder = tmp_path_factory.mktemp("rings") / "artifact"
    return build_quietly(byte_checkpoint("gpt_oss"), folder, max_length=96, prefill_length="6:8:8")


def caches(artifact: Artifact) -> list[CacheRecord]:
    return artifact.manifest.model.caches


def test_what_a_ring_takes(text: Artifact) -> None:
    """16 rows and 6 for a short step's padding, in whole 8; 96 and a sink elsewhere. Half of the model's caches."""
    model = text.manifest.model
    assert [(cache.rows, cache.ring, cache.window) for cache in caches(text)] == [(24, 16, 8)] * 2 + [(0, 0, 0)] * 2
    assert (model.cache_rows, model.chunk, model.rewinds) == (104, 8, 8)
    assert cache_bytes(text.manifest) == 4 * 2 * 2 * 16 * (24 + 104)


def test_no_ring_where_it_saves_little(
    checkpoint: Callable[[str], Path], build_quietly: Callable[..., Artifact], tmp_path: Path
) -> None:
    """16 rows are more than half of 24."""
    model = build_quietly(checkpoint("gpt_oss"), tmp_path / "out", max_length=16, prefill_length="1:8:8").manifest.model
    assert {(cache.rows, cache.ring) for cache in model.caches} == {(0, 0)}
    assert (model.chunk, model.rewinds) == (0, 16)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma4", "mimo_v2_flash")]


@pytest.mark.parametrize("name", ["gpt_oss", *SLOW])
def test_logits_equal_eager(
    name: str, checkpoint: Callable[[str], Path], build_quietly: Callable[..., Artifact], tmp_path: Path
) -> None:
    """Prompts in chunks with padding, decode steps of rows at different places of their rings."""
    random = np.random.default_rng(7)
    rows = [random.integers(3, 256, size=length + STEPS) for length in LENGTHS]

    def eager(model: Any) -> Array:
        with torch.no_grad():
            every = [model(input_ids=torch.from_numpy(row[None])).logits[0].double().numpy() for row in rows]
        decoded = (each[length - 1 : length + STEPS] for each, length in zip(every, LENGTHS, strict=True))
        return np.stack(list(decoded), axis=1)

    want = eager(tiny_models.random_model(name).double())
    bound = 2 * np.abs(eager(tiny_models.random_model(name)) - want).max()
    built = build_quietly(checkpoint(name), tmp_path / "out", max_length=96, prefill_length="1:4:8", preset="lynx")
    assert any(cache.ring == 16 for cache in caches(built))
    everything = Restriction(tuple(layer.experts for layer in built.manifest.model.moe_layers))
    forms: tuple[Form | None, ...] = (None, "auto")
    for form in forms:
        backend = OrtBackend(built, slots=len(rows), form=form)
        got = np.zeros_like(want)
        for slot, (row, length) in enumerate(zip(rows, LENGTHS, strict=True)):
            for start in range(0, length, CHUNK):
                real = min(CHUNK, length - start)
                ids = np.zeros((1, CHUNK), np.int64)
                ids[0, :real] = row[start : start + real]
                step = backend.step(ids, np.array([start]), np.array([real]), everything, first=slot)
            got[0, slot] = step.logits[0]
        for number in range(STEPS):
            past = np.array(LENGTHS) + number
            ids = np.array([[row[position]] for row, position in zip(rows, past, strict=True)])
            got[number + 1] = backend.step(ids, past, np.ones_like(past), everything).logits
        assert np.abs(got - want).max() <= bound


def eager_tokens(prompt: list[int], new: int) -> list[int]:
    model = tiny_models.random_model("gpt_oss", eos_token_id=None)
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ["onnxruntime", "tensorrt"])
def test_sequences_come_and_go(kind: str, text: Artifact, tmp_path: Path) -> None:
    """Slots that are moved, and prompts that begin as others do, from anywhere in a ring: eager's text.

    The engine prefills no fewer than 6 tokens: what is padded may run over a ring's end.
    """
    backend: Any = OrtBackend(text, 3, threads=1)
    if kind == "tensorrt":
        limits = {"decode": ((1, 4), (1, 1)), "prefill": ((1, 2), (6, 8))}
        backend = backend_of(with_engine(text, tmp_path / "artifact", limits), 3)
    copied: list[int] = []
    copy = backend.copy_slot
    backend.copy_slot = lambda source, target, length: (copied.append(length), copy(source, target, length))
    encode = _encode(text)
    found = run_all(text, backend, PROMPTS, 8, chunk=100, reuse=4)
    assert found == [eager_tokens(encode(prompt), 8 + 3 * number) for number, prompt in enumerate(PROMPTS)]
    assert copied


def _encode(artifact: Artifact) -> Callable[[str], list[int]]:
    from lynx_trt.artifact import TOKENIZER
    from lynx_trt.runtime.text import Tokenizer

    return Tokenizer(artifact.path(TOKENIZER)).encode


def test_a_step_across_a_multiple_is_refused(text: Artifact) -> None:
    """It would be written behind the ring."""
    backend = OrtBackend(text, 1, threads=1)
    with pytest.raises(GenerationError, match="a step of 4 tokens at position 6 crosses a multiple of 8"):
        backend.step(np.zeros((1, 4), np.int64), np.array([6]), np.array([4]), Restriction((8, 8)))
    backend.step(np.zeros((1, 1), np.int64), np.array([95]), np.array([1]), Restriction((8, 8)))
