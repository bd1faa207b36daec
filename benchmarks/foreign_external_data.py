"""How long, and with how much memory, a foreign ONNX file with gigabytes of external data is rewritten.

`python benchmarks/foreign_external_data.py [--gigabytes 2] [--form moe --form loop_scatter] [--out FILE]`

Two forms: `moe`, whose weights stay where they are (the data file is copied by the system), and `loop_scatter`, whose
experts' tensors are all laid out anew. The command that users run is measured as a process of its own, checksums
included; a plain copy of the data file stands beside it as the floor. Budget: 60 s and 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import foreign_graphs  # noqa: E402 - the graphs of the tests, with weights of any size

HIDDEN, INNER, LAYERS = 2048, 2048, 4
FORMS = ("moe", "loop_scatter")
_LARGE = 1 << 16


def make_file(folder: Path, form: str, gigabytes: float) -> Path:
    """A float16 model of `form` whose data file has about that size; the weights are written as they are made."""
    layer_expert = 3 * HIDDEN * INNER * 2
    experts = max(4, round(gigabytes * 1e9 / LAYERS / layer_expert))
    spec = foreign_graphs.Spec(
        form=form, dtype="fp16", layers=LAYERS, experts=experts, count=2, hidden=HIDDEN, inner=INNER, vocabulary=64
    )
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    block = (generator.standard_normal(1 << 22) * 0.02).astype(np.float16).tobytes()
    with (folder / "model.onnx.data").open("wb") as data:

        class Writer(foreign_graphs.Maker):
            def normal(self, *shape: int, scale: float | None = None) -> Any:
                del scale
                return np.zeros(shape, np.float16)  # pages that are never touched

            def weight(self, stem: str, array: Any, element: int | None = None) -> str:
                if array.size < _LARGE:
                    noise = generator.standard_normal(array.shape) * 0.05
                    return super().weight(stem, noise, element)
                tensor = TensorProto(name=self.name(stem), dims=array.shape, data_type=TensorProto.FLOAT16)
                tensor.data_location = TensorProto.EXTERNAL
                length = array.size * 2
                for key, value in (("location", "model.onnx.data"), ("offset", data.tell()), ("length", length)):
                    tensor.external_data.add(key=key, value=str(value))
                for start in range(0, length, len(block)):
                    data.write(block[: min(len(block), length - start)])
                self.weights.append(tensor)
                return str(tensor.name)

        maker, foreign_graphs.Maker = foreign_graphs.Maker, Writer  # type: ignore[misc]
        try:
            model = foreign_graphs.make_model(spec)
        finally:
            foreign_graphs.Maker = maker  # type: ignore[misc]
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def measure(folder: Path, form: str, gigabytes: float) -> dict[str, Any]:
    """One form: bytes, seconds and peak memory of the command, and of a plain copy."""
    path = make_file(folder / form, form, gigabytes)
    nbytes = (folder / form / "model.onnx.data").stat().st_size
    os.sync()
    started = time.perf_counter()
    shutil.copyfile(folder / form / "model.onnx.data", folder / "copy")
    copied = time.perf_counter() - started
    (folder / "copy").unlink()
    command = [sys.executable, "-m", "lynx_trt.build", str(path), "-o", str(folder / "artifact"), "--json"]
    started = time.perf_counter()
    command += ["--tensorrt", "none"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)  # noqa: S603 - ours
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stderr)
    shutil.rmtree(folder / "artifact")
    shutil.rmtree(folder / form)
    # Of the largest child so far: forms run from the one that takes least to the one that takes most.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "form": form,
        "data_bytes": nbytes,
        "moe_layers": json.loads(done.stdout)["moe_layers"],
        "seconds": round(seconds, 1),
        "copy_seconds": round(copied, 1),
        "peak_bytes": peak,
    }


def main() -> None:
    """Measure each form and print a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the data file")
    parser.add_argument("--form", action="append", choices=foreign_graphs.FORMS, help="forms [default: both]")
    parser.add_argument("--folder", type=Path, help="where the files go [default: a temporary folder]")
    parser.add_argument("--out", type=Path, help="append the record to this file, a line each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = [measure(Path(folder), form, options.gigabytes) for form in options.form or FORMS]
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(  # noqa: S603 - ours
        git, capture_output=True, text=True, cwd=ROOT, check=False
    )
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "onnx": onnx.__version__,
        "rows": rows,
    }
    print(json.dumps(record, indent=1))
    if options.out:
        with options.out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
