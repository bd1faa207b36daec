"""`python -m lynx_trt.build`: a checkpoint becomes an artifact: lynx ONNX, weights, TensorRT engine, manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lynx_trt.console import Progress, new_app, note, print_json, run, size
from lynx_trt.errors import CheckpointError, UsageError
from lynx_trt.memory import resident_bytes

if TYPE_CHECKING:
    from lynx_trt.artifact import Artifact, EngineRecord, Manifest, ModelRecord
    from lynx_trt.budgets import Restriction
    from lynx_trt.export.checkpoint import Checkpoint
    from lynx_trt.export.hf import Chunk, Exported, Source
    from lynx_trt.selection import Selection
    from lynx_trt.tensorrt.build import EngineReport
    from lynx_trt.tensorrt.profiles import Profile

Precision = Literal["fp16", "bf16", "fp32"]
Flavor = Literal["auto", "full", "rtx", "none"]
ExpertWeights = Literal["engine", "external"]
Preset = Literal["off", "lynx", "lynx-latency", "lynx-accuracy", "lynx-affinity", "oea", "xshare"]

SHIPPED = "lynx-tiny"
DEFAULT_MAX_LENGTH = 2048
DEFAULT_PREFILL_LENGTH = (1, 128, 512)
# Bytes of weights from which on those of the experts stay outside the engine: inside they cost the build three times
# their size in memory, and most of its time.
OUTSIDE_FROM = 2 * 10**9


@dataclass(frozen=True)
class BuildOptions:
    """Everything that decides what is built; ranges are MIN:OPT:MAX, lengths in tokens."""

    model: Path
    output: Path
    preset: Preset = "lynx"
    budget: str | None = None
    floor: float | None = None
    precision: Precision | None = None  # None: the checkpoint's own
    decode_batch: str = "1:8:64"
    prefill_batch: str = "1:1:8"
    prefill_length: str | None = None
    max_length: int | None = None
    tensorrt: Flavor = "auto"
    expert_weights: ExpertWeights | None = None  # None: by the size of a checkpoint's; engine for an ONNX file
    sm: str = "auto"
    tokenizer: Path | None = None
    overwrite: bool = False
    trust_remote_code: bool = False
    allow_partial: bool = False
    dequantize: bool = False  # also what could be kept as it is stored
    # Without, the weights file is a hole: the graph of a model whose weights nobody has, to measure its speed.
    weight_data: bool = True


def shipped_model() -> Path:
    """Folder of the model that comes with the package."""
    import lynx_trt.models

    return Path(lynx_trt.models.__file__).parent / SHIPPED


def _name(source: Path) -> str:
    """What an artifact is called by default: `out/NAME`; exporters call every ONNX file model.onnx."""
    path = source.resolve()
    return path.name if path.suffix != ".onnx" else path.parent.name if path.stem == "model" else path.stem


def build(options: BuildOptions, progress: Progress) -> Artifact:
    """Build an artifact.

    Raises:
        LynxError: whatever is wrong with the options, the checkpoint, the model or TensorRT, in a sentence.
    """
    from lynx_trt.onnx_build import build_onnx, is_onnx

    if is_onnx(options.model):
        return build_onnx(options, progress)
    if options.allow_partial:
        raise UsageError(
            "--allow-partial means nothing for a checkpoint, of which all MoE blocks are known; leave it out"
        )
    from lynx_trt import artifact as artifacts
    from lynx_trt.export.checkpoint import open_checkpoint
    from lynx_trt.export.hf import Chunk, read_source
    from lynx_trt.tokenizer_files import check_tokenizer, copy_tokenizer

    _parse_ranges(options, None)
    sms = _sms(options)
    checkpoint = open_checkpoint(options.model, trust_remote_code=options.trust_remote_code)
    precision: Precision = options.precision or checkpoint.precision
    max_length = _max_length(options, checkpoint)
    _, _, length = _parse_ranges(options, max_length)
    end_tokens = _end_tokens(checkpoint)
    tokenizer = options.tokenizer or options.model
    check_tokenizer(tokenizer)
    with artifacts.writing(options.output, overwrite=options.overwrite) as folder:
        seconds: dict[str, float] = {}
        clock = _Clock(seconds)
        update = progress.phase("Reading the model")
        source = read_source(checkpoint, precision, dequantize=options.dequantize)
        where: ExpertWeights = "external" if source.weights.nbytes >= OUTSIDE_FROM else "engine"
        options = replace(options, precision=precision, expert_weights=options.expert_weights or where)
        build_record: dict[str, Any] = {"options": _plain(options), "seconds": seconds}
        if source.left_out:
            note(
                f"the artifact takes text alone: the {source.left_out / 1e6:,.1f} M parameters of {options.model} for "
                "images or sound are left out"
            )
        if source.quantization:
            now, before = size(source.weights.nbytes), size(source.weights.stored_bytes)
            sizes = f"all weights take {now}{f' instead of {before}' if now != before else ''}"
            note(f"{source.quantization.in_words(precision)}; {sizes}")
            build_record["quantization"] = asdict(source.quantization)
        if unused := source.weights.unused:
            layers = f"{len(source.caches)} layer{'s' if len(source.caches) > 1 else ''}"
            note(
                f"{len(unused)} of the {len(checkpoint.tensors)} tensors in {checkpoint.folder} are not used, for "
                f"config.json, of {layers}, has no place for them; the first is {unused[0]!r}"
            )
        selection, restriction = _selection(options, source)
        update(1.0)
        chunk = Chunk(length.min, length.max)
        exported, weight_bytes = _export(
            source, checkpoint, max_length, selection, folder, progress, clock, chunk=chunk, data=options.weight_data
        )
        copy_tokenizer(tokenizer, folder)
        if options.tensorrt != "none":
            _note_long_caches(options, exported, max_length)
        report, absent = _engine(options, folder, max_length, sms, progress, clock)
        model = _model_record(options.model, precision, end_tokens, exported, max_length, weight_bytes)
        if report and sms:
            from lynx_trt.tensorrt.kernels import write_draws

            update = progress.phase("Compiling the draws of tokens")
            write_draws(folder / artifacts.DRAWS, model.vocabulary, sms, update)
            clock.lap("draws")
        update = progress.phase("Checksums")
        manifest = artifacts.Manifest(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=model,
            selection=artifacts.SelectionRecord.of(options.preset, selection, restriction),
            engine=engine_record(report) if report else None,
            engine_absent=absent,
            plugin={"namespace": "lynx", "version": "1"},
            versions=_versions(report),
            build={**build_record, "peak_bytes": resident_bytes("peak")},
            files=artifacts.record_files(folder) if options.weight_data else {},
        )
        (folder / artifacts.MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        update(1.0)
    return artifacts.Artifact(options.output, manifest)


class _Clock:
    """Seconds of each phase, in the order in which they end."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] = round(now - self._last, 2)
        self._last = now


