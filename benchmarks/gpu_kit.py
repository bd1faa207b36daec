"""What the engine's part of `make gpu` needs and a GPU machine can't make: exported small models, and what is right.

    python benchmarks/gpu_kit.py -o build/gpu-kit

Runs where there is no GPU. For each model: the artifact without an engine (`gpu_engine.py` builds it on the machine
with the GPU, by the TensorRT that is there), and `expected.npz`: a ragged batch of prompts, tokens to force, Hugging
Face eager's logits in float64, the error of eager in the engine's own precision, and ONNX Runtime's greedy tokens and
active experts with all experts, under a budget and under a floor. And the graph of Qwen3-30B-A3B's form without
weights, for `gpu_end_to_end.py`.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from gpu_models import PROMPTS, STEPS, forced_logits, greedy_tokens, restrictions

from lynx_trt.artifact import MANIFEST, Artifact, record_files
from lynx_trt.build import BuildOptions, build, shipped_model
from lynx_trt.console import Progress, new_app, run

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
LARGE = "qwen3-30b-a3b"
app = new_app()


@dataclass(frozen=True)
class Entry:
    """A small model: its architecture (of `tests/tiny_models.py`; None is the shipped one), and how it is built."""

    architecture: str | None
    precision: str
    expert_weights: str = "engine"
    why: str = ""

    @property
    def name(self) -> str:
        """Its folder in the kit."""
        external = "-external" if self.expert_weights == "external" else ""
        return f"{self.architecture or 'lynx-tiny'}-{self.precision}{external}"


ENTRIES = [
    Entry("mixtral", "fp32", why="nothing but the order of adding and TF32 may differ"),
    Entry("mixtral", "bf16"),
    Entry("qwen3_moe", "fp16"),
    Entry("qwen3_moe", "fp16", "external", why="the same weights, bound by the runtime"),
    Entry("qwen2_moe", "fp16", why="a shared expert"),
    Entry("olmoe", "fp16"),
    Entry("granitemoe", "fp16"),
    Entry("phimoe", "fp16", why="drop instead of remap"),
    Entry("glm4_moe", "fp16", why="a dense layer"),
    Entry("deepseek_v3", "fp16", why="latent attention"),
    Entry("gpt_oss", "fp16", why="sinks, biases, transposed and interleaved weights"),
    Entry("gpt_oss", "bf16"),
    Entry(None, "fp16", why="a trained model: its near-ties are real ones"),
]


@app.command()
def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the kit.")] = Path("build/gpu-kit"),
    only: Annotated[list[str] | None, typer.Option(help="Names of entries; repeatable.")] = None,
    large: Annotated[bool, typer.Option(help=f"Make the graph of {LARGE} too.")] = True,
) -> None:
    """Make the kit."""
    output.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        for entry in ENTRIES:
            if not only or entry.name in only:
                progress.say(f"{entry.name}: {entry.why}" if entry.why else entry.name)
                make(entry, output / entry.name, progress)
        if large and (not only or LARGE in only):
            progress.say(f"{LARGE}: the graph alone")
            make_large(output / LARGE, progress)


def make(entry: Entry, folder: Path, progress: Progress) -> Artifact:
    """One entry; a folder that is there already is made anew. The ranges are for the engine, see `gpu_build.py`."""
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = _checkpoint(entry, folder.with_name(f"{folder.name}.checkpoint"))
    options = BuildOptions(
        model=checkpoint,
        output=folder,
        precision=entry.precision,  # type: ignore[arg-type]
        expert_weights=entry.expert_weights,  # type: ignore[arg-type]
        max_length=64,
        prefill_length="1:16:32",
        prefill_batch="1:1:4",
        decode_batch="1:4:16",
        tensorrt="none",
    )
    built = build(options, progress)
    beside = folder.with_name(f"{folder.name}.fp32")
    plain = BuildOptions(model=checkpoint, output=beside, precision="fp32", max_length=64, tensorrt="none")
    reference = build(plain, Progress(quiet=True))
    np.savez_compressed(folder / "expected.npz", **expected(entry, checkpoint, reference))
    shutil.rmtree(reference.folder)
    if entry.architecture:
        shutil.rmtree(checkpoint)
    manifest = built.manifest.model_copy(update={"files": record_files(folder)})
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return Artifact(folder, manifest)


def _checkpoint(entry: Entry, folder: Path) -> Path:
    import tiny_models

    if entry.architecture is None:
        return shipped_model()
    return tiny_models.save(tiny_models.random_model(entry.architecture, eos_token_id=None), folder)


def expected(entry: Entry, checkpoint: Path, reference: Artifact) -> dict[str, Any]:
    """What is right, and how wrong a plain implementation in the same precision is."""
    import torch

    from lynx_trt.runtime.ort import OrtBackend

    vocabulary = reference.manifest.model.vocabulary
    generator = np.random.default_rng(5)
    prompts = [generator.integers(3, vocabulary, size=length).tolist() for length in PROMPTS]
    settings = restrictions(reference.manifest.model.moe_layers)
    found: dict[str, Any] = {}
    for name, restriction in settings.items():
        backend = OrtBackend(reference, len(PROMPTS), threads=1)
        tokens, active = greedy_tokens(backend, prompts, restriction)
        found[f"tokens_{name}"], found[f"active_{name}"] = tokens, active
    rows = [prompt + tokens.tolist() for prompt, tokens in zip(prompts, found["tokens_all"].T, strict=True)]
    exact = eager(checkpoint, torch.float64, rows)
    same = eager(checkpoint, getattr(torch, DTYPES[entry.precision]), rows) - exact
    found["prompts"] = np.concatenate([np.array(prompt) for prompt in prompts])
    found["logits"] = exact.astype(np.float32)
    found["same_precision_rms"] = np.sqrt((same**2).mean())
    found["same_precision_median"] = np.median(np.abs(same))
    # The backend that will be compared is checked here against the same numbers, by the same function.
    backend = OrtBackend(reference, len(PROMPTS), threads=1)
    logits = forced_logits(backend, prompts, found["tokens_all"], settings["all"])
    assert np.abs(logits - exact).max() < 1e-3 * np.abs(exact).max(), entry.name
    return found


def eager(checkpoint: Path, dtype: Any, rows: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
    """[steps + 1, B, V] float64: Hugging Face eager's logits after each prompt and each forced token."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32)
    model.set_experts_implementation("eager")
    model = model.to(dtype).eval()
    outputs = []
    with torch.no_grad():
        for row, prompt in zip(rows, PROMPTS, strict=True):
            logits = model(input_ids=torch.tensor([list(row)])).logits[0]
            outputs.append(logits[prompt - 1 : prompt + STEPS].double().numpy())
    return np.stack(outputs, axis=1)


