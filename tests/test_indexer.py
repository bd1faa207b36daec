"""Attention to the rows of the cache that an indexer chooses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from lynx_trt.artifact import Artifact
from lynx_trt.errors import UnsupportedModelError
from lynx_trt.export import attention


def initializers(artifact: Artifact) -> list[str]:
    graph = onnx.load(artifact.path("model.onnx"), load_external_data=False).graph
    return [tensor.name for tensor in graph.initializer]


def test_an_indexer_has_a_cache_of_its_own(artifact: Any) -> None:
    """Beside the latents, with as many rows."""
    built = artifact("deepseek_v32", preset="lynx")
    names = [cache.name for cache in built.manifest.model.caches]
    layers = range(built.manifest.model.layers)
    assert names == [f"key_values.{layer}.{part}" for layer in layers for part in ("latent", "index")]
    assert any("indexer" in name for name in initializers(built))


def test_an_indexer_that_chooses_all_rows(
    checkpoint: Callable[[str], Path], build_quietly: Callable[..., Artifact], tmp_path: Path
) -> None:
    """It changes nothing up to the length that it may choose, so nothing of it is in the graph."""
    import json
    import shutil

    folder = Path(shutil.copytree(checkpoint("deepseek_v32"), tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "index_topk": 64}))
    every = build_quietly(folder, tmp_path / "all")
    assert all(cache.name.endswith(".latent") for cache in every.manifest.model.caches)
    assert not any("indexer" in name for name in initializers(every))


def test_the_rows_chosen() -> None:
    """Any order, and the last row."""
    chosen = attention._chosen(torch.tensor([[[4, 0], [2, 3]]], dtype=torch.int32), 5)
    assert chosen.shape == (1, 1, 2, 5)
    assert chosen.long().tolist() == [[[[1, 0, 0, 0, 1], [0, 0, 1, 1, 0]]]]


def test_another_way_of_choosing(
    checkpoint: Callable[[str], Path],
    build_quietly: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A model with an indexer that keeps to itself which rows it chose, would attend to all of them."""
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as module

    functions = module.ALL_ATTENTION_FUNCTIONS

    class WithoutIndices:
        def get_interface(self, *arguments: Any) -> Any:
            found = functions.get_interface(*arguments)
            return lambda *values, indices=None, **options: found(*values, **options)

    monkeypatch.setattr(module, "ALL_ATTENTION_FUNCTIONS", WithoutIndices())
    with pytest.raises(UnsupportedModelError, match="layer 0 chooses what it attends to in a way not known here"):
        build_quietly(checkpoint("deepseek_v32"), tmp_path / "out")
