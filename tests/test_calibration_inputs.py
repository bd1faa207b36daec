"""What the calibrate command says to wrong input, and how text becomes sequences."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from calibration_runs import report_of, run_quietly, small_run, words
from tokenizers import Tokenizer

from lynx_trt import artifact as artifacts
from lynx_trt.artifact import Artifact
from lynx_trt.calibration import text as texts
from lynx_trt.calibration.model import Probed
from lynx_trt.calibration.options import CalibrateOptions, output_folder
from lynx_trt.errors import ArtifactError, CheckpointError, LynxError, UsageError


@pytest.fixture
def options(byte_model: Path, text_artifact: Artifact, tmp_path: Path) -> CalibrateOptions:
    return small_run(byte_model, text_artifact.folder, tmp_path)


def _wrong(**changes: Any) -> Callable[[CalibrateOptions], CalibrateOptions]:
    return lambda options: replace(options, **changes)


def _with_text(content: bytes) -> Callable[[CalibrateOptions], CalibrateOptions]:
    def change(options: CalibrateOptions) -> CalibrateOptions:
        options.text[0].write_bytes(content)
        return options

    return change


def _with_budget_file(content: str) -> Callable[[CalibrateOptions], CalibrateOptions]:
    def change(options: CalibrateOptions) -> CalibrateOptions:
        path = options.text[0].with_name("budgets.json")
        path.write_text(content)
        return replace(options, budget=str(path))

    return change


def _twice(options: CalibrateOptions) -> CalibrateOptions:
    again = options.text[0].with_name("again.txt")
    shutil.copy(options.text[0], again)
    return replace(options, text=(options.text[0], again))


WRONG: dict[str, tuple[Callable[[CalibrateOptions], CalibrateOptions], str]] = {
    "text too short": (
        _with_text(b"a few words"),
        r"the text is too short: it has 12 tokens, which make 0 sequences of 48, and 16 are needed",
    ),
    "empty file": (_with_text(b""), r"text.txt is empty; give text of the kind"),
    "blank file": (_with_text(b" \n\n"), r"text.txt is empty"),
    "not UTF-8": (_with_text(b"caf\xe9 " * 500), r"text.txt is not UTF-8: byte 3 is 0xe9; convert it first"),
    "a folder as text": (_wrong(text=(Path("/"),)), r"/ is a folder; give each of its text files with --text"),
    "the same text twice": (_twice, r"again.txt is the same text as .*text.txt, .* give each text once with --text"),
    "no such text": (_wrong(text=(Path("/nowhere/x.txt"),)), r"no such text file: /nowhere/x.txt"),
    "no text": (_wrong(text=()), r"no text: give UTF-8 files"),
    "no checkpoint": (_wrong(checkpoint=None), r"was built from 'bytes': give the folder of that checkpoint"),
    "batch larger than the text": (_wrong(batch="4,64"), r"--batch 64 needs 128 sequences, .* --sequences is 16"),
    "batch that is no list": (_wrong(batch="4;8"), r"--batch is '4;8'; write sizes with commas"),
    "batch of nothing": (_wrong(batch="0"), r"--batch has 0; a batch has 1 sequence or more"),
    "too few sequences": (_wrong(sequences=6, batch="1"), r"--sequences is 6; it must be 8 or more"),
    "too long": (_wrong(length=4096), r"--length is 4096, but the artifact takes 64 tokens at most"),
    "nothing to decode": (
        _wrong(prompt_length=48),
        r"sequences of 48 tokens leave nothing to decode after --prompt-length 48; give --prompt-length 46 or less, or "
        r"--length 50 or more$",
    ),
    "nothing to decode at all": (
        _wrong(prompt_length=63, length=None),
        r"sequences of 64 tokens leave nothing to decode after --prompt-length 63; give --prompt-length 62 or less$",
    ),
    "a single token": (
        _wrong(prompt_length=8, length=1),
        r"sequences of 1 tokens leave nothing to decode after --prompt-length 8; give --length 10 or more$",
    ),
    "no prompt": (_wrong(prompt_length=0), r"--prompt-length is 0"),
    "a limit out of range": (_wrong(max_kl=-1.0), r"--max-kl is -1; it must be above 0"),
    "no such artifact": (_wrong(artifact=Path("/nowhere/a")), r"no such artifact: /nowhere/a"),
    "budgets for another model": (_with_budget_file("[4, 4, 4]"), r"3 budgets for 2 MoE layers"),
    "budgets above the model's": (_with_budget_file('{"budgets": [64, 64]}'), r"but the model has 8 experts a layer"),
    "a list instead of its file": (
        _wrong(budget=json.dumps([4] * 200)),  # longer than a file's name may be
        r"is neither a number nor a file that exists",
    ),
    "both": (_wrong(resume=True, overwrite=True), r"--resume goes on .* and --overwrite replaces"),
    "floors for another model": (
        _with_budget_file('{"budgets": [4, 4], "floors": [0.1]}'),
        r"1 floors for 2 MoE layers",
    ),
    "a floor below 0": (_wrong(floor=-0.5), r"the floor is -0.5: .* is no number of votes"),
    "no GPU": (_wrong(device="cuda"), r"--device cuda, but torch sees no GPU here"),
    "a folder of something else": (_wrong(output=Path(__file__).parent), r"exists and is no calibration"),
    "a file in the way": (_wrong(output=Path(__file__)), r"exists and is not a folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_said(name: str, options: CalibrateOptions) -> None:
    change, says = WRONG[name]
    before = artifacts.read(options.artifact).manifest
    with pytest.raises(LynxError, match=says):
        run_quietly(change(options))
    assert artifacts.read(options.artifact).manifest == before
    assert options.output is not None
    assert not options.output.exists()  # a mistake leaves nothing behind


def test_another_checkpoint_is_refused(options: CalibrateOptions, tmp_path: Path) -> None:
    """Another architecture, other dimensions, and the same dimensions with other weights."""
    for name, model, says in (
        ("mixtral", tiny_models.random_model("mixtral"), "its architecture is MixtralForCausalLM"),
        ("wide", tiny_models.random_model("qwen3_moe", num_hidden_layers=3), "its number of layers is 3"),
        ("other", tiny_models.random_model("qwen3_moe", seed=9), "both have the same dimensions, but model.layers"),
    ):
        tiny_models.save(model, tmp_path / name)
        with pytest.raises(CheckpointError, match=says):
            run_quietly(replace(options, checkpoint=tmp_path / name))


def _with_tokenizer(artifact: Path, change: Callable[[dict[str, Any]], None] | None) -> None:
    """Change the artifact's tokenizer, or remove it, as if it had been built so."""
    path = artifact / "tokenizer.json"
    opened = artifacts.read(artifact)
    if change is None:
        path.unlink()
    else:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    files = artifacts.record_files(artifact)
    artifacts.replace_manifest(opened, opened.manifest.model_copy(update={"files": files}))


