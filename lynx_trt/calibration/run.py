"""A calibration from options to files: read and check, measure and search, write, and update the artifact."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lynx_trt import __version__
from lynx_trt.artifact import (
    TOKENIZER,
    Artifact,
    CalibrationRecord,
    SelectionRecord,
    open_artifact,
    replace_manifest,
)
from lynx_trt.budgets import Restriction
from lynx_trt.calibration import options as option
from lynx_trt.calibration import plots, report, source
from lynx_trt.calibration.company import MORE
from lynx_trt.calibration.cost import LAYER_SECONDS, CostModel, cost_model
from lynx_trt.calibration.journal import Journal, Measured
from lynx_trt.calibration.measure import Measurement, Meter
from lynx_trt.calibration.model import Probed, Setting
from lynx_trt.calibration.options import PAGE, RESULT, CalibrateOptions
from lynx_trt.calibration.promise import Promise
from lynx_trt.calibration.study import Parts, Study, run_study
from lynx_trt.calibration.text import Sequences, Text, cut
from lynx_trt.console import Progress, note
from lynx_trt.errors import ArtifactError, CalibrationError
from lynx_trt.export.hf import DTYPES
from lynx_trt.runtime.text import Tokenizer
from lynx_trt.selection import Selection

PACKAGES = ("lynx-trt", "torch", "transformers", "numpy", "matplotlib")
# What the artifact's manifest keeps of the held-out measurement.
RECORDED = ("kl", "kl_p99", "agreement", "perplexity_increase", "bits_a_byte", "active", "step_seconds")


@dataclass(frozen=True)
class _Inputs:
    """What a run works on, read and checked."""

    artifact: Artifact
    probed: Probed
    selection: Selection
    text: Text
    sequences: Sequences
    batches: list[int]
    length: int
    cost: CostModel
    promise: Promise | None
    dial: option.DialName
    given: Restriction | None  # only to be measured


def calibrate(options: CalibrateOptions, progress: Progress) -> dict[str, Any]:
    """Measure, search, and write what was found; the result is what `calibration.json` holds.

    Raises:
        CalibrationError: nothing keeps the promise, or the held-out text breaks it. Everything measured is written
            all the same, but not to the artifact.
        LynxError: whatever else is wrong with the options, the artifact, the checkpoint or the text, in a sentence.
    """
    started = time.perf_counter()
    folder = option.output_folder(options)
    inputs = _read(options, progress)
    journal = _journal(options, inputs, folder)
    try:
        result = _study(options, inputs, journal, progress)
    finally:
        journal.close()
    result["seconds"] = round(time.perf_counter() - started, 1)
    result["peak_bytes"] = _peak_bytes()
    _write(folder, result)
    journal.close(remove=True)
    if not result["kept"]:
        raise CalibrationError(f"{result['reason']}; what was measured is in {folder}")
    if options.write and inputs.given is None:
        result["artifact_updated"] = _update_artifact(inputs, result)
    return result


def _read(options: CalibrateOptions, progress: Progress) -> _Inputs:
    """Check and read everything, the cheap things first, so that a mistake costs no time."""
    batches, promise = option.batch_sizes(options), option.promised(options)
    artifact = open_artifact(options.artifact)
    manifest = artifact.manifest
    length = option.sequence_length(options, artifact)
    experts = [layer.experts for layer in manifest.model.moe_layers]
    given = option.given_restriction(options, experts)
    selection = Selection(**manifest.selection.parameters)  # type: ignore[arg-type]
    guaranteed = min(selection.guaranteed(layer.experts_per_token) for layer in manifest.model.moe_layers)
    dial = option.dial_name(options, guaranteed=guaranteed)
    if not artifact.path(TOKENIZER).is_file():
        raise ArtifactError(f"{artifact.folder} has no tokenizer; build it with --tokenizer FOLDER to calibrate it")
    folder, text = option.checkpoint_folder(options, artifact), option.text_of(options, artifact)
    device = source.choose_device(options.device)
    update = progress.phase("Text and model")
    checkpoint = source.open_source(artifact, folder, trust_remote_code=options.trust_remote_code)
    config = checkpoint.config.get_text_config()
    update(0.2)
    sequences = cut(
        text,
        Tokenizer(artifact.path(TOKENIZER))._tokenizer,
        separator=_first_token(config, artifact),
        count=options.sequences,
        length=length,
        seed=options.seed,
        more=MORE * (options.sequences // 2),
    )
    update(0.5)
    cost = _cost(options, artifact, tied=bool(getattr(config, "tie_word_embeddings", False)))
    # On the CPU everything is computed in float32: the halves are slow there, and nobody serves with it.
    dtype = DTYPES["fp32" if device == "cpu" else manifest.model.precision]
    probed = source.load(checkpoint, device=device, dtype=dtype)
    update(1.0)
    return _Inputs(artifact, probed, selection, text, sequences, batches, length, cost, promise, dial, given)


def _first_token(config: Any, artifact: Artifact) -> int | None:
    """What stands before each text: the model's own token for it, or the one that ends texts."""
    token = getattr(config, "bos_token_id", None)
    if isinstance(token, int):
        return token
    ends = artifact.manifest.model.end_tokens
    return ends[0] if ends else None