def _parse_ranges(options: BuildOptions, max_length: int | None) -> tuple[Any, Any, Any]:
    """The three ranges; before anything is read (without max_length) only their form is checked."""
    from lynx_trt.tensorrt.profiles import Range

    decode, prefill = Range.parse(options.decode_batch), Range.parse(options.prefill_batch)
    if options.prefill_length is not None:
        length = Range.parse(options.prefill_length)
    else:
        length = Range(*(min(value, max_length or value) for value in DEFAULT_PREFILL_LENGTH))
    if max_length is not None and length.max > max_length:
        raise UsageError(
            f"--prefill-length {length} goes beyond --max-length {max_length}; lower its maximum to {max_length}"
        )
    return decode, prefill, length


def _max_length(options: BuildOptions, checkpoint: Checkpoint) -> int:
    limit = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 0 else None
    if options.max_length is None:
        return min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if options.max_length < 2:
        raise UsageError(f"--max-length is {options.max_length}; it must be 2 or more: a prompt and one new token")
    if limit and options.max_length > limit:
        raise UsageError(f"--max-length is {options.max_length}, but the model was made for {limit} tokens at most")
    return options.max_length


def _export(
    source: Source,
    checkpoint: Checkpoint,
    max_length: int,
    selection: Selection,
    folder: Path,
    progress: Progress,
    clock: _Clock,
    *,
    chunk: Chunk,
    data: bool,
) -> tuple[Exported, int]:
    update = progress.phase("Export to ONNX")
    from lynx_trt.export.hf import trace
    from lynx_trt.export.write import write_onnx

    exported = trace(source, max_length=max_length, selection=selection, chunk=chunk)
    update(1.0)
    clock.lap("export")
    update = progress.phase(f"Weights ({size(source.weights.nbytes)})")
    weight_bytes = write_onnx(exported, folder, data=data, on_progress=lambda done, total: update(done / max(total, 1)))
    clock.lap("weights")
    return exported, weight_bytes


