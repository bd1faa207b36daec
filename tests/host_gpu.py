"""A GPU made of host memory, and a TensorRT whose engine is the artifact's graph in ONNX Runtime.

They stand in for the driver and the vendor's runtime where there is no GPU, and are strict where those are undefined:
an address outside an allocation, a stream never waited for, a context without scratch memory, a shape outside the
profile or a cache that is not bound in place is an error here. What runs is the real backend, on real numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from lynx_trt.artifact import Artifact
from lynx_trt.plugins.launcher import Device, Launch
from lynx_trt.runtime.backend import Array, Draws
from lynx_trt.runtime.draws import BEYOND
from lynx_trt.runtime.ort import ELEMENT
from lynx_trt.runtime.ort_graphs import WEIGHTS_FOLDER
from lynx_trt.runtime.sampling import draw

if TYPE_CHECKING:
    from lynx_trt.plugins.blob import Cubin

STREAM = 7
SM = 120  # one that TensorRT for RTX runs on: it builds the engines of the tests


class HostGpu:
    """`lynx_trt.runtime.cuda.Gpu` on host memory; work is queued and done at `synchronize`, in order."""

    def __init__(self, *, captures: bool = True) -> None:
        self.stream = STREAM
        self.captures = captures
        self.blocks: dict[int, Array] = {}
        self.queue: list[Callable[[], None]] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.launches = 0
        self.closed = False
        self.driver = HostDriver(self)
        self._kept: list[Array] = []

    def use(self) -> None:
        assert not self.closed

    def allocate(self, size: int, what: str) -> int:
        block = np.full(size + 256, 255, np.uint8)  # bytes of 255: floats that are no numbers
        address = -(-block.ctypes.data // 256) * 256
        self.blocks[address] = block[address - block.ctypes.data :][:size]
        self._kept.append(block)
        return address

    def pinned(self, size: int) -> Array:
        return np.full(size, 255, np.uint8)

    def view(self, address: int, size: int) -> Array:
        """Bytes of device memory, inside one allocation."""
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + block.size:
                return block[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address:#x} are in no allocation")

    def do(self, work: Callable[[], None]) -> None:
        """Queue work, or put it into the graph that is being captured."""
        (self.queue if self.capturing is None else self.capturing).append(work)

    def upload(self, target: int, source: Array) -> None:
        def work() -> None:
            self.view(target, source.nbytes)[:] = source.reshape(-1).view(np.uint8)

        self.do(work)

    def download(self, target: Array, source: int) -> None:
        def work() -> None:
            target.reshape(-1).view(np.uint8)[:] = self.view(source, target.nbytes)

        self.do(work)

    def copy_rows(self, target: int, source: int, width: int, pitch: int, rows: int) -> None:
        def work() -> None:
            for row in range(rows):
                self.view(target + row * pitch, width)[:] = self.view(source + row * pitch, width)

        self.do(work)

    def zero(self, target: int, size: int) -> None:
        def work() -> None:
            self.view(target, size)[:] = 0

        self.do(work)

    def synchronize(self) -> None:
        assert self.capturing is None, "waiting while capturing is an error of CUDA"
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def timed(self, work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started

    def capture(self, work: Callable[[], None]) -> object:
        from lynx_trt.plugins.cuda_driver import CudaError

        if not self.captures:
            raise CudaError("cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED (901)", "901")
        self.capturing = []
        try:
            work()
            return self.capturing
        finally:
            self.capturing = None

    def launch(self, graph: Any) -> None:
        self.launches += 1
        self.queue += graph

    def close(self) -> None:
        self.closed = True


class HostDriver:
    """`launcher.Driver`: knows the kernels that draw tokens, and does with NumPy what they do.

    It leaves to the host a nucleus that is not within a row's 64 likeliest tokens, where they know more of them.
    """

    def __init__(self, gpu: HostGpu) -> None:
        self.gpu = gpu
        self.vocabulary = 0
        self.sm = SM
        self.loaded: list[Cubin] = []
        self.drawn: list[str] = []  # what was launched

    def device(self) -> Device:
        return Device(self.sm, 132, context=1)

    def load(self, cubin: Cubin, device: Device) -> int:
        self.loaded.append(cubin)
        return len(self.loaded)

    def launch(self, launch: Launch, stream: int) -> None:
        assert stream == STREAM
        cubin = self.loaded[launch.function - 1]
        self.drawn.append(cubin.function)
        if cubin.function == "draw_kernel":
            words = list(launch.words)
            self.gpu.do(lambda: self._draw(words, launch.programs))

    def _draw(self, words: list[int], rows: int) -> None:
        logits, scale, top_p, top_k, uniform, *tables, token, count, _, _ = words
        assert count == rows
        # Without leading tokens there is no nucleus.
        nucleus = tables[2] != 0

        def floats(address: int, dtype: type[np.generic], each: int = 1) -> Array:
            return self.gpu.view(address, rows * each * np.dtype(dtype).itemsize).view(dtype)

        values = floats(logits, np.float32, self.vocabulary).reshape(rows, self.vocabulary)
        temperature = np.where(floats(scale, np.float32) > 0, 1 / np.maximum(floats(scale, np.float32), 1e-30), 0)
        draws = Draws(
            np.ones(rows, np.bool_),
            temperature.astype(np.float64),
            floats(top_p, np.float64) if nucleus else np.ones(rows),
            floats(top_k, np.int32) if nucleus else np.zeros(rows, np.int32),
            floats(uniform, np.float64),
            np.zeros(rows),
        )
        tokens = draw(values, draws)
        for row in np.flatnonzero((temperature > 0) & ((draws.top_p < 1) | (draws.top_k > 0))):
            chances = np.sort(np.exp((values[row] - values[row].max()) / temperature[row]))[::-1]
            small = 0 < draws.top_k[row] <= 64 or chances[:64].sum() >= draws.top_p[row] * chances.sum()
            tokens[row] = tokens[row] if small else BEYOND
        floats(token, np.int32)[:] = tokens


def tensorrt_for(
    artifact: Artifact,
    gpu: HostGpu,
    plan: bytes = b"plan",
    *,
    rtx: bool = False,
    engine: Callable[..., HostEngine] | None = None,
) -> Any:
    """What the backend uses of TensorRT's module, or that of TensorRT for RTX; it takes plans that begin so."""
    begin = plan
    gpu.driver.vocabulary = artifact.manifest.model.vocabulary

    class Logger:
        Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2)

        def __init__(self) -> None: ...

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: Any) -> Any:
            if bytes(plan[: len(begin)]) != begin:
                self.logger.log(1, "the engine\n is of another version")
                return None
            return (engine or HostEngine)(artifact, gpu, self.logger)

    more = {"DynamicShapesKernelSpecializationStrategy": SimpleNamespace(LAZY=0, EAGER=1)} if rtx else {}
    return SimpleNamespace(
        ILogger=Logger, Runtime=Runtime, ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2), **more
    )


