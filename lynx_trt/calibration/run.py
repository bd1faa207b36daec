"""A calibration from options to files: read and check, measure and search, write, and update the artifact."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lynx_trt import __version__
from lynx_trt.artifact import TOKENIZER
from lynx_trt.budgets import Restriction, in_words
from lynx_trt.calibration import inputs as reading
from lynx_trt.calibration import options as option
from lynx_trt.calibration import output
from lynx_trt.calibration.inputs import Inputs
from lynx_trt.calibration.journal import Journal, Measured
from lynx_trt.calibration.measure import Meter
from lynx_trt.calibration.model import Setting
from lynx_trt.calibration.options import CalibrateOptions
from lynx_trt.calibration.promise import Promise
from lynx_trt.calibration.study import Parts, Study, run_study
from lynx_trt.console import Progress, note
from lynx_trt.export.weights import WEIGHTS_FILE
from lynx_trt.memory import resident_bytes


def calibrate(options: CalibrateOptions, progress: Progress) -> dict[str, Any]:
    """Measure, search, and write what was found.

    Returns:
        What `calibration.json` holds. Where `kept` is false, `reason` says in a sentence what nothing keeps, or what
        broke; everything measured is written all the same, but not to the artifact.

    Raises:
        LynxError: what is wrong with the options, the artifact, the checkpoint, the text or the disk, in a sentence.
    """
    started = time.perf_counter()
    folder = option.output_folder(options)
    inputs = reading.read(options, progress)
    journal = _journal(options, inputs, folder)
    try:
        result = _study(options, inputs, journal, progress)
        result["seconds"] = round(time.perf_counter() - started, 1)
        result["peak_bytes"] = resident_bytes("peak")
        output.write(folder, result)
        if result["kept"] and options.write and inputs.given is None:
            result["artifact_updated"] = output.update_artifact(inputs, result, folder)
    except BaseException:
        journal.close()
        raise
    journal.close(remove=True)
    return result


def _journal(options: CalibrateOptions, inputs: Inputs, folder: Path) -> Journal:
    manifest = inputs.artifact.manifest
    identity = {
        "version": __version__,
        "model": [manifest.model.name, manifest.model.parameters, manifest.model.precision],
        "weights": [manifest.files[name].sha256 for name in (WEIGHTS_FILE, TOKENIZER) if name in manifest.files],
        "text": inputs.text.sha256,
        "validation text": None if inputs.validation is None else inputs.validation.sha256,
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


def _study(options: CalibrateOptions, inputs: Inputs, journal: Journal, progress: Progress) -> dict[str, Any]:
    meters = {
        name: Meter(
            inputs.probed,
            part,
            prompt=options.prompt_length,
            cost=inputs.cost,
            seed=options.seed,
            threads=options.threads,
        )
        for name, part in inputs.parts.items()
    }

    def measured(part: str, batch: int) -> Measured:
        return Measured(meters[part], batch, part, journal)

    if inputs.given is not None:
        given = [measured("all", batch) for batch in inputs.batches]
        return {**output.about(options, inputs), **_only_measure(inputs, inputs.given, given, progress)}
    assert inputs.promise is not None
    studies: list[Study] = []
    checked: list[Measured] = []
    selection = inputs.selection
    # The largest batch first: its parameters are used for all, since they are the model's and not the batch's.
    for batch in inputs.batches[::-1]:
        parts = Parts(*(measured(part, batch) for part in ("choose", "check", "more")))
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
    reason = _why_not(inputs, inputs.promise, studies)
    return {
        **output.about(options, inputs),
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


def _why_not(inputs: Inputs, promise: Promise, studies: Sequence[Study]) -> str | None:
    """Why the promise is not kept, or None if it is."""
    if inputs.validation is None:
        where, way_out = "on held-out text", "give more text (--sequences), and text of one kind"
    else:
        where = f"on the validation text ({inputs.validation.name})"
        way_out = "choose on text of that kind (--text), or ask for less"
    for study in studies:
        if study.chosen is None:
            return (
                f"nothing that saves 1% of the experts keeps the promise at a batch of {study.batch} ({promise}); "
                f"{study.nearest()}; allow more, or give more text (--sequences), so that less room has to be left for "
                "chance"
            )
        broken = [check for check in study.checks if not check.kept]
        if broken:
            return (
                f"what was chosen for a batch of {study.batch} keeps the promise on the text that it was chosen on, "
                f"but {where} the {broken[0].name} is {broken[0].value:.4g}, above {broken[0].limit:.4g}; {way_out}"
            )
        if study.shared is not None and not promise.is_kept(study.shared):
            return (
                f"what all batch sizes share doesn't keep the promise at a batch of {study.batch}; "
                f"calibrate for --batch {study.batch} alone"
            )
    return None


def _only_measure(inputs: Inputs, given: Restriction, every: Sequence[Measured], progress: Progress) -> dict[str, Any]:
    """Measure the budgets and floors that were given, on all of the text."""
    setting = Setting(inputs.selection, given)
    found: list[dict[str, Any]] = []
    kept = True
    for measured in every:
        update = progress.phase(f"What was given, batch {measured.batch}")
        free, item = measured.measure([measured.meter.unrestricted(), setting])
        checks = inputs.promise.checks(item, 1) if inputs.promise else []
        kept = kept and all(check.kept for check in checks)
        found.append(
            {
                "batch": measured.batch,
                "unrestricted": free.to_dict(),
                "held_out": item.to_dict(),
                "checks": [check._asdict() for check in checks],
            }
        )
        update(1.0)
    words = in_words(given, inputs.probed.experts)
    said = " and ".join(f"the {name} {value}" for name, value in words.items()) or "all experts"
    return {
        "kept": kept,
        "reason": None if kept else f"{said} don't keep the promise ({inputs.promise})",
        **setting.to_dict(),
        "batches": found,
    }
