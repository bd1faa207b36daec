"""Building a TensorRT engine from a lynx ONNX file, in a child process.

TensorRT runs in `worker.py`, so that whatever it does to its process, an abort or running out of memory, is one
message here; so that its memory can be measured; and so that Ctrl-C ends it at once. The plan is written aside and
renamed when it is whole: at `plan_path` there is the new plan or what was there before, never a part of one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from lynx_trt.errors import LynxError, TensorRTError, UsageError
from lynx_trt.tensorrt import profiles as _profiles
from lynx_trt.tensorrt.loader import Flavor, parser_environment
from lynx_trt.tensorrt.prepare import ExpertWeights, ExternalInput, input_dims, read
from lynx_trt.tensorrt.profiles import Profile

KERNELS_PHASE = "Compiling GPU kernels"


@dataclass(frozen=True)
class Progress:
    """Where a build is: TensorRT's name of the phase, the share done (0 to 1), resident memory of the child."""

    phase: str
    fraction: float
    rss_bytes: int


@dataclass(frozen=True)
class Message:
    """One line of TensorRT's log."""

    severity: Literal["warning", "error"]
    text: str


@dataclass(frozen=True)
class IOTensor:
    """An input or output of the engine; a dimension of -1 is dynamic. `dtype` is NumPy's name, or "bfloat16"."""

    name: str
    mode: Literal["input", "output"]
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EngineReport:
    """What was built, with what, and what it cost.

    `peak_bytes` is the largest resident memory of the build process; it includes the pages of the weight files that
    TensorRT has mapped, which the system can take back. `plugin_layers` maps each op to its number of layers.
    `profiles` are in the engine's order. `external` are the expert weights to bind at run time, empty if they are
    in the engine. `messages` are TensorRT's warnings, and errors that it got over, each once.
    """

    flavor: Literal["full", "rtx"]
    version: str
    origin: str
    seconds: float
    peak_bytes: int
    plan_bytes: int
    plugin_layers: dict[str, int]
    io: tuple[IOTensor, ...]
    profiles: tuple[Profile, ...]
    messages: tuple[Message, ...]
    external: tuple[ExternalInput, ...]
    kernels: KernelsReport


@dataclass(frozen=True)
class KernelsReport:
    """The GPU kernels in an engine: SMs, how many cubins, bytes of all (stored once a profile), seconds to compile."""

    sms: tuple[int, ...] = ()
    cubins: int = 0
    bytes: int = 0
    seconds: float = 0.0


