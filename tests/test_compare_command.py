"""`python -m lynx_trt.compare`: one small comparison, its report, its page and its wrong inputs."""

from __future__ import annotations

import copy
import json
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lynx_trt.artifact import Artifact
from lynx_trt.calibration.source import _same_bits
from lynx_trt.compare import app, write
from lynx_trt.comparison.against import changes, read_report
from lynx_trt.comparison.conditions import Condition
from lynx_trt.comparison.layers import KINDS, sum_by_kind
from lynx_trt.comparison.page import page
from lynx_trt.comparison.run import CompareOptions, compare
from lynx_trt.comparison.summary import summarize
from lynx_trt.console import Progress
from lynx_trt.errors import ArtifactError, CheckpointError, LynxError, UsageError

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="module")
def report(text_artifact: Artifact, byte_model: Path) -> dict[str, Any]:
    """All baselines, two candidates, one batch outside of the profile and one provider that isn't there."""
    options = CompareOptions(
        artifact=text_artifact.folder,
        batches=(1, 2, 999),
        budgets=("off", "2"),
        checkpoint=byte_model,
        prompt=6,
        steps=4,
        rounds=2,
        sequences=2,
        providers=("cpu", "cuda"),
        threads=1,
        memory=False,
    )
    with Progress(quiet=True) as progress:
        return compare(text_artifact, options, progress)


def test_everything_is_compared_or_named(report: dict[str, Any]) -> None:
    assert set(report["samples"]["decode"]) == {"ort-moe", "ort-plain", "hf-eager", "lynx@off", "lynx@2"}
    said = "\n".join(report["problems"])
    assert "tensorrt: the artifact has no engine" in said
    assert "batch 999: outside the profile 1:8:64" in said
    assert "provider cuda" in said
    assert report["baseline"] == "ort-moe"
    assert report["reference"] == "hf-eager"


def test_without_selection_the_logits_are_eagers(report: dict[str, Any]) -> None:
    for name in ("ort-moe", "ort-plain", "lynx@off"):
        assert report["right"][name]["max"] < 1e-4 * report["right"]["hf-eager"]["scale"]
        assert report["right"][name]["top1"] == 1.0
    assert report["right"]["lynx@2"]["max"] > 1e-2  # 2 of 8 experts: it has a price, and that is seen


def test_numbers_come_from_the_samples(report: dict[str, Any], tmp_path: Path) -> None:
    """The report as it is on the disk gives its own summary again; one row is computed by hand."""
    write({**report, "failures": []}, tmp_path)
    stored = read_report(tmp_path)
    assert summarize(stored) == stored["summary"]
    row = next(row for row in stored["summary"] if row["runner"] == "lynx@off" and row["batch"] == 2)
    decode = stored["samples"]["decode"]
    assert len(decode["lynx@off"]["2"]) == 2 * 4  # rounds x steps
    assert row["decode_tokens_per_second"] == pytest.approx(2 / np.median(decode["lynx@off"]["2"]))
    expected = np.median(np.array(decode["ort-moe"]["2"]) / np.array(decode["lynx@off"]["2"]))
    assert row["decode_ratio"] == pytest.approx(expected)


def test_active_experts_and_their_bytes(report: dict[str, Any]) -> None:
    rows = {(row["runner"], row["batch"]): row for row in report["summary"]}
    assert rows["lynx@off", 1]["active_experts"] == 2  # K
    assert rows["lynx@2", 2]["active_experts"] <= rows["lynx@off", 2]["active_experts"]
    size = report["artifact"]["expert_bytes"][0]
    assert rows["lynx@off", 1]["expert_bytes_a_token"] == 2 * 2 * size  # layers x experts
    assert rows["ort-moe", 1]["active_experts"] is None


def test_conditions(report: dict[str, Any]) -> None:
    assert len(Condition.parse("decode_ratio>0").failures(report)) == 4  # 2 candidates, 2 batches
    assert len(Condition.parse("decode_ratio[lynx@off,2]>0").failures(report)) == 1
    assert Condition.parse("top1[lynx@off] < 1").failures(report) == []
    assert "nothing in this comparison" in Condition.parse("rms[lynx@7]>1").failures(report)[0]
    for text in ("decode_ratio", "speed<1", "decode_ratio<x", ""):
        with pytest.raises(UsageError, match="is no condition"):
            Condition.parse(text)


def test_two_reports(report: dict[str, Any]) -> None:
    later = copy.deepcopy(report)
    rows = changes(report, later)
    assert len(rows) == len(report["summary"])
    assert rows[0]["decode_ratio"][0] == rows[0]["decode_ratio"][1]
    later["baseline"] = "ort-plain"  # ratios to another baseline are no comparison
    assert all(row["decode_ratio"] is None for row in changes(report, later))


def test_a_report_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"schema": 0}), encoding="utf-8")
    with pytest.raises(UsageError, match="no report of this version"):
        read_report(tmp_path)


