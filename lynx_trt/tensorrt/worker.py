"""The child process that runs TensorRT: `python -m lynx_trt.tensorrt.worker FD`, started by `build.py` only.

A process of its own because TensorRT can abort, because its memory can then be measured and is given back whole,
and because a build can't be interrupted from inside. The request is one line of JSON on standard input; the answers
are lines of JSON on the file descriptor FD:

    {"event": "progress", "phase": str, "fraction": 0..1, "rss": bytes}     twice a second at least
    {"event": "message", "severity": "warning" | "error", "text": str}
    {"event": "done", "report": {...}}          the plan is in request["partial"]
    {"event": "error", "usage": bool, "text": str}     a sentence for the user

With request["partial"] null nothing is built: the report is {"layers": [...]}, what the kernels are to be made for.

Standard input stays open as a lifeline: when the parent is gone, however it went, the worker ends too.
"""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from lynx_trt.errors import LynxError, TensorRTError, UsageError
from lynx_trt.export.ops import EXPERTS, SELECT
from lynx_trt.memory import resident_bytes
from lynx_trt.plugins.contract import CONTRACTS

_HEARTBEAT_SECONDS = 0.5
_PROGRESS_SECONDS = 0.1

# Warnings about what is meant: token ids and lengths are int64, and not every node carries kernels.
_NOISE = ("has Int64 binding", "Attribute kernels")


def main() -> int:
    """Do one build; 0 if the plan is written, 1 if an error event was sent."""
    # Ctrl-C reaches the whole process group. The parent decides: it ends the worker with a signal that works while
    # TensorRT is busy.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = _Channel(int(sys.argv[1]))
    request = json.loads(sys.stdin.readline())
    partial = Path(request["partial"]) if request["partial"] else None
    threading.Thread(target=_watch_parent, args=(channel, partial), daemon=True).start()
    try:
        channel.send(event="done", report=_build(request, channel))
    except LynxError as error:
        channel.send(event="error", usage=isinstance(error, UsageError), text=str(error))
        return 1
    return 0


class _Channel:
    """Lines of JSON to the parent, from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self._lock = threading.Lock()
        self._phase = "Starting"
        self._fraction = 0.0
        self._sent = 0.0
        self._messages: set[str] = set()

    def send(self, **event: Any) -> None:
        with self._lock:
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()

    def progress(self, phase: str | None = None, fraction: float = 0.0, *, now: bool = True) -> None:
        """Report the phase (None: the one before) and the share done, which never falls. `now`: don't throttle."""
        self._phase = phase or self._phase
        self._fraction = max(self._fraction, fraction)
        moment = time.monotonic()
        if now or moment - self._sent >= _PROGRESS_SECONDS:
            self._sent = moment
            self.send(event="progress", phase=self._phase, fraction=round(self._fraction, 4), rss=resident_bytes("now"))

    def message(self, severity: str, text: str) -> None:
        """Pass a line of TensorRT's log on, the first time it comes."""
        text = " ".join(text.split())
        if text not in self._messages and not any(noise in text for noise in _NOISE):
            self._messages.add(text)
            self.send(event="message", severity=severity, text=text)


def _watch_parent(channel: _Channel, partial: Path | None) -> None:
    """Send a sign of life twice a second; when the parent is gone and our standard input ends, end without a trace."""
    while not select.select([sys.stdin], [], [], _HEARTBEAT_SECONDS)[0]:
        channel.progress()
    if partial:
        partial.unlink(missing_ok=True)
    os._exit(1)


def _build(request: dict[str, Any], channel: _Channel) -> dict[str, Any]:
    """Prepare, parse, and build and write unless only the layers are asked for; return what only the worker knows."""
    from dataclasses import asdict

    from lynx_trt.plugins import python_plugin
    from lynx_trt.tensorrt import loader
    from lynx_trt.tensorrt.prepare import hand_over, plugin_attributes, prepare

    onnx_path = Path(request["onnx"])
    channel.progress("Reading the graph")
    kernels = Path(request["kernels"]).read_bytes() if request["kernels"] else b""
    prepared = prepare(onnx_path, expert_weights=request["expert_weights"], kernels=kernels)
    plugins, external, model = prepared.plugins, prepared.external, prepared.model
    channel.progress("Loading TensorRT")
    loaded = loader.load(request["flavor"])
    if reason := loader.unbuildable_by(loaded, request["sms"]):
        raise TensorRTError(f"this engine could not run: {reason}")
    python_plugin.register(loaded.module)
    builder = _Builder(loaded.module, channel)
    channel.progress("Parsing")
    builder.parse(model.SerializeToString(), onnx_path)
    layers = builder.count_plugins(plugins)
    described = builder.describe_plugins(plugin_attributes(model))
    # Only now are all shapes known. The graph is parsed again where that changes it.
    if hand_over(model, {layer["name"]: layer["shapes"] for layer in described}):
        builder.parse(model.SerializeToString(), onnx_path)
        layers = builder.count_plugins(plugins)
        described = builder.describe_plugins(plugin_attributes(model))
    if request["partial"] is None:
        return {"layers": described}
    del prepared, model  # with the copy of the weights, if they lie inside the file
    builder.configure(request["profiles"], request["workspace_bytes"])
    if request["user_memory"] and loaded.flavor == "rtx":
        builder.leave_memory_to_user()
    size = builder.build(Path(request["partial"]))
    return {
        "flavor": loaded.flavor,
        "version": loaded.version,
        "origin": loaded.origin,
        "peak_bytes": resident_bytes("peak"),
        "plan_bytes": size,
        "plugin_layers": layers,
        "io": builder.io(),
        "external": [asdict(item) for item in external],
    }