def _selection(options: BuildOptions, source: Source) -> tuple[Selection, Restriction]:
    """The selection as it will be in the graph, and the restriction."""
    from lynx_trt import budgets as dial
    from lynx_trt.selection import PRESETS

    selection = PRESETS[options.preset]
    if options.budget is not None and options.preset != "off":
        selection = dial.selection_in(options.budget) or selection
        if selection != PRESETS[options.preset]:
            note(f"{options.budget} brings its own parameters, which replace those of --preset {options.preset}")
    experts = [layer.experts for layer in source.layers]
    k = min(layer.experts_per_token for layer in source.layers)
    unruly = [layer for layer in source.layers if layer.rule is None]
    if unruly and selection.remap and options.preset != "off":
        note(
            f"{len(unruly)} of {len(experts)} routers follow no known rule (first: {unruly[0].name}); "
            "their tokens can lose experts but not be sent to others (drop instead of remap)"
        )
    if unruly:
        selection = replace(selection, remap=False)
    if options.preset == "off":
        for name, value in (("--budget", options.budget), ("--floor", options.floor)):
            if value is not None:
                raise UsageError(f"{name} {value} means nothing with --preset off, which uses all experts")
        return selection, dial.Restriction(tuple(experts))
    if options.budget is not None:
        chosen = dial.parse_budget(options.budget, experts)
    elif options.floor is not None:  # as many as have the votes
        chosen = dial.Restriction(tuple(experts))
    elif options.preset == "oea":
        chosen = dial.Restriction((0,) * len(experts))
    else:
        chosen = dial.default_restriction(selection, experts, k)
    chosen = dial.with_floor(chosen, options.floor)
    dial.check_leaves_experts(chosen, selection, k)
    return selection, chosen


def _sms(options: BuildOptions) -> list[int]:
    """The SMs that the engine is to have kernels for. Raises UsageError: one that it can't run on."""
    from importlib.util import find_spec

    from lynx_trt.plugins.aot import INSTALL
    from lynx_trt.plugins.launch import SMS
    from lynx_trt.tensorrt.gpu import unbuildable
    from lynx_trt.tensorrt.loader import likely

    known = ", ".join(map(str, SMS))
    words = [] if options.sm in ("auto", "none") else options.sm.split(",")
    if not all(word.strip().isdecimal() and int(word) in SMS for word in words):
        raise UsageError(f"--sm is {options.sm!r}: it has to be auto, none or numbers of {known}, as in 80,89")
    if options.sm == "none" or options.tensorrt == "none":
        return []
    compiler = find_spec("triton") is not None
    if words and not compiler:
        raise UsageError(f"--sm {options.sm} needs the Triton language, which compiles the GPU kernels: {INSTALL}")
    asked = sorted({int(word) for word in words})
    flavor = likely(options.tensorrt)
    if flavor and (reason := unbuildable(flavor, asked)):
        raise UsageError(f"--sm {options.sm}: {reason}; or name others with --sm")
    return asked or _sms_here(flavor, compiler=compiler)


def _sms_here(flavor: str | None, *, compiler: bool) -> list[int]:
    """The SMs of this machine's GPUs that the engine can run on; without any, a note says why it won't run."""
    from lynx_trt.plugins.aot import INSTALL
    from lynx_trt.plugins.launch import SMS
    from lynx_trt.tensorrt.gpu import compute_capabilities, unbuildable

    here = sorted({sm for sm in compute_capabilities() if sm in SMS})
    reasons = {sm: unbuildable(flavor, [sm]) if flavor else None for sm in here}
    found = [sm for sm in here if reasons[sm] is None]
    if not here:
        note("no GPU here to make kernels for, so the engine won't run; --sm 89, for one, makes those of an L40S")
    elif not found:
        note(f"the engine gets no GPU kernels and won't run: {reasons[here[0]]}")
    elif not compiler:
        note(f"the engine gets no GPU kernels and won't run: their compiler is not installed: {INSTALL}")
        return []
    return found


def _note_long_caches(options: BuildOptions, exported: Exported, max_length: int) -> None:
    """Say what scratch memory attention may take that TensorRT has no fused kernel for."""
    from lynx_trt.tensorrt.prepare import FUSED_ROWS

    if exported.cache_rows <= FUSED_ROWS:
        return
    decode, prefill, length = _parse_ranges(options, max_length)
    heads = int(getattr(exported.source.model.config.get_text_config(), "num_attention_heads", 1))
    scores = 2 * heads * exported.cache_rows * max(decode.max, prefill.max * length.max)
    note(
        f"TensorRT may have no fused attention for caches of more than {FUSED_ROWS} rows; then it keeps all scores of "
        f"a step, up to {size(scores)} of scratch memory with these profiles; smaller --prefill-batch and "
        f"--prefill-length take less, --max-length {FUSED_ROWS - 8} takes none"
    )


