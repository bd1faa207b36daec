"""Engines on a real GPU: does TensorRT run them there, are they right, is the text ONNX Runtime's?

    python benchmarks/gpu_engine.py --kit build/gpu-kit --output engine.json

The kit is made by `gpu_kit.py` where there is no GPU; it holds no engines. The first line answers whether the TensorRT
that is here runs on this SM at all; if it doesn't, that is the end. Each entry's engine is built and checked in a
process of its own, since TensorRT may end it; one that fails is a row with its error, and the rest goes on. The file is
written after each entry. Exit code 1 if any check failed.

    python benchmarks/gpu_engine.py --kit build/gpu-kit --build-only 86

builds all of them where there is no GPU, with TensorRT for RTX and the kernels of an SM: is the kit whole?
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from gpu_build import ONNX, Machine, add_planned_engine, ask
from gpu_models import PROMPTS, decode, draws, forced_logits, greedy_tokens, restrictions

from lynx_trt.artifact import Artifact
from lynx_trt.console import new_app, run
from lynx_trt.errors import LynxError, UsageError

# TensorRT multiplies float32 matrices in TF32, which eager on a CPU doesn't: its rounding, relative to the logits.
TF32_ROUNDING = 2.0**-11
app = new_app()


@dataclass
class Row:
    """What was seen of one entry; `error` is why it went no further."""

    name: str
    checks: dict[str, bool] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Every check, and no error."""
        return self.error is None and bool(self.checks) and all(self.checks.values())


Build = Callable[[Path], Artifact]
Make = Callable[[Artifact, bool], Any]
SECONDS = 300  # for one entry


def tensorrt_backend(artifact: Artifact, graphs: bool) -> Any:
    """The real thing."""
    from lynx_trt.runtime.trt import TensorRTBackend

    return TensorRTBackend(artifact, len(PROMPTS), graphs=graphs)


def check(folder: Path, build: Build, make: Make | None) -> Row:
    """Everything about one entry of the kit: build the engine of a copy of it, and unless `make` is None check that."""
    row = Row(folder.name)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            artifact = build(Path(shutil.copytree(folder, Path(scratch) / folder.name)))
            if engine := artifact.manifest.engine:
                row.figures |= {"build_seconds": engine.seconds, "plan_bytes": engine.plan_bytes}
            if make is None:
                row.checks["built"] = True
            else:
                _check(row, artifact, make)
    except Exception as error:
        known = isinstance(error, LynxError)
        row.error = str(error) if known else f"{type(error).__name__}: {error}"
    return row


def _check(row: Row, artifact: Artifact, make: Make) -> None:
    with np.load(artifact.path("expected.npz")) as file:
        want = dict(file)
    ends = np.cumsum(PROMPTS)
    prompts = [part.tolist() for part in np.split(want["prompts"], ends[:-1])]
    settings = restrictions(artifact.manifest.model.moe_layers)
    everything = settings["all"]
    started = time.perf_counter()
    backend = make(artifact, False)
    row.figures["load_seconds"] = time.perf_counter() - started
    _right(row, artifact, backend, prompts, want, settings)
    again = forced_logits(backend, prompts, want["tokens_all"], everything)
    once_more = forced_logits(backend, prompts, want["tokens_all"], everything)
    row.checks["same bits twice"] = bool(np.array_equal(again, once_more))
    backend.close()
    _graphs(row, make(artifact, True), prompts, want, everything, again)