def large_config() -> Any:
    """Qwen3-30B-A3B, from its config.json."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    return config


def make_large(
    folder: Path, progress: Progress, config: Any = None, *, precision: str = "bf16", max_length: int = 2048
) -> None:
    """The graph of a model without its weights: `weights.header` is how their file begins, and `.json` its size."""
    from lynx_trt.export.weights import WEIGHTS_FILE

    config = config or large_config()
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = folder.with_name(f"{folder.name}.checkpoint")
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.mkdir(parents=True)
    config.save_pretrained(checkpoint)
    _hollow_weights(config, checkpoint)
    options = BuildOptions(
        model=checkpoint,
        output=folder,
        precision=precision,  # type: ignore[arg-type]
        max_length=max_length,
        tensorrt="none",
        weight_data=False,
    )
    build(options, progress)
    data = folder / WEIGHTS_FILE
    with data.open("rb") as stream:
        size = struct.unpack("<Q", stream.read(8))[0] + 8
        stream.seek(0)
        (folder / "weights.header").write_bytes(stream.read(size))
    (folder / "weights.json").write_text(json.dumps({"file": WEIGHTS_FILE, "bytes": data.stat().st_size}))
    data.unlink()
    shutil.rmtree(checkpoint)


def _hollow_weights(config: Any, folder: Path, largest: int = 4 << 30) -> None:
    """Safetensors files with every parameter of a model, in shards as the hub has them, and nothing in them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    shards: list[dict[str, list[int]]] = [{}]
    size = 0
    for name, tensor in state.items():
        if size + 2 * tensor.numel() > largest and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = list(tensor.shape)
        size += 2 * tensor.numel()
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        _hollow_file(folder / file, shard)
    where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _hollow_file(path: Path, shapes: dict[str, list[int]]) -> None:
    fields, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        fields[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(fields).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + end)


if __name__ == "__main__":
    run(app)