def _engine(
    options: BuildOptions, folder: Path, max_length: int, sms: list[int], progress: Progress, clock: _Clock
) -> tuple[EngineReport | None, str | None]:
    """The engine's report, or why there is none."""
    if options.tensorrt == "none":
        return None, "built with --tensorrt none"
    from lynx_trt.export.write import ONNX_FILE
    from lynx_trt.tensorrt.prepare import input_dims, read
    from lynx_trt.tensorrt.profiles import decode_and_prefill

    decode, prefill, length = _parse_ranges(options, max_length)
    profiles = decode_and_prefill(
        input_dims(read(folder / ONNX_FILE)), decode_batch=decode, prefill_batch=prefill, prefill_length=length
    )
    report = _build_engine(options, folder / ONNX_FILE, profiles, sms, progress, user_memory=True)
    clock.lap("engine")
    return report, None


def _build_engine(
    options: BuildOptions,
    onnx: Path,
    profiles: Sequence[Profile],
    sms: list[int],
    progress: Progress,
    *,
    user_memory: bool,
) -> EngineReport:
    """Build the engine of a graph, beside it."""
    from lynx_trt.artifact import ENGINE
    from lynx_trt.tensorrt.build import KERNELS_PHASE, build_engine

    assert options.tensorrt != "none"
    phases: dict[str, Callable[[float], None]] = {}

    def on_progress(event: Any) -> None:
        if event.phase not in phases:
            own = event.phase == KERNELS_PHASE
            phases[event.phase] = progress.phase(event.phase if own else f"TensorRT: {event.phase}")
        phases[event.phase](event.fraction)

    report = build_engine(
        onnx,
        onnx.with_name(ENGINE),
        profiles,
        flavor=options.tensorrt,
        expert_weights=options.expert_weights or "engine",
        sms=sms,
        user_memory=user_memory,
        on_progress=on_progress,
        on_message=lambda message: progress.say(f"TensorRT {message.severity}: {message.text}"),
    )
    for update in phases.values():
        update(1.0)
    return report


def _model_record(
    checkpoint: Path,
    precision: Precision,
    end_tokens: list[int],
    exported: Exported,
    max_length: int,
    weight_bytes: int,
) -> ModelRecord:
    from lynx_trt.artifact import CacheRecord, ModelRecord, MoeLayerRecord, StateRecord
    from lynx_trt.export.hf import DECODE_MAX_LENGTH, DTYPES, CacheShape, StateShape

    config = exported.source.model.config.get_text_config()
    kept = [shape for layer in exported.source.caches for shape in layer]
    names = {dtype: name for name, dtype in DTYPES.items()}
    return ModelRecord(
        name=checkpoint.resolve().name,
        architecture=type(exported.source.model).__name__,
        model_type=str(exported.source.model.config.model_type),
        precision=precision,
        layers=len(exported.source.caches),
        hidden=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        parameters=exported.source.parameters,
        weight_bytes=weight_bytes,
        max_length=max_length,
        cache_rows=exported.cache_rows,
        moe_layers=[
            MoeLayerRecord(
                name=layer.name,
                experts=layer.experts,
                experts_per_token=layer.experts_per_token,
                intermediate=layer.intermediate,
                expert_bytes=layer.expert_bytes,
                form=asdict(layer.form),
                rule=str(layer.rule) if layer.rule else None,
            )
            for layer in exported.source.layers
        ],
        chunk=exported.chunk,
        caches=[
            CacheRecord(**{**asdict(shape), "rows": shape.rows if shape.ring else 0})
            for shape in kept
            if isinstance(shape, CacheShape)
        ],
        states=[
            StateRecord(name=shape.name, shape=list(shape.shape), precision=names[shape.dtype])  # type: ignore[arg-type]
            for shape in kept
            if isinstance(shape, StateShape)
        ],
        end_tokens=end_tokens,
        decode_max_length=DECODE_MAX_LENGTH,
    )


