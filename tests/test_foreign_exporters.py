"""Real exporters' files (`foreign_files/README.md`): every block found, the same numbers, and an engine from each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import foreign_exporters
import numpy as np
import onnx
import pytest
from foreign_run import TOLERANCE, difference, error, feeds, rewrite, run, session
from foreign_store import FOLDER, load

from lynx_trt.artifact import Artifact
from lynx_trt.errors import TensorRTError, UnsupportedModelError
from lynx_trt.export.foreign import read_foreign, require_all
from lynx_trt.export.foreign_files import write_foreign
from lynx_trt.selection import PRESETS

# file -> pattern, blocks, (E, K, H, I), whether it has a cache, whether ONNX Runtime's CPU runs the original
FILES = {
    # MoE with interleaved swiglu, clamps, biases; GroupQueryAttention with sinks and a window-sized cache
    "genai-0.18-gpt-oss": ("com.microsoft.MoE", 2, (4, 2, 64, 32), True, True),
    # 4-bit QMoE and 4-bit products around it
    "genai-0.14-gpt-oss-int4": ("com.microsoft.QMoE", 2, (4, 2, 64, 32), True, True),
    # a sigmoid router with a correction, in front of a MoE whose softmax has to see the chosen alone
    "genai-0.18-lfm2-moe": ("com.microsoft.MoE", 3, (4, 2, 64, 32), True, True),
    "genai-0.18-lfm2-moe-int4": ("com.microsoft.QMoE", 3, (4, 2, 64, 32), True, True),
    # linear attention around the blocks; its rotary embedding is newer than ONNX Runtime 1.32
    "genai-0.18-qwen3.5-moe": ("com.microsoft.MoE", 2, (4, 2, 64, 32), True, False),
    # one loop over the experts a layer, unrolled
    "optimum-0.1-qwen3-moe": ("per-expert loop", 2, (4, 2, 64, 32), True, True),
    # all experts for all tokens, the result with an axis more than the input
    "optimum-0.1-gpt-oss": ("dense experts", 2, (4, 2, 64, 32), True, True),
    # transformers' own exporter with each of its forms of the experts
    "transformers-5.23-qwen3-moe-grouped": ("grouped experts", 2, (8, 2, 64, 32), False, True),
    "transformers-5.23-qwen3-moe-batched": ("gathered experts", 2, (8, 2, 64, 32), False, True),
    "transformers-5.23-gpt-oss-grouped": ("grouped experts", 2, (8, 2, 64, 32), False, True),
    # fused for CUDA, with FC3
    "transformers-5.23-qwen3-moe-cuda": ("com.microsoft.MoE", 2, (8, 2, 64, 32), False, False),
    # a ModuleList's loop over all experts, traced
    "torch-2.13-olmoe": ("per-expert loop", 2, (4, 2, 64, 32), False, True),
}
# file -> what its refusal says; none of these graphs computes the model for other inputs than the traced ones.
REFUSED = {
    # a loop over the experts that the example used, by place in their list
    "torch-2.13-qwen2-moe-traced": "it fails where some experts have no token",
    "torch-2.13-qwen3-moe-traced": "its router ranks 8 experts, and the graph has 64 of them",
    # the example's tokens an expert, as constants
    "torch-2.13-granitemoe-traced": "is not the weighted sum of its experts",
    # two ArgMax after one another, each with a softmax of its own
    "torch-2.13-phimoe": "can't be tried out",
    # the exporter leaves out a transpose, so the products' sizes don't fit
    "genai-0.18-gpt-oss-dml": "which is no gate and up and down projection",
}


@pytest.mark.parametrize("name", FILES)
def test_blocks_are_found_and_give_the_same_numbers(name: str, tmp_path: Path) -> None:
    pattern, blocks, sizes, cached, runs = FILES[name]
    original = load(name)
    foreign, rewritten = rewrite(original, tmp_path)
    assert dict(foreign.counts) == {pattern: blocks}
    assert not foreign.refused
    found = {(b.experts, b.experts_per_token, b.hidden_size, b.intermediate) for b in foreign.blocks}
    assert found == {sizes}
    assert all(block.rule is not None for block in foreign.blocks), "tokens could only lose experts"
    _check_surroundings(original, rewritten)
    if not runs:
        return
    assert difference(original, rewritten, foreign.experts, length=6) < TOLERANCE
    assert difference(original, rewritten, foreign.experts, length=1, past=5 if cached else 0) < TOLERANCE
    # In a decode step the budget counts: with one expert a block, the numbers are others.
    given = feeds(session(original).get_inputs(), length=1, past=5 if cached else 0)
    off = run(rewritten, given, foreign.experts)
    assert error(off, run(rewritten, given, [1] * blocks)) > 1e-3


def _check_surroundings(original: onnx.ModelProto, rewritten: onnx.ModelProto) -> None:
    """Inputs, outputs and the cache stay as they are; one of each is new."""
    before = [(value.name, _shape(value)) for value in original.graph.input]
    after = [(value.name, _shape(value)) for value in rewritten.graph.input]
    assert after[: len(before)] == before
    assert [name for name, _ in after[len(before) :]] == ["budgets", "floors"]
    outputs = [value.name for value in original.graph.output]
    assert [value.name for value in rewritten.graph.output] == [*outputs, "active_experts"]


def _shape(value: onnx.ValueInfoProto) -> list[str]:
    return [str(size.dim_param or size.dim_value) for size in value.type.tensor_type.shape.dim]


_BUILT = [name for name in FILES if "qwen3.5" not in name]
# An engine a form; those of their siblings take no other way.
_QUICK = {"genai-0.18-gpt-oss", "genai-0.18-lfm2-moe-int4", "optimum-0.1-qwen3-moe", "optimum-0.1-gpt-oss"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in _BUILT]
)
def test_tensorrt_builds_it(name: str, tmp_path: Path, build_quietly: Callable[..., Artifact]) -> None:
    _, blocks, *_ = FILES[name]
    onnx.save(load(name), tmp_path / "model.onnx")
    artifact = build_quietly(
        tmp_path / "model.onnx",
        tmp_path / "artifact",
        tensorrt="auto",
        decode_batch="1:2:4",
        prefill_batch="1:1:2",
        prefill_length="1:8:32",
        sm="none",
    )
    engine = artifact.manifest.engine
    assert engine is not None
    assert engine.plugin_layers == {"LynxSelect": blocks, "LynxExperts": blocks}


def test_an_op_that_tensorrt_lacks_is_named(tmp_path: Path, build_quietly: Callable[..., Artifact]) -> None:
    """Linear attention has no standard form: the blocks are rewritten, and the engine is refused by name."""
    onnx.save(load("genai-0.18-qwen3.5-moe"), tmp_path / "model.onnx")
    options = {"prefill_length": "1:8:32", "sm": "none"}
    with pytest.raises(TensorRTError, match="LinearAttentionGate"):
        build_quietly(tmp_path / "model.onnx", tmp_path / "artifact", tensorrt="auto", **options)
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_block_is_refused(name: str, tmp_path: Path) -> None:
    onnx.save(load(name), tmp_path / "model.onnx")
    foreign = read_foreign(tmp_path / "model.onnx", PRESETS["lynx"])
    assert not foreign.blocks
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]) as refusal:
        require_all(foreign, allow_partial=True)
    assert str(refusal.value).count("\n") == 0
    assert "TopK" in str(refusal.value) or "ArgMax" in str(refusal.value)


def test_torch_onnx_exports_of_today(tmp_path: Path) -> None:
    """torch.onnx of transformers' batched form by both of its exporters, made here."""
    import tiny_models
    import torch

    model = tiny_models.random_model("qwen3_moe", num_hidden_layers=1)
    model.set_experts_implementation("batched_mm")

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    wrapped = Logits().eval()
    ids = torch.randint(3, 200, (2, 7))
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["logits"]}
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("sequence", min=1, max=128)
    program = torch.onnx.export(
        wrapped, (ids, torch.ones_like(ids)), dynamo=True, opset_version=20, verbose=False,
        dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}), **names,
    )  # fmt: skip
    program.save(str(tmp_path / "dynamo.onnx"))
    axes = {name: {0: "batch", 1: "sequence"} for name in (*names["input_names"], "logits")}
    torch.onnx.export(
        wrapped, (ids, torch.ones_like(ids)), str(tmp_path / "script.onnx"), dynamo=False, opset_version=17,
        dynamic_axes=axes, **names,
    )  # fmt: skip
    for name in ("dynamo", "script"):
        original = onnx.load(tmp_path / f"{name}.onnx")
        foreign, rewritten = rewrite(original, tmp_path / name)
        assert dict(foreign.counts) == {"gathered experts": 1}
        given = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 7), np.int64)}
        assert error(run(original, given), run(rewritten, given, foreign.experts)) < TOLERANCE


