"""The artifact: a folder with graph, weights, engine and tokenizer, and `lynx.json` that says what they are.

A folder is written aside and renamed when it is whole, so a name that exists is an artifact that is finished. The
manifest holds the sha256 of every file and the versions of everything that built it; whoever opens one checks first
that it fits (`check`), and says what doesn't.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lynx_trt import __version__
from lynx_trt.budgets import Restriction
from lynx_trt.errors import ArtifactError, UsageError
from lynx_trt.selection import Selection

SCHEMA: Literal[4] = 4
MANIFEST = "lynx.json"
TOKENIZER = "tokenizer.json"
ENGINE = "engine.plan"
DRAWS = "draws.kernels"  # that draw tokens from the engine's logits
# Bytes of files whose sums take seconds.
LONG_TO_READ = 2 * 10**9
CHUNK = 1 << 20


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MoeLayerRecord(_Record):
    """One MoE block; `rule` is how its router ranks and weighs experts, None if no known rule fits."""

    name: str
    experts: int
    experts_per_token: int
    intermediate: int
    expert_bytes: int = Field(description="bytes of one expert's weights in the graph")
    form: dict[str, str | int | float]
    rule: str | None

    @property
    def quantized(self) -> str | None:
        """In what the weights are in the graph, as `weights` of the form has it; None if they are plain numbers."""
        weights = str(self.form.get("weights", "float"))
        return None if weights == "float" else weights


class CacheRecord(_Record):
    """One of the KV caches: the graph reads past_NAME and writes present_NAME, both [B,heads,rows,size].

    Where a token attends to no more than a window, it may be a ring: position p lies in row p modulo the ring's size.
    """

    name: str
    heads: int
    size: int
    rows: int = Field(default=0, description="0: the model's cache_rows")
    window: int = Field(default=0, description="rows of the past that a token attends to; 0: all")
    ring: int = Field(default=0, description="size of the ring; 0: none")


class StateRecord(_Record):
    """What a layer keeps in place of keys and values: the graph reads past_NAME and writes present_NAME, [B,*shape].

    It is zeros before a sequence's first token, and each step's is made of the last one's alone.
    """

    name: str
    shape: list[int]
    precision: Literal["fp32", "fp16", "bf16"]


class ModelRecord(_Record):
    """The model's dimensions. Lengths are in tokens."""

    name: str
    architecture: str
    model_type: str
    precision: Literal["fp32", "fp16", "bf16"]
    layers: int
    hidden: int
    vocabulary: int
    parameters: int
    weight_bytes: int
    max_length: int
    cache_rows: int = Field(description="rows of the cache: max_length, one more for attention sinks, rounded up")
    chunk: int = Field(default=0, description="what no prefill step may cross a multiple of, for its rings; 0: any may")
    moe_layers: list[MoeLayerRecord]
    caches: list[CacheRecord] = Field(description="two a layer; one where it attends to its latents")
    states: list[StateRecord] = Field(default=[], description="of layers that have a state in place of caches")
    end_tokens: list[int]
    decode_max_length: int

    @property
    def rewinds(self) -> int:
        """How many of a sequence's last tokens the caches can be without, as if they had never been."""
        if self.states:
            return 0
        return min((cache.ring - cache.window for cache in self.caches if cache.ring), default=self.max_length)


class SelectionRecord(_Record):
    """The selection: the preset's name, its parameters, and the restriction of each MoE layer."""

    preset: str
    parameters: dict[str, str | int | float | bool]
    budgets: list[int] = Field(description="experts to load in a decode step")
    floors: list[float] = Field(description="votes for each voting token that an expert needs; 0: any")

    @classmethod
    def of(cls, preset: str, selection: Selection, restriction: Restriction) -> SelectionRecord:
        """The record of a selection and a restriction."""
        return cls(
            preset=preset,
            parameters=asdict(selection),
            budgets=list(restriction.budgets),
            floors=list(restriction.floors),
        )

    @property
    def restriction(self) -> Restriction:
        """What decode steps are run under where nobody asks for another."""
        return Restriction(tuple(self.budgets), tuple(self.floors))


