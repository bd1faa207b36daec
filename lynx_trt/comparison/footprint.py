"""Memory of one runner, in a process of its own: nothing else is there to blame."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lynx_trt.artifact import Artifact, read
from lynx_trt.budgets import Restriction
from lynx_trt.comparison.runners import Spec, open_runner
from lynx_trt.memory import resident_bytes

TIMEOUT = 600  # seconds; loading a model that takes longer is not measured


def measure(artifact: Artifact, spec: Spec, threads: int | None) -> dict[str, Any] | None:
    """Bytes before loading, at the peak and after one prefill and step of a single sequence; None if that failed."""
    request = {"artifact": str(artifact.folder), "threads": threads, **asdict(spec)}
    request["source"] = str(spec.source) if spec.source else None
    command = [sys.executable, "-m", __name__, json.dumps(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT)  # noqa: S603
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError):
        return None
    return found


def main() -> None:
    """The child: load, run once, print a line of JSON."""
    import numpy as np
    import onnxruntime  # noqa: F401  # its own size is no runner's

    request = json.loads(sys.argv[1])
    artifact, threads = read(Path(request.pop("artifact"))), request.pop("threads")
    request["source"] = Path(request["source"]) if request["source"] else None
    request["restriction"] = Restriction(**{name: tuple(values) for name, values in request["restriction"].items()})
    if request["kind"] == "hf":
        import torch  # noqa: F401
        import transformers  # noqa: F401
    before = resident_bytes("now")
    opened = open_runner(artifact, Spec(**request), 1, threads)
    if opened.runner is None:
        raise SystemExit(1)
    opened.runner.prefill(np.ones((1, 8), np.int64))
    opened.runner.decode(np.ones(1, np.int64))
    sizes = {"before": before, "peak": resident_bytes("peak"), "after": resident_bytes("now")}
    sys.stdout.write(json.dumps(sizes) + "\n")


if __name__ == "__main__":
    main()
