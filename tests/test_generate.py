"""Decoding with ONNX Runtime: a batch is its rows, the dial works, and what a user can get wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lynx_trt.artifact import Artifact, open_artifact
from lynx_trt.errors import ArtifactError, GenerationError, UsageError
from lynx_trt.generate import expert_bytes_a_token, generate_text
from lynx_trt.runtime.ort import OrtBackend
from lynx_trt.runtime.sampling import Sampling
from lynx_trt.runtime.text import Tokenizer

PROMPTS = ["def add(a, b):\n", "import", "class Point:\n    def __init__(self, x, y):\n"]


def tokens(artifact: Artifact, prompts: list[str], **settings: Any) -> list[list[int]]:
    sequences, _ = generate_text(artifact, prompts, **{"max_new_tokens": 12, **settings})
    return [sequence.tokens for sequence in sequences]


def test_batch_equals_its_rows(text_artifact: Artifact) -> None:
    """With all experts a row must not feel its neighbours: prompts of unequal length, together and alone."""
    together = tokens(text_artifact, PROMPTS, budget="8")
    assert together == [tokens(text_artifact, [prompt], budget="8")[0] for prompt in PROMPTS]


def test_long_prompts_in_chunks(text_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt longer than a chunk, beside one that ends in its first: the same text as in one piece."""
    from lynx_trt.runtime import decode

    whole = tokens(text_artifact, PROMPTS, budget="8")
    monkeypatch.setattr(decode, "PREFILL_CHUNK", 5)
    assert tokens(text_artifact, PROMPTS, budget="8") == whole


def test_dial_needs_no_rebuild(text_artifact: Artifact) -> None:
    """Fewer experts are loaded at a smaller budget, of the same artifact; the expert bytes follow."""
    active, bytes_ = [], []
    for budget in ("8", "4", "1"):
        _, statistics = generate_text(text_artifact, PROMPTS * 2, budget=budget, max_new_tokens=12)
        active.append(statistics.mean_active)
        bytes_.append(expert_bytes_a_token(text_artifact.manifest, statistics))
    assert active[0] > active[1] > active[2] >= 1
    assert bytes_[0] > bytes_[1] > bytes_[2]


def test_artifact_own_budget_is_the_default(text_artifact: Artifact) -> None:
    assert tokens(text_artifact, PROMPTS) == tokens(text_artifact, PROMPTS, budget="2")


def test_expert_bytes_are_those_of_the_active_experts(text_artifact: Artifact) -> None:
    """One sequence with all experts: K experts of 3*H*I float32 numbers in each layer, every step."""
    _, statistics = generate_text(text_artifact, PROMPTS[:1], budget="8", max_new_tokens=5)
    assert statistics.mean_active == 2
    assert expert_bytes_a_token(text_artifact.manifest, statistics) == 2 * 2 * (3 * 64 * 32) * 4


def test_preset_off_and_full_budget_are_the_same(
    byte_model: Path, text_artifact: Artifact, tmp_path: Path, build_quietly: Callable[..., Artifact]
) -> None:
    off = build_quietly(byte_model, tmp_path / "off", preset="off")
    assert tokens(off, PROMPTS) == tokens(text_artifact, PROMPTS, budget="8")
    for dial in ({"budget": "1"}, {"floor": 0.1}):
        with pytest.raises(UsageError, match="means nothing for an artifact built with --preset off"):
            generate_text(off, PROMPTS, **dial)  # type: ignore[arg-type]


def test_sampling_depends_on_seed_alone(text_artifact: Artifact) -> None:
    warm = Sampling(temperature=1.0, top_p=0.9, seed=3)
    first = tokens(text_artifact, PROMPTS, budget="8", sampling=warm)
    assert first == tokens(text_artifact, PROMPTS, budget="8", sampling=warm)
    assert first != tokens(text_artifact, PROMPTS, budget="8", sampling=Sampling(1.0, 0.9, seed=4))
    # A row keeps its draws when rows after it go away.
    assert first[0] == tokens(text_artifact, PROMPTS[:1], budget="8", sampling=warm)[0]