class _Builder:
    """TensorRT's objects of one build, and what its log said."""

    def __init__(self, trt: Any, channel: _Channel) -> None:
        self.trt = trt
        self.channel = channel
        self.errors: list[str] = []
        self.logger = _make_logger(trt, self)
        self.builder = trt.Builder(self.logger)
        if not self.builder:
            raise TensorRTError(f"TensorRT makes no builder: {self._reasons()}")
        self.config = self.builder.create_builder_config()
        self.network: Any = None
        self.parser: Any = None

    def parse(self, data: bytes, onnx_path: Path) -> None:
        """Make the network, anew if there is one; external data is found relative to the path."""
        from lynx_trt.plugins.python_plugin import take_refusals

        self.parser = None  # before the network that it refers to
        # The default since TensorRT 11, and all there is in TensorRT for RTX; 10 has to be asked for it.
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self.network = self.builder.create_network(0 if flag is None else 1 << int(flag))
        parser = self.trt.OnnxParser(self.network, self.logger)
        override = getattr(self.trt.OnnxParserFlag, "ENABLE_PLUGIN_OVERRIDE", None)
        if override is not None:
            parser.set_flag(override)
        if not parser.parse(data, str(onnx_path)):
            # What our plugins say is why the parser says that it could not create them.
            errors = take_refusals() or [_parser_error(parser.get_error(n)) for n in range(parser.num_errors)]
            lines = "".join(f"\n  {line}" for line in dict.fromkeys(errors or [self._reasons()]))
            raise TensorRTError(f"TensorRT can't read {onnx_path}:{lines}")
        self.parser = parser  # it owns the weights that the network refers to

    def count_plugins(self, expected: dict[str, str]) -> dict[str, int]:
        """Number of plugin layers of each op; `expected` is (node name -> op). A node that is none is an error.

        The two ops of a MoE block are always named, those that keep states where there are some.
        """
        layers = (self.network.get_layer(number) for number in range(self.network.num_layers))
        found = {layer.name for layer in layers if layer.type == self.trt.LayerType.PLUGIN_V3}
        missing = [f"{name} ({op})" for name, op in expected.items() if name not in found]
        if missing:
            raise TensorRTError(
                f"{len(missing)} of {len(expected)} lynx nodes did not become plugin layers: {', '.join(missing[:8])}"
                f"{', ...' if len(missing) > 8 else ''}. This is a defect of lynx-trt or a TensorRT it does not know"
            )
        counts = Counter(expected.values())
        return {op: counts[op] for op in CONTRACTS if counts[op] or op in (SELECT, EXPERTS)}

    def describe_plugins(self, attributes: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Op, attributes, and the shapes of all inputs and type of the first, of each plugin layer."""
        from lynx_trt.plugins.python_plugin import type_name

        layers = (self.network.get_layer(number) for number in range(self.network.num_layers))
        found = []
        for layer in layers:
            if layer.type == self.trt.LayerType.PLUGIN_V3 and layer.name in attributes:
                inputs = [layer.get_input(number) for number in range(layer.num_inputs)]
                shapes = [list(tensor.shape) for tensor in inputs]
                first = type_name(self.trt, inputs[0].dtype)
                found.append({"name": layer.name, **attributes[layer.name], "shapes": shapes, "type": first})
        return found

    def configure(self, profiles: list[dict[str, Any]], workspace_bytes: int | None) -> None:
        """Add the optimization profiles, in order, and the limits."""
        self.config.progress_monitor = self._monitor = _make_monitor(self.trt, self.channel)
        if workspace_bytes is not None:
            self.config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, workspace_bytes)
        for number, profile in enumerate(profiles):
            shapes = self.builder.create_optimization_profile()
            for name, (smallest, best, largest) in profile["shapes"].items():
                shapes.set_shape(name, smallest, best, largest)
            if self.config.add_optimization_profile(shapes) != number:
                raise TensorRTError(f"TensorRT refuses the profile {profile['name']}: {self._reasons()}")

    def leave_memory_to_user(self) -> None:
        """Forbid TensorRT for RTX to allocate while a step runs, which a CUDA graph can't hold (from its 1.2 on)."""
        flag = getattr(self.trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
        if flag is not None:
            self.config.set_flag(flag)

    def build(self, partial: Path) -> int:
        """Build and write the plan; return its size in bytes.

        It is written while it is made, which saves one copy of it in memory, where TensorRT can.
        """
        self.channel.progress("Building engine")
        try:
            with partial.open("wb") as file:
                streams = hasattr(self.builder, "build_serialized_network_to_stream")
                size = self._stream(file) if streams else self._serialize(file)
                self.channel.progress("Writing the plan", 1.0)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            partial.unlink(missing_ok=True)
            # The folder is not named: it may be one written aside, which is gone when this is read.
            free = f" ({_free(partial.parent) / 1e9:.1f} GB are free)" if error.errno == errno.ENOSPC else ""
            raise TensorRTError(
                f"can't write the engine: {error.strerror}{free}; make room, or choose another disk for the output"
            ) from error
        return size

    def _serialize(self, file: Any) -> int:
        plan = self.builder.build_serialized_network(self.network, self.config)
        if plan is None:
            raise TensorRTError(f"TensorRT could not build the engine: {self._reasons()}")
        return int(file.write(memoryview(plan)))

    def _stream(self, file: Any) -> int:
        writer = _make_writer(self.trt, file)
        done = self.builder.build_serialized_network_to_stream(self.network, self.config, writer)
        if writer.error is not None:
            raise writer.error
        if not done:
            raise TensorRTError(f"TensorRT could not build the engine: {self._reasons()}")
        return int(writer.size)

    def io(self) -> list[dict[str, Any]]:
        """Inputs, then outputs, as the engine has them; -1 is a dynamic dimension."""
        from lynx_trt.plugins.python_plugin import type_name

        network = self.network
        inputs = [("input", network.get_input(number)) for number in range(network.num_inputs)]
        outputs = [("output", network.get_output(number)) for number in range(network.num_outputs)]
        return [
            {"name": t.name, "mode": mode, "dtype": type_name(self.trt, t.dtype), "shape": list(t.shape)}
            for mode, t in (*inputs, *outputs)
        ]

    def _reasons(self) -> str:
        from lynx_trt.plugins.python_plugin import take_refusals

        hint = ". Raise or drop the workspace limit" if "workspace" in " ".join(self.errors) else ""
        return ("; ".join([*take_refusals(), *self.errors[-3:]]) or "it gave no reason") + hint


def _make_logger(trt: Any, builder: _Builder) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity == trt.ILogger.Severity.WARNING:
                builder.channel.message("warning", text)
            elif severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                builder.errors.append(" ".join(text.split()))
                builder.channel.message("error", text)

    return Logger()


def _make_monitor(trt: Any, channel: _Channel) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Phases nest: the share done is that of the outermost, refined by those inside its current step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.open: list[list[Any]] = []  # [name, steps, steps done], outermost first

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.open.append([name, max(steps, 1), 0])
            self._report()

        def step_complete(self, name: str, step: int) -> bool:
            for phase in self.open:
                if phase[0] == name:
                    phase[2] = min(step + 1, phase[1])
            self._report()
            return True  # go on

        def phase_finish(self, name: str) -> None:
            for number in reversed(range(len(self.open))):
                if self.open[number][0] == name:
                    del self.open[number]
                    break

        def _report(self) -> None:
            fraction, weight = 0.0, 1.0
            for _, steps, done in self.open:
                fraction += weight * done / steps
                weight /= steps
            channel.progress(self.open[0][0] if self.open else None, min(fraction, 0.99), now=False)

    return Monitor()


def _make_writer(trt: Any, file: Any) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Writes the plan as it comes. An exception can't pass through TensorRT, so it is kept for afterwards."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.size = 0
            self.error: OSError | None = None

        def write(self, data: Any) -> int:
            try:
                count = int(file.write(data))
            except OSError as error:
                self.error = error
                return 0
            self.size += count
            return count

    return Writer()


def _parser_error(error: Any) -> str:
    """The node, if the error is about one, and what TensorRT says."""
    op = error.node_operator()
    what = " ".join(error.desc().split()).removeprefix("Assertion failed: ")
    if "Plugin not found" in what:
        what = "TensorRT has no such op, and no plugin of that name is registered"
    return f"node {error.node_name() or error.node()} ({op}): {what}" if op else what


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


if __name__ == "__main__":
    sys.exit(main())