def test_an_artifact_without_a_tokenizer(options: CalibrateOptions) -> None:
    _with_tokenizer(options.artifact, None)
    with pytest.raises(LynxError, match="has no tokenizer; build it with --tokenizer"):
        run_quietly(options)


def test_a_tokenizer_that_truncates(options: CalibrateOptions) -> None:
    """Such a setting is for other uses: all of the text counts, in tokens and not in padding."""
    want = run_quietly(replace(options, budget="4", max_kl=None))
    truncation = {"direction": "Right", "max_length": 20, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9000}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    _with_tokenizer(options.artifact, lambda content: content.update(truncation=truncation, padding=padding))
    assert run_quietly(replace(options, budget="4", max_kl=None, overwrite=True))["batches"] == want["batches"]


def test_a_tokenizer_of_another_model(options: CalibrateOptions) -> None:
    """A token that the model has no row for is said, and is no failure deep inside of it."""
    extra = {"id": 256, "content": "expert", "special": False, "normalized": False}
    extra |= {"single_word": False, "lstrip": False, "rstrip": False}
    _with_tokenizer(options.artifact, lambda content: content["added_tokens"].append(extra))
    with pytest.raises(ArtifactError, match="gives the token 256, but the model knows 256 tokens"):
        run_quietly(options)