def test_a_tokenizer_that_truncates(text_artifact: Artifact, tmp_path: Path) -> None:
    """A tokenizer.json may cut texts, or fill them up, for what it was trained for; a prompt stays whole."""
    import shutil

    folder = Path(shutil.copytree(text_artifact.folder, tmp_path / "artifact"))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] = {**padding, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    path.write_text(json.dumps(content))
    sequences, _ = generate_text(Artifact(folder, text_artifact.manifest), PROMPTS[:1], max_new_tokens=3)
    assert len(sequences[0].prompt) == len(PROMPTS[0])


def test_graph_holds_no_path_of_the_building_machine(text_artifact: Artifact) -> None:
    """The exporter of torch notes where in the sources each node comes from."""
    import transformers

    graph = text_artifact.path("model.onnx").read_bytes()
    for place in (Path(transformers.__file__).parent, Path(__file__).parents[1]):
        assert str(place).encode() not in graph
    assert b"stack_trace" not in graph


def test_stop_string_is_not_shown(text_artifact: Artifact) -> None:
    """The text ends before the stop string, also where that spans tokens, and no part of it was streamed."""
    (full,), _ = generate_text(text_artifact, PROMPTS[:1], max_new_tokens=20)
    stop = full.text[7:10]
    pieces: list[str] = []
    (cut,), _ = generate_text(
        text_artifact, PROMPTS[:1], max_new_tokens=20, stop=[stop], on_text=lambda _, piece: pieces.append(piece)
    )
    assert cut.finish == "stop"
    assert cut.text == full.text[: full.text.index(stop)]
    assert "".join(pieces) == cut.text


def test_pieces_make_the_text(text_artifact: Artifact) -> None:
    pieces: dict[int, str] = {0: "", 1: "", 2: ""}

    def on_text(row: int, piece: str) -> None:
        pieces[row] += piece

    sequences, _ = generate_text(text_artifact, PROMPTS, max_new_tokens=16, stop=["\x00\x01never"], on_text=on_text)
    assert [pieces[row] for row in range(3)] == [sequence.text for sequence in sequences]


def test_sequence_ends_at_the_cache(text_artifact: Artifact) -> None:
    """64 positions: the row that starts later gets more tokens, none writes past the end."""
    sequences, _ = generate_text(text_artifact, PROMPTS, max_new_tokens=1000)
    assert [len(s.prompt) + len(s.tokens) for s in sequences] == [64, 64, 64]
    assert {s.finish for s in sequences} == {"length"}


def test_end_token_ends(byte_model: Path, text_artifact: Artifact, tmp_path: Path) -> None:
    """The end token is no part of the text, and the others go on."""
    free = tokens(text_artifact, PROMPTS)
    manifest = text_artifact.manifest
    model = manifest.model.model_copy(update={"end_tokens": [free[0][4]]})
    ending = Artifact(text_artifact.folder, manifest.model_copy(update={"model": model}))
    sequences, _ = generate_text(ending, PROMPTS, max_new_tokens=12)
    assert sequences[0].finish == "end"
    assert sequences[0].tokens == free[0][: free[0].index(free[0][4])]
    assert sequences[1].tokens or sequences[2].tokens


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "words"),
    [
        ([], {}, UsageError, "--prompt"),
        ([""], {}, GenerationError, "empty"),
        (["fine", "x" * 64], {}, GenerationError, "prompt 2 has 64 tokens"),
        (["x"], {"max_new_tokens": 0}, UsageError, "0"),
        (["x\udcff"], {}, GenerationError, "no valid UTF-8"),
        (["x"], {"budget": "-1"}, UsageError, "-1"),
        (["x"], {"budget": str(10**9)}, UsageError, str(10**9)),
    ],
)
def test_what_does_not_fit(
    prompts: list[str], settings: dict[str, Any], error: type[Exception], words: str, text_artifact: Artifact
) -> None:
    with pytest.raises(error, match=words):
        generate_text(text_artifact, prompts, **settings)