def _cost(options: CalibrateOptions, artifact: Artifact, *, tied: bool) -> CostModel:
    model = artifact.manifest.model
    return cost_model(
        options.hardware,
        [layer.expert_bytes for layer in model.moe_layers],
        source.other_bytes(model, tied=tied),
        bandwidth=options.bandwidth,
        layer_seconds=LAYER_SECONDS if options.layer_overhead is None else options.layer_overhead / 1e6,
    )


def _journal(options: CalibrateOptions, inputs: _Inputs, folder: Path) -> Journal:
    manifest = inputs.artifact.manifest
    identity = {
        "version": __version__,
        "model": [manifest.model.name, manifest.model.parameters, manifest.model.precision],
        "text": inputs.text.sha256,
        "sequences": options.sequences,
        "length": inputs.length,
        "prompt_length": options.prompt_length,
        "seed": options.seed,
        "cost_model": asdict(inputs.cost),
        "device": inputs.probed.device.type,
    }
    if options.overwrite:
        Journal.remove(folder)
    journal = Journal(folder, identity, resume=options.resume)
    if options.resume:
        note(f"{len(journal)} measurements are there already" if len(journal) else f"nothing to resume in {folder}")
    return journal


def _meter(options: CalibrateOptions, inputs: _Inputs, rows: slice) -> Meter:
    return Meter(
        inputs.probed,
        inputs.sequences[rows],
        prompt=options.prompt_length,
        cost=inputs.cost,
        seed=options.seed,
        threads=options.threads,
    )


def _study(options: CalibrateOptions, inputs: _Inputs, journal: Journal, progress: Progress) -> dict[str, Any]:
    half = options.sequences // 2
    if inputs.given is not None:
        return _only_measure(options, inputs, _meter(options, inputs, slice(0, options.sequences)), journal, progress)
    assert inputs.promise is not None
    choose, check = (_meter(options, inputs, rows) for rows in (slice(0, half), slice(half, 2 * half)))
    more = _meter(options, inputs, slice(options.sequences, len(inputs.sequences)))
    studies: list[Study] = []
    checked: list[Measured] = []
    selection = inputs.selection
    # The largest batch first: its parameters are used for all, since they are the model's and not the batch's.
    for batch in inputs.batches[::-1]:
        measured = ((choose, "choose"), (check, "check"), (more, "more"))
        parts = Parts(*(Measured(meter, batch, part, journal) for meter, part in measured))
        study = run_study(
            parts,
            selection,
            inputs.promise,
            progress.phase,
            dial_name=inputs.dial,
            search_parameters=options.search_parameters and not studies,
            compare=options.compare,
        )
        selection = study.selection
        studies.append(study)
        checked.append(parts.check)
    shared = _shared(studies, checked)
    reason = _why_not(inputs.promise, studies)
    return {
        **_about(options, inputs),
        "kept": reason is None,
        "reason": reason,
        "dial": inputs.dial,
        "batch": studies[0].batch,
        **(shared.to_dict() if shared else {"budgets": None, "floors": None}),
        "selection": asdict(selection),
        "batches": [study.to_dict() for study in studies[::-1]],
    }


def _shared(studies: Sequence[Study], checked: Sequence[Measured]) -> Restriction | None:
    """What all batch sizes share, measured on each one's held-out text: the mildest of what was found for each.

    It keeps at least what each keeps for itself; None where something was found for some sizes only.
    """
    chosen = [study.chosen.setting.restriction for study in studies if study.chosen is not None]
    if len(chosen) < len(studies):
        return None
    shared = Restriction.mildest(chosen)
    for study, measured in zip(studies, checked, strict=True):
        (study.shared,) = measured.measure([Setting(study.selection, shared)])
    return shared


