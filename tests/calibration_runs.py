"""What the tests of the calibrate command share: a small run that succeeds, in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lynx_trt.calibration.options import CalibrateOptions
from lynx_trt.calibration.run import calibrate
from lynx_trt.console import Progress

WORDS = ("expert", "token", "batch", "the", "of", "a", "budget", "keeps", "votes", "layer", "and", "others", "wait")


def words(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, size=count))


def small_run(checkpoint: Path, artifact: Path, folder: Path) -> CalibrateOptions:
    """Options of a run on a copy of `artifact` in `folder`, which tests may change."""
    shutil.copytree(artifact, folder / "artifact")
    (folder / "text.txt").write_text(words(900), encoding="utf-8")
    return CalibrateOptions(
        artifact=folder / "artifact",
        checkpoint=checkpoint,
        text=(folder / "text.txt",),
        output=folder / "report",
        batch="4",
        sequences=16,
        length=48,
        prompt_length=16,
        max_kl=0.2,
        compare=False,
        threads=2,
    )


def report_of(options: CalibrateOptions) -> Path:
    """The folder that a run writes to."""
    assert options.output is not None
    return options.output


def run_quietly(options: CalibrateOptions) -> dict[str, Any]:
    with Progress(quiet=True) as progress:
        return calibrate(options, progress)


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what differs from run to run."""
    return {name: value for name, value in result.items() if name not in ("created", "seconds", "peak_bytes")}