def test_an_artifact_of_all_experts(options: CalibrateOptions) -> None:
    """Its graph would count votes, the worst policy there is, and nobody asked for it."""
    opened = artifacts.read(options.artifact)
    chosen = opened.manifest.selection.model_copy(update={"preset": "off"})
    artifacts.replace_manifest(opened, opened.manifest.model_copy(update={"selection": chosen}))
    with pytest.raises(UsageError, match="was built with --preset off"):
        run_quietly(options)


def test_an_artifact_that_cannot_be_written(options: CalibrateOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is seen before the search and not after it; without writing it is no mistake."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != options.artifact)
    with pytest.raises(UsageError, match="can't get what is found; pass --no-write"):
        run_quietly(options)
    assert not report_of(options).exists()
    assert run_quietly(replace(options, write=False))["kept"]


def test_a_model_that_gives_no_numbers(options: CalibrateOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overflow in half precision, or damaged weights: no search over NaN."""
    monkeypatch.setattr(Probed, "logits", lambda self, hidden: torch.full((len(hidden), 256), torch.nan))
    with pytest.raises(CheckpointError, match="gives 496 of 496 tokens no finite probability"):
        run_quietly(replace(options, budget="4"))


def test_parameters_of_a_file_are_not_the_artifact_s(
    options: CalibrateOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file's budgets are measured under the graph's own parameters, and it says so; its own file says nothing."""
    own = artifacts.read(options.artifact).manifest.selection.parameters
    path = tmp_path / "budgets.json"
    for parameters, noted in ((own, False), ({**own, "power": 1.0}, True)):
        path.write_text(json.dumps({"budgets": [4, 4], "selection": parameters}))
        run_quietly(replace(options, budget=str(path), max_kl=None, overwrite=True))
        assert ("was found with other parameters of the selection" in capsys.readouterr().err) == noted


def test_sequences_that_fill_no_batch_are_said(options: CalibrateOptions, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of 16 are two batches of 3 and two sequences; all 16 are four of 4 and nothing is left."""
    run_quietly(replace(options, batch="3", max_kl=1e-7))
    assert "at a batch of 3, 2 of the 8 sequences in each half are left out" in capsys.readouterr().err
    run_quietly(replace(options, budget="4", overwrite=True))
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("artifact", "folder"),
    [
        ("out/tiny", "out/tiny-calibration"),
        (".", "/tmp/here-calibration"),  # the artifact that one is in: beside it, not inside
        ("..", "/tmp-calibration"),
        ("a/../b", "a/../b-calibration"),
    ],
)
def test_the_folder_is_beside_the_artifact(artifact: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "resolve", lambda path: Path("/tmp") if path.name == ".." else Path("/tmp/here"))
    assert output_folder(CalibrateOptions(Path(artifact)), finished=True) == Path(folder)


def test_many_files_have_a_short_name(tmp_path: Path) -> None:
    """It goes into tables, the report and the artifact."""
    paths = [tmp_path / f"{n}.txt" for n in range(40)]
    for path in paths:
        path.write_text(path.name)
    assert texts.read_text(paths[:2]).name == "0.txt, 1.txt"
    assert texts.read_text(paths).name == "0.txt, 1.txt, 2.txt, and 37 others"


@pytest.fixture
def tokenizer(byte_model: Path) -> Tokenizer:
    """One token a byte."""
    return Tokenizer.from_file(str(byte_model / "tokenizer.json"))


def test_bytes_of_tokens_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    """Also where a character is several tokens."""
    text = texts.Text(("naïve 日本語 😀 text", "second"), "x")
    cut = texts.cut(text, tokenizer, separator=0, count=1, length=text.nbytes + 2, seed=0)
    assert cut.nbytes.sum() == text.nbytes == sum(len(part.encode()) for part in text.texts)
    assert (cut.ids[0] == 0).sum() >= 2  # before each text


def test_no_sequence_is_drawn_twice(tokenizer: Tokenizer) -> None:
    text = texts.Text((words(400),), "x")
    cut = texts.cut(text, tokenizer, separator=None, count=20, length=64, seed=4)
    assert len({row.tobytes() for row in cut.ids}) == 20
    again = texts.cut(text, tokenizer, separator=None, count=20, length=64, seed=4)
    np.testing.assert_array_equal(cut.ids, again.ids)
    np.testing.assert_array_equal(cut.nbytes, np.ones_like(cut.ids))
