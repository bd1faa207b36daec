"""What was measured is on disk at once, is gone on with only where it means the same, and a full disk is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_calibration_search import made_up_measurement

from lynx_trt.budgets import Restriction
from lynx_trt.calibration.journal import FORMAT, Journal, Measured
from lynx_trt.calibration.measure import Measurement
from lynx_trt.calibration.model import Setting
from lynx_trt.calibration.options import JOURNAL
from lynx_trt.errors import CalibrationError, LynxError, UsageError
from lynx_trt.selection import PRESETS

IDENTITY = {"text": "abc", "cost_model": {"expert_bytes": (10, 20)}}  # a tuple, which JSON doesn't have
LYNX = Setting(PRESETS["lynx"], Restriction((3, 4), (0.1, 0.0)))


class FakeMeter:
    """Says how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[Setting] = []

    def measure(self, settings: list[Setting], batch: int, **_: Any) -> list[Measurement]:
        self.asked += settings
        return [replace(made_up_measurement(setting, 0.1, [3.0, 4.0]), batch=batch) for setting in settings]


def measured(folder: Path, *, resume: bool = False, batch: int = 4, part: str = "choose") -> Measured:
    meter: Any = FakeMeter()
    return Measured(meter, batch, part, Journal(folder, IDENTITY, resume=resume))


def asked(measured: Measured) -> list[Setting]:
    meter: Any = measured.meter
    return list(meter.asked)


def test_a_setting_is_known_again_and_another_is_not(tmp_path: Path) -> None:
    """A budget, a floor, a parameter, the batch or the part of the text: each makes it another measurement."""
    (want,) = measured(tmp_path).measure([LYNX])
    others = [
        replace(LYNX, restriction=Restriction((3, 5), (0.1, 0.0))),
        replace(LYNX, restriction=Restriction((3, 4), (0.1, 0.2))),
        replace(LYNX, restriction=Restriction((3, 4))),
        replace(LYNX, selection=replace(LYNX.selection, power=1.0)),
    ]
    resumed = measured(tmp_path, resume=True)
    found = resumed.measure([LYNX, *others])
    assert found[0] == want
    assert [item.setting for item in found] == [LYNX, *others]
    assert asked(resumed) == others
    for changes in ({"batch": 8}, {"part": "check"}):
        other = measured(tmp_path, resume=True, **changes)  # type: ignore[arg-type]
        other.measure([LYNX])
        assert asked(other) == [LYNX]


def _without_format(lines: list[Any]) -> list[Any]:
    """As journals were before they had a number, when a key was made otherwise."""
    del lines[0]["format"]
    return lines


def _older(lines: list[Any]) -> list[Any]:
    lines[0]["format"] = FORMAT - 1
    return lines


def _of_other_text(lines: list[Any]) -> list[Any]:
    lines[0]["text"] = "xyz"
    return lines


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without_format, r"calibration.partial.jsonl was written by another version of lynx-trt, .* pass --overwrite"),
        (_older, r"was written by another version of lynx-trt"),
        (_of_other_text, r"is of another run \(text differ\); give the same options to --resume it"),
        (lambda lines: [["a", "list"], *lines[1:]], r"is no journal of a calibration; pass --overwrite"),
    ],
)
def test_what_means_something_else_is_refused(
    change: Callable[[list[Any]], list[Any]], says: str, tmp_path: Path
) -> None:
    """And it stays as it is."""
    measured(tmp_path).measure([LYNX])
    path = tmp_path / JOURNAL
    lines = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = path.read_bytes()
    with pytest.raises(UsageError, match=says):
        measured(tmp_path, resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],  # cut off within the measurement
        lambda data: data.replace(b'"kl"', b'"xx"', 1),  # a field is missing
        lambda data: data.replace(b'"weight"', b'"blame"', 1),  # a vote that there is none of
        lambda data: data[: data.index(b"\n")],  # cut off at the end of the first line
        lambda data: data[:9],  # within the first line
        lambda _: b"",
        lambda data: data + b"\xff\xfe half a line",  # bytes that are no text
    ],
)
def test_a_damaged_end_is_measured_again(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Whatever the end of the file looks like: the rest counts, and the file is whole afterwards."""
    (want,) = measured(tmp_path).measure([LYNX])
    path = tmp_path / JOURNAL
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert measured(tmp_path, resume=True).measure([LYNX]) == [want]
    assert path.read_bytes() == whole


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    """Where the file is made and where it grows; closing it says nothing more."""
    (tmp_path / JOURNAL).symlink_to("/dev/full")
    with pytest.raises(CalibrationError, match=r"can't be written: No space left on device; .* with --resume"):
        Journal(tmp_path, IDENTITY, resume=False)
    growing = Journal(tmp_path / "other", IDENTITY, resume=False)
    growing._stream.close()
    growing._stream = (tmp_path / JOURNAL).open("ab", buffering=0)
    with pytest.raises(CalibrationError, match="No space left on device"):
        growing.put("key", made_up_measurement(LYNX, 0.1, [3.0, 4.0]))
    growing.close()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LynxError, match=r"calibration.partial.jsonl can't be opened: .*; choose another --output"):
        Journal(tmp_path / "file" / "report", IDENTITY, resume=False)