def _end_tokens(checkpoint: Checkpoint) -> list[int]:
    """Ids that end a sequence: the generation config's, else the config's."""
    import json

    from lynx_trt.export.config import end_tokens

    found: Any = None
    path = checkpoint.folder / "generation_config.json"
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError):
            raise CheckpointError(f"{path} can't be read as JSON; mend or remove it") from None
    if found is None:
        found = getattr(checkpoint.config.get_text_config(), "eos_token_id", None)
        path = checkpoint.folder / "config.json"
    ids = end_tokens(found, path)
    # Told and not refused: models that were cut down for tests keep the ids of the vocabulary they had.
    known = int(checkpoint.config.get_text_config().vocab_size)
    for token in (unknown := [token for token in ids if not 0 <= token < known]):
        note(f"{path} has eos_token_id {token}, but the model has the tokens 0 to {known - 1}: no text ends with it")
    return [token for token in ids if token not in unknown]


def engine_record(report: EngineReport) -> EngineRecord:
    """What the manifest says of an engine that was built."""
    from lynx_trt.artifact import EngineRecord

    return EngineRecord(
        flavor=report.flavor,
        tensorrt=report.version,
        expert_weights="external" if report.external else "engine",
        compute_capabilities=list(report.kernels.sms),
        kernels=asdict(report.kernels),
        seconds=round(report.seconds, 2),
        peak_bytes=report.peak_bytes,
        plan_bytes=report.plan_bytes,
        plugin_layers=report.plugin_layers,
        profiles=[asdict(profile) for profile in report.profiles],
        tensors=[asdict(tensor) for tensor in report.io],
        external=[asdict(item) for item in report.external],
        warnings=[message.text for message in report.messages],
    )


