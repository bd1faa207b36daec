"""Fixtures that several files share: checkpoints and artifacts, each made once a run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal

# Before anything imports transformers: nothing here may look for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each core has a worker already: with as many threads in each, of models this small, a tenth more time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lynx_trt.artifact import Artifact
from lynx_trt.build import BuildOptions, build
from lynx_trt.console import Progress


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Ctrl-C works in the processes that tests start, also where a shell started these in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is made once and only read."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="session")
def checkpoint(workspace: Path) -> Callable[[str], Path]:
    """The checkpoint folder of a random model of some architecture."""
    import tiny_models

    def make(name: str) -> Path:
        folder = workspace / "checkpoints" / name
        if not folder.exists():
            tiny_models.save(tiny_models.random_model(name), folder)
        return folder

    return make


@pytest.fixture(scope="session")
def build_quietly() -> Callable[..., Artifact]:
    """`build` without progress, ONNX only unless told otherwise."""

    def run(model: Path, output: Path, **options: Any) -> Artifact:
        settings = {"tensorrt": "none", "precision": "fp32", "max_length": 64, **options}
        with Progress(quiet=True) as progress:
            return build(BuildOptions(model=model, output=output, **settings), progress)

    return run


@pytest.fixture(scope="session")
def artifact(workspace: Path, checkpoint: Callable[[str], Path], build_quietly: Callable[..., Artifact]) -> Any:
    """An ONNX-only float32 artifact of a random model, by architecture and options."""
    made: dict[tuple[Any, ...], Artifact] = {}

    def make(name: str, **options: Any) -> Artifact:
        key = (name, *sorted(options.items()))
        if key not in made:
            output = workspace / "artifacts" / f"{name}-{len(made)}"
            made[key] = build_quietly(checkpoint(name), output, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def byte_checkpoint(workspace: Path) -> Callable[[str], Path]:
    """A random checkpoint of some architecture, with a tokenizer whose tokens are the 256 bytes."""
    import tiny_models
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    def make(name: str) -> Path:
        folder = workspace / f"text-{name}" / "bytes"
        if folder.exists():
            return folder
        tiny_models.save(tiny_models.random_model(name, eos_token_id=None), folder)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "generation_config.json").unlink(missing_ok=True)
        return folder

    return make


@pytest.fixture(scope="session")
def byte_model(byte_checkpoint: Callable[[str], Path]) -> Path:
    """The one that most tests of text use."""
    return byte_checkpoint("qwen3_moe")


@pytest.fixture(scope="session")
def text_artifact(byte_model: Path, workspace: Path, build_quietly: Callable[..., Artifact]) -> Artifact:
    return build_quietly(byte_model, workspace / "bytes-artifact", preset="lynx", budget="2")


@pytest.fixture(scope="session")
def trt() -> Any:
    """TensorRT for RTX, with our plugins in its registry."""
    from lynx_trt.plugins import python_plugin
    from lynx_trt.tensorrt import loader

    for wheel in loader.RTX_WHEELS:
        try:
            importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{wheel} is not installed: {loader.INSTALL_CPU}")
    module = loader.load("rtx").module
    python_plugin.register(module)
    return module


@pytest.fixture(scope="session")
def long_artifact(byte_model: Path, workspace: Path, build_quietly: Callable[..., Artifact]) -> Artifact:
    """600 tokens: long enough for requests that last while something else happens; with a chat template.

    With the template's option `think` an answer begins with thoughts, which end at </think>.
    """
    folder = Path(shutil.copytree(byte_model, workspace / "long-bytes"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 600}))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}>{% if think %}<think>{% endif %}{# </think> #}"
    )
    return build_quietly(folder, workspace / "long-artifact", preset="lynx", budget="2", max_length=600)
