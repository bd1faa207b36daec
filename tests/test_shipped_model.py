"""The shipped model is what the README says, and the script that trained it still runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lynx_trt.artifact import Artifact
from lynx_trt.build import shipped_model
from lynx_trt.generate import generate_text

COMMANDS = ("build", "generate", "inspect", "models.train", "models.demo")


@pytest.fixture(scope="module")
def shipped(build_quietly: Callable[..., Artifact], workspace: Path) -> Artifact:
    return build_quietly(
        shipped_model(), workspace / "shipped", precision="fp16", max_length=None, tensorrt="auto", preset="lynx"
    )


def test_it_is_small_and_a_real_mixture() -> None:
    folder = shipped_model()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12e6
    config = json.loads((folder / "config.json").read_text())
    assert config["num_local_experts"] >= 16
    assert config["num_experts_per_tok"] >= 4
    assert config["num_hidden_layers"] >= 4


def test_memory_and_profiles_of_its_build(shipped: Artifact) -> None:
    manifest = shipped.manifest
    assert manifest.engine
    assert manifest.engine.peak_bytes <= 3 * manifest.model.weight_bytes + 1.5e9
    assert [profile["name"] for profile in manifest.engine.profiles] == ["decode", "prefill"]
    assert manifest.engine.plugin_layers == {"LynxSelect": 6, "LynxExperts": 6}


def test_it_reads_python_better_than_a_compressor() -> None:
    """Bits per byte on text written for this test, so no part of the training: under 2, where gzip needs over 4."""
    import zlib

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lynx_trt.models.train import bits_per_byte

    text = '''
class Cache:
    """Keep the most recent values."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.values = {}

    def get(self, key, default=None):
        if key not in self.values:
            return default
        value = self.values.pop(key)
        self.values[key] = value
        return value

    def put(self, key, value):
        if key in self.values:
            self.values.pop(key)
        elif len(self.values) >= self.capacity:
            raise ValueError("the cache is full")
        self.values[key] = value
'''
    model = AutoModelForCausalLM.from_pretrained(shipped_model(), dtype=torch.float32)
    model.set_experts_implementation("eager")
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    assert bits_per_byte(model, tokenizer, [text], 512) < 2.0
    assert 8 * len(zlib.compress(text.encode(), 9)) / len(text.encode()) > 2.5


def test_it_writes_python(shipped: Artifact) -> None:
    """What it writes after the head of a function parses as a function, once its last line is dropped."""
    import ast

    (sequence,), _ = generate_text(shipped, ["def read_config(path):\n    "], budget="1.0", max_new_tokens=60)
    lines = ("def read_config(path):\n    " + sequence.text).splitlines()
    bodies = []
    for end in range(len(lines), 1, -1):
        try:
            bodies.append(ast.parse("\n".join(lines[:end])).body[0])
            break
        except SyntaxError:
            continue
    assert bodies
    assert isinstance(bodies[0], ast.FunctionDef)


def test_selection_saves_loads_on_it(shipped: Artifact) -> None:
    prompts = [
        "def main():\n    ",
        "import os\n",
        "class A:\n    ",
        "    for x in ",
        "    if ",
        "    return ",
        "try:\n",
        "@",
    ]
    _, off = generate_text(shipped, prompts, budget="1.0", max_new_tokens=16)
    _, on = generate_text(shipped, prompts, max_new_tokens=16)
    assert on.mean_active < 0.75 * off.mean_active


def test_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of a small recipe on two files: a Hugging Face folder comes out, and its report."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lynx_trt.models import train

    texts = [Path(train.__file__).read_text(), Path(__file__).read_text()]
    monkeypatch.setattr(train, "corpus", lambda: (texts, texts[1:]))
    recipe = train.Recipe(vocabulary=400, hidden=32, layers=2, heads=2, head_dim=16, experts=8, length=64, batch=2)
    report = train.train(tmp_path / "model", recipe, minutes=0.02)
    assert report["steps"] >= 1
    assert 0 < report["bits_per_byte"] < 16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.num_local_experts == 8
    text = "def f(x):\n\treturn 'ä'"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_corpus_split_is_by_file_and_stable() -> None:
    from lynx_trt.models import train

    training, validation = train.corpus()
    assert not set(training) & set(validation) - {""}
    assert 0.005 < len(validation) / len(training) < 0.1
    assert (training, validation) == train.corpus()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_heavy(command: str) -> None:
    """`--help` answers at once because importing a command imports none of the big libraries."""
    heavy = "{'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'pydantic', 'tensorrt'}"
    code = f"import sys, lynx_trt.{command}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    shown = subprocess.run(
        [sys.executable, "-m", f"lynx_trt.{command}", "--help"], capture_output=True, text=True, check=True
    )
    assert "Options" in shown.stdout
