"""The whole comparison, from an artifact to a report."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lynx_trt.artifact import TOKENIZER, Artifact
from lynx_trt.comparison import footprint, layers, right, speed
from lynx_trt.comparison.runners import BASELINES, CUDA, HF, Opened, Runner, open_runner, specs, try_out
from lynx_trt.comparison.summary import summarize
from lynx_trt.console import Progress
from lynx_trt.errors import LynxError, UnsupportedModelError, UsageError
from lynx_trt.inspect import cache_bytes
from lynx_trt.machine import slots_problem
from lynx_trt.runtime.backend import Array
from lynx_trt.runtime.ort_graphs import PROVIDERS, Device, device_problem

SCHEMA = 1


@dataclass(frozen=True)
class CompareOptions:
    """What is compared and how long. Lengths are in tokens."""

    artifact: Path
    baselines: tuple[str, ...] = BASELINES
    budgets: tuple[str, ...] = ("off", "own")
    batches: tuple[int, ...] = (1, 4, 16)
    checkpoint: Path | None = None
    text: Path | None = None
    prompt: int = 32
    steps: int = 16
    rounds: int = 5
    sequences: int = 4
    providers: tuple[str, ...] = ("cpu",)
    threads: int | None = None
    memory: bool = True
    seed: int = 0


def compare(artifact: Artifact, options: CompareOptions, progress: Progress) -> dict[str, Any]:
    """Compare; the result is the content of report.json.

    Raises:
        LynxError: an option is out of its range, the checkpoint is another model's, or nothing at all could be run.
    """
    check(options)
    providers, problems = _providers(options.providers)
    checkpoint = options.checkpoint or shipped_checkpoint(artifact)
    unsupported = _check_checkpoint(artifact, checkpoint) if options.checkpoint or HF in options.baselines else None
    rows = specs(
        artifact, baselines=options.baselines, budgets=options.budgets, checkpoint=checkpoint, providers=providers
    )
    rows = [replace(row, absent=unsupported) if unsupported and row.name == HF else row for row in rows]
    batches = _batches(artifact, options, problems)
    slots = max(*batches, options.sequences)
    if not providers:
        raise LynxError("nothing can be compared: " + "; ".join(problems))
    problem = slots_problem(slots, cache_bytes(artifact.manifest))
    if problem:
        raise UsageError(f"{problem}; lower --sequences or --batch")
    ids, text = _tokens(artifact, options, slots, problems)
    opened = []
    update = progress.phase("Loading")
    for number, spec in enumerate(rows):
        opened.append(open_runner(artifact, spec, slots, options.threads))
        try_out(opened[-1], ids[:, : options.prompt])
        update((number + 1) / len(rows))
    runners: dict[str, Runner] = {item.spec.name: item.runner for item in opened if item.runner}
    problems += [f"{item.spec.name}: {item.absent}" for item in opened if item.absent]
    if not any(not item.spec.baseline and item.runner for item in opened):
        raise LynxError("nothing can be compared: " + "; ".join(problems))
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "artifact": _describe(artifact),
        "options": _plain(options),
        "machine": _machine(),
        "text": text,
        "baseline": next((name for name in BASELINES if name in runners or f"{name}{CUDA}" in runners), None),
        "problems": problems,
        "runners": [],
    }
    _judge(report, runners, ids, options, progress)
    for item in opened:
        if item.runner and not report["right"][item.spec.name]["finite"]:
            item.notes.append(_not_finite(item.spec.name, report["reference"]))
    update = progress.phase("Speed")
    samples = speed.measure(
        runners, ids, batches, prompt=options.prompt, steps=options.steps, rounds=options.rounds, on_progress=update
    )
    report["samples"] = _with_text_keys(asdict(samples))
    report["summary"] = summarize(report)
    report["layers"] = layers.times(artifact, [item.spec for item in opened if item.runner], ids, options, progress)
    runners.clear()
    for item in opened:
        if item.runner:
            item.runner.close()
            item.runner = None
    report["runners"] = _describe_runners(artifact, opened, options, progress)
    return report


def check(options: CompareOptions) -> None:
    """Refuse options out of their range.

    Raises:
        UsageError: such an option.
    """
    for name in options.baselines:
        if name not in BASELINES:
            raise UsageError(f"--baseline {name} is not known; choose of {', '.join(BASELINES)}")
    for name in ("prompt", "steps", "rounds", "sequences"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} is {getattr(options, name)}; it must be 1 or more")
    if not options.batches or min(options.batches) < 1:
        raise UsageError(f"--batch is {list(options.batches)}; a batch has 1 sequence or more")


def shipped_checkpoint(artifact: Artifact) -> Path | None:
    """The checkpoint that comes with the package, if the artifact was built from it."""
    from lynx_trt.build import SHIPPED, shipped_model

    folder = shipped_model()
    return folder if artifact.manifest.model.name == SHIPPED and folder.is_dir() else None


def _check_checkpoint(artifact: Artifact, checkpoint: Path | None) -> str | None:
    """Why transformers can't run the checkpoint here, None if nothing is known to hinder it.

    Raises:
        CheckpointError: it can't be read, or it is not what the artifact was built from: no reference, then.
    """
    if checkpoint is None:
        return None
    from lynx_trt.calibration.source import open_source

    try:
        open_source(artifact, checkpoint)
    except UnsupportedModelError as error:
        return str(error)
    return None


def _not_finite(name: str, reference: str) -> str:
    judged = "; the others are judged against it, so theirs don't either" if name == reference else ""
    return f"its logits are not all finite numbers, so its perplexity and differences mean nothing{judged}"


def _providers(asked: Sequence[str]) -> tuple[list[Device], list[str]]:
    """Those that can be used here, and a line for each that can't."""
    there: list[Device] = []
    problems = []
    for name in dict.fromkeys(asked):
        device = next((known for known in PROVIDERS if known == name), None)
        if device is None:
            raise UsageError(f"--provider {name} is not known; choose of {', '.join(PROVIDERS)}")
        problem = device_problem(device)
        if problem:
            problems.append(f"provider {name}: {problem}")
        else:
            there.append(device)
    return there, problems


