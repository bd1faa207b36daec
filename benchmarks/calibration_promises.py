"""Are promises kept? Three targets and three seeds on the shipped model, each a whole run of the command's own code.

The seed draws other text, and splits it differently into the half to choose on and the held-out half.

    python benchmarks/calibration_promises.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from calibration_common import record

from lynx_trt.build import BuildOptions, build, shipped_model
from lynx_trt.calibration.options import CalibrateOptions
from lynx_trt.calibration.run import calibrate
from lynx_trt.console import Progress
from lynx_trt.errors import CalibrationError

TARGETS: dict[str, dict[str, Any]] = {
    "KL at most 0.01": {"max_kl": 0.01},
    "perplexity at most 2% above": {"max_perplexity_increase": 0.02},
    "agreement at least 0.9": {"min_agreement": 0.9},
}


def one(artifact: Path, folder: Path, limits: dict[str, Any], batch: int, seed: int) -> dict[str, Any]:
    """One calibration: what was chosen, and how held-out text came out."""
    options = CalibrateOptions(
        artifact, output=folder, batch=str(batch), seed=seed, compare=False, write=False, **limits
    )
    with Progress(quiet=True) as progress:
        try:
            result = calibrate(options, progress)
        except CalibrationError as error:
            return {"kept": False, "says": str(error)}
    (study,) = result["batches"]
    (check,) = study["checks"]
    return {
        "kept": result["kept"],
        "budgets": result["budgets"],
        "natural": sum(study["natural_active"]) / len(study["natural_active"]),
        "active": study["held_out"]["active"][0],
        "limit": check["limit"],
        "chosen_on": study["search"]["best"]["kl"][0] if check["name"] == "KL" else None,
        "held_out": check["value"],
        "settings": len(study["search"]["steps"]),
        "seconds": result["seconds"],
        "peak_bytes": result["peak_bytes"],
    }


def main(
    batch: Annotated[int, typer.Option(help="Sequences that decode together.")] = 16,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
) -> None:
    """Run every target with every seed; exit 1 if a promise is broken."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, Progress(quiet=True) as progress:
        artifact = build(BuildOptions(shipped_model(), Path(scratch) / "artifact", tensorrt="none"), progress).folder
        for name, limits in TARGETS.items():
            for seed in range(seeds):
                row: dict[str, Any] = {"target": name, "seed": seed}
                row |= one(artifact, Path(scratch) / f"{len(rows)}", limits, batch, seed)
                rows.append(row)
                typer.echo(row)
    typer.echo(record("calibration_promises", rows))
    raise typer.Exit(0 if all(row["kept"] for row in rows) else 1)


if __name__ == "__main__":
    typer.run(main)