def _right(row: Row, artifact: Artifact, backend: Any, prompts: Any, want: Any, settings: Any) -> None:
    """Logits of forced tokens against float64, then what it says by itself."""
    logits = forced_logits(backend, prompts, want["tokens_all"], settings["all"])
    error = np.abs(logits - want["logits"])
    rms, median = float(np.sqrt((error**2).mean())), float(np.median(error))
    scale = float(np.abs(want["logits"]).max())
    floor = TF32_ROUNDING * scale if artifact.manifest.model.precision == "fp32" else 0.0
    step, place, token = np.unravel_index(error.argmax(), error.shape)
    row.figures |= {
        "rms_error": rms,
        "rms_error_of_eager_in_this_precision": float(want["same_precision_rms"]),
        "median_error": median,
        "largest_error": float(error.max()),
        "largest_error_at": {"step": int(step), "row": int(place), "token": int(token)},
        "largest_logit": scale,
    }
    row.checks["logits"] = bool(
        np.isfinite(logits).all()
        and rms <= 2 * float(want["same_precision_rms"]) + floor
        and median <= 2 * float(want["same_precision_median"]) + floor
    )
    got, drawn, greedy = draws(backend, prompts, want["tokens_all"], settings["all"])
    row.figures["equal_draws"] = float((got == drawn).mean())
    # A draw at a temperature may fall on the edge of a token, where a rounding decides; a greedy one has none.
    row.checks["draws"] = bool((got == drawn)[greedy].all() and (got == drawn).mean() >= 0.95)
    for name, restriction in settings.items():
        tokens, active = greedy_tokens(backend, prompts, restriction)
        same = tokens == want[f"tokens_{name}"]
        # After the first token that differs the texts are two different ones.
        agreed = np.cumprod(same, axis=0).astype(bool)
        row.figures[f"equal_greedy_tokens_{name}"] = float(agreed.mean())
        compare = agreed.all(axis=1)
        steps = np.flatnonzero(compare)
        difference = np.abs(active[steps] - want[f"active_{name}"][steps])
        row.figures[f"active_experts_{name}"] = float(active.mean())
        row.figures[f"largest_difference_of_active_experts_{name}"] = int(difference.max(initial=0))
        if artifact.manifest.model.precision == "fp32":
            row.checks[f"text, {name}"] = bool(same.all())
            row.checks[f"active experts, {name}"] = bool((difference == 0).all())
        else:
            # Half precision may take the other of two near-equals, after which everything differs.
            row.checks[f"text, {name}"] = bool(agreed[0].mean() >= 0.75)


def _graphs(row: Row, backend: Any, prompts: Any, want: Any, everything: Any, eager: Any) -> None:
    """Captured steps give the bits of those that were not; and how long a step takes, both ways."""
    logits = forced_logits(backend, prompts, want["tokens_all"], everything)
    row.figures["graphs_refused"] = backend.graphs_refused
    row.checks["CUDA graphs"] = backend.graphs_refused is None
    row.checks["same bits in graphs"] = bool(np.array_equal(logits, eager))
    past = np.array(PROMPTS, np.int64)
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        decode(backend, want["tokens_all"][0], past, everything)
        seconds.append(time.perf_counter() - started)
    row.figures["step_microseconds_median"] = float(np.median(seconds) * 1e6)
    backend.close()


def table(rows: list[Row]) -> str:
    """A line an entry."""
    lines = []
    for row in rows:
        failed = [name for name, passed in row.checks.items() if not passed]
        said = row.error or (f"failed: {', '.join(failed)}" if failed else "passed")
        seconds = row.figures.get("build_seconds", 0)
        ratio = row.figures.get("rms_error", 0) / max(row.figures.get("rms_error_of_eager_in_this_precision", 1), 1e-30)
        lines.append(f"{row.name:<28} built in {seconds:5.1f} s   error / eager's {ratio:5.2f}   {said}")
    return "\n".join(lines)


def first_answer(where: Machine, rows: list[Row]) -> str:
    """Does TensorRT run here?"""
    ran = [row for row in rows if "rms_error" in row.figures]
    if ran:
        return f"{where} runs: {len(ran)} of {len(rows)} engines gave numbers"
    return f"{where} runs no engine; the first one: {rows[0].error if rows else 'the kit is empty'}"


