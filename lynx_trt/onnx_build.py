"""An artifact from somebody else's ONNX file: what `python -m lynx_trt.build model.onnx` does.

The graph's own inputs and outputs stay, so the runtime here, which expects those of our own export, doesn't run such an
artifact; the manifest's `foreign` part says what it takes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lynx_trt.console import Progress, note
from lynx_trt.errors import UsageError
from lynx_trt.memory import resident_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

    from lynx_trt.artifact import Artifact, ForeignRecord, ModelRecord, MoeLayerRecord
    from lynx_trt.build import BuildOptions
    from lynx_trt.export.foreign import Foreign
    from lynx_trt.tensorrt.build import EngineReport

_PRECISION = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}


def is_onnx(path: Path) -> bool:
    """Whether a path names an ONNX file (and not a checkpoint's folder)."""
    return path.suffix == ".onnx" or path.is_file()


@dataclass(frozen=True)
class _Layer:
    """What the choice of a restriction has to know of a block."""

    name: str
    experts: int
    experts_per_token: int
    rule: str | None


@dataclass(frozen=True)
class _Source:
    layers: list[_Layer]


def build_onnx(options: BuildOptions, progress: Progress) -> Artifact:
    """Build an artifact from the ONNX file `options.model`.

    Raises:
        LynxError: whatever is wrong with the options, the file, its MoE blocks or TensorRT, in a sentence.
    """
    from lynx_trt import artifact as artifacts
    from lynx_trt import build as command
    from lynx_trt.export import foreign as pass_
    from lynx_trt.export.foreign_files import write_foreign
    from lynx_trt.export.foreign_finite import refuse_not_finite
    from lynx_trt.selection import PRESETS
    from lynx_trt.tokenizer_files import check_tokenizer, copy_tokenizer

    if options.trust_remote_code:
        raise UsageError("--trust-remote-code means nothing for an ONNX file, which holds no code; leave it out")
    command._parse_ranges(options, None)
    sms = command._sms(options)
    max_length = _max_length(options)
    command._parse_ranges(options, max_length)
    tokenizer = _tokenizer(options)
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    update = progress.phase(f"MoE blocks of {options.model.name}")
    foreign = pass_.read_foreign(options.model, PRESETS[options.preset], dequantize=options.dequantize)
    warnings = pass_.require_all(foreign, allow_partial=options.allow_partial)
    selection, restriction = command._selection(options, _Source(_layers(foreign)))  # type: ignore[arg-type]  # layers are all it reads
    foreign.select(selection)
    update(1.0)
    for line in (*warnings, *foreign.notes):
        note(line)
    update = progress.phase("Reading the weights")
    refuse_not_finite(foreign.stored, options.model, on_progress=lambda done, total: update(done / max(total, 1)))
    foreign.stored.clear()  # what lies inside the .onnx file takes memory
    update(1.0)
    with artifacts.writing(options.output, overwrite=options.overwrite) as folder:
        record: dict[str, Any] = {"options": command._plain(options), "seconds": {}}
        clock = command._Clock(record["seconds"])
        update = progress.phase("Weights")
        nbytes = write_foreign(foreign, folder, on_progress=lambda done, total: update(done / max(total, 1)))
        update(1.0)
        clock.lap("weights")
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
        report, absent = _engine(options, folder, max_length, sms, progress, clock)
        update = progress.phase("Checksums")
        manifest = artifacts.Manifest(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=_model_record(options, foreign, max_length, nbytes),
            selection=artifacts.SelectionRecord.of(options.preset, selection, restriction),
            engine=command.engine_record(report) if report else None,
            engine_absent=absent,
            plugin={"namespace": "lynx", "version": "1"},
            versions=command._versions(report),
            build={**record, "peak_bytes": resident_bytes("peak")},
            foreign=_foreign_record(foreign, warnings),
            files=artifacts.record_files(folder),
        )
        (folder / artifacts.MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        update(1.0)
    return artifacts.Artifact(options.output, manifest)


def _max_length(options: BuildOptions) -> int:
    """Tokens that a cache may hold, where the graph leaves it open."""
    from lynx_trt.build import DEFAULT_MAX_LENGTH

    if options.max_length is not None and options.max_length < 2:
        raise UsageError(f"--max-length is {options.max_length}; it must be 2 or more: a prompt and one new token")
    return options.max_length or DEFAULT_MAX_LENGTH


def _layers(foreign: Foreign) -> list[_Layer]:
    if foreign.blocks:
        return [_Layer(b.name, b.experts, b.experts_per_token, b.rule) for b in foreign.blocks]
    return [_Layer(b.select, b.experts, b.experts_per_token, "as it was" if b.remap else None) for b in foreign.ours]


def _tokenizer(options: BuildOptions) -> Path | None:
    """The folder of the tokenizer, if there is one; onnxruntime-genai and Optimum write it beside the ONNX file."""
    source = options.tokenizer or options.model.parent
    return source if options.tokenizer is not None or any(source.glob("tokenizer*")) else None


def _engine(
    options: BuildOptions, folder: Path, max_length: int, sms: list[int], progress: Progress, clock: Any
) -> tuple[EngineReport | None, str | None]:
    """The engine's report, or why there is none."""
    from lynx_trt import build as command
    from lynx_trt.export.foreign_files import write_standard
    from lynx_trt.export.foreign_profiles import profiles
    from lynx_trt.tensorrt.prepare import input_dims, read

    if options.tensorrt == "none":
        return None, "built with --tensorrt none"
    update = progress.phase("Ops for TensorRT")
    path, _, left = write_standard(folder, cache_rows=max_length)
    for line in left:
        note(line)
    update(1.0)
    decode, prefill, length = command._parse_ranges(options, max_length)
    made = profiles(
        input_dims(read(path)), decode_batch=decode, prefill_batch=prefill, prefill_length=length, max_length=max_length
    )
    # Whoever runs it does so without us, and may let TensorRT make the contexts' memory.
    report = command._build_engine(options, path, made, sms, progress, user_memory=False)
    clock.lap("engine")
    return report, None


def _model_record(options: BuildOptions, foreign: Foreign, max_length: int, nbytes: int) -> ModelRecord:
    from lynx_trt import build as command
    from lynx_trt.artifact import ModelRecord
    from lynx_trt.export.step_inputs import DECODE_MAX_LENGTH

    graph = foreign.model.graph
    layers = _layer_records(foreign)
    dtype = foreign.blocks[0].dtype.name if foreign.blocks else _dtype_of_ours(graph)
    producer = foreign.model.producer_name or "an unnamed exporter"
    return ModelRecord(
        name=command._name(options.model),
        architecture=f"ONNX of {producer}",
        model_type="onnx",
        precision=_PRECISION[dtype],  # type: ignore[arg-type]
        layers=len(layers),
        hidden=_widths(foreign)[0],
        vocabulary=_vocabulary(graph),
        parameters=_parameters(foreign),
        weight_bytes=nbytes,
        max_length=max_length,
        cache_rows=0,
        moe_layers=layers,
        caches=[],
        end_tokens=[],
        decode_max_length=DECODE_MAX_LENGTH,
    )


def _parameters(foreign: Foreign) -> int:
    """How many numbers its weights are: initializers of floating point, and what quantized experts mean."""
    scales = {value for node in _quantized(foreign.model.graph) for value in node.inputs[5:7]}
    values = (value for value in foreign.model.graph.initializers.values() if value not in scales)
    floats = (value.const_value for value in values if value.const_value is not None)
    plain = sum(tensor.size for tensor in floats if tensor.dtype.is_floating_point())
    packed = [(block, block.form["gated"]) for block in foreign.ours if block.form["weights"] != "float"]
    packed += [(block, block.form.gated) for block in foreign.blocks if block.form.quantized]  # type: ignore[misc]
    return plain + sum(b.experts * b.hidden_size * b.intermediate * (3 if gated else 2) for b, gated in packed)


def _quantized(graph: ir.Graph) -> list[ir.Node]:
    """The LynxExperts of quantized weights."""
    from lynx_trt.export import ops

    nodes = (node for node in graph.all_nodes() if (node.domain, node.op_type) == (ops.DOMAIN, ops.EXPERTS))
    return [node for node in nodes if node.attributes.get_string("weights", "float") != "float"]


def _layer_records(foreign: Foreign) -> list[MoeLayerRecord]:
    from lynx_trt.artifact import MoeLayerRecord

    if foreign.blocks:
        return [
            MoeLayerRecord(
                name=block.name,
                experts=block.experts,
                experts_per_token=block.experts_per_token,
                intermediate=block.intermediate,
                expert_bytes=block.expert_bytes,
                form={"pattern": block.pattern, **asdict(block.form)},
                rule=block.rule,
            )
            for block in foreign.blocks
        ]
    return [
        MoeLayerRecord(
            name=block.experts_node,
            experts=block.experts,
            experts_per_token=block.experts_per_token,
            intermediate=block.intermediate,
            expert_bytes=block.expert_bytes,
            form={"pattern": "lynx", **block.form},
            rule="as it was" if block.remap else None,
        )
        for block in foreign.ours
    ]


def _dtype_of_ours(graph: ir.Graph) -> str:
    """That of the experts' weights; of what they are given, where the weights are quantized."""
    from lynx_trt.export import ops

    quantized = _quantized(graph)
    nodes = (n for n in graph.all_nodes() if n.domain == ops.DOMAIN and n.op_type == ops.EXPERTS)
    values = (n.inputs[0 if n in quantized else 4] for n in nodes)
    found = next((value.dtype.name for value in values if value is not None and value.dtype is not None), "FLOAT")
    return found if found in _PRECISION else "FLOAT"


def _vocabulary(graph: ir.Graph) -> int:
    """The last axis of the logits, 0 where that isn't recorded."""
    for value in graph.outputs:
        if value.name == "logits" and value.shape is not None and len(value.shape):
            last = value.shape[-1]
            return last if isinstance(last, int) else 0
    return 0


def _foreign_record(foreign: Foreign, warnings: list[str]) -> ForeignRecord:
    from lynx_trt.artifact import ForeignRecord, ForeignTensor

    graph = foreign.model.graph
    meanings = {item.name: item.meaning for item in foreign.added}

    def tensor(value: Any) -> ForeignTensor:
        sizes = [] if value.shape is None else [s if isinstance(s, int) else str(s.value or "?") for s in value.shape]
        dtype = value.dtype.name.lower() if value.dtype is not None else "unknown"
        return ForeignTensor(name=str(value.name), dtype=dtype, shape=sizes, meaning=meanings.get(str(value.name)))

    return ForeignRecord(
        file=foreign.path.name,
        producer=f"{foreign.model.producer_name or ''} {foreign.model.producer_version or ''}".strip(),
        opset=foreign.opset,
        patterns=dict(foreign.counts),
        phase_known=not any("prefill can't be told" in line for line in foreign.notes),
        inputs=[tensor(value) for value in graph.inputs if not value.is_initializer()],
        outputs=[tensor(value) for value in graph.outputs],
        added=[item.name for item in foreign.added],
        kept=[f"{refusal.node}: {refusal.reason}" for refusal in foreign.refused],
        notes=[*warnings, *foreign.notes],
        packed={block.name: block.packed for block in foreign.blocks if block.packed},
    )


def survey(path: Path) -> dict[str, Any]:
    """What MoE blocks an ONNX file holds, for `python -m lynx_trt.inspect model.onnx`; nothing is written.

    Raises:
        CheckpointError: the file can't be read.
        UnsupportedModelError: its opset can't be raised.
    """
    from lynx_trt.export.foreign import read_foreign
    from lynx_trt.selection import PRESETS

    foreign = read_foreign(path, PRESETS["off"])
    record = _foreign_record(foreign, [])
    blocks = [
        {
            "name": item.name,
            "pattern": item.form["pattern"],
            "experts": item.experts,
            "experts_per_token": item.experts_per_token,
            "hidden": width,
            "intermediate": item.intermediate,
            "form": {key: value for key, value in item.form.items() if key != "pattern"},
            "rule": item.rule,
        }
        for item, width in zip(_layer_records(foreign), _widths(foreign), strict=True)
    ]
    return {
        "file": str(path),
        "producer": record.producer,
        "opset": record.opset,
        "blocks": blocks,
        "not_recognised": [{"node": refusal.node, "reason": refusal.reason} for refusal in foreign.refused],
        "inputs": [item.model_dump() for item in record.inputs],
        "notes": record.notes,
    }


def _widths(foreign: Foreign) -> list[int]:
    return [b.hidden_size for b in foreign.blocks] or [b.hidden_size for b in foreign.ours]


def survey_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The survey's rows: a label and a value each; equal blocks in a row share one."""
    rows = [("exporter", found["producer"] or "unnamed"), ("opset", str(found["opset"]))]
    rows.append(("blocks", f"{len(found['blocks'])} recognised, {len(found['not_recognised'])} not"))
    for block in found["blocks"]:
        form = ", ".join(f"{key} {value}" for key, value in block["form"].items())
        rule = block["rule"] or "unknown rule: tokens can lose experts, not be sent to others"
        sizes = f"E {block['experts']}, K {block['experts_per_token']}, H {block['hidden']}, I {block['intermediate']}"
        rows.append((block["name"], f"{block['pattern']}; {sizes}; {rule}; {form}"))
    return rows