def test_an_empty_prompt_is_none_with_any_tokenizer(text_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every text begins with a token."""
    monkeypatch.setattr(Tokenizer, "encode", lambda _, text, **__: [1, *text.encode()])
    with pytest.raises(GenerationError, match="prompt 2 is empty: there is nothing to continue"):
        generate_text(text_artifact, ["x", ""])


def with_nan(artifact: Artifact, folder: Path, ending: str) -> Artifact:
    """A copy in which no number of such weights is one; `build` would refuse a checkpoint like that."""
    import shutil
    import struct

    shutil.copytree(artifact.folder, folder)
    with (folder / "weights.safetensors").open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        for name, entry in json.loads(stream.read(length)).items():
            if name.endswith(ending):
                start, end = entry["data_offsets"]
                stream.seek(8 + length + start)
                stream.write(struct.pack("<f", float("nan")) * ((end - start) // 4))
    return Artifact(folder, artifact.manifest)


def test_nan_in_the_router(text_artifact: Artifact, tmp_path: Path) -> None:
    """Broken routers in both layers: NaN scores load no expert, and what is computed stays finite."""
    broken = with_nan(text_artifact, tmp_path / "nan", "mlp.gate.weight")
    _, statistics = generate_text(broken, PROMPTS, max_new_tokens=4)
    assert statistics.mean_active == 0


def test_nan_weights_are_said(text_artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="NaN"):
        generate_text(with_nan(text_artifact, tmp_path / "nan", "lm_head.weight"), PROMPTS)


def test_one_changed_byte_is_noticed(text_artifact: Artifact, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(text_artifact.folder, tmp_path / "copy"))
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors was changed"):
        open_artifact(folder)


def test_no_tokenizer(artifact: Callable[..., Artifact]) -> None:
    with pytest.raises(ArtifactError, match="--tokenizer"):
        generate_text(artifact("qwen3_moe", preset="lynx"), ["x"])


def test_bfloat16_is_computed_in_float32_on_the_cpu(
    byte_model: Path, tmp_path: Path, build_quietly: Callable[..., Artifact]
) -> None:
    """ONNX Runtime has no bf16 there: the lowered graph needs none, the graph as it is says so."""
    built = build_quietly(byte_model, tmp_path / "out", precision="bf16")
    assert len(generate_text(built, ["x"], max_new_tokens=8)[0][0].tokens) == 8
    with pytest.raises(ArtifactError, match="--precision fp16 or fp32"):
        OrtBackend(built, 1)


# --- As a user runs it.


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lynx_trt.generate", *arguments], capture_output=True, text=True, check=False
    )


def test_command_prints_text_and_statistics(text_artifact: Artifact) -> None:
    result = command(str(text_artifact.folder), "-p", "def f(", "--max-new-tokens", "6")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def f(")
    assert "experts active a layer" in result.stderr


def test_command_json(text_artifact: Artifact) -> None:
    result = command(str(text_artifact.folder), "-p", "a", "-p", "b", "--max-new-tokens", "6", "--json")
    report = json.loads(result.stdout)
    assert [len(sequence["tokens"]) for sequence in report["sequences"]] == [6, 6]
    assert report["statistics"]["decode_tokens"] == 10


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere", "-p", "x"], 1, "no such artifact"),
        (["ARTIFACT"], 2, "--prompt"),
        (["ARTIFACT", "-p", "x", "--temperature", "-1"], 2, "temperature"),
        (["ARTIFACT", "-p", "x", "--stop", ""], 2, "--stop"),
        (["ARTIFACT", "-p", "x" * 70], 1, "70 tokens"),
        (["ARTIFACT", "-p", "x", "--threads", "100000"], 2, "--threads is 100000, and this process may use"),
    ],
)
def test_command_mistakes(arguments: list[str], code: int, words: str, text_artifact: Artifact) -> None:
    result = command(*[str(text_artifact.folder) if a == "ARTIFACT" else a for a in arguments])
    assert result.returncode == code
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
