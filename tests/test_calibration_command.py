"""The command: what it leaves behind, how it goes on after an interruption, and what it says to wrong input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from typer.testing import CliRunner

from lynx_trt import artifact as artifacts
from lynx_trt.calibrate import app
from lynx_trt.calibration import report
from lynx_trt.calibration import text as texts
from lynx_trt.calibration.measure import Meter
from lynx_trt.calibration.options import CalibrateOptions
from lynx_trt.calibration.run import calibrate
from lynx_trt.console import Progress
from lynx_trt.errors import CalibrationError, CheckpointError, LynxError, UsageError

WORDS = ("expert", "token", "batch", "the", "of", "a", "budget", "keeps", "votes", "layer", "and", "others", "wait")


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte, 256 of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def words(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, size=count))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    tiny_models.save(tiny_models.random_model("qwen3_moe"), folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory, build_quietly: Callable[..., Any]) -> Path:
    """Its artifact; tests that change it take a copy."""
    return build_quietly(source, tmp_path_factory.mktemp("built") / "tiny").folder


@pytest.fixture
def options(source: Path, built: Path, tmp_path: Path) -> CalibrateOptions:
    """Options of a small run that succeeds, on a copy of the artifact."""
    shutil.copytree(built, tmp_path / "artifact")
    (tmp_path / "text.txt").write_text(words(900), encoding="utf-8")
    return CalibrateOptions(
        artifact=tmp_path / "artifact",
        checkpoint=source,
        text=(tmp_path / "text.txt",),
        output=tmp_path / "report",
        batch="4",
        sequences=16,
        length=48,
        prompt_length=16,
        max_kl=0.2,
        compare=False,
        threads=2,
    )


def run_quietly(options: CalibrateOptions) -> dict[str, Any]:
    with Progress(quiet=True) as progress:
        return calibrate(options, progress)


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what differs from run to run."""
    return {name: value for name, value in result.items() if name not in ("created", "seconds", "peak_bytes")}


@pytest.mark.parametrize("dial", ["floors", "budgets"])
def test_what_is_found_reaches_the_artifact(dial: Any, options: CalibrateOptions) -> None:
    before = artifacts.read(options.artifact).manifest
    result = run_quietly(replace(options, dial=None if dial == "floors" else dial))  # floors by default
    after = artifacts.open_artifact(options.artifact).manifest  # its sums still hold
    assert result["kept"]
    assert result["dial"] == dial
    assert any(result["floors"]) == (dial == "floors")
    assert after.selection.budgets == result["budgets"]
    assert after.selection.floors == result["floors"]
    assert after.selection.restriction != before.selection.restriction
    assert after.selection.parameters == before.selection.parameters
    record = after.calibration
    assert record is not None
    assert record.promise == {"max_kl": 0.2}
    assert record.batch == 4
    assert record.budgets_by_batch == {4: result["budgets"]}
    assert record.floors_by_batch == {4: result["floors"]}
    assert record.held_out["kl"][0] <= 0.2
    assert record.text["sha256"] == texts.read_text(options.text).sha256
    assert sorted(p.name for p in options.artifact.iterdir()) == sorted([*before.files, "lynx.json"])


