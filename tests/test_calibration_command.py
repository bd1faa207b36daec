"""The calibrate command: what it finds, and what it leaves behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_runs import numbers, run_quietly, small_run
from typer.testing import CliRunner

from lynx_trt import artifact as artifacts
from lynx_trt.artifact import Artifact
from lynx_trt.calibrate import app
from lynx_trt.calibration import report
from lynx_trt.calibration import text as texts
from lynx_trt.calibration.options import CalibrateOptions
from lynx_trt.errors import UsageError


@pytest.fixture
def options(byte_model: Path, text_artifact: Artifact, tmp_path: Path) -> CalibrateOptions:
    return small_run(byte_model, text_artifact.folder, tmp_path)


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


def test_rounding_is_shown_as_nothing() -> None:
    """Of all experts, the KL to themselves in another shape of batch; and no zero has a sign."""
    assert report._with_interval([8e-9, 0.0, 2e-8]) == "0 [0, 0]"
    assert report._with_interval([-3e-9, -2e-7, 1e-9], ".2f") == "0.00 [0.00, 0.00]"
    assert report._with_interval([0.0172, 2e-6, 0.5]) == "0.0172 [2e-06, 0.5000]"


def test_same_seed_same_numbers(options: CalibrateOptions, tmp_path: Path) -> None:
    first = run_quietly(replace(options, output=tmp_path / "1", write=False))
    second = run_quietly(replace(options, output=tmp_path / "2", write=False, threads=1))
    other = run_quietly(replace(options, output=tmp_path / "3", write=False, seed=1))
    assert numbers(first) == numbers(second)
    assert other["batches"][0]["held_out"] != first["batches"][0]["held_out"]


def test_parameters_are_searched_and_can_be_built_with(
    options: CalibrateOptions, byte_model: Path, build_quietly: Any, tmp_path: Path
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
    again = build_quietly(byte_model, tmp_path / "again", budget=str(tmp_path / "found" / "calibration.json"))
    assert again.manifest.selection.budgets == result["budgets"]
    assert again.manifest.selection.floors == result["floors"]
    assert again.manifest.selection.parameters == result["selection"]


def test_budgets_are_only_measured(options: CalibrateOptions, capsys: pytest.CaptureFixture[str]) -> None:
    before = artifacts.read(options.artifact).manifest
    result = run_quietly(replace(options, budget="4", max_kl=None))
    assert result["budgets"] == [4, 4]
    assert result["batches"][0]["held_out"]["active"][0] <= 4.5
    assert artifacts.read(options.artifact).manifest == before
    broken = run_quietly(replace(options, budget="1", max_kl=0.0001, overwrite=True))
    assert broken["reason"] == "the budgets 1 in every MoE layer don't keep the promise (KL at most 0.0001)"
    assert not broken["kept"]


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
    broken = run_quietly(replace(options, floor=0.3, max_kl=0.0001, overwrite=True))
    assert broken["reason"].startswith("the floors 0.3 in every MoE layer don't keep")


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
    byte_model: Path, options: CalibrateOptions, build_quietly: Any
) -> None:
    """A floor could leave its tokens without any expert."""
    shutil.rmtree(options.artifact)
    build_quietly(byte_model, options.artifact, preset="lynx-latency")
    with pytest.raises(UsageError, match="--dial floors can leave a token without any expert"):
        run_quietly(replace(options, dial="floors"))
    with pytest.raises(UsageError, match="a budget of 0 keeps no expert"):
        run_quietly(replace(options, budget="0"))
    with pytest.raises(UsageError, match=r"a floor of 0\.1 can keep no expert"):
        run_quietly(replace(options, floor=0.1))
    result = run_quietly(replace(options, max_kl=1.0))
    assert result["dial"] == "budgets"
    assert not any(result["floors"])


def test_a_target_that_nothing_meets(options: CalibrateOptions) -> None:
    """It is said, the artifact is untouched, what was measured is there, and its file is no budget."""
    before = artifacts.read(options.artifact).manifest
    result = run_quietly(replace(options, max_kl=1e-7))
    assert result["reason"].startswith("nothing that saves 1% of the experts keeps the promise")
    nearest = re.search(r"comes to ([\d.e+]+) times the limit .* at ([\d.]+) of ([\d.]+) active", result["reason"])
    assert nearest is not None
    over, active, natural = (float(value) for value in nearest.groups())
    assert over > 1
    assert active <= 0.99 * natural
    assert artifacts.read(options.artifact).manifest == before
    stored = json.loads((options.output / "calibration.json").read_text())  # type: ignore[operator]
    assert not stored["kept"]
    assert stored["budgets"] is None
    page = (options.output / "report.html").read_text()  # type: ignore[operator]
    assert "is NOT kept: nothing that saves 1% of the experts" in page
    with pytest.raises(UsageError, match="is of a calibration that found none"):
        run_quietly(replace(options, budget=str(options.output / "calibration.json"), overwrite=True))  # type: ignore[operator]


def test_a_promise_that_held_out_text_breaks(options: CalibrateOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for chance the held-out half decides; a break is said, and nothing is written."""
    from lynx_trt.calibration import promise

    monkeypatch.setattr(promise.Promise, "strain", lambda self, item, *_: item.kl.mean / (20 * self.max_kl))
    before = artifacts.read(options.artifact).manifest
    result = run_quietly(replace(options, max_kl=0.01))
    assert re.search(r"but on held-out text the KL is .* above 0\.01; give more text", result["reason"])
    assert artifacts.read(options.artifact).manifest == before


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