class CalibrationRecord(_Record):
    """Where calibrated budgets and floors come from, and what they promise; python -m lynx_trt.calibrate writes it."""

    created: str
    promise: dict[str, float] = Field(description="what they keep, up to this batch size")
    batch: int
    budgets_by_batch: dict[int, list[int]] = Field(description="budgets that keep the promise at each batch size")
    floors_by_batch: dict[int, list[float]] = Field(description="floors that go with them")
    held_out: dict[str, list[float]] = Field(description="each metric on held-out text: mean, 95% interval")
    text: dict[str, str | int]
    hardware: str
    seed: int
    versions: dict[str, str]


class FileRecord(_Record):
    """One file of the artifact."""

    bytes: int
    sha256: str


class EngineRecord(_Record):
    """How the engine was built, and what it needs to run. Sizes are in bytes, times in seconds."""

    flavor: str
    tensorrt: str
    expert_weights: Literal["engine", "external"]
    compute_capabilities: list[int] = Field(description="SMs that there are kernels for; empty: it can't run")
    kernels: dict[str, Any] | None = Field(default=None, description="sms, cubins, bytes of all, seconds to compile")
    seconds: float
    peak_bytes: int
    plan_bytes: int
    plugin_layers: dict[str, int]
    profiles: list[dict[str, Any]]
    tensors: list[dict[str, Any]]
    external: list[dict[str, Any]]
    warnings: list[str]


class ForeignTensor(_Record):
    """An input or output of a graph that others exported; `meaning` is about those that were added."""

    name: str
    dtype: str
    shape: list[int | str]
    meaning: str | None = None


class ForeignRecord(_Record):
    """Where a graph with inputs of its own came from, what was rewritten in it, and what it takes."""

    file: str
    producer: str
    opset: int
    patterns: dict[str, int] = Field(description="rewritten MoE blocks by the form they had")
    phase_known: bool = Field(description="the graph tells prefill from decode; otherwise budgets apply to every step")
    inputs: list[ForeignTensor]
    outputs: list[ForeignTensor]
    added: list[str]
    kept: list[str] = Field(description="blocks that stay as they were, and why")
    notes: list[str]
    packed: dict[str, dict[str, Any]] = Field(description="where quantized weights lie that were dequantized, by block")


class Manifest(_Record):
    """`lynx.json`."""

    schema_version: Literal[4] = SCHEMA
    created: str
    model: ModelRecord
    selection: SelectionRecord
    calibration: CalibrationRecord | None = None
    engine: EngineRecord | None
    engine_absent: str | None = Field(default=None, description="why there is no engine")
    plugin: dict[str, str]
    versions: dict[str, str]
    build: dict[str, Any]
    foreign: ForeignRecord | None = Field(default=None, description="of a graph that others exported")
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Artifact:
    """An opened artifact."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Path of one of its files."""
        return self.folder / name


