"""Decoding end to end: a model of Qwen3-30B-A3B's size and form, random weights, its engine on a real GPU.

    python benchmarks/gpu_end_to_end.py --kit build/gpu-kit --output end_to_end.json

Whether the TensorRT that is here runs on this GPU is asked first. The graph comes from the kit (`gpu_kit.py`); the
weights are made up here: those in the engine are written to the file that the graph names, the experts' (57 GB) are
filled in on the device. The engine is built here. Then decode steps of each batch size, with all experts and under
budgets, interleaved, in CUDA graphs; the time is the device's, between events around the step, without copying the
logits to the host. Beside it the floor: the bytes of weights that such a step reads, over the copy bandwidth measured
in the same run.

Then whole steps as a decoding loop sees them, from the call to the tokens on the host, drawn on the device in each way
that there is; beside them a step that copies its logits to the host, and draws nothing.
"""

from __future__ import annotations

import json
import mmap
import struct
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from gpu_build import ONNX, Machine, add_engine, inputs_of, machine

from lynx_trt.artifact import Artifact
from lynx_trt.budgets import Restriction
from lynx_trt.console import new_app, run
from lynx_trt.runtime.sampling import Sampling, draws_of
from lynx_trt.tensorrt.profiles import Range, decode_and_prefill

LARGE = "qwen3-30b-a3b"
BATCHES = (1, 4, 16, 32, 64)
SHARES = (1.0, 0.75, 0.5, 0.25)
CONTEXT = 256  # tokens that each sequence has in the cache
PREFILL = (1, 256, 256)  # tokens of a prefill step
PIECE = 64 << 20
WAYS = {
    "logits to the host": None,
    "greedy": Sampling(),
    "temperature 1": Sampling(1.0),
    "temperature 1, top-k 20, top-p 0.95": Sampling(1.0, 0.95, top_k=20),
}
app = new_app()


def random_bytes(shape: list[int], dtype: str, name: str, generator: np.random.Generator) -> bytes:
    """A made-up weight: about 1 / sqrt(fan in), norms 1."""
    import ml_dtypes

    if name.endswith("norm.weight"):
        values = np.ones(shape, np.float32)
    else:
        count = int(np.prod(shape))
        piece = generator.standard_normal(min(count, 1 << 22), np.float32)
        values = np.resize(piece, shape) / np.float32(np.sqrt(shape[-1]))
    kind: Any = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[dtype]
    return values.astype(kind).tobytes()


def write_weights(folder: Path, experts: frozenset[str]) -> None:
    """The weights' file: everything but the experts, which stay a hole."""
    about = json.loads((folder / "weights.json").read_text())
    header = (folder / "weights.header").read_bytes()
    fields = json.loads(header[8:])
    assert struct.unpack("<Q", header[:8])[0] + 8 == len(header)
    generator = np.random.default_rng(0)
    with (folder / about["file"]).open("w+b") as stream:
        stream.write(header)
        stream.truncate(about["bytes"])
        with mmap.mmap(stream.fileno(), 0) as memory:
            for name, entry in fields.items():
                if name not in experts:
                    begin, end = (len(header) + offset for offset in entry["data_offsets"])
                    memory[begin:end] = random_bytes(entry["shape"], entry["dtype"], name, generator)


def build(folder: Path, where: Machine, say: Any) -> Artifact:
    """The artifact with its engine."""
    from lynx_trt.tensorrt.prepare import prepare

    about = json.loads((folder / "weights.json").read_text())
    if not (folder / about["file"]).exists():  # the names of the experts come from the graph, which wants its file
        with (folder / about["file"]).open("wb") as stream:
            stream.truncate(about["bytes"])
    experts = frozenset(item.name for item in prepare(folder / ONNX, expert_weights="external").external)
    started = time.perf_counter()
    write_weights(folder, experts)
    say(f"weights: {time.perf_counter() - started:.1f} s")
    profiles = decode_and_prefill(
        inputs_of(folder),
        decode_batch=Range(1, min(16, max(BATCHES)), max(BATCHES)),
        prefill_batch=Range(1, 1, 4),
        prefill_length=Range(*PREFILL),
    )
    artifact = add_engine(folder, where, profiles, "external")
    engine = artifact.manifest.engine
    assert engine
    say(f"engine: {engine.seconds:.1f} s, {engine.plan_bytes / 1e9:.2f} GB, peak {engine.peak_bytes / 1e9:.1f} GB")
    return artifact


