"""An engine for an artifact that has none, built on the machine that runs it by whatever TensorRT is there.

    python benchmarks/gpu_build.py        # which TensorRT is there, and does it run on this GPU?

What the engine's and the end-to-end part of `make gpu` share: an engine of one product or for one GPU is of no use to
another, so the kit (`gpu_kit.py`) holds none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lynx_trt.artifact import DRAWS, ENGINE, Artifact, read
from lynx_trt.build import engine_record
from lynx_trt.errors import LynxError, TensorRTError
from lynx_trt.tensorrt.gpu import PRODUCTS, compute_capabilities
from lynx_trt.tensorrt.profiles import Profile, Range, decode_and_prefill

ONNX = "model.onnx"
SECONDS = 120  # to load TensorRT


@dataclass(frozen=True)
class Machine:
    """The SM of GPU 0, and the TensorRT that builds engines for it and runs them."""

    sm: int
    flavor: Literal["full", "rtx"]
    version: str

    def __str__(self) -> str:
        return f"{PRODUCTS[self.flavor]} {self.version} on SM {self.sm}"


def machine() -> Machine:
    """What is here.

    Raises:
        TensorRTError: no GPU, none that there are kernels for, no TensorRT, or one that does not run on this GPU.
    """
    from lynx_trt.plugins.launch import SMS
    from lynx_trt.tensorrt.loader import load, unbuildable_by

    capabilities = compute_capabilities()
    if not capabilities:
        raise TensorRTError("there is no GPU that the CUDA driver reports")
    sm = capabilities[0]
    if sm not in SMS:
        raise TensorRTError(f"this GPU is SM {sm}, and kernels are made for SM {', '.join(map(str, SMS))}")
    loaded = load("auto")
    if reason := unbuildable_by(loaded, [sm]):
        raise TensorRTError(f"{PRODUCTS[loaded.flavor]} {loaded.version} does not run on this GPU: {reason}")
    return Machine(sm, loaded.flavor, loaded.version)


def ask() -> Machine | str:
    """`machine` in a process of its own, since TensorRT may end it; or why there is none."""
    command = [sys.executable, __file__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)  # noqa: S603
        said = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return f"TensorRT was not loaded after {SECONDS} seconds"
    except (ValueError, IndexError):
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        return f"the process that loads TensorRT ended with {how}: {''.join(last)[:300]}"
    return Machine(**said["machine"]) if said["machine"] else str(said["problem"])


def add_engine(
    folder: Path, where: Machine, profiles: Sequence[Profile], expert_weights: Literal["engine", "external"]
) -> Artifact:
    """Build the engine of the artifact in `folder` beside its graph, and what draws tokens of its logits.

    The manifest on disk stays as it is; that of the result has the engine.

    Raises:
        LynxError: whatever TensorRT or the kernels' compiler say.
    """
    from lynx_trt.tensorrt.build import build_engine
    from lynx_trt.tensorrt.kernels import write_draws

    artifact = read(folder)
    report = build_engine(
        folder / ONNX,
        folder / ENGINE,
        profiles,
        flavor=where.flavor,
        expert_weights=expert_weights,
        sms=[where.sm],
    )
    write_draws(folder / DRAWS, artifact.manifest.model.vocabulary, [where.sm], lambda _: None)
    return Artifact(folder, artifact.manifest.model_copy(update={"engine": engine_record(report)}))


def add_planned_engine(folder: Path, where: Machine) -> Artifact:
    """`add_engine` with the ranges and the place of the experts that the artifact was exported with."""
    options = read(folder).manifest.build["options"]
    ranges = {name: Range.parse(options[name]) for name in ("decode_batch", "prefill_batch", "prefill_length")}
    return add_engine(folder, where, decode_and_prefill(inputs_of(folder), **ranges), options["expert_weights"])


def inputs_of(folder: Path) -> dict[str, tuple[int | str, ...]]:
    """The inputs of an artifact's graph."""
    from lynx_trt.tensorrt.prepare import input_dims
    from lynx_trt.tensorrt.prepare import read as read_onnx

    return dict(input_dims(read_onnx(folder / ONNX)))


def main() -> None:
    """One line of JSON: the machine, or why it won't do."""
    try:
        said = {"machine": asdict(machine()), "problem": None}
    except LynxError as error:
        said = {"machine": None, "problem": str(error)}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
