"""What the GPU benchmarks share: their options, the device, and the record that is written as it grows."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]

# What a result depends on, where it is installed.
PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "cuda-bindings", "onnx", "onnxruntime", "vllm"),
    *("tensorrt", "tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs", "pydantic"),
)


@dataclass(frozen=True)
class Options:
    """A benchmark's command line. `seconds`: after so many no new point is begun. `dry`: tiny sizes, on a CPU."""

    output: Path
    seconds: float
    dry: bool
    models: tuple[str, ...]
    dtype: str
    jit: bool
    vllm: Path | None

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        import torch

        return torch.device("cpu" if self.dry else "cuda")


def options(doc: str | None, seconds: float, models: tuple[str, ...] = ()) -> Options:
    """Read the command line, and choose what has to be chosen before anything imports the Triton language."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--seconds", type=float, default=seconds, help="begin no new point after this time")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU: does the script run at all?")
    parser.add_argument("--model", action="append", choices=models or None, help="one model; repeat for several (all)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--jit", action="store_true", help="let the Triton language launch, not the CUDA driver")
    parser.add_argument("--vllm", type=Path, help="a folder with vLLM's fused_moe.py, from its wheel, as a peer")
    given = parser.parse_args()
    if given.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    # A dry run has the two forms of experts there are; the sizes are the same for all.
    chosen = tuple(given.model or (models[0:3:2] if given.dry_run else models))
    return Options(given.output, given.seconds, given.dry_run, chosen, given.dtype, given.jit, given.vllm)


@dataclass
class Report:
    """One benchmark's results, in a file after each row."""

    path: Path
    name: str
    environment: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        """A row more."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write aside and rename, so that a reader or a killed run finds a whole file."""
        values = {name: value for name, value in asdict(self).items() if name != "path"}
        write_json(self.path, values)


def write_json(path: Path, values: Any) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


@contextmanager
def benchmark(doc: str | None, name: str, seconds: float, models: tuple[str, ...] = ()) -> Iterator[Any]:
    """Options, a report and a clock for a script; the report is written whatever happens."""
    chosen = options(doc, seconds, models)
    if not chosen.dry:
        require_gpu()
    report = Report(chosen.output, name, environment(dry=chosen.dry))
    try:
        yield chosen, report, Clock(chosen.seconds)
    finally:
        report.write()


class Clock:
    """Whether there is time for another point."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the end, 0 when it is past."""
        return max(self._end - time.monotonic(), 0.0)


def require_gpu() -> None:
    """End with one sentence where there is none."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no GPU here; --dry-run tries the script on a CPU")


def environment(*, dry: bool = False) -> dict[str, Any]:
    """Commit, command, versions and hardware."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command_words([sys.executable, *sys.argv]),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := package(name))},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "gpu": "none: a dry run on a CPU" if dry else gpu(),
    }


def command_words(command: Sequence[str]) -> str:
    """A command for the record: this repository's files by their paths in it, others by their names alone."""
    return shlex.join(_recorded(word) for word in command)


def _recorded(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def commit() -> str | None:
    """LYNX_COMMIT where it is set (a copy without history), else what git says."""
    if given := os.environ.get("LYNX_COMMIT"):
        return given
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(ROOT), "describe", "--always", "--dirty"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return said.stdout.strip() or None


def package(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu() -> dict[str, Any]:
    """The GPU as PyTorch sees it, and the driver's version."""
    import torch

    if not torch.cuda.is_available():
        return {"name": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "sm": 10 * properties.major + properties.minor,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "driver": driver(),
    }


def driver() -> str | None:
    """The driver's version, from nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)  # noqa: S603
    return said.stdout.strip().splitlines()[0] if said.stdout.strip() else None
