"""Where a decode step's time goes, by kind of layer: from ONNX Runtime's own profile."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lynx_trt.artifact import Artifact
from lynx_trt.comparison.runners import BackendRunner, Spec, open_ort
from lynx_trt.console import Progress
from lynx_trt.runtime.backend import Array

if TYPE_CHECKING:
    from lynx_trt.comparison.run import CompareOptions

KINDS = ("experts and selection", "attention and cache", "dense", "the rest")
STEPS = 8
ATTENTION = {"Attention", "TensorScatter", "RotaryEmbedding", "GroupQueryAttention"}
DENSE = {"MatMul", "FusedMatMul", "Gemm", "RMSNormalization", "SimplifiedLayerNormalization"}


def times(
    artifact: Artifact, specs: Sequence[Spec], ids: Array, options: CompareOptions, progress: Progress
) -> dict[str, Any]:
    """Seconds a decode step spends in each kind of layer, by runner; at the largest batch, with profiling on."""
    update = progress.phase("Time by layer")
    batch = min(max(options.batches), len(ids))
    found = {}
    # On a GPU the profile has the time that a kernel's launch took.
    graphs = [spec for spec in specs if spec.kind == "ort" and spec.provider == "cpu"]
    for number, spec in enumerate(graphs):
        found[spec.name] = _profile(artifact, spec, ids[:batch], options)
        update((number + 1) / len(graphs))
    return {"batch": batch, "kinds": list(KINDS), "seconds": found}


def _profile(artifact: Artifact, spec: Spec, ids: Array, options: CompareOptions) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        backend = open_ort(artifact, spec, len(ids), options.threads, profile=Path(folder) / "step")
        runner = BackendRunner(backend, artifact, spec.restriction)
        runner.prefill(np.ascontiguousarray(ids[:, : options.prompt]))
        steps = min(STEPS, ids.shape[1] - options.prompt)
        for step in range(steps):
            runner.decode(np.ascontiguousarray(ids[:, options.prompt + step]))
        files = [json.loads(Path(name).read_text(encoding="utf-8")) for name in backend.end_profile()]
    # A prefill restricts nothing, so it is the first run of the last graph.
    starts = [0] * len(files)
    starts[-1] = _runs(files[-1])[0]["ts"] + _runs(files[-1])[0]["dur"]
    seconds = [
        sum_by_kind(event for event in events if event.get("ts", 0) >= start)
        for events, start in zip(files, starts, strict=True)
    ]
    return {kind: sum(part[kind] for part in seconds) / steps for kind in KINDS}


def _runs(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted((event for event in events if event.get("name") == "model_run"), key=lambda event: event["ts"])


def sum_by_kind(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds of all kernels by kind; what runs inside a Loop or If counts as part of that."""
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    total: Counter[str] = Counter()
    end = -1
    for event in sorted(nodes, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] < end:
            continue
        end = event["ts"] + event["dur"]
        total[_kind(event["name"], event["args"]["op_name"])] += event["dur"] / 1e6
    return {kind: float(total[kind]) for kind in KINDS}


def _kind(name: str, op: str) -> str:
    if op in ATTENTION or "lowered/attention" in name:
        return KINDS[1]
    if "lowered/experts" in name or op in ("MoE", "Loop", "If", "TopK") or "Lynx" in name:
        return KINDS[0]
    return KINDS[2] if op in DENSE else KINDS[3]