class HostConfig:
    """IRuntimeConfig of TensorRT for RTX."""

    dynamic_shapes_kernel_specialization_strategy = 0
    allocation = 0

    def set_execution_context_allocation_strategy(self, strategy: int) -> None:
        self.allocation = strategy


class HostEngine:
    """ICudaEngine, as far as it is used."""

    device_memory_size_v2 = 4096

    def __init__(self, artifact: Artifact, gpu: HostGpu, logger: Any) -> None:
        assert artifact.manifest.engine is not None
        self.artifact, self.gpu, self.logger = artifact, gpu, logger
        self.external = {str(item["name"]): item for item in artifact.manifest.engine.external}
        self.session = _session(artifact, self.external)
        self.inputs = {each.name: each for each in self.session.get_inputs()}
        self.outputs = {each.name: each for each in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.profiles = [profile["shapes"] for profile in artifact.manifest.engine.profiles]
        self.contexts: list[HostContext] = []
        self.kernels: list[int] = []  # of each: 1 compiles a shape's before it runs

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, number: int) -> str:
        return self.names[number]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.inputs[name].shape)

    def create_runtime_config(self) -> HostConfig:
        return HostConfig()

    def create_execution_context(self, how: int | HostConfig) -> HostContext:
        assert (how.allocation if isinstance(how, HostConfig) else how) == 2
        self.contexts.append(HostContext(self))
        self.kernels.append(how.dynamic_shapes_kernel_specialization_strategy if isinstance(how, HostConfig) else 0)
        return self.contexts[-1]


class HostContext:
    """IExecutionContext, as far as it is used."""

    def __init__(self, engine: HostEngine) -> None:
        self.engine = engine
        self.profile: dict[str, Any] = {}
        self.scratch = (0, 0)
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        assert stream == STREAM
        self.profile = self.engine.profiles[number]
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.scratch = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.names
        assert address % 256 == 0, f"{name} lies at {address:#x}: TensorRT asks for multiples of 256"
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name in self.profile:
            least, _, most = self.profile[name]
            inside = all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
            if not inside:
                self.engine.logger.log(1, f"{name} {shape} is not within [{least}, {most}]")
                return False
        self.shapes[name] = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        self.engine.gpu.view(*self.scratch)
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.engine.gpu.do(lambda: self._execute(shapes, addresses))
        return True

    def _execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine = self.engine
        layers = len(engine.artifact.manifest.model.moe_layers)
        batch = shapes["input_ids"][0]
        shapes = {
            **shapes,
            "budgets": (layers,),
            "floors": (layers,),
            "active_experts": (layers,),
            "logits": (batch, engine.artifact.manifest.model.vocabulary),
        }
        binding = engine.session.io_binding()
        for name in engine.names:
            past = name.replace("present_", "past_")
            if past != name:
                assert addresses[name] == addresses[past], "a cache is to be updated in place"
            shape = engine.external[name]["shape"] if name in engine.external else shapes[past]
            dtype = self._dtype(name)
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            engine.gpu.view(addresses[name], size)  # it is all there
            bind = binding.bind_input if name in engine.inputs else binding.bind_output
            bind(name, "cpu", 0, dtype, list(shape), addresses[name])
        engine.session.run_with_iobinding(binding)

    def _dtype(self, name: str) -> Any:
        states = {state.name: state.precision for state in self.engine.artifact.manifest.model.states}
        if (state := name.removeprefix("past_").removeprefix("present_")) in states:
            return ELEMENT[states[state]]
        if name.startswith(("past_key", "present_")):
            return ELEMENT[self.engine.artifact.manifest.model.precision]
        if name in self.engine.external:
            return np.dtype(self.engine.external[name]["dtype"])
        fixed = {"logits": np.float32, "active_experts": np.int32, "budgets": np.int32, "floors": np.float32}
        return fixed.get(name, np.int64)


def _session(artifact: Artifact, external: dict[str, dict[str, Any]]) -> Any:
    """The artifact's graph; weights that are outside the engine are inputs of the types and shapes that it records."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry(WEIGHTS_FOLDER, str(artifact.folder))
    model = onnx.load(artifact.path("model.onnx"), load_external_data=False)
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in external]
    outside = {tensor.name for tensor in model.graph.initializer} & external.keys()
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for name in outside:
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(external[name]["dtype"]))
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, external[name]["shape"]))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