@contextmanager
def writing(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `target` that becomes `target` when the block ends well, and is removed when it doesn't.

    Raises:
        UsageError: `target` exists and may not, or is something that we didn't make, or its parent is no folder.
    """
    from lynx_trt.partials import partial

    target = target.absolute()
    _refuse_target(target, overwrite)
    with ExitStack() as stack:
        try:
            aside = stack.enter_context(partial(target))
        except OSError as error:
            raise UsageError(
                f"can't write to {target.parent}: {error.strerror or error}; choose another --output"
            ) from None
        try:
            yield aside
            _replace(aside, target)
        except OSError as error:
            raise ArtifactError(
                f"writing {target} failed: {error.strerror or error}; nothing was left behind: make room there, or "
                "choose another --output"
            ) from error


def _refuse_target(target: Path, overwrite: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise UsageError(f"{target} exists and is not a folder; choose another --output")
    if not any(target.iterdir()):
        return
    if not (target / MANIFEST).is_file():
        raise UsageError(f"{target} exists and is no artifact, so it is not touched; choose another --output")
    if not overwrite:
        raise UsageError(f"{target} exists; choose another --output, or pass --overwrite to replace this artifact")


def _replace(aside: Path, target: Path) -> None:
    """Rename `aside` to `target`; an artifact that was there goes only after the new one is in place."""
    if not target.exists():
        aside.rename(target)
        return
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file in `folder` but the manifest."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    return {name: FileRecord(bytes=(folder / name).stat().st_size, sha256=sha256(folder / name)) for name in names}


def sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex digest of a file, read in pieces; `on_bytes` is called with the size of each."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK):
            digest.update(piece)
            if on_bytes:
                on_bytes(len(piece))
    return digest.hexdigest()


def read(folder: Path) -> Artifact:
    """Open an artifact without looking at its files.

    Raises:
        ArtifactError: no such folder, no manifest, or one that this version can't read.
    """
    if not folder.exists():
        raise ArtifactError(f"no such artifact: {folder}; build one with python -m lynx_trt.build")
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} is no artifact: it holds no {MANIFEST}; build one with python -m lynx_trt.build")
    try:
        text = path.read_text(encoding="utf-8")
        return Artifact(folder, Manifest.model_validate_json(text))
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} can't be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(
            f"{path} is not a manifest that lynx-trt {__version__} reads: {where}: {first['msg']}; "
            "build the artifact again"
        ) from None


def replace_manifest(artifact: Artifact, manifest: Manifest) -> Artifact:
    """The artifact with another manifest, on disk too: written aside and renamed, so it is never half of one.

    Raises:
        ArtifactError: it can't be written; the one that was there stays.
    """
    from lynx_trt.partials import write_file

    path = artifact.path(MANIFEST)
    try:
        write_file(path, (manifest.model_dump_json(indent=2) + "\n").encode())
    except OSError as error:
        raise ArtifactError(f"{path} can't be written: {error.strerror or error}; it stays as it was") from None
    return Artifact(artifact.folder, manifest)


def open_artifact(folder: Path, *, verify: bool = True, on_progress: Callable[[float], None] | None = None) -> Artifact:
    """Open an artifact and, unless told not to, check that every file is the one that was built (`check_files`).

    Raises:
        ArtifactError: it can't be read, a file is missing or changed (the message names the first), or its graph is one
            that others exported, which the runtime here doesn't know to feed.
    """
    artifact = read(folder)
    if verify and (problems := check_files(artifact, on_progress)):
        more = f" (and {len(problems) - 1} more: python -m lynx_trt.inspect {folder})" if len(problems) > 1 else ""
        raise ArtifactError(problems[0] + more)
    if artifact.manifest.foreign is not None:
        raise ArtifactError(
            f"{folder} was built from {artifact.manifest.foreign.file}, an ONNX file with inputs of its own, "
            "which this command can't run; run its model.onnx or engine with what ran the original "
            f"({MANIFEST} names its inputs)"
        )
    return artifact


def check_files(artifact: Artifact, on_progress: Callable[[float], None] | None = None) -> list[str]:
    """One line for each file that is missing or is not what was built.

    What takes no reading comes first. `on_progress` is called with the fraction that is done, if it takes seconds.
    """
    problems: list[str] = []
    whole: dict[Path, FileRecord] = {}
    for name, record in artifact.manifest.files.items():
        path = artifact.path(name)
        if Path(name).name != name:
            problems.append(f"{MANIFEST} names {name!r}, which is outside the artifact")
        elif not path.is_file():
            problems.append(f"{path} is missing; build the artifact again")
        elif (size := path.stat().st_size) != record.bytes:
            problems.append(
                f"{path} has {size} bytes, the manifest says {record.bytes}; copy or build the artifact again"
            )
        else:
            whole[path] = record
    total, done = sum(record.bytes for record in whole.values()), 0

    def on_bytes(number: int) -> None:
        nonlocal done
        done += number
        if on_progress and total >= LONG_TO_READ:
            on_progress(done / total)

    for path, record in whole.items():
        if sha256(path, on_bytes) != record.sha256:
            problems.append(f"{path} was changed since it was built (sha256 differs); copy or build the artifact again")
    return problems
