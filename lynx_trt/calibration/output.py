"""What a calibration leaves behind: its folder, and floors and budgets in the artifact; nothing half-written."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lynx_trt.artifact import CalibrationRecord, SelectionRecord, replace_manifest
from lynx_trt.calibration import plots, report
from lynx_trt.calibration.inputs import Inputs
from lynx_trt.calibration.measure import Measurement
from lynx_trt.calibration.options import PAGE, RESULT, CalibrateOptions
from lynx_trt.console import note
from lynx_trt.errors import ArtifactError, CalibrationError
from lynx_trt.partials import write_file

PACKAGES = ("lynx-trt", "torch", "transformers", "numpy", "matplotlib")
# What the artifact's manifest keeps of the held-out measurement.
RECORDED = ("kl", "kl_p99", "agreement", "perplexity_increase", "bits_a_byte", "active", "step_seconds")

# Pictures of a calibration that is replaced, and what was left of one that was killed while writing.
OURS = re.compile(r"(quality|sensitivity|uses)-\d+\.png|[\w.-]+\.(png|html|json)\.partial-\d+")


def about(options: CalibrateOptions, inputs: Inputs) -> dict[str, Any]:
    """What was measured, with what: everything in `calibration.json` that is no outcome."""
    model = inputs.artifact.manifest.model
    return {
        "schema_version": 2,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "seed": options.seed,
        "model": {
            "name": model.name,
            "architecture": model.architecture,
            "parameters": model.parameters,
            "precision": model.precision,
            "moe_layers": len(model.moe_layers),
            "experts": max(layer.experts for layer in model.moe_layers),
            "experts_per_token": model.moe_layers[0].experts_per_token,
            "expert_bytes": [layer.expert_bytes for layer in model.moe_layers],
            "rules": [layer.rule for layer in model.moe_layers],
        },
        "text": {
            **inputs.text.to_dict(),
            "sequences": options.sequences,
            "length": inputs.length,
            "prompt": options.prompt_length,
            "validation": None if inputs.validation is None else inputs.validation.to_dict(),
        },
        "cost_model": asdict(inputs.cost),
        "promise": None if inputs.promise is None else {"text": str(inputs.promise), **asdict(inputs.promise)},
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write(folder: Path, result: dict[str, Any]) -> None:
    """All files, each written aside and renamed; `calibration.json` last, since it says that the rest is there.

    Raises:
        CalibrationError: they can't be written.
    """
    pictures: dict[str, bytes] = {}
    for study in result["batches"]:
        if "sensitivity" in study:
            pictures |= plots.all_plots(study)
    files = {f"{name}.png": data for name, data in pictures.items()}
    files[PAGE] = report.page(result, pictures).encode()
    files[RESULT] = (json.dumps(result, indent=1) + "\n").encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_file(folder / name, data)
        for path in folder.iterdir():
            if OURS.fullmatch(path.name) and path.name not in files:
                path.unlink()
    except OSError as error:
        raise CalibrationError(
            f"can't write to {folder}: {error.strerror or error}; what was measured is kept: "
            "make room, and give the same command with --resume"
        ) from None


def update_artifact(inputs: Inputs, result: dict[str, Any], folder: Path) -> bool:
    """Put what was found into the manifest, unless it is for parameters that the artifact's graph doesn't have.

    Raises:
        ArtifactError: the manifest can't be written; the one that was there stays.
    """
    manifest = inputs.artifact.manifest
    if result["selection"] != asdict(inputs.selection):
        note(
            "the search found better parameters than the artifact was built with, so it stays as it is; "
            f"build it again with --budget {folder / RESULT}, which holds everything that was found"
        )
        return False
    largest = Measurement.from_dict(result["batches"][-1]["shared"])
    text = {name: value for name, value in result["text"].items() if name not in ("bytes", "validation")}
    if inputs.validation is not None:
        text |= {"validation_name": inputs.validation.name, "validation_sha256": inputs.validation.sha256}
    record = CalibrationRecord(
        created=result["created"],
        promise={name: value for name, value in result["promise"].items() if isinstance(value, float)},
        batch=result["batch"],
        budgets_by_batch={study["batch"]: study["held_out"]["budgets"] for study in result["batches"]},
        floors_by_batch={study["batch"]: study["held_out"]["floors"] for study in result["batches"]},
        held_out={name: list(getattr(largest, name)) for name in RECORDED},
        text=text,
        hardware=result["cost_model"]["name"],
        seed=result["seed"],
        versions=result["versions"],
    )
    chosen = SelectionRecord.of(manifest.selection.preset, inputs.selection, largest.setting.restriction)
    try:
        replace_manifest(inputs.artifact, manifest.model_copy(update={"selection": chosen, "calibration": record}))
    except ArtifactError as error:
        raise ArtifactError(
            f"{error}; what was measured is kept: make room, and give the same command with --resume"
        ) from None
    return True
