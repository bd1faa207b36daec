"""What the benchmarks of serving share: the server that is measured, its metrics, and what all of it ran on."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import urllib.request
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
