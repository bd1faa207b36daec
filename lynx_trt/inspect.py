"""`python -m lynx_trt.inspect`: what is in an artifact, and does it fit this machine."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lynx_trt.console import Progress, fail, new_app, note, print_json, run, size

if TYPE_CHECKING:
    from lynx_trt.artifact import CalibrationRecord, Manifest

app = new_app()


@app.command()
def main(
    artifact: Annotated[
        Path, typer.Argument(help="Artifact folder, as python -m lynx_trt.build writes it, or an ONNX file.")
    ],
    verify: Annotated[bool, typer.Option(help="Compare the files' sha256 with the manifest.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print manifest, problems and notes as JSON.")] = False,
) -> None:
    """Show what is in an artifact and whether it fits this machine; exit 1 with a line for each thing that doesn't."""
    from lynx_trt.artifact import read
    from lynx_trt.onnx_build import is_onnx
    from lynx_trt.preflight import preflight

    if is_onnx(artifact):
        sys.exit(_survey(artifact, json_output=json_output))
    opened = read(artifact)
    with Progress(quiet=json_output) as progress:
        found = preflight(opened, verify=verify, on_progress=progress.sums())
    if json_output:
        manifest = opened.manifest.model_dump(mode="json")
        print_json({"manifest": manifest, "problems": found.problems, "notes": found.notes})
    else:
        _print_table(artifact, opened.manifest)
        for line in found.notes:
            note(line)
        for line in found.problems:
            fail(line)
        if not found.problems:
            typer.echo("preflight: everything fits" if verify else "preflight: everything fits (sums not checked)")
    sys.exit(1 if found.problems else 0)


def rows(manifest: Manifest) -> list[tuple[str, str]]:
    """The table's rows: a label and a value each."""
    from lynx_trt.budgets import in_words
    from lynx_trt.experts import weights_in_words
    from lynx_trt.tensorrt.gpu import PRODUCTS

    model, engine, chosen = manifest.model, manifest.engine, manifest.selection
    moe = model.moe_layers
    first = moe[0]
    packed = f", in {weights_in_words(first.quantized)}" if first.quantized else ""
    limits = in_words(chosen.restriction, [layer.experts for layer in moe])
    rules = sorted({layer.rule or "unknown: tokens can lose experts, not be sent to others" for layer in moe})
    table = [
        ("model", f"{model.name} ({model.architecture}, {model.precision})"),
        ("size", f"{model.parameters / 1e6:,.1f} M parameters, {size(model.weight_bytes)} of weights"),
        *_quantized(manifest),
        ("layers", f"{model.layers}, {len(moe)} of them MoE"),
        (
            "experts",
            f"{first.experts} a layer, {first.experts_per_token} a token, {size(first.expert_bytes)} each{packed}",
        ),
        ("dimensions", f"H {model.hidden}, I {first.intermediate}, vocabulary {model.vocabulary}"),
        ("routing", "; ".join(rules)),
        ("sequence", _sequence(manifest)),
        ("preset", chosen.preset),
        ("parameters", ", ".join(f"{name} {value}" for name, value in chosen.parameters.items())),
        ("budgets", limits.get("budgets", "no limit")),
        ("floors", limits.get("floors", "none")),
        ("calibrated", _calibrated(manifest.calibration)),
    ]
    if engine is None:
        table.append(("engine", f"none ({manifest.engine_absent})"))
    else:
        product = PRODUCTS[engine.flavor]
        where = "inside" if engine.expert_weights == "engine" else f"outside ({len(engine.external)} tensors to bind)"
        sms = ", ".join(map(str, engine.compute_capabilities)) or "none yet"
        table += [
            ("engine", f"{product} {engine.tensorrt}, {size(engine.plan_bytes)}, expert weights {where}"),
            ("engine build", f"{engine.seconds:.1f} s, {size(engine.peak_bytes)} of memory at its peak"),
            ("kernels", f"SM {sms}" if engine.compute_capabilities else sms),
            *((f"profile {item['name']}", _profile(item)) for item in engine.profiles),
        ]
    table += [
        ("files", ", ".join(f"{name} {size(record.bytes)}" for name, record in manifest.files.items())),
        ("versions", ", ".join(f"{name} {value}" for name, value in manifest.versions.items())),
        ("built", manifest.created),
    ]
    return table


