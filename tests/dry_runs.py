"""The GPU benchmarks' scripts, run without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmark_path import BENCHMARKS

# isort: split
import gpu


def dry_run(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """What a script records in a run without a GPU."""
    output = folder / "record.json"
    command = [sys.executable, str(BENCHMARKS / f"gpu_{script}.py"), "--dry-run", "--output", str(output), *arguments]
    gpu.links()
    environment = {**gpu.child_environment(), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert said.returncode == 0, said.stderr
    record: dict[str, Any] = json.loads(output.read_text())
    return record
