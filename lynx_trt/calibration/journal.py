"""What was measured so far, on disk: an interrupted calibration goes on where it stopped.

A search is decided by its measurements alone, so to resume is to run it again with those at hand: no state but theirs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lynx_trt.calibration.measure import Measurement, Meter
from lynx_trt.calibration.options import JOURNAL
from lynx_trt.errors import CalibrationError, UsageError

if TYPE_CHECKING:
    from lynx_trt.calibration.model import Setting

# Counts up whenever lines or keys change their meaning: what was measured under another is not gone on with.
FORMAT = 2
# Measured between two writes: a few seconds' work on a small model, a few minutes' on a big one.
SETTINGS_A_WRITE = 16


class Journal:
    """One line of JSON for the run's identity, and one for each measurement."""

    def __init__(self, folder: Path, identity: dict[str, Any], *, resume: bool) -> None:
        """Open `folder`'s journal, or begin one.

        Raises:
            UsageError: there is one and `resume` is false, or it is of another run; the message names the difference.
            CalibrationError: it can't be read or written.
        """
        self._path = folder / JOURNAL
        self._known: dict[str, Measurement] = {}
        identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        try:
            if self._path.is_file():
                if not resume:
                    raise UsageError(
                        f"{folder} holds an interrupted run; pass --resume to go on with it, or --overwrite to begin "
                        "again"
                    )
                self._read(identity)
            folder.mkdir(parents=True, exist_ok=True)
            # Without a buffer: what the disk had no room for must not come again when the file is closed.
            self._stream = self._path.open("ab", buffering=0)
        except OSError as error:
            raise CalibrationError(
                f"{self._path} can't be opened: {error.strerror or error}; choose another --output"
            ) from None
        if self._stream.tell() == 0:
            self._write(identity)

    def _read(self, identity: dict[str, Any]) -> None:
        lines = self._path.read_bytes().splitlines(keepends=True)
        if lines and lines[0].endswith(b"\n"):
            self._check_identity(lines[0], identity)
        good = 0
        for number, line in enumerate(lines):
            if not line.endswith(b"\n"):
                break  # what the interruption cut off
            if number:
                try:
                    entry = json.loads(line)
                    self._known[entry["key"]] = Measurement.from_dict(entry["measurement"])
                except (ValueError, KeyError, TypeError, UsageError):
                    break
            good += len(line)
        os.truncate(self._path, good)

    def _check_identity(self, line: bytes, identity: dict[str, Any]) -> None:
        try:
            before = json.loads(line)
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise UsageError(f"{self._path} is no journal of a calibration; pass --overwrite to begin again")
        names = sorted(name for name in before.keys() | identity.keys() if before.get(name) != identity.get(name))
        if "format" in names:
            raise UsageError(
                f"{self._path} was written by another version of lynx-trt, which keeps its measurements in another "
                "form; pass --overwrite to begin again"
            )
        if names:
            raise UsageError(
                f"{self._path} is of another run ({', '.join(names)} differ); "
                "give the same options to --resume it, or pass --overwrite to begin again"
            )

    def __len__(self) -> int:
        """Measurements at hand."""
        return len(self._known)

    def get(self, key: str) -> Measurement | None:
        """What was measured under `key`."""
        return self._known.get(key)

    def put(self, key: str, measurement: Measurement) -> None:
        """Remember a measurement, on disk too."""
        self._known[key] = measurement
        self._write({"key": key, "measurement": measurement.to_dict()})

    def _write(self, entry: dict[str, Any]) -> None:
        data = (json.dumps(entry) + "\n").encode()
        try:
            while data:
                data = data[self._stream.write(data) :]
        except OSError as error:
            raise CalibrationError(
                f"{self._path} can't be written: {error.strerror or error}; what was measured before is kept: "
                "make room, and give the same command with --resume to go on"
            ) from None

    @staticmethod
    def remove(folder: Path) -> None:
        """Forget an interrupted run."""
        (folder / JOURNAL).unlink(missing_ok=True)

    def close(self, *, remove: bool = False) -> None:
        """Close the file; a run that is whole doesn't need it any more."""
        self._stream.close()
        if remove:
            self._path.unlink(missing_ok=True)


class Measured:
    """Settings measured on one part of the text at one batch size, each once (the `Trials` of a search)."""

    def __init__(self, meter: Meter, batch: int, part: str, journal: Journal | None = None) -> None:
        """`part` names the text's part in the journal."""
        self.meter = meter
        self.batch = batch
        self.count = 0  # settings asked for, for progress bars
        self.on_progress: Callable[[float], None] | None = None
        self._part = part
        self._journal = journal
        self._memory: dict[str, Measurement] = {}

    def regrouped(self, number: int, size: int) -> Measured:
        """The same text in the `number`-th random grouping into batches of `size`."""
        order = np.random.default_rng([number, self.meter.sequences]).permutation(self.meter.sequences)
        other = Measured(self.meter.regrouped(order), size, f"{self._part}, grouping {number}", self._journal)
        other.count, other.on_progress = self.count + number, self.on_progress
        return other

    def measure(self, settings: Sequence[Setting]) -> list[Measurement]:
        """One measurement for each setting."""
        keys = [self._key(setting) for setting in settings]
        missing = {key: setting for key, setting in zip(keys, settings, strict=True) if self._get(key) is None}
        for start in range(0, len(missing), SETTINGS_A_WRITE):
            some = dict(list(missing.items())[start : start + SETTINGS_A_WRITE])
            before = self.count

            def progress(done: float, before: int = before, size: int = len(some)) -> None:
                if self.on_progress:
                    self.on_progress(before + done * size)

            found = self.meter.measure(list(some.values()), self.batch, on_progress=progress)
            for key, item in zip(some, found, strict=True):
                self._put(key, item)
            self.count += len(some)
        results = [self._get(key) for key in keys]
        return [result for result in results if result is not None]

    def _get(self, key: str) -> Measurement | None:
        return self._memory.get(key) if self._journal is None else self._journal.get(key)

    def _put(self, key: str, measurement: Measurement) -> None:
        if self._journal is None:
            self._memory[key] = measurement
        else:
            self._journal.put(key, measurement)

    def _key(self, setting: Setting) -> str:
        text = json.dumps([self._part, self.batch, setting.to_dict()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]