def _batches(artifact: Artifact, options: CompareOptions, problems: list[str]) -> list[int]:
    """The batches within the profile that the artifact was built for."""
    from lynx_trt.tensorrt.profiles import Range

    built = artifact.manifest.build.get("options", {}).get("decode_batch")
    limit = Range.parse(built).max if isinstance(built, str) else None
    kept = [batch for batch in dict.fromkeys(options.batches) if limit is None or batch <= limit]
    for batch in options.batches:
        if batch not in kept:
            problems.append(f"batch {batch}: outside the profile {built} that the artifact was built for")
    if not kept:
        raise UsageError(f"no --batch lies in the profile {built} that the artifact was built for")
    return kept


def _tokens(
    artifact: Artifact, options: CompareOptions, rows: int, problems: list[str]
) -> tuple[Array, dict[str, Any]]:
    """i64 [rows,L] tokens of a text (random ones where there is no tokenizer), and what they are."""
    model = artifact.manifest.model
    length = options.prompt + options.steps + speed.WARM_STEPS
    if length > model.max_length:
        raise UsageError(
            f"--prompt {options.prompt} and --steps {options.steps} need {length} tokens, and the artifact was built "
            f"for {model.max_length}; lower one of them, or build with a larger --max-length if the model takes more"
        )
    generator = np.random.default_rng(options.seed)
    if not artifact.path(TOKENIZER).is_file():
        problems.append("no tokenizer: random tokens, and a perplexity that means nothing")
        return generator.integers(0, model.vocabulary, (rows, length)), {
            "name": "random tokens",
            "tokens": rows * length,
        }
    from lynx_trt.runtime.text import Tokenizer

    path = options.text or Path(platform.__file__)
    try:
        ids = np.array(Tokenizer(artifact.path(TOKENIZER)).encode(path.read_text(encoding="utf-8")), np.int64)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the text {path} can't be read: {error}") from None
    if len(ids) < length + rows:
        raise UsageError(f"the text {path} has {len(ids)} tokens, and {length + rows} are needed; give a longer one")
    starts = generator.choice(len(ids) - length, size=rows, replace=len(ids) - length < rows)
    return np.stack([ids[start : start + length] for start in starts]), {"name": path.name, "tokens": len(ids)}


def _judge(
    report: dict[str, Any], runners: dict[str, Runner], ids: Array, options: CompareOptions, progress: Progress
) -> None:
    """The reference is the checkpoint itself where it is there, else the exported graph with the selection off.

    At the largest batch, where a budget restricts most: a quality at a small one would flatter the speed at a large.
    """
    order = [name for base in reversed(BASELINES) for name in (base, f"{base}{CUDA}")]
    reference = next((name for name in order if name in runners), next(iter(runners)))
    update = progress.phase("Logits and text")
    report["reference"], report["judged_batch"] = reference, len(ids)
    report["right"] = right.judge(runners, ids, prompt=options.prompt, reference=reference, on_progress=update)


def _describe(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "name": manifest.model.name,
        "architecture": manifest.model.architecture,
        "precision": manifest.model.precision,
        "created": manifest.created,
        "preset": manifest.selection.preset,
        "budgets": manifest.selection.budgets,
        "floors": manifest.selection.floors,
        "experts": [layer.experts for layer in manifest.model.moe_layers],
        "experts_per_token": [layer.experts_per_token for layer in manifest.model.moe_layers],
        "expert_bytes": [layer.expert_bytes for layer in manifest.model.moe_layers],
        "files": {name: record.bytes for name, record in manifest.files.items()},
    }


def _describe_runners(
    artifact: Artifact, opened: Sequence[Opened], options: CompareOptions, progress: Progress
) -> list[dict[str, Any]]:
    update = progress.phase("Memory") if options.memory else lambda _: None
    rows = []
    for number, item in enumerate(opened):
        spec = item.spec
        row = {
            "name": spec.name,
            "what": spec.what,
            "baseline": spec.baseline,
            "absent": item.absent,
            "notes": item.notes,
            "budgets": list(spec.restriction.budgets),
            "floors": list(spec.restriction.floors),
            "load_seconds": None if item.absent else item.seconds,
            "memory": None,
        }
        if options.memory and not item.absent and spec.provider == "cpu":  # a GPU's memory is not the process's
            row["memory"] = footprint.measure(artifact, spec, options.threads)
        rows.append(row)
        update((number + 1) / len(opened))
    return rows


def _machine() -> dict[str, Any]:
    import os

    from lynx_trt import __version__

    versions = {"lynx-trt": __version__, "python": platform.python_version(), **_package_versions()}
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": platform.platform(), "versions": versions}


def _package_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("onnxruntime", "onnxruntime-gpu", "torch", "transformers", "polygraphy", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _plain(options: CompareOptions) -> dict[str, Any]:
    """Options for the report; paths by name only, since a report travels and a path of one machine does not."""
    return {
        key: value.name if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for key, value in asdict(options).items()
    }


def _with_text_keys(value: Any) -> Any:
    """JSON has no integer keys; the report is the same before and after it was written."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(item) for key, item in value.items()}
    return value