def _calibrated(record: CalibrationRecord | None) -> str:
    """What the restriction promises, and on what text that was checked."""
    if record is None:
        return "no: nothing is promised about quality"
    promise = ", ".join(f"{name.replace('_', ' ')} {limit:g}" for name, limit in record.promise.items())
    checked = record.text.get("validation_name") or f"held-out parts of {record.text['name']}"
    return f"{promise}; up to a batch of {record.batch}; checked on {checked}"


def _sequence(manifest: Manifest) -> str:
    longest = f"{manifest.model.max_length} tokens at most"
    if not manifest.model.caches and not manifest.model.states:
        return longest  # a graph that others exported keeps its cache in its own way
    states = state_bytes(manifest)
    of_it = f", {size(states)} of it states that don't grow" if states else ""
    return f"{longest}; cache {size(cache_bytes(manifest))} a sequence{of_it}"


def _profile(profile: dict[str, Any]) -> str:
    """`batch 1:8:64, length 1:1:1`, from the shapes of input_ids [B,S]."""
    shapes = profile["shapes"].get("input_ids")
    if shapes is None:
        return ", ".join(f"{name} {shape}" for name, shape in profile["shapes"].items())
    batch, length = (":".join(str(shape[axis]) for shape in shapes) for axis in (0, 1))
    return f"batch {batch}, length {length}"


def cache_bytes(manifest: Manifest) -> int:
    """Bytes that one sequence takes in the KV caches and the states."""
    element = 4 if manifest.model.precision == "fp32" else 2
    values = sum(
        cache.heads * cache.size * (cache.rows or manifest.model.cache_rows) for cache in manifest.model.caches
    )
    return element * values + state_bytes(manifest)


def state_bytes(manifest: Manifest) -> int:
    """Bytes of what one sequence's layers keep in place of keys and values."""
    return sum(math.prod(state.shape) * (4 if state.precision == "fp32" else 2) for state in manifest.model.states)


def _survey(path: Path, *, json_output: bool) -> int:
    """Show what MoE blocks an ONNX file holds; 1 if one is not recognised, or there is none."""
    from lynx_trt.onnx_build import survey, survey_lines

    found = survey(path)
    if json_output:
        print_json(found)
        return 0 if found["blocks"] and not found["not_recognised"] else 1
    _print_rows(path, survey_lines(found))
    for line in found["notes"]:
        note(line)
    for item in found["not_recognised"]:
        fail(f"node {item['node']} looks like an MoE block, but {item['reason']}")
    if not found["blocks"] and not found["not_recognised"]:
        fail(f"{path} holds no MoE block that is known here")
    return 0 if found["blocks"] and not found["not_recognised"] else 1


def _print_table(folder: Path, manifest: Manifest) -> None:
    _print_rows(folder, rows(manifest))


def _quantized(manifest: Manifest) -> list[tuple[str, str]]:
    """A row on the checkpoint, if it was quantized."""
    found = manifest.build.get("quantization")
    if not found or not found["weights"]:
        return []
    kept, rest = found["kept"], found["weights"] - found["kept"]
    parts = [f"{number} {what}" for number, what in ((kept, "kept as stored"), (rest, "dequantized")) if number]
    what = f"{found['weights']} weights of {size(found['nbytes'])}, {' and '.join(parts)}"
    return [("checkpoint", f"quantized ({found['method']}): {what}")]


def _print_rows(folder: Path, lines: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(folder), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in lines:
        table.add_row(label, value)
    Console(highlight=False, markup=False).print(table)


if __name__ == "__main__":
    run(app)