def test_report_holds_everything_and_needs_nothing(options: CalibrateOptions) -> None:
    result = run_quietly(replace(options, compare=True, batch="2,4"))
    folder = options.output
    assert folder is not None
    stored = json.loads((folder / "calibration.json").read_text())
    shared = stored["batches"][-1]["shared"]
    assert stored["budgets"] == result["budgets"] == shared["budgets"]
    assert stored["floors"] == result["floors"] == shared["floors"]
    assert [study["batch"] for study in stored["batches"]] == [2, 4]
    for study in stored["batches"]:
        presets = {"lynx", "lynx-latency", "lynx-accuracy", "lynx-affinity", "oea", "xshare"}
        assert set(study["uniform"]) == {*presets, "lynx, one floor"}
        assert len(study["sensitivity"]["kl"]) == 2
        assert study["comparison"]
        assert len({row["preset"] for row in study["comparison"]} & {"lynx", "lynx, one floor"}) == 2
        chosen = study["held_out"]
        # The caps: what some step of the text that they were chosen on used.
        assert chosen["budgets"] == study["search"]["best"]["active_max_by_layer"]
    assert stored["versions"]["torch"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 6
    assert str(result["floors"]) in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page
    names = {path.name for path in folder.iterdir()}
    plots = {f"{plot}-{batch}.png" for plot in ("quality", "sensitivity", "uses") for batch in (2, 4)}
    assert names == {"calibration.json", "report.html", *plots}


def test_layers_are_compared_where_they_save_the_same() -> None:
    """At 70% of their own experts: what the second loses by then, whatever it loses at equal floors."""
    found = {
        "natural": [10.0, 20.0, 10.0],
        "active": [[2.0, 8.0], [13.0, 15.0], [7.0, 9.0]],
        "kl": [[0.9, 0.0009], [0.04, 0.01], [0.001, 0.0001]],
    }
    assert report.alone(found, 0) == pytest.approx(0.9 * 1000 ** (-5 / 6))
    assert report.alone(found, 1) == pytest.approx(0.02)  # halfway, the geometric mean
    assert report.alone(found, 2) == pytest.approx(0.001)
    assert "layer 1 is the most sensitive (a middle layer, KL 0.02) and layer 2 the least" in report.most_sensitive(
        found
    )


def test_same_seed_same_numbers(options: CalibrateOptions, tmp_path: Path) -> None:
    first = run_quietly(replace(options, output=tmp_path / "1", write=False))
    second = run_quietly(replace(options, output=tmp_path / "2", write=False, threads=1))
    other = run_quietly(replace(options, output=tmp_path / "3", write=False, seed=1))
    assert numbers(first) == numbers(second)
    assert other["batches"][0]["held_out"] != first["batches"][0]["held_out"]


def test_resume_goes_on_where_it_stopped(
    options: CalibrateOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Interrupted in the search; what was measured is not measured again, and the outcome is the same."""
    whole = run_quietly(replace(options, output=tmp_path / "whole", write=False))
    measure, seen = Meter.measure, {"settings": 0, "stop": 12}

    def counting(self: Meter, settings: Any, batch: int, **rest: Any) -> Any:
        seen["settings"] += len(settings)
        if seen["settings"] > seen["stop"]:
            raise KeyboardInterrupt
        return measure(self, settings, batch, **rest)

    monkeypatch.setattr(Meter, "measure", counting)
    with pytest.raises(KeyboardInterrupt):
        run_quietly(options)
    with pytest.raises(UsageError, match="interrupted run; pass --resume"):
        run_quietly(options)
    journal = options.output / "calibration.partial.jsonl"  # type: ignore[operator]
    done = len(journal.read_text().splitlines()) - 1
    assert 0 < done <= 12
    with journal.open("a") as stream:
        stream.write('{"key": "half a li')  # as an interruption leaves it
    with pytest.raises(UsageError, match=r"of another run \(seed differ\)"):
        run_quietly(replace(options, resume=True, seed=3))
    seen.update(settings=0, stop=10**6)
    resumed = run_quietly(replace(options, resume=True))
    assert numbers(resumed) == numbers(whole) | {"artifact_updated": True}
    assert not journal.exists()
    total = seen["settings"] + done
    seen["settings"] = 0
    run_quietly(replace(options, overwrite=True))
    assert seen["settings"] == total


def test_parameters_are_searched_and_can_be_built_with(
    options: CalibrateOptions, source: Path, build_quietly: Any, tmp_path: Path
) -> None:
    """Other parameters than the graph's never reach the artifact; a build from the file has them."""
    result = run_quietly(replace(options, search_parameters=True, output=tmp_path / "found"))
    tried = result["batches"][0]["parameters"]
    assert len(tried) == 6  # guarantees of 1 and 2; with floors nobody is left without one
    best = min((row for row in tried if row["kl"]), key=lambda row: row["kl"][0])
    assert result["selection"]["guarantee"] == best["guarantee"]
    assert result["selection"]["sensitivity"] == best["sensitivity"]
    same = result["selection"] == artifacts.read(options.artifact).manifest.selection.parameters
    assert result["artifact_updated"] == same
    again = build_quietly(source, tmp_path / "again", budget=str(tmp_path / "found" / "calibration.json"))
    assert again.manifest.selection.budgets == result["budgets"]
    assert again.manifest.selection.floors == result["floors"]
    assert again.manifest.selection.parameters == result["selection"]


def test_budgets_are_only_measured(options: CalibrateOptions, capsys: pytest.CaptureFixture[str]) -> None:
    before = artifacts.read(options.artifact).manifest
    result = run_quietly(replace(options, budget="4", max_kl=None))
    assert result["budgets"] == [4, 4]
    assert result["batches"][0]["held_out"]["active"][0] <= 4.5
    assert artifacts.read(options.artifact).manifest == before
    with pytest.raises(CalibrationError, match=r"the budgets \[1, 1\] don't keep the promise \(KL at most 0.0001\)"):
        run_quietly(replace(options, budget="1", max_kl=0.0001, overwrite=True))


def test_budgets_and_floors_of_a_file_are_measured(options: CalibrateOptions, tmp_path: Path) -> None:
    """A calibration's own file gives that calibration's numbers; one floor and no budget has no cap."""
    found = run_quietly(replace(options, write=False, sequences=16, output=tmp_path / "found"))
    given = run_quietly(replace(options, budget=str(tmp_path / "found" / "calibration.json"), max_kl=None))
    assert given["floors"] == found["floors"]
    assert given["budgets"] == found["budgets"]
    assert any(given["floors"])
    halves = [found["batches"][0][part] for part in ("held_out", "search")]
    sequences = [*halves[0]["kl_by_sequence"], *halves[1]["best"]["kl_by_sequence"]]
    whole = given["batches"][0]["held_out"]["kl_by_sequence"]
    np.testing.assert_allclose(sorted(whole), sorted(sequences), rtol=1e-3, atol=1e-6)
    one = run_quietly(replace(options, floor=0.05, max_kl=None, overwrite=True))
    assert one["budgets"] == [8, 8]
    assert one["floors"] == [0.05, 0.05]
    with pytest.raises(CalibrationError, match=r"budgets \[8, 8\] with the floors \[0.3, 0.3\] don't keep"):
        run_quietly(replace(options, floor=0.3, max_kl=0.0001, overwrite=True))


def test_several_batch_sizes_share_the_mildest(options: CalibrateOptions) -> None:
    """In each layer the lowest floor and the largest cap: measured at every size, and what the artifact gets."""
    result = run_quietly(replace(options, batch="1,4,8", max_kl=0.1))
    studies = result["batches"]
    found = [study["held_out"] for study in studies]
    assert len({tuple(item["floors"]) for item in found}) > 1  # or there is nothing to share
    assert result["floors"] == [min(layer) for layer in zip(*(item["floors"] for item in found), strict=True)]
    assert result["budgets"] == [max(layer) for layer in zip(*(item["budgets"] for item in found), strict=True)]
    for study in studies:
        assert study["shared"]["floors"] == result["floors"]
        assert study["shared"]["kl"][0] <= 0.1
    record = artifacts.read(options.artifact).manifest.calibration
    assert record is not None
    assert record.floors_by_batch == {study["batch"]: study["held_out"]["floors"] for study in studies}
    assert record.held_out["kl"] == list(studies[-1]["shared"]["kl"])


def test_a_preset_that_guarantees_nothing_has_budgets(
    source: Path, options: CalibrateOptions, build_quietly: Any
) -> None:
    """A floor could leave its tokens without any expert."""
    shutil.rmtree(options.artifact)
    build_quietly(source, options.artifact, preset="lynx-latency")
    with pytest.raises(UsageError, match="--dial floors can leave a token without any expert"):
        run_quietly(replace(options, dial="floors"))
    result = run_quietly(replace(options, max_kl=1.0))
    assert result["dial"] == "budgets"
    assert not any(result["floors"])


def test_a_target_that_nothing_meets(options: CalibrateOptions) -> None:
    """Exit 1, the artifact untouched, and what was measured is there."""
    before = artifacts.read(options.artifact).manifest
    with pytest.raises(CalibrationError, match="nothing that saves 1% of the experts keeps the promise") as caught:
        run_quietly(replace(options, max_kl=1e-7))
    assert caught.value.exit_code == 1
    assert artifacts.read(options.artifact).manifest == before
    stored = json.loads((options.output / "calibration.json").read_text())  # type: ignore[operator]
    assert not stored["kept"]
    assert stored["budgets"] is None
    assert "NOT kept" in (options.output / "report.html").read_text()  # type: ignore[operator]


def test_a_promise_that_held_out_text_breaks(options: CalibrateOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for chance the held-out half decides; a break is said, and nothing is written."""
    from lynx_trt.calibration import promise

    monkeypatch.setattr(promise.Promise, "strain", lambda self, item, *_: item.kl.mean / (20 * self.max_kl))
    before = artifacts.read(options.artifact).manifest
    with pytest.raises(CalibrationError, match=r"but on held-out text the KL is .* above 0\.01"):
        run_quietly(replace(options, max_kl=0.01))
    assert artifacts.read(options.artifact).manifest == before


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


WRONG: dict[str, tuple[Callable[[CalibrateOptions], CalibrateOptions], str]] = {
    "text too short": (
        _with_text(b"a few words"),
        r"the text is too short: it has 12 tokens, which make 0 sequences of 48, and 16 are needed",
    ),
    "empty file": (_with_text(b""), r"text.txt is empty; give text of the kind"),
    "blank file": (_with_text(b" \n\n"), r"text.txt is empty"),
    "not UTF-8": (_with_text(b"caf\xe9 " * 500), r"text.txt is not UTF-8: byte 3 is 0xe9; convert it first"),
    "no such text": (_wrong(text=(Path("/nowhere/x.txt"),)), r"no such text file: /nowhere/x.txt"),
    "no text": (_wrong(text=()), r"no text: give UTF-8 files"),
    "no checkpoint": (_wrong(checkpoint=None), r"was built from 'tiny': give the folder of that checkpoint"),
    "batch larger than the text": (_wrong(batch="4,64"), r"--batch 64 needs 128 sequences, .* --sequences is 16"),
    "batch that is no list": (_wrong(batch="4;8"), r"--batch is '4;8'; write sizes with commas"),
    "batch of nothing": (_wrong(batch="0"), r"--batch has 0; a batch has 1 sequence or more"),
    "too few sequences": (_wrong(sequences=6, batch="1"), r"--sequences is 6; it must be 8 or more"),
    "too long": (_wrong(length=4096), r"--length is 4096, but the artifact takes 64 tokens at most"),
    "nothing to decode": (_wrong(prompt_length=48), r"--length 48 leaves nothing to decode after --prompt-length 48"),
    "no prompt": (_wrong(prompt_length=0), r"--prompt-length is 0"),
    "a limit out of range": (_wrong(max_kl=-1.0), r"--max-kl is -1; it must be above 0"),
    "no such artifact": (_wrong(artifact=Path("/nowhere/a")), r"no such artifact: /nowhere/a"),
    "budgets for another model": (_with_budget_file("[4, 4, 4]"), r"3 budgets for 2 MoE layers"),
    "budgets above the model's": (_with_budget_file('{"budgets": [64, 64]}'), r"but the model has 8 experts a layer"),
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


def test_an_artifact_without_a_tokenizer(options: CalibrateOptions) -> None:
    manifest = artifacts.read(options.artifact).manifest
    (options.artifact / "tokenizer.json").unlink()
    files = {name: record for name, record in manifest.files.items() if name != "tokenizer.json"}
    artifacts.replace_manifest(artifacts.read(options.artifact), manifest.model_copy(update={"files": files}))
    with pytest.raises(LynxError, match="has no tokenizer; build it with --tokenizer"):
        run_quietly(options)


def test_a_finished_report_is_not_replaced(options: CalibrateOptions) -> None:
    run_quietly(replace(options, budget="4", max_kl=None))
    with pytest.raises(UsageError, match="holds a calibration; choose another --output, or pass --overwrite"):
        run_quietly(options)
    with pytest.raises(UsageError, match="holds a calibration"):
        run_quietly(replace(options, resume=True))


def test_bytes_of_tokens_add_up_to_the_text() -> None:
    """Also where a character is several tokens."""
    text = texts.Text(("naïve 日本語 😀 text", "second"), "x")
    cut = texts.cut(text, byte_tokenizer(), separator=0, count=1, length=text.nbytes + 2, seed=0)
    assert cut.nbytes.sum() == text.nbytes == sum(len(part.encode()) for part in text.texts)
    assert (cut.ids[0] == 0).sum() >= 2  # before each text


def test_no_sequence_is_drawn_twice() -> None:
    text = texts.Text((words(400),), "x")
    cut = texts.cut(text, byte_tokenizer(), separator=None, count=20, length=64, seed=4)
    assert len({row.tobytes() for row in cut.ids}) == 20
    again = texts.cut(text, byte_tokenizer(), separator=None, count=20, length=64, seed=4)
    np.testing.assert_array_equal(cut.ids, again.ids)
    np.testing.assert_array_equal(cut.nbytes, np.ones_like(cut.ids))


def test_command_line(options: CalibrateOptions) -> None:
    """Options arrive, --json is JSON, and the exit codes are 0, 1 and 2."""
    arguments = [str(options.artifact), "--checkpoint", str(options.checkpoint), "--text", str(options.text[0])]
    arguments += ["--batch", "4", "--sequences", "16", "--length", "48", "--prompt-length", "16", "--no-compare"]
    arguments += ["-o", str(options.output), "--overwrite"]
    outcome = CliRunner().invoke(app, [*arguments, "--max-kl", "0.2", "--json"], catch_exceptions=False)
    assert outcome.exit_code == 0
    printed = json.loads(outcome.stdout)
    assert printed["kept"]
    assert printed["artifact_updated"]
    assert printed["batches"][0]["kl"]["chosen"][0] <= 0.2
    outcome = CliRunner().invoke(app, [*arguments, "--max-kl", "0.2"], catch_exceptions=False)
    assert "Promise: KL at most 0.2; kept on held-out text" in outcome.stdout
    assert "experts active in a layer" in outcome.stdout
    assert f"Floors: {printed['floors']} (batch of 4 and below)" in outcome.stdout
    assert f"Budgets: {printed['budgets']} (caps: the most experts" in outcome.stdout
    assert "floors by layer" not in outcome.stdout  # nothing is compared
    for changes, code in ((["--max-kl", "1e-7"], 1), (["--max-kl", "0"], 2)):
        command = [sys.executable, "-m", "lynx_trt.calibrate", *arguments, *changes]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == code
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in done.stderr


def test_help_imports_nothing_heavy() -> None:
    """The modules that take seconds are not loaded for --help."""
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom lynx_trt.calibrate import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'onnx', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
