"""What the benchmarks of serving share: the server that is measured, its metrics, and what all of it ran on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Target:
    """The server, its model, and the process whose memory is watched."""

    host: str
    http: int
    metrics: int
    model: str
    pid: int


def recorded(
    options: argparse.Namespace,
    measure: Callable[[Path], dict[str, Any]],
    text: Callable[[dict[str, Any]], str] = lambda record: json.dumps(record, indent=1),
) -> dict[str, Any]:
    """What is recorded in `options.output`; unless `options.show`, `measure` makes it anew, in a folder of its own."""
    if not options.show:
        with tempfile.TemporaryDirectory() as folder:
            record = measure(Path(folder))
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(text(record) + "\n", encoding="utf-8")
    return dict(json.loads(options.output.read_text(encoding="utf-8")))


def metric(target: Target, name: str) -> float:
    """Sum of a metric over its series; `name` may go on with the first of its labels."""
    url = f"http://{target.host}:{target.metrics}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    prefix = name if "{" in name else f"{name}{{"
    return sum(float(line.split()[-1]) for line in lines if line.startswith(prefix))


def where() -> dict[str, Any]:
    """What a result was measured on, when and how."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False)  # noqa: S603
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1] for line in lines if line.startswith("model name")), "")
    script, *arguments = sys.argv
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *arguments]),
        "commit": commit.stdout.strip(),
        "cpu": cpu.strip() or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("onnxruntime", "numpy", "lynx-trt")},
        "server": "Triton Inference Server of nvidia-pytriton 0.7.0",
    }
