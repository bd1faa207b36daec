"""A calibration that was interrupted goes on where it stopped, and nothing that is there is lost."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from calibration_runs import numbers, report_of, run_quietly, small_run

from lynx_trt import artifact as artifacts
from lynx_trt.artifact import Artifact
from lynx_trt.calibration.measure import Meter
from lynx_trt.calibration.model import Probed
from lynx_trt.calibration.options import CalibrateOptions
from lynx_trt.errors import ArtifactError, CalibrationError, UsageError


@pytest.fixture
def options(byte_model: Path, text_artifact: Artifact, tmp_path: Path) -> CalibrateOptions:
    return small_run(byte_model, text_artifact.folder, tmp_path)


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


def test_a_finished_report_is_not_replaced(options: CalibrateOptions) -> None:
    run_quietly(replace(options, budget="4", max_kl=None))
    with pytest.raises(UsageError, match="holds a calibration; choose another --output, or pass --overwrite"):
        run_quietly(options)
    with pytest.raises(UsageError, match="holds a calibration"):
        run_quietly(replace(options, resume=True))


def test_a_full_disk_is_an_interruption(options: CalibrateOptions, tmp_path: Path) -> None:
    """Whether there is no room for a measurement or for the report: said, and gone on with once there is room."""
    whole = run_quietly(replace(options, output=tmp_path / "whole", write=False, compare=True))
    options = replace(options, compare=True)
    page = (tmp_path / "whole" / "report.html").stat().st_size
    for room in (20_000, page - 1):  # in the search; and the journal fits, the report doesn't
        with _file_size_limit(room), pytest.raises(CalibrationError, match=r"File too large; .* with --resume"):
            run_quietly(options)
        options = replace(options, resume=True)
    folder = report_of(options)
    assert (folder / "quality-4.png").exists()
    assert not (folder / "calibration.json").exists()
    assert not any("partial-" in path.name for path in folder.iterdir())
    assert numbers(run_quietly(options)) == numbers(whole) | {"artifact_updated": True}


@contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what the disk says when it is full, with another word."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_artifact_that_cannot_be_written_at_the_end(
    options: CalibrateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search is not lost: with room again, --resume has every measurement at hand."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _no_space)
        with pytest.raises(ArtifactError, match=r"lynx.json can't be written: No space left .* with --resume"):
            run_quietly(options)
    monkeypatch.setattr(Probed, "run", _only_unrestricted(Probed.run))
    result = run_quietly(replace(options, resume=True))
    assert result["artifact_updated"]
    assert artifacts.read(options.artifact).manifest.selection.floors == result["floors"]


def _no_space(descriptor: int) -> None:
    """For the artifact's manifest; what the calibration writes of its own finds room."""
    if "lynx.json" in Path(f"/proc/self/fd/{descriptor}").readlink().name:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _only_unrestricted(run: Callable[..., Any]) -> Callable[..., Any]:
    """The pictures of a batch's experts need one forward more; the search needs none."""
    seen: list[Any] = []

    def checked(self: Probed, ids: Any, shape: Any, setting: Any, **rest: Any) -> Any:
        seen.append(setting)
        assert len([each for each in seen if each is not None]) <= 1
        return run(self, ids, shape, setting, **rest)

    return checked


def test_an_artifact_of_other_weights_is_another_run(
    options: CalibrateOptions, byte_model: Path, build_quietly: Callable[..., Artifact], tmp_path: Path
) -> None:
    """A model that was trained on has the same name and shape; what the one before it lost says nothing about it."""
    with _file_size_limit(20_000), pytest.raises(CalibrationError):
        run_quietly(options)
    shutil.copytree(byte_model, tmp_path / "bytes")
    tiny_models.save(tiny_models.random_model("qwen3_moe", seed=9, eos_token_id=None), tmp_path / "bytes")
    shutil.rmtree(options.artifact)
    build_quietly(tmp_path / "bytes", options.artifact)
    with pytest.raises(UsageError, match=r"of another run \(weights differ\)"):
        run_quietly(replace(options, checkpoint=tmp_path / "bytes", resume=True))


def test_a_report_that_is_replaced_leaves_nothing(options: CalibrateOptions) -> None:
    """The pictures of a batch size that isn't measured any more, and nothing of the user's."""
    folder = report_of(options)
    run_quietly(replace(options, batch="2,4"))
    (folder / "notes-4.png").write_bytes(b"mine")
    (folder / "report.html.partial-123").write_bytes(b"half")  # of a run that was killed
    assert (folder / "uses-2.png").exists()
    run_quietly(replace(options, overwrite=True))
    ours = {"calibration.json", "report.html", "sensitivity-4.png", "uses-4.png"}
    assert {path.name for path in folder.iterdir()} == {*ours, "notes-4.png"}