def test_a_second_rewrite_changes_nothing(tmp_path: Path) -> None:
    original = load("optimum-0.1-qwen3-moe")
    foreign, rewritten = rewrite(original, tmp_path / "one")
    again = read_foreign(tmp_path / "one" / "rewritten" / "model.onnx", PRESETS["lynx"])
    assert not again.blocks
    assert [block.experts for block in again.ours] == foreign.experts
    (tmp_path / "two").mkdir()
    write_foreign(again, tmp_path / "two")
    twice = onnx.load(tmp_path / "two" / "model.onnx")
    assert [node.op_type for node in twice.graph.node] == [node.op_type for node in rewritten.graph.node]
    given = feeds(session(original).get_inputs())
    assert np.array_equal(run(rewritten, given, [2, 2]), run(twice, given, [2, 2]))


def test_every_stored_file_is_tested() -> None:
    stored = {path.name.removesuffix(".onnx.xz") for path in FOLDER.glob("*.xz")}
    assert stored == {*FILES, *REFUSED}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000


@pytest.mark.slow
@pytest.mark.parametrize("name", foreign_exporters.FILES)
def test_exporters_themselves(name: str, tmp_path: Path) -> None:
    """The exporters' packages as they are installed, their own weights and all."""
    folder = os.environ.get("LYNX_EXPORTERS")
    if folder is None:
        pytest.skip("python tests/foreign_exporters.py FOLDER makes the files; LYNX_EXPORTERS=FOLDER names them")
    original = onnx.load(Path(folder) / name / "model.onnx")
    foreign, rewritten = rewrite(original, tmp_path)
    *_, pattern = foreign_exporters.FILES[name]
    assert set(foreign.counts) == {pattern}
    assert difference(original, rewritten, foreign.experts, length=6) < TOLERANCE
    assert difference(original, rewritten, foreign.experts, length=1, past=5) < TOLERANCE