def write(output: Path | None, answer: str, rows: list[Row]) -> None:
    """What was seen so far."""
    if output:
        record = {"answer": answer, "rows": [{**vars(row), "passed": row.passed} for row in rows]}
        output.write_text(json.dumps(record, indent=1) + "\n")


def entries(kit: Path) -> list[Path]:
    """Their folders, the plainest first. Raises UsageError: the kit is of the time when it held engines."""
    found = (each.parent for each in kit.glob("*/expected.npz"))
    folders = sorted(found, key=lambda folder: (not folder.name.startswith("mixtral"), folder.name))
    if old := [folder.name for folder in folders if not (folder / ONNX).is_file()]:
        raise UsageError(f"{kit} has no {ONNX} of {', '.join(old)}, so there is nothing to build: make gpu-kit again")
    return folders


def check_kit(
    kit: Path, where: Machine, one: Callable[[Path], Row], say: Callable[[str], None], output: Path | None
) -> list[Row]:
    """All entries."""
    rows: list[Row] = []
    for folder in entries(kit):
        rows.append(one(folder))
        if len(rows) == 1:
            say(first_answer(where, rows))
        write(output, first_answer(where, rows), rows)
    return rows


def in_a_process(folder: Path, where: Machine, plugin: Path | None) -> Row:
    """An entry in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "row.json"
        command = [sys.executable, __file__, "--kit", str(folder), "--output", str(answer)]
        command += ["--entry", json.dumps(vars(where))]
        command += ["--plugin", str(plugin)] if plugin else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)  # noqa: S603
            if answer.exists():
                return Row(**json.loads(answer.read_text()))
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            return Row(folder.name, error=f"its process ended with {how}: {''.join(last)[:300]}")
        except subprocess.TimeoutExpired:
            return Row(folder.name, error=f"it was not done after {SECONDS} seconds")


def build_only(kit: Path, sm: int) -> list[Row]:
    """Build every engine for an SM that need not be here."""
    from lynx_trt.tensorrt.loader import load

    where = Machine(sm, "rtx", load("rtx").version)
    rows = [check(each, lambda folder: add_planned_engine(folder, where), None) for each in entries(kit)]
    typer.echo(f"{sum(row.passed for row in rows)} of {len(rows)} engines built by {where}; none was run")
    return rows


def check_all(kit: Path, plugin: Path | None, output: Path | None) -> list[Row]:
    """Check every engine here, if TensorRT runs here at all."""
    where = ask()
    if isinstance(where, str):
        answer = f"TensorRT runs no engine here: {where}"
        typer.echo(answer)
        write(output, answer, [])
        return []
    rows = check_kit(kit, where, lambda folder: in_a_process(folder, where, plugin), typer.echo, output)
    typer.echo(first_answer(where, rows))
    return rows


@app.command()
def main(
    kit: Annotated[Path, typer.Option(help="Folder that gpu_kit.py made.")] = Path("build/gpu-kit"),
    output: Annotated[Path | None, typer.Option(help="Write what was seen to this JSON file.")] = None,
    plugin: Annotated[
        Path | None, typer.Option(help="The C++ plugin's library, to be used instead of the Python plugin.")
    ] = None,
    only_build: Annotated[
        int | None, typer.Option("--build-only", help="An SM: build the engines for it with no GPU, and run none.")
    ] = None,
    entry: Annotated[str | None, typer.Option("--entry", hidden=True, help="The kit is one entry, for this.")] = None,
) -> None:
    """Build and check every engine of the kit on GPU 0."""
    if entry:
        assert output
        where = Machine(**json.loads(entry))
        if plugin:
            from lynx_trt.tensorrt.loader import load

            load(where.flavor).module.get_plugin_registry().load_library(str(plugin))
        row = check(kit, lambda folder: add_planned_engine(folder, where), tensorrt_backend)
        output.write_text(json.dumps(vars(row)))
        return
    rows = check_all(kit, plugin, output) if only_build is None else build_only(kit, only_build)
    typer.echo(table(rows))
    if not rows or not all(row.passed for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run(app)