def build_engine(
    onnx_path: str | os.PathLike[str],
    plan_path: str | os.PathLike[str],
    profiles: Sequence[Profile],
    *,
    flavor: Flavor = "auto",
    expert_weights: ExpertWeights = "engine",
    workspace_bytes: int | None = None,
    sms: Sequence[int] = (),
    user_memory: bool = True,
    on_progress: Callable[[Progress], object] | None = None,
    on_message: Callable[[Message], object] | None = None,
) -> EngineReport:
    """Build an engine from a lynx ONNX file and write it to `plan_path`, replacing what is there.

    `sms` are the GPUs whose kernels it is to carry (90 for an H100); an engine without any can't run, and one for a GPU
    that this TensorRT's engines don't run on is refused (`gpu.unbuildable`).

    `expert_weights="external"` leaves the expert weights out; the report says what to bind instead.
    `workspace_bytes` limits the scratch memory of a layer on the GPU (None: TensorRT's default, all of it).
    `user_memory`: the engine runs in the memory that its context is given, and in no other, as a CUDA graph needs it.
    Of TensorRT for RTX such an engine makes contexts of `kUSER_MANAGED` memory only; full TensorRT is so by itself.
    `on_progress` is called twice a second at least, `on_message` for each warning; both run in this thread, and
    what they raise ends the build.

    Memory: about three times the weights that go into the engine, plus 0.2 GB.

    Raises UsageError (profiles that don't fit the graph, an unknown option) and TensorRTError (no TensorRT, a GPU that
    it doesn't run on, files that can't be read or written, a graph that TensorRT refuses, a crash of TensorRT).
    """
    onnx_path, plan_path = Path(onnx_path).absolute(), Path(plan_path).absolute()
    _check_options(expert_weights, workspace_bytes)
    _profiles.check(profiles, input_dims(read(onnx_path)))
    _check_writable(plan_path)
    partial = plan_path.with_name(f"{plan_path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    request = {
        "onnx": str(onnx_path),
        "partial": str(partial),
        "flavor": flavor,
        "expert_weights": expert_weights,
        "workspace_bytes": workspace_bytes,
        "profiles": [asdict(profile) for profile in profiles],
        "sms": list(sms),
        "user_memory": user_memory,
        "kernels": None,
    }
    started = time.perf_counter()
    blob = partial.with_name(f"{partial.name}.kernels")
    try:
        kernels = KernelsReport()
        if sms:
            kernels = _make_kernels(request, blob, profiles, sms, on_progress)
            request["kernels"] = str(blob)
        report, messages = _run(request, on_progress, on_message)
        partial.replace(plan_path)
    except OSError as error:
        raise TensorRTError(f"can't write the engine {plan_path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
    return EngineReport(
        flavor=report["flavor"],
        version=report["version"],
        origin=report["origin"],
        seconds=time.perf_counter() - started,
        peak_bytes=report["peak_bytes"],
        plan_bytes=report["plan_bytes"],
        plugin_layers=report["plugin_layers"],
        io=tuple(IOTensor(**{**item, "shape": tuple(item["shape"])}) for item in report["io"]),
        profiles=tuple(profiles),
        messages=tuple(messages),
        external=tuple(ExternalInput(**{**item, "shape": tuple(item["shape"])}) for item in report["external"]),
        kernels=kernels,
    )


def _make_kernels(
    request: dict[str, Any],
    blob: Path,
    profiles: Sequence[Profile],
    sms: Sequence[int],
    on_progress: Callable[[Progress], object] | None,
) -> KernelsReport:
    """Compile what the graph's layers need, as TensorRT sees them, and write it to the file `blob`."""
    from lynx_trt.plugins.aot import compile_for
    from lynx_trt.tensorrt.kernels import ops_of

    # TensorRT infers the shapes, so a first child only parses. Its weights stay out: they are not looked at.
    described, _ = _run({**request, "partial": None}, None, None)
    started = time.perf_counter()

    def tell(fraction: float) -> None:
        if on_progress:
            on_progress(Progress(KERNELS_PHASE, fraction, 0))

    tell(0.0)
    kernels = compile_for(ops_of(described["layers"], profiles), sms, progress=tell)
    blob.write_bytes(data := kernels.to_bytes())
    return KernelsReport(kernels.sms, len(kernels.cubins), len(data), time.perf_counter() - started)


def _check_options(expert_weights: str, workspace_bytes: int | None) -> None:
    if expert_weights not in ("engine", "external"):
        raise UsageError(f"unknown place for the expert weights {expert_weights!r}: choose engine or external")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise UsageError(f"the workspace limit is {workspace_bytes} bytes; it must be at least 1")


def _check_writable(plan_path: Path) -> None:
    """Find out before the build, not after it."""
    if plan_path.is_dir():
        raise TensorRTError(f"can't write the engine {plan_path}: it is a folder; name a file")
    if not plan_path.parent.is_dir():
        raise TensorRTError(f"can't write the engine {plan_path}: the folder {plan_path.parent} does not exist")
    if not os.access(plan_path.parent, os.W_OK | os.X_OK):
        raise TensorRTError(f"can't write the engine {plan_path}: no permission to write in {plan_path.parent}")


class _State:
    """What the child has told so far."""

    def __init__(self) -> None:
        self.phase = "Starting"
        self.peak = 0
        self.messages: list[Message] = []
        self.report: dict[str, Any] | None = None
        self.error: LynxError | None = None


def _run(
    request: dict[str, Any],
    on_progress: Callable[[Progress], object] | None,
    on_message: Callable[[Message], object] | None,
) -> tuple[dict[str, Any], list[Message]]:
    """Run the child to its end; return its report and TensorRT's messages. Raises TensorRTError."""
    state = _State()
    with tempfile.TemporaryFile() as output:
        with _child(request, output) as (process, events):
            for line in events:
                _take(json.loads(line), state, on_progress, on_message)
            code = process.wait()
        if state.error is not None:
            raise state.error
        if state.report is None or code != 0:
            output.seek(0)
            text = output.read().decode(errors="replace")
            if code > 0 and "Traceback" in text:  # a defect of ours, which keeps its traceback
                raise RuntimeError(f"the build process failed:\n{text}")
            raise TensorRTError(_death(code, state, text))
    return state.report, state.messages


@contextlib.contextmanager
def _child(request: dict[str, Any], output: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], IO[str]]]:
    """The worker and the lines it sends; dead and waited for at the end, whatever happens meanwhile."""
    receive, send = os.pipe()
    with os.fdopen(receive, encoding="utf-8") as events, parser_environment() as environment:
        try:
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "lynx_trt.tensorrt.worker", str(send)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(send,),
                env=environment,
            )
        finally:
            os.close(send)
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once: its exit code and output say why
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            yield process, events
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def _take(
    event: dict[str, Any],
    state: _State,
    on_progress: Callable[[Progress], object] | None,
    on_message: Callable[[Message], object] | None,
) -> None:
    kind = event["event"]
    if kind == "progress":
        state.phase = event["phase"]
        state.peak = max(state.peak, event["rss"])
        if on_progress:
            on_progress(Progress(event["phase"], event["fraction"], event["rss"]))
    elif kind == "message":
        message = Message(event["severity"], event["text"])
        state.messages.append(message)
        # Where an error ends the build it comes in the exception, where it doesn't in the report.
        if on_message and message.severity == "warning":
            on_message(message)
    elif kind == "done":
        state.report = event["report"]
    elif kind == "error":
        state.error = (UsageError if event["usage"] else TensorRTError)(event["text"])


def _death(code: int, state: _State, output: str) -> str:
    """One sentence on a child that ended without a result."""
    last = [message.text for message in state.messages[-1:]] + [line.strip() for line in output.splitlines()[-1:]]
    said = f"; its last words: {' | '.join(filter(None, last))}" if any(last) else ""
    during = f"in the phase '{state.phase}', using {state.peak / 1e9:.1f} GB of memory"
    if code >= 0:
        return f"the build process ended with exit code {code} {during}{said}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    advice = (
        ". If nobody killed it, the machine ran out of memory: keep the expert weights outside the engine "
        "(--expert-weights external), or build on a machine with memory of three times the weights"
        if -code == signal.SIGKILL
        else ". This is a crash inside TensorRT: try another version of it, or report it with the ONNX file"
    )
    return f"the build process was ended by {name} {during}{said}{advice}"
