"""Does the promise hold on other text? What is held out, what the output says about it, and --validation-text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_runs import numbers, report_of, run_quietly, small_run, words
from typer.testing import CliRunner

from lynx_trt import artifact as artifacts
from lynx_trt.artifact import Artifact
from lynx_trt.calibrate import app
from lynx_trt.calibration import report
from lynx_trt.calibration import text as texts
from lynx_trt.calibration.options import CalibrateOptions
from lynx_trt.calibration.promise import Promise
from lynx_trt.errors import LynxError

CAVEAT = "text of another kind may cost more: check the promise on yours with --validation-text"


@pytest.fixture
def options(byte_model: Path, text_artifact: Artifact, tmp_path: Path) -> CalibrateOptions:
    """With text of another kind beside it: digits."""
    digits = np.random.default_rng(3).integers(0, 10**9, size=200)
    (tmp_path / "other.txt").write_text(" ".join(map(str, digits)), encoding="utf-8")
    return small_run(byte_model, text_artifact.folder, tmp_path)


def other(options: CalibrateOptions) -> Path:
    return options.text[0].with_name("other.txt")


def test_the_promise_is_checked_on_the_text_that_was_given(options: CalibrateOptions, tmp_path: Path) -> None:
    """Held-out numbers are those of measuring what was found on that text alone; choices are made without it."""
    path = other(options)
    result = run_quietly(replace(options, validation_text=(path,)))
    found = options.output / "calibration.json"  # type: ignore[operator]
    alone = replace(options, text=(path,), sequences=8, budget=str(found), max_kl=None, output=tmp_path / "alone")
    measured = run_quietly(alone)["batches"][0]["held_out"]
    (study,) = result["batches"]
    np.testing.assert_allclose(study["held_out"]["kl_by_sequence"], measured["kl_by_sequence"], rtol=1e-3)
    assert study["checks"][0]["value"] == study["held_out"]["kl"][0]
    usual = run_quietly(replace(options, output=tmp_path / "usual"))
    assert usual["batches"][0]["sensitivity"] == study["sensitivity"]  # the same half to choose on
    assert usual["batches"][0]["held_out"] != study["held_out"]


def test_what_it_was_checked_on_is_recorded(options: CalibrateOptions) -> None:
    """In the file, on the page, and in the artifact, by name and sum; without it, nothing but the text is there."""
    path = other(options)
    result = run_quietly(replace(options, validation_text=(path,)))
    text = texts.read_text((path,))
    assert result["text"]["validation"] == {"name": "other.txt", "bytes": text.nbytes, "sha256": text.sha256}
    record = artifacts.read(options.artifact).manifest.calibration
    assert record is not None
    assert record.text["validation_sha256"] == text.sha256
    page = (report_of(options) / "report.html").read_text()
    assert "is kept on validation text" in page
    assert "half to check on, which are of other text: other.txt" in page
    assert CAVEAT not in page
    named = {**result["text"], "name": "<i>", "validation": {**result["text"]["validation"], "name": "<b>&"}}
    assert not re.search(r"<[ib]>", report.page({**result, "text": named}, {}).replace("<b>KL at most", ""))
    run_quietly(replace(options, overwrite=True))
    record = artifacts.read(options.artifact).manifest.calibration
    assert record is not None
    assert not any("validation" in name for name in record.text)
    page = (report_of(options) / "report.html").read_text()
    assert "is kept on held-out text" in page
    assert CAVEAT in page


def test_a_promise_that_other_text_breaks(options: CalibrateOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no matter of chance then, so the way out is another; and the artifact stays as it is."""
    monkeypatch.setattr(Promise, "strain", lambda self, item, *_: item.kl.mean / (20 * self.max_kl))
    before = artifacts.read(options.artifact).manifest
    result = run_quietly(replace(options, max_kl=0.01, validation_text=(other(options),)))
    assert not result["kept"]
    assert re.search(
        r"but on the validation text \(other.txt\) the KL is .* above 0\.01; choose on text of that kind",
        result["reason"],
    )
    assert artifacts.read(options.artifact).manifest == before


def test_the_terminal_says_what_it_was_checked_on(options: CalibrateOptions) -> None:
    """Plain words below the tables: the same text, or the user's; a broken promise has its tables too, and exit 1."""
    arguments = [str(options.artifact), "--checkpoint", str(options.checkpoint), "--text", str(options.text[0])]
    arguments += ["--batch", "4", "--sequences", "16", "--length", "48", "--prompt-length", "16", "--no-compare"]
    arguments += ["-o", str(options.output), "--overwrite", "--no-write"]

    def said(*more: str) -> tuple[str, BaseException | None]:
        outcome = CliRunner().invoke(app, [*arguments, *more])
        return outcome.stdout, outcome.exception

    out, error = said("--max-kl", "0.2")
    assert error is None
    assert "Batch of 4, held-out text" in out
    assert "Promise: KL at most 0.2; kept on held-out text\n" in out
    assert f"Held-out text is other parts of the same text (text.txt); {CAVEAT}" in out
    out, error = said("--max-kl", "0.2", "--validation-text", str(other(options)))
    assert error is None
    assert "Batch of 4, validation text" in out
    assert (
        "Promise: KL at most 0.2; kept on validation text\nValidation text is other.txt; nothing was chosen on it.\n"
        in out
    )
    assert "held-out" not in out.lower()
    out, error = said("--max-kl", "0.2", "--floor", "0.01")
    assert error is None
    assert "Batch of 4, all of the text" in out
    assert "Promise: KL at most 0.2; kept on all of the text\n" in out
    assert "held-out" not in out.lower()
    out, error = said("--max-kl", "1e-7")
    assert isinstance(error, LynxError)
    assert error.exit_code == 1
    assert "experts active in a layer" in out
    assert "Promise: KL at most 1e-07; NOT kept\nReport:" in out
    out, error = said("--max-kl", "1e-7", "--json")
    assert isinstance(error, LynxError)
    printed = json.loads(out)
    assert not printed["kept"]
    assert printed["reason"] in str(error)
    assert printed["budgets"] is None
    assert printed["measured_on"] == "held-out text"


def test_resuming_knows_the_validation_text(options: CalibrateOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured on one is nothing about another."""
    from lynx_trt.calibration import output

    with monkeypatch.context() as patch:
        patch.setattr(output, "write", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_quietly(replace(options, validation_text=(other(options),)))
    with pytest.raises(LynxError, match=r"of another run \(validation text differ\)"):
        run_quietly(replace(options, resume=True))
    first = run_quietly(replace(options, validation_text=(other(options),), resume=True))
    again = run_quietly(replace(options, validation_text=(other(options),), overwrite=True))
    assert numbers(first) == numbers(again)


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("content", "changes", "says"),
    [
        ("few", {}, r"the validation text is too short: it has 4 tokens, .* and 8 are needed"),
        ("", {}, r"other.txt is empty"),
        (words(900), {}, r"other.txt is part of the text to choose on"),  # a copy of it
        (None, {}, r"no such text file: .*other.txt; give plain text in UTF-8 with --validation-text"),
        ("digits " * 99, {"budget": "4"}, r"--validation-text checks what a search chose, .* measure on with --text"),
    ],
)
def test_text_that_shows_nothing(content: str | None, changes: Any, says: str, options: CalibrateOptions) -> None:
    path = other(options)
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(LynxError, match=says):
        run_quietly(replace(options, validation_text=(path,), **changes))
    assert not report_of(options).exists()