def _versions(report: EngineReport | None) -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("lynx-trt", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if report:
        found["tensorrt"] = f"{report.version} ({report.flavor})"
    return found


def _plain(options: BuildOptions) -> dict[str, Any]:
    """Options for the manifest; paths by name only, since an artifact travels and a path of one machine does not."""
    values = asdict(options)
    return {key: value.name if isinstance(value, Path) else value for key, value in values.items()}


def summary(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """What a build came to, for --json."""
    engine = manifest.engine
    return {
        "artifact": str(folder),
        "model": manifest.model.name,
        "architecture": manifest.model.architecture,
        "moe_layers": len(manifest.model.moe_layers),
        "preset": manifest.selection.preset,
        "budgets": manifest.selection.budgets,
        "floors": manifest.selection.floors,
        "weight_bytes": manifest.model.weight_bytes,
        "quantization": manifest.build.get("quantization"),
        "engine": None
        if engine is None
        else {
            "path": str(folder / "engine.plan"),
            "flavor": engine.flavor,
            "tensorrt": engine.tensorrt,
            "seconds": engine.seconds,
            "peak_bytes": engine.peak_bytes,
            "plan_bytes": engine.plan_bytes,
            "compute_capabilities": engine.compute_capabilities,
            "kernels": engine.kernels,
        },
        "seconds": manifest.build["seconds"],
        "peak_bytes": manifest.build["peak_bytes"],
    }


app = new_app()


@app.command()
def main(
    model: Annotated[
        Path | None,
        typer.Argument(help="Hugging Face checkpoint folder, or an ONNX file. Without it: the shipped lynx-tiny."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Artifact folder [default: out/NAME].")] = None,
    preset: Annotated[Preset, typer.Option(help="Selection policy; off keeps the model's own routing.")] = "lynx",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Experts a MoE layer may load in a decode step: a number, a fraction (0.5), or a JSON file with one "
            "number a layer [default: no limit beside the floor of the preset lynx, else a quarter of the experts]."
        ),
    ] = None,
    floor: Annotated[
        float | None,
        typer.Option(
            help="Votes for each voting token that an expert needs to be loaded (0.01), beside its place within "
            "the budget; without --budget as many are loaded as have them [default: a quarter of an even share for the "
            "preset lynx without --budget, else 0: any vote will do]."
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Of weights, activations and cache; an ONNX file keeps its own [default: the checkpoint's, fp16 if "
            "that is fp32]."
        ),
    ] = None,
    decode_batch: Annotated[str, typer.Option(help="Sequences in a decode step, MIN:OPT:MAX.")] = "1:8:64",
    prefill_batch: Annotated[str, typer.Option(help="Sequences in a prefill step, MIN:OPT:MAX.")] = "1:1:8",
    prefill_length: Annotated[
        str | None, typer.Option(help="Tokens a sequence in a prefill step, MIN:OPT:MAX [default: 1:128:512].")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens a sequence may have in all [default: the model's limit, at most 2048].")
    ] = None,
    tensorrt: Annotated[Flavor, typer.Option(help="Which TensorRT builds the engine; none: ONNX only.")] = "auto",
    expert_weights: Annotated[
        ExpertWeights | None,
        typer.Option(
            help="Inside the engine, or outside and bound at run time, for a quarter of the build's memory and time "
            "[default: outside if all weights take 2 GB or more; inside for an ONNX file]."
        ),
    ] = None,
    sm: Annotated[
        str,
        typer.Option(
            help="GPUs to make kernels for: numbers such as 80,89 (A100, L40S), none, or auto: those of this machine. "
            "An H100 or B200 (90, 100) needs full TensorRT, on its own machine."
        ),
    ] = "auto",
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the tokenizer, if not the checkpoint's.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings along.")
    ] = False,
    allow_partial: Annotated[
        bool,
        typer.Option("--allow-partial", help="Of an ONNX file: leave MoE blocks that are not recognised as they are."),
    ] = False,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize",
            help="Dequantize all weights, also experts in MXFP4 (gpt-oss), FP8 (DeepSeek-V3, Qwen3), NVFP4 and int4 "
            "(GPTQ, AWQ, compressed-tensors, QMoE), which in fp16 and bf16 stay as they are stored, a quarter or half "
            "of the size; weights quantized by another method always are.",
        ),
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON; no progress.")] = False,
) -> None:
    """Turn a Mixture-of-Experts checkpoint into an artifact: ONNX with batch-aware selection, and a TensorRT engine."""
    source = model or shipped_model()
    _refuse_precision_of_onnx(source, precision)
    options = BuildOptions(
        model=source,
        output=output or Path("out") / _name(source),
        preset=preset,
        budget=budget,
        floor=floor,
        precision=precision,
        decode_batch=decode_batch,
        prefill_batch=prefill_batch,
        prefill_length=prefill_length,
        max_length=max_length,
        tensorrt=tensorrt,
        expert_weights=expert_weights,
        sm=sm,
        tokenizer=tokenizer,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        allow_partial=allow_partial,
        dequantize=dequantize,
    )
    with Progress(quiet=json_output) as progress:
        artifact = build(options, progress)
    if json_output:
        print_json(summary(artifact.manifest, artifact.folder))
    else:
        _tell(artifact)


def _refuse_precision_of_onnx(source: Path, precision: Precision | None) -> None:
    from lynx_trt.onnx_build import is_onnx

    if precision is not None and is_onnx(source):
        raise UsageError(
            f"--precision {precision} means nothing for an ONNX file, which keeps its own; leave it out, or export the "
            f"file again in {precision}"
        )


def _kernels_line(engine: EngineRecord) -> str:
    if not engine.compute_capabilities or engine.kernels is None:
        return "GPU kernels: none, so the engine can't run"
    has = ", ".join(map(str, engine.compute_capabilities))
    made = engine.kernels
    return f"GPU kernels: {made['cubins']} for SM {has}, {size(made['bytes'])}, made in {made['seconds']:.1f} s"


def _tell(artifact: Artifact) -> None:
    from lynx_trt.budgets import in_words
    from lynx_trt.experts import weights_in_words
    from lynx_trt.tensorrt.gpu import PRODUCTS

    manifest, engine = artifact.manifest, artifact.manifest.engine
    layers, packed = len(manifest.model.moe_layers), manifest.model.moe_layers[0].quantized
    typer.echo(
        f"Rewrote {layers} MoE blocks of {manifest.model.architecture}; weights {size(manifest.model.weight_bytes)} in "
        f"{manifest.model.precision}{', the experts in ' + weights_in_words(packed) if packed else ''}"
    )
    chosen = manifest.selection
    limits = in_words(chosen.restriction, [layer.experts for layer in manifest.model.moe_layers])
    typer.echo("; ".join([f"Selection: {chosen.preset}", *(f"{name} {words}" for name, words in limits.items())]))
    if engine:
        product = PRODUCTS[engine.flavor]
        typer.echo(
            f"Engine: {artifact.path('engine.plan')} ({size(engine.plan_bytes)}), built by {product} {engine.tensorrt} "
            f"in {engine.seconds:.1f} s with {size(engine.peak_bytes)} of memory at its peak"
        )
        typer.echo(_kernels_line(engine))
    else:
        typer.echo(f"Engine: none ({manifest.engine_absent})")
    seconds = sum(manifest.build["seconds"].values())
    peak = size(manifest.build["peak_bytes"])
    typer.echo(f"Artifact: {artifact.folder} in {seconds:.1f} s; export with {peak} of memory at its peak")


if __name__ == "__main__":
    run(app)