def backend_of(artifact: Artifact, slots: int, **where: Any) -> Any:
    """The backend, its experts filled with made-up numbers instead of a file's."""
    from lynx_trt.runtime.trt import TensorRTBackend

    generator = np.random.default_rng(1)

    class MadeUp(TensorRTBackend):
        vocabulary = artifact.manifest.model.vocabulary

        def _fill(self, address: int, item: dict[str, Any]) -> None:
            if not hasattr(self, "_piece"):
                count = PIECE // 2
                values = random_bytes([count // 2048, 2048], "BF16", "experts", generator)
                self._piece = self._gpu.pinned(PIECE)
                self._piece[:] = np.frombuffer(values, np.uint8)
            for start in range(0, item["length"], PIECE):
                self._gpu.upload(address + start, self._piece[: item["length"] - start])

    return MadeUp(artifact, slots, **where)


def measure(backend: Any, artifact: Artifact, rounds: int) -> list[dict[str, Any]]:
    """Decode steps of each batch size under each budget, in turn; a row for each pair."""
    layers = artifact.manifest.model.moe_layers
    rows = []
    for batch in (size for size in BATCHES if size in backend.sizes.decode_rows):
        natural = _active(backend, batch, Restriction(tuple(layer.experts for layer in layers)))
        settings = {}
        for share in SHARES:
            budgets = (
                layer.experts if share == 1 else max(1, round(share * float(active)))
                for layer, active in zip(layers, natural, strict=True)
            )
            restriction = Restriction(tuple(budgets))
            settings[share] = restriction, _active(backend, batch, restriction)
        times: dict[float, list[float]] = {share: [] for share in settings}
        for _ in range(rounds):
            for share, (restriction, _used) in settings.items():
                times[share].append(_step_seconds(backend, batch, restriction))
        for share, (_, used) in settings.items():
            rows.append(_row(artifact, batch, share, used, times[share]))
    return rows


def measure_draws(backend: Any, artifact: Artifact, rounds: int) -> list[dict[str, Any]]:
    """Whole steps with all experts, the tokens drawn in each way, in turn; a row for each batch size and way."""
    everything = Restriction(tuple(layer.experts for layer in artifact.manifest.model.moe_layers))
    rows = []
    for batch in (size for size in BATCHES if size in backend.sizes.decode_rows):
        inputs = _inputs(backend, batch, everything)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(rounds + 1):
            for way, sampling in WAYS.items():
                how = [] if sampling is None else [(row, sampling, np.random.default_rng(row)) for row in range(batch)]
                draws = draws_of(batch, how)
                started = time.perf_counter()
                if sampling is None:
                    backend.step(*inputs)
                else:
                    backend.next_tokens(*inputs, draws)
                if number:  # the first loads what it launches
                    seconds[way].append(time.perf_counter() - started)
        for way, times in seconds.items():
            rows.append({"batch": batch, "way": way, "seconds": times, "median_seconds": float(np.median(times))})
    return rows


def draws_table(rows: list[dict[str, Any]]) -> str:
    """Whole steps in milliseconds, a line for each batch size."""
    lines = [f"{'batch':>5} " + " ".join(f"{way:>{len(way)}}" for way in WAYS)]
    for batch in sorted({row["batch"] for row in rows}):
        each = {row["way"]: row["median_seconds"] * 1e3 for row in rows if row["batch"] == batch}
        lines.append(f"{batch:>5} " + " ".join(f"{each[way]:>{len(way)}.3f}" for way in WAYS))
    return "\n".join(lines)


def _inputs(backend: Any, batch: int, restriction: Restriction) -> tuple[Any, ...]:
    generator = np.random.default_rng(batch)
    ids = generator.integers(0, backend.vocabulary, size=(batch, 1))
    return ids, np.full(batch, CONTEXT, np.int64), np.ones(batch, np.int64), restriction


def _active(backend: Any, batch: int, restriction: Restriction) -> Any:
    """Active experts of each layer, after enough steps that the size is captured."""
    for _ in range(5):
        result = backend.step(*_inputs(backend, batch, restriction))
    return np.array(result.active, np.float64)


def _step_seconds(backend: Any, batch: int, restriction: Restriction) -> float:
    """Device time of one step, without the copies to and from the host."""
    return float(backend.device_seconds(*_inputs(backend, batch, restriction)))


def _row(artifact: Artifact, batch: int, share: float, used: Any, seconds: list[float]) -> dict[str, Any]:
    model = artifact.manifest.model
    experts = float(sum(layer.expert_bytes * active for layer, active in zip(model.moe_layers, used, strict=True)))
    held = sum(layer.expert_bytes * layer.experts for layer in model.moe_layers)
    embedding = model.vocabulary * model.hidden * 2
    rest = model.weight_bytes - held - embedding  # of the embedding a step reads a row a token
    middle = float(np.median(seconds))
    return {
        "batch": batch,
        "share": share,
        "active_experts": float(np.mean(used)),
        "seconds": seconds,
        "median_seconds": middle,
        "tokens_per_second": batch / middle,
        "expert_bytes": experts,
        "weight_bytes_read": experts + rest,
    }


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device: the best way that there is."""
    import torch
    from gpu_timing import copies

    return max(copies(torch.device("cuda")).values())


def table(rows: list[dict[str, Any]], bandwidth: float) -> str:
    """Time, speed-up and floor of each setting."""
    lines = [
        f"{'batch':>5} {'active':>7} {'ms':>8} {'tokens/s':>9} {'against all':>11} {'floor ms':>9} {'of floor':>8}"
    ]
    for row in rows:
        all_experts = next(r for r in rows if r["batch"] == row["batch"] and r["share"] == 1.0)
        floor = row["weight_bytes_read"] / bandwidth
        lines.append(
            f"{row['batch']:>5} {row['active_experts']:>7.1f} {row['median_seconds'] * 1e3:>8.3f} "
            f"{row['tokens_per_second']:>9.0f} {all_experts['median_seconds'] / row['median_seconds']:>11.2f} "
            f"{floor * 1e3:>9.3f} {floor / row['median_seconds']:>8.2f}"
        )
    return "\n".join(lines)


@app.command()
def main(
    kit: Annotated[Path, typer.Option(help="Folder that gpu_kit.py made.")] = Path("build/gpu-kit"),
    output: Annotated[Path | None, typer.Option(help="Write the samples to this JSON file.")] = None,
    rounds: Annotated[int, typer.Option(help="Steps of each setting.", min=1)] = 30,
) -> None:
    """Measure decoding end to end on GPU 0."""
    where = machine()
    typer.echo(str(where))
    import torch

    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    artifact = build(kit / LARGE, where, typer.echo)
    started = time.perf_counter()
    backend = backend_of(artifact, max(BATCHES))
    typer.echo(f"loaded in {time.perf_counter() - started:.1f} s")
    rows = measure(backend, artifact, rounds)
    typer.echo(table(rows, bandwidth))
    drawn = measure_draws(backend, artifact, rounds)
    typer.echo("whole steps, ms:\n" + draws_table(drawn))
    if output:
        report = {
            "model": LARGE,
            "tensorrt": str(where),
            "context": CONTEXT,
            "copy_bandwidth": bandwidth,
            "rows": rows,
            "draws": drawn,
            "graphs_refused": backend.graphs_refused,
        }
        output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run(app)