def test_nested_nodes_count_once() -> None:
    def event(name: str, op: str, start: int, duration: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": duration, "args": {"op_name": op}}

    events = [event("loop", "Loop", 0, 100), event("inner", "Gemm", 10, 50), event("head", "MatMul", 100, 7)]
    seconds = sum_by_kind(events)
    assert seconds[KINDS[0]] == pytest.approx(100e-6)
    assert seconds[KINDS[2]] == pytest.approx(7e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--baseline", "vllm"], UsageError, "--baseline vllm is not known"),
        (["--provider", "tpu"], UsageError, "--provider tpu is not known"),
        (["--batch", "999"], UsageError, "no --batch lies in the profile"),
        (["--budget", "99"], UsageError, "the model has 8 experts a layer"),
        (["--steps", "100"], UsageError, "was built for 64"),
        (["--fail-if", "x<1"], UsageError, "is no condition"),
        (["--text", "/nowhere"], UsageError, "can't be read"),
    ],
)
def test_wrong_input(
    arguments: list[str], error: type[Exception], message: str, text_artifact: Artifact, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, [str(text_artifact.folder), "-o", str(tmp_path / "out"), *arguments])
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


def test_another_model_s_checkpoint_is_no_reference(
    text_artifact: Artifact, byte_model: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of another architecture, and of the same with other values."""
    changed = tmp_path / "changed"
    shutil.copytree(byte_model, changed)
    tiny_models.save(tiny_models.random_model("qwen3_moe", seed=9, eos_token_id=None), changed)
    for folder, words in ((checkpoint("mixtral"), "architecture is Mixtral"), (changed, "holds other values")):
        arguments = [str(text_artifact.folder), "-o", str(tmp_path / "out"), "--checkpoint", str(folder)]
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, CheckpointError)
        assert f"{folder} is not the model of {text_artifact.folder}" in str(result.exception)
        assert words in str(result.exception)


def test_a_value_that_is_no_number_is_still_the_same_value() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert _same_bits(nan, nan.clone())
    assert not _same_bits(nan, torch.tensor([1.0, 2.0]))
    assert not _same_bits(nan, nan.half())
    assert _same_bits(torch.tensor(1.0), torch.tensor(1.0))


def test_results_that_are_no_numbers_are_said(
    byte_model: Path, tmp_path: Path, build_quietly: Callable[..., Artifact]
) -> None:
    """Weights that are finite, and so large that logits are not."""
    folder = Path(shutil.copytree(byte_model, tmp_path / "large"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][:] = 3e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    built = build_quietly(folder, tmp_path / "artifact")
    arguments = ["--checkpoint", str(folder), "--baseline", "hf-eager", "--budget", "off", "--batch", "1", "--prompt"]
    arguments += ["4", "--steps", "1", "--rounds", "1", "--sequences", "1", "--no-memory", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [str(built.folder), *arguments])
    assert result.exit_code == 0, result.exception
    assert "hf-eager: its logits are not all finite numbers" in result.stdout
    assert "judged against it" in result.stdout
    assert "lynx@off: its logits are not all finite numbers" in result.stdout


def test_an_output_that_is_a_file_is_said_first(tmp_path: Path) -> None:
    """Before the artifact is even looked for."""
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        result = CliRunner().invoke(app, [str(tmp_path / "nowhere"), "-o", str(output)])
        assert isinstance(result.exception, UsageError)
        assert f"{tmp_path / 'file'} is a file" in str(result.exception)


def test_a_full_disk_leaves_the_report_that_was_there(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("the one before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(LynxError, match="File too large; make room"):
            write({**report, "failures": []}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "the one before"


def test_an_artifact_of_another_version(text_artifact: Artifact, tmp_path: Path) -> None:
    folder = shutil.copytree(text_artifact.folder, tmp_path / "old")
    manifest = json.loads((folder / "lynx.json").read_text(encoding="utf-8"))
    (folder / "lynx.json").write_text(json.dumps({**manifest, "schema_version": 99}), encoding="utf-8")
    result = CliRunner().invoke(app, [str(folder)])
    assert isinstance(result.exception, ArtifactError)
    assert "schema_version" in str(result.exception)


def test_page_stands_alone(report: dict[str, Any]) -> None:
    html = page(report)
    assert html.count("<svg") == 3
    assert "batch 999: outside the profile" in html
    for outside in ("<script", '<link rel="stylesheet', "@import", '<img src="http'):
        assert outside not in html


@pytest.mark.skipif(not Path(CHROMIUM).is_file(), reason=f"no {CHROMIUM}; it is in Debian's package chromium")
def test_page_in_a_browser(report: dict[str, Any], tmp_path: Path) -> None:
    """No console message, three plots with a size, no sideways scrolling at a phone's width, and a PDF comes out."""
    html = page(report).replace(
        "</body>",
        "<script>window.onerror = e => document.title = 'error ' + e; addEventListener('load', () => {"
        "const plots = [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect());"
        "document.body.dataset.seen = plots.filter(r => r.width > 100 && r.height > 100).length + ' plots, ' +"
        "(document.documentElement.scrollWidth <= innerWidth ? 'fits' : 'too wide');});</script></body>",
    )
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    log = browse(path, tmp_path, "--window-size=500,900", "--dump-dom")
    assert 'data-seen="3 plots, fits"' in log.stdout
    assert "CONSOLE" not in log.stderr
    browse(path, tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").stat().st_size > 10_000


def browse(path: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", *arguments, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
