"""What a user can get wrong with `build`, and what becomes of it: a sentence, an exit code, nothing left behind."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from lynx_trt import build as command_module
from lynx_trt.artifact import MANIFEST
from lynx_trt.budgets import Restriction, parse_budget, with_floor
from lynx_trt.errors import ArtifactError, CheckpointError, UnsupportedModelError, UsageError
from lynx_trt.export.checkpoint import open_checkpoint
from lynx_trt.export.config import check_experts
from lynx_trt.export.finite import all_finite, refuse_not_finite
from lynx_trt.export.hf import _quiet, read_source
from lynx_trt.partials import remove_dead
from lynx_trt.tensorrt import gpu, loader

Build = Callable[..., Any]


@pytest.fixture
def own_checkpoint(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a good checkpoint that the test may break."""
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "checkpoint"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of several shards."""
    folder = tiny_models.save(tiny_models.random_model("qwen3_moe"), tmp_path / "sharded", shard="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "partial" in path.name or path.name == "out")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refuse(build: Build, error: type[Exception], folder: Path, tmp_path: Path, *words: str, **options: Any) -> str:
    """`build` raises `error`, its message has every word, is one line, and nothing is left behind."""
    with pytest.raises(error) as caught:
        build(folder, tmp_path / "out", **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert left_behind(tmp_path) == []
    return message


def test_no_such_path(build_quietly: Build, tmp_path: Path) -> None:
    refuse(build_quietly, CheckpointError, tmp_path / "nowhere", tmp_path, "no such checkpoint", "nowhere")


def test_file_instead_of_folder(build_quietly: Build, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    refuse(build_quietly, CheckpointError, tmp_path / "weights.bin", tmp_path, "weights.bin is not an ONNX file")


@pytest.mark.parametrize("name", ["graph.json", "graph.textproto", "graph.onnxtxt", "graph"])
def test_text_instead_of_onnx(name: str, build_quietly: Build, tmp_path: Path) -> None:
    """Formats that onnx tells by the file's name are no reason for a traceback."""
    (tmp_path / name).write_text("x")
    refuse(build_quietly, CheckpointError, tmp_path / name, tmp_path, f"{name} is not an ONNX file, or is damaged")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_file_of_a_checkpoint(name: str, build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    refuse(build_quietly, CheckpointError, own_checkpoint / name, tmp_path, f"name the folder: {own_checkpoint}")


def test_folder_without_config(build_quietly: Build, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse(build_quietly, CheckpointError, tmp_path / "empty", tmp_path, "config.json")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '"text"'], ids=["cut", "list", "no model_type", "string"])
def test_config_that_is_none(content: str, build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    (own_checkpoint / "config.json").write_text(content)
    refuse(build_quietly, CheckpointError, own_checkpoint, tmp_path, "config.json")


def test_unknown_model_type(build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    edit_config(own_checkpoint, model_type="no_such_model", architectures=["NoSuchModel"])
    refuse(build_quietly, UnsupportedModelError, own_checkpoint, tmp_path, "no_such_model")


def test_remote_code_is_not_run_unasked(build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    (own_checkpoint / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_config(own_checkpoint, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    build_quietly(own_checkpoint, tmp_path / "artifact")  # transformers' own model of that type
    edit_config(own_checkpoint, model_type="evil")
    refuse(build_quietly, UnsupportedModelError, own_checkpoint, tmp_path, "'evil'", "--trust-remote-code")
    assert not (tmp_path / "ran").exists()


def test_dense_model(build_quietly: Build, tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(**tiny_models.COMMON, intermediate_size=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    refuse(build_quietly, UnsupportedModelError, tmp_path / "dense", tmp_path, "dense", "llama")


def test_experts_outside_of_the_interface(build_quietly: Build, tmp_path: Path) -> None:
    """A model with experts that can't be rewritten is not called dense."""
    import transformers

    config = transformers.JetMoeConfig(**tiny_models.COMMON, intermediate_size=32, num_local_experts=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "jetmoe")
    refuse(build_quietly, UnsupportedModelError, tmp_path / "jetmoe", tmp_path, "experts interface")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("minimax_m3_vl", "layers of type 'minimax_m3_sparse'"),  # a language model within
        ("deepseek_v4", "layers of type 'heavily_compressed_attention'"),
        pytest.param("jamba", "keeps a state by a recurrence that is not known here", marks=pytest.mark.slow),
        pytest.param("llama4", "experts interface", marks=pytest.mark.slow),
    ],
)
def test_attention_of_another_kind(name: str, reason: str, build_quietly: Build, tmp_path: Path) -> None:
    """It would be right while all of the past is attended to, and wrong beyond."""
    folder = tiny_models.save(tiny_models.random_model(name), tmp_path / name)
    refuse(build_quietly, UnsupportedModelError, folder, tmp_path, reason)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_local_experts": 0}, ["num_local_experts 0", "1 expert or more"]),
        ({"num_local_experts": -1}, ["num_local_experts -1", "1 expert or more"]),
        ({"num_local_experts": "8"}, ["num_local_experts '8'", "whole number"]),
        ({"num_local_experts": 8.0}, ["num_local_experts 8.0", "whole number"]),
        ({"num_local_experts": True}, ["num_local_experts True", "whole number"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok 9 and num_local_experts 8", "1 to 8 of 8"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok 0 and num_local_experts 8", "1 to 8 of 8"]),
        ({"num_experts_per_tok": [2, 9]}, ["num_experts_per_tok 9 and"]),  # one a layer
        ({"text_config": {"num_experts": 4, "moe_topk": 5}}, ["moe_topk 5 and num_experts 4"]),
        ({"hidden_act": "foo"}, ["hidden_act 'foo'", "such as silu"]),
    ],
)
def test_config_that_no_model_can_have(
    changes: dict[str, Any], words: list[str], build_quietly: Build, own_checkpoint: Path, tmp_path: Path
) -> None:
    """The key is named, and what it has to be; not what goes wrong later because of it."""
    edit_config(own_checkpoint, **changes)
    refuse(build_quietly, CheckpointError, own_checkpoint, tmp_path, "config.json has ", *words)


def test_numbers_of_experts_that_are_right(tmp_path: Path) -> None:
    """All of them used, none said, one a layer, and a key that the model doesn't use."""
    for raw in (
        {"num_experts": 8, "num_experts_per_tok": 8},
        {"num_experts": None, "moe_topk": None},
        {"num_experts": [1, 8], "moe_topk": [1, 2]},
        {"num_local_experts": 0, "n_routed_experts": 8, "num_experts_per_tok": 2},
        {"text_config": "none"},
    ):
        check_experts(raw, tmp_path)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", ["foo", 3, ["yarn"]])
def test_unknown_kind_of_rope(key: str, kind: Any, build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    """Under either key, of which transformers makes one."""
    edit_config(own_checkpoint, rope_parameters=None)
    edit_config(own_checkpoint, **{key: {"rope_type": kind, "rope_theta": 10000.0}})
    words = ["config.json has rope_type", repr(kind), key, "one of default, linear, llama3", "yarn"]
    refuse(build_quietly, CheckpointError, own_checkpoint, tmp_path, *words)


@pytest.mark.parametrize("value", ["foo", [1, "2"], 1.5, True, {"a": 1}])
def test_end_token_that_is_none(value: Any, build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    """Of either file that may name it; before the model is traced."""
    (own_checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    words = ["generation_config.json has eos_token_id", repr(value), "a token's id"]
    refuse(build_quietly, CheckpointError, own_checkpoint, tmp_path, *words)
    (own_checkpoint / "generation_config.json").unlink()
    edit_config(own_checkpoint, eos_token_id=value)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=r"eos_token_id .*, which has to be "):
        build_quietly(own_checkpoint, tmp_path / "out")


def test_tensors_that_are_not_used(build_quietly: Build, sharded: Path, tmp_path: Path, capsys: Any) -> None:
    """A config that was edited to fewer layers than the shards hold: a line, and the artifact is of the fewer."""
    stored = [key for shard in sorted(sharded.glob("*.safetensors")) for key in load_file(shard)]
    stray = [key for key in stored if key.startswith("model.layers.1.")]
    edit_config(sharded, num_hidden_layers=1)
    assert build_quietly(sharded, tmp_path / "out").manifest.model.layers == 1
    words = f"note: {len(stray)} of the {len(stored)} tensors in {sharded} are not used, for config.json, of 1 layer, "
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not used" in line]
    assert line.startswith(words)
    assert any(line.endswith(f"the first is {key!r}") for key in stray)


def test_tensors_that_are_left_out_on_purpose(tmp_path: Path) -> None:
    """Those that transformers lists, the layer behind the last that predicts further tokens, and computed ones."""
    folder = tiny_models.save(tiny_models.random_model("deepseek_v3"), tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    assert "model.layers.1.mlp.gate.weight" in tensors
    assert read_source(open_checkpoint(folder), "fp32").weights.unused == []
    for key in (
        "model.layers.3.eh_proj.weight", "model.layers.3.input_layernorm.weight", "model.layers.61.mlp.gate.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.k_scale",
        "model.layers.20.mlp.gate.weight", "vision.weight",
    ):  # fmt: skip
        tensors[key] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors")
    unused = read_source(open_checkpoint(folder), "fp32").weights.unused
    assert unused == ["model.layers.20.mlp.gate.weight", "vision.weight"]


@pytest.mark.parametrize(("value", "known"), [(256, []), ([255, 256, -1, 0], [255, 0])])
def test_end_token_beyond_the_vocabulary(
    value: Any,
    known: list[int],
    build_quietly: Build,
    own_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A line for each, and the artifact has the others: nothing may feed such a token to the model."""
    (own_checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    artifact = build_quietly(own_checkpoint, tmp_path / "out")
    assert artifact.manifest.model.end_tokens == known
    told = re.findall(r"eos_token_id (-?\d+), but the model has the tokens 0 to 255: no text", capsys.readouterr().err)
    assert told == [str(token) for token in ([value] if isinstance(value, int) else value) if token not in known]


@pytest.mark.parametrize("content", ["", "{}", *(pytest.param(x, marks=pytest.mark.slow) for x in ("{", "[]"))])
def test_damaged_tokenizer(
    content: str, build_quietly: Build, own_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the model is read; a folder named by --tokenizer is looked at in its stead."""
    (own_checkpoint / "tokenizer.json").write_text(content)
    with monkeypatch.context() as patch:
        patch.setattr("lynx_trt.export.hf.read_source", lambda *_: pytest.fail("the model was read"))
        words = ["tokenizer.json can't be read as a tokenizer", "--tokenizer"]
        refuse(build_quietly, CheckpointError, own_checkpoint, tmp_path, *words)
        (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "tokenizer_config.json").write_text("{}")
    built = build_quietly(own_checkpoint, tmp_path / "artifact", tokenizer=tmp_path / "empty")
    assert "tokenizer_config.json" in built.manifest.files
    assert "tokenizer.json" not in built.manifest.files


def test_torch_is_quiet_while_it_traces() -> None:
    """On whichever of its loggers, and only then."""
    logger, said = logging.getLogger("torch.fx.experimental.symbolic_shapes"), io.StringIO()
    handler = logging.StreamHandler(said)
    logger.addHandler(handler)
    try:
        with _quiet():
            logger.error("at length")
        logger.error("afterwards")
    finally:
        logger.removeHandler(handler)
    assert said.getvalue() == "afterwards\n"


def test_dynamic_rope(build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    """Frequencies that change with the length have no graph; silently the default ones would be wrong."""
    edit_config(own_checkpoint, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    refuse(build_quietly, UnsupportedModelError, own_checkpoint, tmp_path, "rope_type", "dynamic")


def test_quantized_checkpoint(build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    """By a method that nobody here knows; tests/test_quantized.py has those that are read."""
    edit_config(own_checkpoint, quantization_config={"quant_method": "bitsandbytes"})
    refuse(build_quietly, UnsupportedModelError, own_checkpoint, tmp_path, "(bitsandbytes)", "dequantize")


def test_pickled_weights_are_refused(build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    (own_checkpoint / "model.safetensors").rename(own_checkpoint / "pytorch_model.bin")
    refuse(build_quietly, CheckpointError, own_checkpoint, tmp_path, "pickled", "pytorch_model.bin")


def test_missing_shard(build_quietly: Build, sharded: Path, tmp_path: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    refuse(build_quietly, CheckpointError, sharded, tmp_path, victim.name, "missing")


@pytest.mark.parametrize("keep", [0.0, 0.00005, 0.5, 0.9999])
def test_truncated_shard(keep: float, build_quietly: Build, sharded: Path, tmp_path: Path) -> None:
    """Cut to nothing, within the header's length, within the data, and by a few bytes."""
    victim = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(victim, int(victim.stat().st_size * keep))
    refuse(build_quietly, CheckpointError, sharded, tmp_path, victim.name, "truncated")


@pytest.mark.parametrize(
    "header", [b"not json", b"[1, 2]", b'{"a": {"dtype": "F32"}}', b'{"a": 3}'], ids=["text", "list", "partial", "int"]
)
def test_damaged_header(header: bytes, build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    (own_checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refuse(build_quietly, CheckpointError, own_checkpoint, tmp_path, "model.safetensors")


def test_header_length_of_terabytes_is_not_allocated(
    build_quietly: Build, own_checkpoint: Path, tmp_path: Path
) -> None:
    (own_checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refuse(build_quietly, CheckpointError, own_checkpoint, tmp_path, "model.safetensors")


def test_index_that_leaves_the_folder(build_quietly: Build, sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../elsewhere.safetensors")
    index.write_text(json.dumps(content))
    refuse(build_quietly, CheckpointError, sharded, tmp_path, "outside")


@pytest.mark.parametrize(
    "changes",
    [{"moe_intermediate_size": 48}, {"num_local_experts": 4}, {"hidden_size": 128}, {"num_hidden_layers": 3}],
    ids=["experts' size", "number of experts", "hidden size", "layers that the weights lack"],
)
def test_config_disagrees_with_the_weights(
    changes: dict[str, int], build_quietly: Build, own_checkpoint: Path, tmp_path: Path
) -> None:
    edit_config(own_checkpoint, **changes)
    refuse(build_quietly, CheckpointError, own_checkpoint, tmp_path, "don't belong together")


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (EXPERT, float("nan"), ["nan at [2, 3]", "broken"]),  # one tensor of many that are stacked
        pytest.param(EXPERT, float("-inf"), ["-inf at [2, 3]", "broken"], marks=pytest.mark.slow),
        (EXPERT, 1e6, ["1e+06 at [2, 3]", "more than fp16 holds", "--precision bf16 or fp32"]),
        (EXPERT, -65520.0, ["-65520 at [2, 3]", "more than fp16 holds"]),  # the least that rounds to infinity
        (ROUTER, float("inf"), ["inf at [2, 3]", "broken"]),
    ],
)
def test_weight_that_is_no_number_in_the_precision(
    name: str, value: float, words: list[str], build_quietly: Build, own_checkpoint: Path, tmp_path: Path
) -> None:
    """Without a word it would be wrong text later."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][2, 3] = value

    edit_weights(own_checkpoint, edit)
    refuse(build_quietly, CheckpointError, own_checkpoint, tmp_path, name, *words, precision="fp16")


def test_weight_that_only_bf16_holds(build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    """What the refusal says to do works; the largest value of fp16 is no reason for it."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT][2, 3] = 1e6
        tensors[ROUTER][2, 3] = 65504.0

    edit_weights(own_checkpoint, edit)
    assert build_quietly(own_checkpoint, tmp_path / "artifact", precision="bf16").manifest.model.precision == "bf16"


def test_small_weight_that_is_no_number(build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    """Those that stay in the ONNX file are read elsewhere."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][-1] = float("nan")

    edit_weights(own_checkpoint, edit)
    refuse(build_quietly, CheckpointError, own_checkpoint, tmp_path, "model.norm.weight holds nan at [63]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 64, 1001])
def test_one_value_among_many(dtype: torch.dtype, size: int) -> None:
    """The extremes see it at every place of a vector register and of the rest behind the last one."""
    for value in (math.nan, math.inf, -math.inf):
        for place in {0, size // 2, size - 1}:
            tensor = torch.linspace(-1, 1, size).to(dtype)
            assert all_finite(tensor)
            tensor[place] = value
            assert not all_finite(tensor)
            with pytest.raises(CheckpointError, match=rf"x holds {value:g} at \[{place}\]"):
                refuse_not_finite("x", tensor, dtype, masks=False)


def test_minus_infinity_masks() -> None:
    """A bias may keep an expert from ever being chosen; plus infinity and NaN are nothing of the kind."""
    assert all_finite(torch.empty(0))
    assert all_finite(torch.tensor([True]))
    refuse_not_finite("bias", torch.tensor([0.0, -math.inf]), torch.float16, masks=True)
    for value in (math.inf, math.nan, -1e5):
        with pytest.raises(CheckpointError, match="bias holds"):
            refuse_not_finite("bias", torch.tensor([-math.inf, value]), torch.float16, masks=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_tensor_without_a_word_in_the_config(
    dtype: torch.dtype, build_quietly: Build, own_checkpoint: Path, tmp_path: Path
) -> None:
    """Its scales would be left out like any tensor that nobody asked for."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT] = tensors[EXPERT].to(dtype)

    edit_weights(own_checkpoint, edit)
    refuse(build_quietly, CheckpointError, own_checkpoint, tmp_path, EXPERT, "quantized", "dequantize=True")


def test_one_expert_of_another_shape(build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    """As many values as there should be, so their number tells nothing."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT] = tensors[EXPERT].T.contiguous()

    edit_weights(own_checkpoint, edit)
    refuse(build_quietly, CheckpointError, own_checkpoint, tmp_path, f"{EXPERT} is stored as [64, 32]", "[32, 64]")


def test_all_gates_of_another_shape(build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    """Each alike, so that it shows only where they meet what they are put together with."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".gate_proj." in name]:
            tensors[name] = tensors[name].T.contiguous()

    edit_weights(own_checkpoint, edit)
    refuse(build_quietly, CheckpointError, own_checkpoint, tmp_path, "gate_up_proj", "gate_proj.weight [64, 32]")


def test_output_that_exists(build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    """A user's folder is never touched; an artifact only with --overwrite."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no artifact, so it is not touched"):
        build_quietly(own_checkpoint, mine, overwrite=True)
    assert (mine / "thesis.txt").read_text() == "years of work"
    built = build_quietly(own_checkpoint, tmp_path / "artifact")
    with pytest.raises(UsageError, match="--overwrite"):
        build_quietly(own_checkpoint, tmp_path / "artifact")
    again = build_quietly(own_checkpoint, tmp_path / "artifact", overwrite=True, preset="off")
    assert built.manifest.selection.preset == "lynx"
    assert again.manifest.selection.preset == "off"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "checkpoint", "mine"]


def test_failed_overwrite_keeps_the_old_artifact(build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    build_quietly(own_checkpoint, tmp_path / "artifact")
    before = (tmp_path / "artifact" / MANIFEST).read_text()
    os.truncate(own_checkpoint / "model.safetensors", 1000)
    with pytest.raises(CheckpointError):
        build_quietly(own_checkpoint, tmp_path / "artifact", overwrite=True)
    assert (tmp_path / "artifact" / MANIFEST).read_text() == before


def test_output_that_is_a_file(build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="not a folder"):
        build_quietly(own_checkpoint, tmp_path / "file", overwrite=True)


def test_disk_that_fills_up(
    build_quietly: Build, own_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lynx_trt.export import write

    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write, "write_weights", full)
    refuse(build_quietly, ArtifactError, own_checkpoint, tmp_path, "No space left", "make room", "--output")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decode_batch": "8:4:16"}, ["8:4:16", "MIN:OPT:MAX"]),
        ({"prefill_batch": "0:1:2"}, ["0:1:2"]),
        ({"prefill_length": "1:2"}, ["1:2"]),
        ({"prefill_length": "1:16:128"}, ["1:16:128", "--max-length 64"]),
        ({"decode_batch": "many"}, ["'many' can't be read"]),
        ({"decode_batch": "1:8:99999999999"}, ["'1:8:99999999999' is too large", "at most 999999999"]),
        ({"max_length": 1}, ["--max-length is 1"]),
        ({"max_length": 10**6}, ["1000000", "128"]),
        ({"budget": "-1"}, ["-1", "below 0"]),
        ({"budget": "nan"}, ["the budget is nan, which is no number"]),
        ({"budget": "inf"}, ["the budget is inf, which is no number"]),
        ({"budget": "1.5"}, ["1.5", "at most 1.0"]),
        ({"budget": str(10**9)}, [f"the budget is {10**9}, but the model has 8 experts"]),
        ({"budget": "plenty"}, ["plenty"]),
        ({"budget": "0", "preset": "lynx-latency"}, ["budget of 0"]),
        ({"budget": "4", "preset": "off"}, ["--preset off"]),
        ({"floor": 0.1, "preset": "off"}, ["--floor 0.1", "--preset off"]),
        ({"floor": -0.1}, ["-0.1", "from 0"]),
        ({"floor": float("nan")}, ["nan", "from 0"]),
        ({"floor": 0.1, "preset": "lynx-latency"}, ["floor of 0.1", "guarantees none"]),
        ({"sm": "75"}, ["'75'", "numbers of 80, 86, 89, 90, 100, 120"]),
        ({"sm": "80,"}, ["'80,'", "as in 80,89"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range(
    options: dict[str, Any], words: list[str], build_quietly: Build, own_checkpoint: Path, tmp_path: Path
) -> None:
    refuse(build_quietly, UsageError, own_checkpoint, tmp_path, *words, **options)


class Installed:
    """A machine with these GPUs, and with TensorRT of either product, or of none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sms: list[int], product: str | None) -> None:
        monkeypatch.setattr(gpu, "compute_capabilities", lambda: sms)
        monkeypatch.setattr(loader, "describe", lambda: {"auto": product})


@pytest.mark.parametrize(
    ("sms", "product", "options", "words"),
    [
        # What this product builds without complaint and no GPU runs: Hopper, and Blackwell of data centres.
        ([], "rtx", {"sm": "90"}, ["--sm 90: ", "SM 80, 86, 89, 120 and later, not on SM 90; "]),
        ([], "rtx", {"sm": "80,90,100"}, ["--sm 80,90,100: ", "not on SM 90, 100; ", "name others with --sm"]),
        ([90], "rtx", {"sm": "90"}, ["not on SM 90; ", "full TensorRT there: pip install tensorrt"]),
        ([90], "full", {"sm": "90", "tensorrt": "rtx"}, ["not on SM 90; "]),
        # Full TensorRT builds for the GPU it finds.
        ([90], "full", {"sm": "80,90"}, ["SM 90 here, not for SM 80; ", "machine with that GPU"]),
        ([90, 80], "full", {"sm": "80"}, ["SM 90 here, not for SM 80; "]),
    ],
)
def test_gpus_that_the_engine_would_not_run_on(
    sms: list[int],
    product: str,
    options: dict[str, str],
    words: list[str],
    build_quietly: Build,
    own_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused before the model is read."""
    Installed(monkeypatch, sms, product)
    monkeypatch.setattr("lynx_trt.export.hf.read_source", lambda *_: pytest.fail("the model was read"))
    settings = {"tensorrt": "auto", **options}
    refuse(build_quietly, UsageError, own_checkpoint, tmp_path, *words, **settings)


@pytest.mark.parametrize(
    ("sms", "product", "sm", "expected", "said"),
    [
        ([], "rtx", "auto", [], "no GPU here to make kernels for, so the engine won't run; --sm 89"),
        ([90], "rtx", "auto", [], "won't run: engines of TensorRT for RTX run on SM 80, 86, 89, 120 and later, not on"),
        ([90, 120], "rtx", "auto", [120], ""),
        ([89, 86, 89], "rtx", "auto", [86, 89], ""),
        ([90], "full", "auto", [90], ""),
        ([90, 80], "full", "auto", [90], ""),
        ([], "rtx", "120,80", [80, 120], ""),
        ([], "rtx", "none", [], ""),
        ([], None, "90", [90], ""),  # that no TensorRT is here is said later, by whoever loads it
    ],
)
def test_gpus_that_kernels_are_made_for(
    sms: list[int],
    product: str | None,
    sm: str,
    expected: list[int],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is asked for, else the GPUs of this machine that the engine can run on: none is no error but a note."""
    Installed(monkeypatch, sms, product)
    assert command_module._sms(command_module.BuildOptions(tmp_path, tmp_path / "out", sm=sm)) == expected
    error = capsys.readouterr().err
    assert (said in error) if said else (error == "")


def test_the_default_works_with_this_tensorrt() -> None:
    """`--sm auto`, which `make demo` uses, on whatever this machine is."""
    from lynx_trt.tensorrt.loader import likely

    chosen = command_module._sms(command_module.BuildOptions(Path(), Path()))
    flavor = likely("auto")
    assert flavor is None or gpu.unbuildable(flavor, chosen) is None


@pytest.mark.parametrize(
    "content",
    [
        "[4]",
        '{"budgets": [4, -1]}',
        "[4, 4.5]",
        "nonsense",
        '{"other": 1}',
        "[4, 99]",
        '{"budgets": [4, 4], "floors": 0.1}',
        '{"budgets": [4, 4], "floors": [0.1]}',
        '{"budgets": [4, 4], "floors": [0.1, -0.1]}',
        '{"budgets": [4, 4], "floors": [0.1, NaN]}',
    ],
)
def test_budget_file_that_does_not_fit(
    content: str, build_quietly: Build, own_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "budgets.json"
    path.write_text(content)
    message = refuse(build_quietly, UsageError, own_checkpoint, tmp_path, "budgets.json", budget=str(path))
    if content == "[4, 99]":
        assert "99 for MoE layer 2 of 2, but the model has 8 experts a layer" in message


@pytest.mark.parametrize(
    ("text", "expected"), [("3", [3, 3]), ("0.5", [4, 4]), ("1.0", [8, 8]), ("0", [0, 0]), ("0.01", [1, 1])]
)
def test_budgets_of_every_form(text: str, expected: list[int]) -> None:
    """A number, a fraction (rounded up: an expert can't be kept in part), nothing at all."""
    assert parse_budget(text, [8, 8]) == Restriction(tuple(expected))


def test_budget_is_capped_in_a_smaller_layer() -> None:
    """One number serves layers of unequal size; it is refused only if no layer has as many."""
    assert parse_budget("6", [8, 4]).budgets == (6, 4)


def test_budget_file_reaches_the_manifest(build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text('{"budgets": [3, 0]}')
    built = build_quietly(own_checkpoint, tmp_path / "artifact", budget=str(tmp_path / "b.json"))
    assert built.manifest.selection.budgets == [3, 0]
    assert built.manifest.selection.floors == [0.0, 0.0]


def test_floors_of_every_form(tmp_path: Path) -> None:
    """From a file, over a file's, and alone."""
    (tmp_path / "b.json").write_text('{"budgets": [3, 0], "floors": [0.25, 0]}')
    found = parse_budget(str(tmp_path / "b.json"), [8, 8])
    assert found == Restriction((3, 0), (0.25, 0.0))
    assert with_floor(found, 0.5) == Restriction((3, 0), (0.5, 0.5))
    assert with_floor(found, None) is found
    assert parse_budget("3", [8, 8]).floors == (0.0, 0.0)


def test_floor_reaches_the_manifest(build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    """Without a budget as many are loaded as have the votes."""
    chosen = build_quietly(own_checkpoint, tmp_path / "artifact", floor=0.125).manifest.selection
    assert (chosen.budgets, chosen.floors) == ([8, 8], [0.125, 0.125])
    both = build_quietly(own_checkpoint, tmp_path / "both", floor=0.125, budget="3").manifest.selection
    assert (both.budgets, both.floors) == ([3, 3], [0.125, 0.125])


# --- As a user runs it: exit codes, one line on stderr, nothing left behind.


def command(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lynx_trt.build", *arguments], capture_output=True, text=True, check=False, **settings
    )


def test_exit_code_and_one_line_for_a_mistake(tmp_path: Path) -> None:
    result = command(str(tmp_path / "nowhere"), "-o", str(tmp_path / "out"))
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: no such checkpoint")


def test_exit_code_of_wrong_usage(tmp_path: Path) -> None:
    """An unknown option and an option out of its range both give 2."""
    assert command("--no-such-option").returncode == 2
    assert command("--precision", "fp64").returncode == 2
    assert command("--decode-batch", "3:2:1", "-o", str(tmp_path / "out")).returncode == 2


@pytest.mark.parametrize(
    ("option", "reason"), [("--precision fp16", "keeps its own"), ("--trust-remote-code", "holds no code")]
)
def test_option_that_an_onnx_file_has_no_use_for(option: str, reason: str, tmp_path: Path) -> None:
    """The file keeps its precision; only one that was asked for is refused, so the default is not in the way."""
    from foreign_graphs import Spec, save_model

    path = save_model(Spec(form="moe"), tmp_path / "model")
    result = command(str(path), "-o", str(tmp_path / "out"), "--tensorrt", "none", *option.split())
    assert result.returncode == 2
    assert f"error: {option} means nothing for an ONNX file, which {reason}" in result.stderr
    assert left_behind(tmp_path) == []


def test_option_that_a_checkpoint_has_no_use_for(build_quietly: Build, own_checkpoint: Path, tmp_path: Path) -> None:
    words = ["--allow-partial means nothing for a checkpoint", "leave it out"]
    refuse(build_quietly, UsageError, own_checkpoint, tmp_path, *words, allow_partial=True)


def test_file_size_limit_during_the_build(own_checkpoint: Path, tmp_path: Path) -> None:
    """The nearest to a full disk that needs no disk of its own: writes beyond 100 kB fail."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = command(
        str(own_checkpoint), "-o", str(tmp_path / "out"), "--max-length", "64", "--tensorrt", "none", preexec_fn=limit
    )
    assert result.returncode == 1
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert left_behind(tmp_path) == []


def test_killed_build_is_cleared_away_by_the_next(
    build_quietly: Build, own_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a process left that could not clean up; not while it lives, and nothing of another name."""
    script = (
        "import sys, time; from pathlib import Path; from lynx_trt.artifact import writing\n"
        "with writing(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'weights.safetensors').write_bytes(b'half')\n"
        "    print(folder, flush=True)\n"
        "    time.sleep(600)\n"
    )
    folders, processes = [], []
    for name in ("out", "out2"):
        processes.append(
            subprocess.Popen([sys.executable, "-c", script, str(tmp_path / name)], stdout=subprocess.PIPE, text=True)
        )
        stream = processes[-1].stdout
        assert stream is not None
        folders.append(Path(stream.readline().strip()))
    try:
        assert remove_dead(tmp_path / "out") == ([], [])  # it lives
        assert folders[0].is_dir()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    build_quietly(own_checkpoint, tmp_path / "out")
    assert f"note: removed {folders[0]}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out", folders[1].name]


def test_what_may_be_of_another_machine_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another boot's folder, one of another form of name, a link; and one made just now, by a process yet to lock."""
    import lynx_trt.partials as partials_module
    from lynx_trt.artifact import writing

    boot = partials_module._boot()
    assert boot is not None
    names = ["out.partial-00000000abcd-12345678", "out.partial-4711"]
    for name in (*names, f"out.partial-{boot}-00000000"):
        (tmp_path / name).mkdir()
    (tmp_path / f"out.partial-{boot}-00000001").symlink_to(tmp_path / names[0])
    before = sorted(tmp_path.iterdir())
    assert remove_dead(tmp_path / "out") == ([], [tmp_path / name for name in names])
    with writing(tmp_path / "out"):
        pass
    assert capsys.readouterr().err.count("note: ") == 2
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out", *before]
    os.utime(tmp_path / f"out.partial-{boot}-00000000", (0, 0))
    assert remove_dead(tmp_path / "out")[0] == [tmp_path / f"out.partial-{boot}-00000000"]


def _wait_for_handler(process: subprocess.Popen[str]) -> None:
    """Until Python has taken charge of SIGINT: before that the kernel ends it, whatever the program is.

    Seen twice: a process that is about to become another one still has its parent's handlers for an instant.
    """
    seen = 0
    while process.poll() is None and seen < 2:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        seen = seen + 1 if caught >> (signal.SIGINT - 1) & 1 else 0
        time.sleep(0.02)


@pytest.mark.parametrize("phase", ["", "Export to ONNX", "TensorRT: Loading"])
def test_interrupted_build_leaves_nothing(phase: str, own_checkpoint: Path, tmp_path: Path) -> None:
    """Ctrl-C while Python imports, while it exports, and while TensorRT's process builds."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "lynx_trt.build",
            str(own_checkpoint),
            "-o",
            str(tmp_path / "out"),
            "--max-length",
            "64",
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    said = ""
    if phase:
        for line in process.stderr:
            said += line
            if phase in line:
                break
    else:
        _wait_for_handler(process)
        time.sleep(1.0)  # Python's own start is over, and it is importing
    assert process.poll() is None, f"it ended before it could be interrupted: {said}"
    os.killpg(process.pid, signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    errors = said + rest
    # Or by the signal itself: `python -m` ends so once a Ctrl-C has come out of an exec of source (a dataclass is being
    # made, say), whoever handles it afterwards. To a shell both are 130.
    assert process.returncode in (130, -signal.SIGINT), errors
    assert "Traceback" not in errors
    if phase:
        assert errors.endswith("error: interrupted; nothing was left behind\n")
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(("asked", "where"), [(None, "external"), ("engine", "engine")])
def test_experts_of_large_models_stay_outside_the_engine(
    asked: str | None,
    where: str,
    checkpoint: Callable[[str], Path],
    build_quietly: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inside, the build takes three times their size: unless it is asked for, or they are small."""
    small = build_quietly(checkpoint("mixtral"), tmp_path / "small")
    assert small.manifest.build["options"]["expert_weights"] == "engine"
    monkeypatch.setattr(command_module, "OUTSIDE_FROM", 0)
    options = {"tensorrt": "auto", "prefill_length": "1:16:32", "expert_weights": asked}
    built = build_quietly(checkpoint("mixtral"), tmp_path / "large", **options)
    assert built.manifest.build["options"]["expert_weights"] == where
    assert built.manifest.engine
    assert built.manifest.engine.expert_weights == where
