"""What does calibrating the shipped model take, in time and memory, and how do both grow?

The command as a user runs it, one process for each amount of text; then once more without the comparison with other
presets, which tries fewer settings: memory must not care. Run it on a quiet machine.

    python benchmarks/calibration_cost.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from calibration_common import LENGTH, record

from lynx_trt.build import BuildOptions, build, shipped_model
from lynx_trt.console import Progress


def one(artifact: Path, folder: Path, sequences: int, *more: str) -> dict[str, Any]:
    """One run of the command."""
    command = [sys.executable, "-m", "lynx_trt.calibrate", str(artifact), "-o", str(folder), "--no-write", "--json"]
    command += ["--sequences", str(sequences), "--length", str(LENGTH), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    if done.returncode:
        raise SystemExit(done.stderr)
    said = json.loads(done.stdout)
    tried = settings(json.loads((folder / "calibration.json").read_text()))
    return {
        "options": ["--sequences", str(sequences), *more],
        "settings": tried,
        "seconds": said["seconds"],
        "milliseconds_a_setting_and_sequence": round(1e3 * said["seconds"] / tried / (sequences // 2), 2),
        "peak_bytes": said["peak_bytes"],
    }


def settings(result: dict[str, Any]) -> int:
    """How many settings a calibration measured; the range of floors, other batches and checks are not counted."""
    (study,) = result["batches"]
    alone = len(study["sensitivity"]["levels"]) * len(study["sensitivity"]["kl"])
    compared = sum(len(items) for items in study["uniform"].values()) + len(study["frontier"])
    return alone + len(study["search"]["steps"]) + compared


def main(
    sequences: Annotated[str, typer.Option(help="Numbers of sequences, with commas between them.")] = "32,64,128",
    write: Annotated[bool, typer.Option(help="Record the results; otherwise only print them.")] = True,
) -> None:
    """Calibrate with each amount of text, and once without the comparison."""
    counts = [int(part) for part in sequences.split(",")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, Progress(quiet=True) as progress:
        artifact = build(BuildOptions(shipped_model(), Path(scratch) / "artifact", tensorrt="none"), progress).folder
        for number, (count, more) in enumerate([*((count, ()) for count in counts), (counts[-1], ("--no-compare",))]):
            rows.append(one(artifact, Path(scratch) / f"{number}", count, *more))
            typer.echo(rows[-1])
    if write:
        typer.echo(record("calibration_cost", rows))


if __name__ == "__main__":
    typer.run(main)