def _why_not(promise: Promise, studies: Sequence[Study]) -> str | None:
    """Why the promise is not kept, or None if it is."""
    for study in studies:
        if study.chosen is None:
            return (
                f"nothing that saves 1% of the experts keeps the promise at a batch of {study.batch} ({promise}); "
                f"the mildest that was tried comes to {study.nearest(promise)}; allow more, or give more text "
                "(--sequences), so that less room has to be left for chance"
            )
        broken = [check for check in study.checks if check.value > check.limit]
        if broken:
            return (
                f"what was chosen for a batch of {study.batch} keeps the promise on the text that it was chosen "
                f"on, but on held-out text the {broken[0].name} is {broken[0].value:.4g}, above {broken[0].limit:.4g}; "
                "give more text (--sequences), and text of one kind"
            )
        if study.shared is not None and not promise.is_kept(study.shared):
            return (
                f"what all batch sizes share doesn't keep the promise at a batch of {study.batch}; "
                f"calibrate for --batch {study.batch} alone"
            )
    return None


def _only_measure(
    options: CalibrateOptions, inputs: _Inputs, meter: Meter, journal: Journal, progress: Progress
) -> dict[str, Any]:
    """Measure the budgets and floors that were given, on all of the text."""
    given = inputs.given
    assert given is not None
    found: list[dict[str, Any]] = []
    kept = True
    for batch in inputs.batches:
        update = progress.phase(f"What was given, batch {batch}")
        measured = Measured(meter, batch, "all", journal)
        free, item = measured.measure([meter.unrestricted(), Setting(inputs.selection, given)])
        checks = inputs.promise.checks(item, 1) if inputs.promise else []
        kept = kept and all(check.value <= check.limit for check in checks)
        found.append(
            {
                "batch": batch,
                "unrestricted": free.to_dict(),
                "held_out": item.to_dict(),
                "checks": [check._asdict() for check in checks],
            }
        )
        update(1.0)
    said = f"budgets {list(given.budgets)}" + (f" with the floors {list(given.floors)}" if any(given.floors) else "")
    reason = None if kept else f"the {said} don't keep the promise ({inputs.promise})"
    return {
        **_about(options, inputs),
        "kept": kept,
        "reason": reason,
        **Setting(inputs.selection, given).to_dict(),
        "batches": found,
    }


def _about(options: CalibrateOptions, inputs: _Inputs) -> dict[str, Any]:
    model = inputs.artifact.manifest.model
    return {
        "schema_version": 2,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
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
            "name": inputs.text.name,
            "bytes": inputs.text.nbytes,
            "sha256": inputs.text.sha256,
            "sequences": options.sequences,
            "length": inputs.length,
            "prompt": options.prompt_length,
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


def _peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _write(folder: Path, result: dict[str, Any]) -> None:
    """All files, each written aside and renamed; `calibration.json` last, since it says that the rest is there."""
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
            aside = folder / f"{name}.partial-{os.getpid()}"
            aside.write_bytes(data)
            aside.replace(folder / name)
    except OSError as error:
        raise CalibrationError(f"can't write to {folder}: {error.strerror or error}; choose another --output") from None


def _update_artifact(inputs: _Inputs, result: dict[str, Any]) -> bool:
    """Put what was found into the manifest, unless it is for parameters that the artifact's graph doesn't have."""
    manifest = inputs.artifact.manifest
    if result["selection"] != asdict(inputs.selection):
        note(
            "the search found better parameters than the artifact was built with, so it stays as it is; "
            f"build it again with --budget {RESULT}, which holds everything that was found"
        )
        return False
    largest = Measurement.from_dict(result["batches"][-1]["shared"])
    record = CalibrationRecord(
        created=result["created"],
        promise={name: value for name, value in result["promise"].items() if isinstance(value, float)},
        batch=result["batch"],
        budgets_by_batch={study["batch"]: study["held_out"]["budgets"] for study in result["batches"]},
        floors_by_batch={study["batch"]: study["held_out"]["floors"] for study in result["batches"]},
        held_out={name: list(getattr(largest, name)) for name in RECORDED},
        text={name: value for name, value in result["text"].items() if name != "bytes"},
        hardware=result["cost_model"]["name"],
        seed=result["seed"],
        versions=result["versions"],
    )
    chosen = SelectionRecord(
        preset=manifest.selection.preset,
        parameters=manifest.selection.parameters,
        budgets=result["budgets"],
        floors=result["floors"],
    )
    replace_manifest(inputs.artifact, manifest.model_copy(update={"selection": chosen, "calibration": record}))
    return True
